"""Deliver rows of an outbox to the fleet's database, in one transaction, once.

Facts and states have keys of their own, so inserting them twice changes nothing. Amounts do not:
they count because their shipment does. A shipment begins where the one before it ended, and one
process at a time sends under a sender's name. So whoever sends again what the fleet has already,
also cut otherwise, is told how far the fleet is, and nothing is written.

Invariant: each row of a sender's outbox is in the fleet's sums once, or not yet.
"""

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy import Table, select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.fleet.changes import FACTS, STATES, SUMS, RowTuple, TableRows, unpacked
from vllm_cost_meter.ledger.fleet.cleaning import cleaned
from vllm_cost_meter.ledger.fleet.inserting import insert_new
from vllm_cost_meter.ledger.fleet.schema import (
    SENT_SUMS,
    TOLD,
    now_text,
    retired_senders,
    run_senders,
    sender_ends,
    senders,
    shared_runs,
    shipments,
)
from vllm_cost_meter.ledger.fleet.tidying import lock_sender
from vllm_cost_meter.ledger.rollups.bill_sums import BillSums
from vllm_cost_meter.units.time import rfc3339

# A ledger that joins for the first time brings these too: which rows it had dropped before.
OF_FIRST_JOINING = (
    *(schema.row_cutoffs, schema.dropped_bills, schema.dropped_hours),
    *(schema.dropped_latencies, schema.dropped_unknown_energy),
)
FACT_TABLES = {table.name: table for table in (*FACTS, *OF_FIRST_JOINING)}
_STATES = {table.name: table for table in STATES}
_SUMS = {table.name: table for table in SUMS}

# "join": a number of our own among PostgreSQL's locks.
_JOINING_LOCK = 0x6A6F696E


class Reached(NamedTuple):
    """How far the fleet has a sender's outbox: the last row's number, and its content's digest."""

    last_number: int
    last_digest: str


# Rows of an outbox are numbered from 1 on.
NOTHING = Reached(-1, "")


class Shipment(NamedTuple):
    """Rows of an outbox that are sent together."""

    sender_id: str
    first_number: int
    last_number: int
    last_digest: str
    interval_s: float
    tables: Sequence[TableRows]


class Joining(NamedTuple):
    """A ledger that the fleet gets as a whole, and the names under which it sent before."""

    host: str
    meter_version: str
    retires: Sequence[str]


def for_postgresql(tables: Iterable[TableRows]) -> list[TableRows]:
    """Return rows in a form that PostgreSQL takes, whatever texts SQLite has taken."""
    return list(cleaned(tables, {**FACT_TABLES, **_STATES, **_SUMS}))


