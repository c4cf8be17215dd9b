"""Deliver rows of an outbox to the fleet's database, in one transaction, once.

Facts and states have keys of their own, so inserting them twice changes nothing. Amounts do not:
they count because their shipment does. A shipment begins where the one before it ended, and its
first row's number is its key. So whoever sends again what the fleet has already, also cut
otherwise, meets that key, and is told how far the fleet is.

Invariant: each row of a sender's outbox is in the fleet's sums once, or not yet.
"""

import hashlib
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Table, delete, exists, select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.fleet.changes import FACTS, STATES, SUMS, RowTuple, TableRows, unpacked
from vllm_cost_meter.ledger.fleet.cleaning import cleaned
from vllm_cost_meter.ledger.fleet.schema import (
    NEVER,
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
    """Rows of an outbox that are sent together.

    `all_until_ns` is when the ledger held nothing but this and what was sent before, by the
    sender's clock; None if it holds more.
    """

    sender_id: str
    first_number: int
    last_number: int
    last_digest: str
    interval_s: float
    all_until_ns: int | None
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


def shipment_of(
    sender_id: str, rows: Sequence[tuple[int, bytes]], interval_s: float, all_until_ns: int | None
) -> Shipment:
    """Return rows of an outbox, numbered without a gap, as one shipment."""
    tables = [each for _, content in rows for each in unpacked(content)]
    (first, _), (last, content) = rows[0], rows[-1]
    digest = digest_of(content)
    return Shipment(sender_id, first, last, digest, interval_s, all_until_ns, merged(tables))


def merged(tables: Iterable[TableRows]) -> list[TableRows]:
    """Return one list of rows for each table: the latest states, and amounts added up."""
    by_table: dict[str, list[dict[str, Any]]] = {}
    for name, columns, rows in tables:
        found = by_table.setdefault(name, [])
        found.extend(dict(zip(columns, row, strict=True)) for row in rows)
    merged_rows = {
        name: _latest(_STATES[name], rows)
        if name in _STATES
        else _added_up(_SUMS[name], rows)
        if name in _SUMS
        else _each_once(FACT_TABLES[name], rows)
        for name, rows in by_table.items()
    }
    return [
        TableRows(name, tuple(rows[0]), [tuple(row.values()) for row in rows])
        for name, rows in merged_rows.items()
        if rows
    ]


def _keys(table: Table) -> list[str]:
    return [column.name for column in table.primary_key]


def _each_once(table: Table, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[RowTuple, dict[str, Any]] = {}
    keys = _keys(table)
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), row)
    return list(found.values())


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
            found[key] = {
                name: value if name in keys else known[name] + value for name, value in row.items()
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
    have = reached(connection, shipment.sender_id) or NOTHING
    if have.last_number + 1 != shipment.first_number:
        return have
    if not _begin(connection, shipment):
        return reached(connection, shipment.sender_id)  # Another process was faster.
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
    if (have := reached(connection, shipment.sender_id)) is not None:
        return have
    if not _begin(connection, shipment):
        return reached(connection, shipment.sender_id)
    _join(connection, shipment.sender_id, joining)
    for each in tables:
        insert_tables(connection, shipment, [each])
    _share_runs(connection, shipment.sender_id)
    return None


def insert_facts(connection: Connection, tables: Iterable[TableRows]) -> None:
    """Insert facts within the connection's transaction; those that are there stay."""
    for name, columns, rows in tables:
        _insert(connection, FACT_TABLES[name], _by_name(columns, rows))


def insert_tables(connection: Connection, shipment: Shipment, tables: Iterable[TableRows]) -> None:
    """Insert rows of a shipment that has begun."""
    of_shipment = {"sender_id": shipment.sender_id, "first_number": shipment.first_number}
    for name, columns, rows in tables:
        values = _by_name(columns, rows)
        if name in _SUMS:
            _insert(connection, SENT_SUMS[name], [{**of_shipment, **row} for row in values])
        else:
            _insert(connection, TOLD[name] if name in TOLD else FACT_TABLES[name], values)
        if name == schema.runs.name:
            told = [{"run_id": row["run_id"], "sender_id": shipment.sender_id} for row in values]
            _insert(connection, run_senders, told)


def _begin(connection: Connection, shipment: Shipment) -> bool:
    """Insert the row of a shipment; return False if there is one that begins there."""
    until_ns = shipment.all_until_ns
    sent_at = _all_until(connection, shipment.sender_id) if until_ns is None else rfc3339(until_ns)
    statement = postgresql.insert(shipments).values(
        sender_id=shipment.sender_id,
        first_number=shipment.first_number,
        last_number=shipment.last_number,
        last_digest=shipment.last_digest,
        sent_at=sent_at,
        received_at=now_text(),
        interval_s=shipment.interval_s,
    )
    new = statement.on_conflict_do_nothing().returning(shipments.c.first_number)
    return connection.execute(new).first() is not None


def _all_until(connection: Connection, sender_id: str) -> str:
    """Return until when the fleet has all that a sender's ledger held."""
    c = shipments.c
    latest = select(c.sent_at).where(c.sender_id == sender_id)
    asked = latest.order_by(c.first_number.desc()).limit(1)
    return connection.execute(asked).scalar() or NEVER


def _join(connection: Connection, sender_id: str, joining: Joining) -> None:
    now = rfc3339(time.time_ns())
    about = {"host": joining.host, "meter_version": joining.meter_version, "joined_at": now}
    _insert(connection, senders, [{"sender_id": sender_id, **about}])
    retired = [
        {"sender_id": name, "successor_id": sender_id, "retired_at": now}
        for name in joining.retires
    ]
    _insert(connection, retired_senders, retired)


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
    _insert(connection, sender_ends, [end])


def forget_older_states(connection: Connection, run_ids: Collection[str]) -> None:
    """Delete what was told of runs before what was told last. Needs the right to delete."""
    for name, table in TOLD.items():
        keys = [column.name for column in _STATES[name].primary_key]
        told, newer = table.c, table.alias("newer").c
        same = [newer[key] == told[key] for key in keys]
        connection.execute(
            delete(table).where(
                told.run_id.in_(run_ids), exists().where(*same, newer.number > told.number)
            )
        )


def _by_name(columns: Sequence[str], rows: Iterable[RowTuple]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _insert(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows that are not there.

    No column is named in ON CONFLICT: that would need the right to read it.
    """
    if rows:
        connection.execute(postgresql.insert(table).on_conflict_do_nothing(), rows)
