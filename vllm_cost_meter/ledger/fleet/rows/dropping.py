"""Drop old rows of requests from a fleet's database, by the pass with which a ledger drops its own.

The pass (`ledger/retention/dropping.py`) knows a ledger's tables. So within each of its
transactions, temporary views of these names lead to the tables with what senders have sent.

A row goes once nothing of its request can still be on its way: its ledger has sent all that it held
a day after, or nothing came from it for a day. A ledger that joins anew sends rows once more: those
that were dropped are left out (`without_dropped`).

Invariant: a bill is in the fleet's rows or in what its dropped rows add up to, never both.
"""

# ruff: noqa: S608 - only names of our own are written into the SQL below
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import Engine, Table, lateral, select, text, true
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.fleet.changes import RowTuple, TableRows
from vllm_cost_meter.ledger.fleet.schema import (
    KEPT_ROWS,
    kept_name,
    latest_shipment,
    now_text,
    run_senders,
    shipments,
)
from vllm_cost_meter.ledger.retention.dropping import Dropper
from vllm_cost_meter.ledger.retention.known import NONE_DROPPED, dropped_by_run, kept_from_hour
from vllm_cost_meter.ledger.tables.packed import instant_us
from vllm_cost_meter.ledger.tables.replies import replies
from vllm_cost_meter.ledger.tables.replies import view_query as replies_query
from vllm_cost_meter.units.calendar import HOURS_PER_DAY
from vllm_cost_meter.units.time import NS_PER_HOUR, NS_PER_US, rfc3339

_DAY_S = 86_400.0
# A transaction makes its views first, so it is worth more bills than in a ledger: some 0.2 s.
_BILLS_AT_ONCE = 1_000
# "rows": a number of our own among PostgreSQL's locks.
_ROWS_LOCK = 0x726F7773
_OF_BILLS = frozenset(
    table.name for table in (schema.requests, schema.usage_pieces, schema.request_energy)
)
_DROPPED_BILLS = KEPT_ROWS[schema.dropped_bills.name]


@dataclass(slots=True)
class FleetDropper(Dropper):
    """A pass over the rows in a fleet's database. Used by one thread.

    Needs the right to delete rows of requests, to insert and update what they add up to, and to
    make temporary views.
    """

    @classmethod
    def of(
        cls, engine: Engine, before_hour: int, bills_at_once: int = _BILLS_AT_ONCE
    ) -> "FleetDropper":
        """Return a pass over rows that ended before an hour, by what senders have sent so far."""
        with engine.connect() as connection:
            held = runs_on_their_way(connection, before_hour)
        return cls(engine, before_hour, bills_at_once, held)

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Give a transaction in which a ledger's names mean the tables with what was sent."""
        with self.engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ROWS_LOCK})
            _make_views(connection)
            yield connection
            # Behind a pooler somebody else has this session next.
            _drop_views(connection)


def _make_views(connection: Connection) -> None:
    made = {name: f"SELECT * FROM {kept_name(table)}" for name, table in _ledger_tables()}
    for name, query in {**made, replies.name: replies_query(connection.dialect)}.items():
        connection.exec_driver_sql(f"CREATE TEMPORARY VIEW {name} AS {query}")


def _drop_views(connection: Connection) -> None:
    names = [replies.name, *(name for name, _ in _ledger_tables())]
    dropped = ", ".join(f"pg_temp.{name}" for name in names)
    connection.exec_driver_sql(f"DROP VIEW {dropped}")


def _ledger_tables() -> Iterable[tuple[str, Table]]:
    return (
        (table.name, table) for table in schema.metadata.sorted_tables if table.name in KEPT_ROWS
    )


def runs_on_their_way(connection: Connection, before_hour: int) -> frozenset[str]:
    """Return the runs of which rows from before an hour may still come."""
    s, c = run_senders.c, shipments.c
    last = lateral(latest_shipment(s.sender_id, c.sent_at, c.received_at))
    day_after = rfc3339((before_hour + HOURS_PER_DAY) * NS_PER_HOUR)
    asked = (
        select(s.run_id)
        .join(last, true())
        .where(last.c.sent_at < day_after, last.c.received_at >= now_text(_DAY_S))
    )
    return frozenset(connection.execute(asked).scalars())


# ---- rows that come again


def without_dropped(connection: Connection, tables: Iterable[TableRows]) -> Iterator[TableRows]:
    """Yield rows of a ledger that joins, without those that the fleet has dropped.

    Until the transaction ends, no more are dropped.
    """
    connection.execute(text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": _ROWS_LOCK})
    for each in tables:
        if each.table in _OF_BILLS:
            yield each._replace(rows=_not_dropped(connection, each))
        elif each.table == schema.open_requests.name:
            yield each._replace(rows=_not_from_before(connection, each))
        else:
            yield each


def _not_dropped(connection: Connection, bills: TableRows) -> list[RowTuple]:
    run, seq = bills.columns.index("run_id"), bills.columns.index("seq")
    dropped = dropped_by_run(connection, {row[run] for row in bills.rows}, _DROPPED_BILLS)
    return [row for row in bills.rows if not dropped.get(row[run], NONE_DROPPED).has(row[seq])]


def _not_from_before(connection: Connection, opened: TableRows) -> list[RowTuple]:
    """Return the open requests that began since rows are kept: others may have had their bill."""
    hour = kept_from_hour(connection, KEPT_ROWS[schema.row_cutoffs.name])
    if hour is None:
        return opened.rows
    began, since_us = opened.columns.index("started_at"), hour * NS_PER_HOUR // NS_PER_US
    return [row for row in opened.rows if _us(row[began]) >= since_us]


def _us(instant: str | int) -> int:
    """Return an instant in microseconds: a ledger's rows have texts, its outbox has these."""
    return instant if isinstance(instant, int) else instant_us(instant)