def digest_of(content: bytes) -> str:
    """Return the digest by which a row of an outbox is known again."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def shipment_of(sender_id: str, rows: Sequence[tuple[int, bytes]], interval_s: float) -> Shipment:
    """Return rows of an outbox, numbered without a gap, as one shipment."""
    tables = [each for _, content in rows for each in unpacked(content)]
    (first, _), (last, content) = rows[0], rows[-1]
    return Shipment(sender_id, first, last, digest_of(content), interval_s, merged(tables))


def merged(tables: Iterable[TableRows]) -> list[TableRows]:
    """Return lists of rows by table: facts once each, the latest states, and amounts added up.

    Rows of one table that an older version of the ledger put in may lack columns.
    """
    facts: dict[tuple[str, tuple[str, ...]], list[RowTuple]] = {}
    others: dict[str, list[dict[str, Any]]] = {}
    for name, columns, rows in tables:
        if name in FACT_TABLES:
            facts.setdefault((name, columns), []).extend(rows)
        else:
            found = others.setdefault(name, [])
            found.extend(dict(zip(columns, row, strict=True)) for row in rows)
    once = [
        TableRows(name, columns, _each_once(FACT_TABLES[name], columns, rows))
        for (name, columns), rows in facts.items()
    ]
    by_name = {
        name: _latest(_STATES[name], rows) if name in _STATES else _added_up(_SUMS[name], rows)
        for name, rows in others.items()
    }
    others_rows = [_rows_of(name, rows) for name, rows in by_name.items() if rows]
    return [*_without_billed(once), *others_rows]


def _without_billed(tables: Sequence[TableRows]) -> list[TableRows]:
    """Return facts without the open requests that have their bill among them.

    They are known by the ledger's own rule (`is_billed`).
    """
    bills = _billed_in(tables)
    if not bills:
        return list(tables)
    return [
        _still_open(table, bills) if table.table == schema.open_requests.name else table
        for table in tables
    ]


def _billed_in(tables: Iterable[TableRows]) -> dict[str, list[tuple[int, int]]]:
    """Return when the requests that have a bill in these rows began and ended, by internal id."""
    found: dict[str, list[tuple[int, int]]] = {}
    for name, columns, rows in tables:
        if name == schema.requests.name:
            values = itemgetter(*map(columns.index, ("request_id", "started_at", "finished_at")))
            for request_id, started_us, finished_us in map(values, rows):
                found.setdefault(request_id, []).append((started_us, finished_us))
    return found


def _still_open(opened: TableRows, bills: Mapping[str, Sequence[tuple[int, int]]]) -> TableRows:
    at, began = opened.columns.index("request_id"), opened.columns.index("started_at")
    rows = [
        row
        for row in opened.rows
        if not any(
            started_us == row[began] or finished_us >= row[began]
            for started_us, finished_us in bills.get(row[at], ())
        )
    ]
    return opened._replace(rows=rows)


def _rows_of(name: str, rows: Sequence[dict[str, Any]]) -> TableRows:
    columns = max(rows, key=len)
    missing = 0 if name in _SUMS else None
    return TableRows(
        name, tuple(columns), [tuple(row.get(one, missing) for one in columns) for row in rows]
    )


def _keys(table: Table) -> list[str]:
    return [column.name for column in table.primary_key]


def _each_once(table: Table, columns: Sequence[str], rows: Sequence[RowTuple]) -> list[RowTuple]:
    key = itemgetter(*(columns.index(name) for name in _keys(table)))
    return list({key(row): row for row in reversed(rows)}.values())[::-1]


def _latest(table: Table, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[RowTuple, dict[str, Any]] = {}
    keys = _keys(table)
    for row in rows:
        key = tuple(row[key] for key in keys)
        if key not in found or found[key]["number"] < row["number"]:
            found[key] = row
    return list(found.values())


def _added_up(table: Table, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[RowTuple, dict[str, Any]] = {}
    keys = _keys(table)
    for row in rows:
        key = tuple(row[key] for key in keys)
        known = found.get(key)
        if known is None:
            found[key] = row
        elif table is schema.bill_sums:
            found[key] = BillSums(**known).with_more(BillSums(**row))._asdict()
        else:
            amounts = dict.fromkeys((*known, *row), 0) | known
            found[key] = {
                name: value if name in keys else value + row.get(name, 0)
                for name, value in amounts.items()
            }
    return list(found.values())


def reached(connection: Connection, sender_id: str) -> Reached | None:
    """Return how far the fleet has a sender's outbox; None if it has nothing of it."""
    c = shipments.c
    row = connection.execute(
        select(c.last_number, c.last_digest)
        .where(c.sender_id == sender_id)
        .order_by(c.first_number.desc())
        .limit(1)
    ).first()
    return None if row is None else Reached._make(row)


def deliver(connection: Connection, shipment: Shipment) -> Reached | None:
    """Insert a shipment within the connection's transaction.

    Returns how far the fleet is where the shipment does not begin right after that: the fleet has
    it already, or lacks what comes before. None if it was inserted.
    """
    lock_sender(connection, shipment.sender_id)
    have = reached(connection, shipment.sender_id) or NOTHING
    if have.last_number + 1 != shipment.first_number:
        return have
    _begin(connection, shipment)
    insert_tables(connection, shipment, shipment.tables)
    return None


