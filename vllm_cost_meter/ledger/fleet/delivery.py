"""Deliver rows of an outbox to the fleet's database, in one transaction, once.

Facts and states have keys of their own, so inserting them twice changes nothing. Amounts do not:
they count because their shipment does. A shipment begins where the one before it ended, and one
process at a time sends under a sender's name. So whoever sends again what the fleet has already,
also cut otherwise, is told how far the fleet is, and nothing is written.

Invariant: each row of a sender's outbox is in the fleet's sums once, or not yet.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Table, select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.fleet.changes import TableRows
from vllm_cost_meter.ledger.fleet.cleaning import cleaned
from vllm_cost_meter.ledger.fleet.inserting import insert_new
from vllm_cost_meter.ledger.fleet.schema import (
    KEPT_ROWS,
    NEVER,
    SENT_SUMS,
    TOLD,
    latest_shipment,
    now_text,
    retired_senders,
    run_senders,
    sender_ends,
    senders,
    shared_runs,
    shipments,
    tails,
    told_open_requests,
    told_running,
)
from vllm_cost_meter.ledger.fleet.shipment import FACT_TABLES, Shipment
from vllm_cost_meter.ledger.fleet.tidying import lock_sender
from vllm_cost_meter.ledger.fleet_use.running import NOTHING_RUNS
from vllm_cost_meter.units.time import rfc3339

# Into which table the rows of a ledger's table go, and those that a sender makes.
_INTO = {**FACT_TABLES, **KEPT_ROWS, **TOLD}
_MADE = {table.name: table for table in (tails, told_open_requests)}

# "join": a number of our own among PostgreSQL's locks.
_JOINING_LOCK = 0x6A6F696E


class Reached(NamedTuple):
    """How far the fleet has a sender's outbox: the last row's number, and its content's digest."""

    last_number: int
    last_digest: str


# Rows of an outbox are numbered from 1 on.
NOTHING = Reached(-1, "")


class Joining(NamedTuple):
    """A ledger that the fleet gets as a whole, and the names under which it sent before."""

    host: str
    meter_version: str
    # Where the rows of requests go: see `senders.rows`.
    rows: str
    retires: Sequence[str]


def for_postgresql(tables: Iterable[TableRows]) -> list[TableRows]:
    """Return rows in a form that PostgreSQL takes, whatever texts SQLite has taken."""
    return list(cleaned(tables, {**_INTO, **SENT_SUMS, **_MADE}))


def reached(connection: Connection, sender_id: str) -> Reached | None:
    """Return how far the fleet has a sender's outbox; None if it has nothing of it."""
    c = shipments.c
    row = connection.execute(latest_shipment(sender_id, c.last_number, c.last_digest)).first()
    return None if row is None else Reached._make(row)


def rows_of(connection: Connection, sender_id: str) -> str | None:
    """Return where the rows of a sender's requests go; None if the fleet does not know it."""
    s = senders.c
    found: str | None = connection.execute(select(s.rows).where(s.sender_id == sender_id)).scalar()
    return found


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
    _tell_running(connection, shipment)
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
    _tell_running(connection, shipment)
    _join(connection, shipment.sender_id, joining)
    for each in tables:
        insert_tables(connection, shipment, [each])
    _share_runs(connection, shipment.sender_id)
    return None


def insert_facts(connection: Connection, tables: Iterable[TableRows]) -> None:
    """Insert facts within the connection's transaction; those that are there stay."""
    for name, columns, rows in tables:
        insert_new(connection, _INTO[name], columns, rows)


def insert_tables(connection: Connection, shipment: Shipment, tables: Iterable[TableRows]) -> None:
    """Insert rows of a shipment that has begun."""
    sender_id, number = shipment.sender_id, shipment.first_number
    for name, columns, rows in tables:
        if name in SENT_SUMS:
            own = {"sender_id": sender_id, "first_number": number}
            insert_new(connection, SENT_SUMS[name], columns, rows, **own)
        elif name in _MADE:
            insert_new(connection, _MADE[name], columns, rows, sender_id=sender_id, number=number)
        else:
            insert_new(connection, _INTO[name], columns, rows)
        if name == schema.runs.name:
            at = columns.index("run_id")
            told = [(row[at],) for row in rows]
            insert_new(connection, run_senders, ["run_id"], told, sender_id=sender_id)


def _begin(connection: Connection, shipment: Shipment) -> None:
    """Insert the row of a shipment. Fails if there is one that begins there."""
    until_ns = shipment.all_until_ns
    sent_at = _all_until(connection, shipment.sender_id) if until_ns is None else rfc3339(until_ns)
    row = {
        "sender_id": shipment.sender_id,
        "first_number": shipment.first_number,
        "last_number": shipment.last_number,
        "last_digest": shipment.last_digest,
        "sent_at": sent_at,
        "received_at": now_text(),
        "interval_s": shipment.interval_s,
    }
    connection.execute(shipments.insert().values(row))


def _all_until(connection: Connection, sender_id: str) -> str:
    """Return until when the fleet has all that a sender's ledger held."""
    return connection.execute(latest_shipment(sender_id, shipments.c.sent_at)).scalar() or NEVER


def _join(connection: Connection, sender_id: str, joining: Joining) -> None:
    now = rfc3339(time.time_ns())
    about = {
        "host": joining.host,
        "meter_version": joining.meter_version,
        "rows": joining.rows,
        "joined_at": now,
    }
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
    for name in joining.retires:
        if (have := reached(connection, name)) is not None:
            _tell_end(connection, name, have.last_number)


def _tell_running(connection: Connection, shipment: Shipment) -> None:
    if shipment.running is not None:
        number = 2 * shipment.last_number
        told = {"sender_id": shipment.sender_id, "number": number, "content": shipment.running}
        _insert_one(connection, told_running, told)


def _tell_end(connection: Connection, sender_id: str, last_number: int) -> None:
    """Tell that nothing runs at a sender after this row of its outbox; a later shipment may."""
    # What runs after a shipment has an even number, so the one between two is free.
    told = {"sender_id": sender_id, "number": 2 * last_number + 1, "content": NOTHING_RUNS}
    _insert_one(connection, told_running, told)


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
    _tell_end(connection, sender_id, last_number)


def _insert_one(connection: Connection, table: Table, row: Mapping[str, Any]) -> None:
    connection.execute(postgresql.insert(table).values(row).on_conflict_do_nothing())
