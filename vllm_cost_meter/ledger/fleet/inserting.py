"""Insert many rows into a fleet's table by one statement, in which each column is one array.

A statement for each row costs PostgreSQL five times as much. COPY into a temporary table costs it
less for thousands of rows and twice as much for a hundred, which is what a server sends each few
seconds; and a pooler in transaction mode keeps no temporary table.

Rows that are there stay: ON CONFLICT names no column, as that would need the right to read it.

Invariant: of two rows with one key the first one is in the table.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import ARRAY, String, Table, Text, bindparam, func, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection
from sqlalchemy.sql.dml import Insert
from sqlalchemy.types import TypeEngine

from vllm_cost_meter.ledger.fleet.changes import RowTuple

# What an array may have at most: beyond that a statement takes too much memory at once.
ROWS_AT_ONCE = 10_000


def insert_new(
    connection: Connection,
    table: Table,
    columns: Sequence[str],
    rows: Sequence[RowTuple],
    **same: object,
) -> None:
    """Insert rows that are not there, with values in the order of `columns`.

    `same` are columns that have one value in all rows.
    """
    statement = _statement(table, tuple(columns), tuple(same))
    for at in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[at : at + ROWS_AT_ONCE]
        arrays = dict(zip(columns, map(list, zip(*some, strict=True)), strict=True))
        connection.execute(statement, {**arrays, **same})


@lru_cache(maxsize=256)
def _statement(table: Table, columns: tuple[str, ...], same: tuple[str, ...]) -> Insert:
    arrays = [bindparam(name, type_=ARRAY(_element(table.c[name].type))) for name in columns]
    given = func.unnest(*arrays).table_valued(*columns).render_derived()
    values = [bindparam(name, type_=table.c[name].type) for name in same]
    rows = select(*values, *given.c)
    statement = postgresql.insert(table).from_select([*same, *columns], rows)
    return statement.on_conflict_do_nothing()


def _element(of: TypeEngine[Any]) -> TypeEngine[Any]:
    """Return the type of an array's elements: a text's has no collation of its own there."""
    return Text() if isinstance(of, String) else of