def deliver_all(
    connection: Connection, shipment: Shipment, joining: Joining, tables: Iterable[TableRows]
) -> Reached | None:
    """Insert all that a ledger holds, within the connection's transaction; it counts from now on.

    `tables` may name a table many times, and its rows each once. Returns as `deliver` does.
    """
    # One after the other, so that each sees which runs of its own the fleet has from others.
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _JOINING_LOCK})
    lock_sender(connection, shipment.sender_id)
    if (have := reached(connection, shipment.sender_id)) is not None:
        return have
    _begin(connection, shipment)
    _join(connection, shipment.sender_id, joining)
    for each in tables:
        insert_tables(connection, shipment, [each])
    _share_runs(connection, shipment.sender_id)
    return None


def insert_facts(connection: Connection, tables: Iterable[TableRows]) -> None:
    """Insert facts within the connection's transaction; those that are there stay."""
    for name, columns, rows in tables:
        insert_new(connection, FACT_TABLES[name], columns, rows)


def insert_tables(connection: Connection, shipment: Shipment, tables: Iterable[TableRows]) -> None:
    """Insert rows of a shipment that has begun."""
    sender_id = shipment.sender_id
    for name, columns, rows in tables:
        if name in _SUMS:
            number = shipment.first_number
            sent = SENT_SUMS[name]
            insert_new(connection, sent, columns, rows, sender_id=sender_id, first_number=number)
        else:
            table = TOLD[name] if name in TOLD else FACT_TABLES[name]
            insert_new(connection, table, columns, rows)
        if name == schema.runs.name:
            at = columns.index("run_id")
            told = [(row[at],) for row in rows]
            insert_new(connection, run_senders, ["run_id"], told, sender_id=sender_id)


def _begin(connection: Connection, shipment: Shipment) -> None:
    """Insert the row of a shipment. Fails if there is one that begins there."""
    row = {
        "sender_id": shipment.sender_id,
        "first_number": shipment.first_number,
        "last_number": shipment.last_number,
        "last_digest": shipment.last_digest,
        "sent_at": rfc3339(time.time_ns()),
        "received_at": now_text(),
        "interval_s": shipment.interval_s,
    }
    connection.execute(shipments.insert().values(row))


def _join(connection: Connection, sender_id: str, joining: Joining) -> None:
    now = rfc3339(time.time_ns())
    about = {"host": joining.host, "meter_version": joining.meter_version, "joined_at": now}
    _insert_one(connection, senders, {"sender_id": sender_id, **about})
    retired = [(name,) for name in joining.retires]
    insert_new(
        connection,
        retired_senders,
        ["sender_id"],
        retired,
        successor_id=sender_id,
        retired_at=now,
    )


def _share_runs(connection: Connection, sender_id: str) -> None:
    """Note which runs of a sender the fleet has from others too."""
    sent = SENT_SUMS[schema.bill_sums.name]
    own, other = sent.alias("own").c, sent.alias("other").c
    both = (
        select(own.run_id)
        .join(other.run_id.table, other.run_id == own.run_id)
        .where(own.sender_id == sender_id, other.sender_id != sender_id)
        .distinct()
    )
    connection.execute(
        postgresql.insert(shared_runs).from_select(["run_id"], both).on_conflict_do_nothing()
    )


def note_end(connection: Connection, sender_id: str, last_number: int) -> None:
    """Note that a sender's ledger holds nothing beyond this number, and its server stops."""
    end = {"sender_id": sender_id, "last_number": last_number, "ended_at": rfc3339(time.time_ns())}
    _insert_one(connection, sender_ends, end)


def _insert_one(connection: Connection, table: Table, row: Mapping[str, Any]) -> None:
    connection.execute(postgresql.insert(table).values(row).on_conflict_do_nothing())
