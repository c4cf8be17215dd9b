"""Add amounts to rows of a table, which are made where they are not there.

A row whose amounts all fall to 0 is deleted, so that a table does not depend on the order in which
its amounts came.

Invariant: a table is changed by amounts alone, and never overwritten.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from sqlalchemy import Column, ColumnElement, Table, and_, case, delete, func, or_, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.fleet.changes import note

_ROWS_AT_ONCE = 400

_LOCK = 0x636F73745F72  # "cost_r": a number of our own among PostgreSQL's locks

# The values of a row in the order of its table's columns.
RowValues = tuple[Any, ...]


def lock_sums(connection: Connection) -> None:
    """Let nobody else add to sums until the transaction ends: whoever adds looks first what is new.

    A SQLite file has one writer at a time anyway.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})


def insert_new(connection: Connection, table: Table, rows: Sequence[RowValues]) -> None:
    """Insert rows; a row with the same key stays as it is. Rows are in the order of their keys."""
    _execute(connection, table, rows, adds=False)


def add_to(connection: Connection, table: Table, rows: Sequence[RowValues]) -> None:
    """Add the amounts of rows to those of the table. Rows are in the order of their keys.

    PostgreSQL's writers take one order, so that they do not wait for one another in a ring.
    """
    _execute(connection, table, rows, adds=True)
    amounts = _amounts(table)  # the last columns
    lowered = [row for row in rows if min(row[-len(amounts) :]) < 0]
    is_zero = and_(*(column == 0 for column in amounts))
    for some in in_chunks(lowered):
        same = or_(
            *(
                and_(*(key == value for key, value in zip(table.primary_key, row, strict=False)))
                for row in some
            )
        )
        connection.execute(delete(table).where(same, is_zero))


def _execute(
    connection: Connection, table: Table, rows: Sequence[RowValues], *, adds: bool
) -> None:
    if not rows:
        return
    note(connection, table, rows)
    if connection.dialect.name == "postgresql":
        names = table.c.keys()
        values = [dict(zip(names, row, strict=True)) for row in rows]
        connection.execute(_statement(postgresql.insert(table), table, adds=adds), values)
        return
    # SQLAlchemy would take longer for the parameters than SQLite for the rows.
    connection.exec_driver_sql(_sqlite_text(table, adds), list(rows))


@cache
def _sqlite_text(table: Table, adds: bool) -> str:
    statement = _statement(sqlite.insert(table), table, adds=adds)
    return str(statement.compile(dialect=sqlite.dialect()))


def _statement(insert: Any, table: Table, *, adds: bool) -> Any:
    if not adds:
        return insert.on_conflict_do_nothing()
    changed = {column.name: column + insert.excluded[column.name] for column in _amounts(table)}
    if "first_hour" in table.c:
        changed["first_hour"] = _earlier(table.c.first_hour, insert.excluded.first_hour)
    return insert.on_conflict_do_update(index_elements=list(table.primary_key), set_=changed)


def _amounts(table: Table) -> list[Column[Any]]:
    return [c for c in table.c if not c.primary_key and c.name != "first_hour"]


def _earlier(own: ColumnElement[int], other: ColumnElement[int]) -> ColumnElement[int]:
    """Return the earlier one of two hours, either of which may be NULL."""
    return case((own <= other, own), else_=func.coalesce(other, own))


def in_chunks(of: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yield parts of a sequence that fit into one statement."""
    for at in range(0, len(of), _ROWS_AT_ONCE):
        yield of[at : at + _ROWS_AT_ONCE]
