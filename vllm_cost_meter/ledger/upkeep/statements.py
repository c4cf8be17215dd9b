"""Write SQLite's text of statements that are made from the tables of the schema.

Invariant: no name of a table or column stands in a text here, so the schema may change.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Table, bindparam
from sqlalchemy.dialects import sqlite

from vllm_cost_meter.ledger.upkeep.kinds import RowKind, kind_of_rows


def sql_of(statement: Any) -> str:
    """Return a statement as a text for `sqlite3`, its values within it."""
    return str(statement.compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True}))


def insert_into(table: Table, names: Sequence[str]) -> sqlite.Insert:
    """Return an insert of these columns that keeps the row with the same key.

    A row of cumulative totals with a higher snapshot number overwrites.
    """
    statement = sqlite.insert(table)
    if kind_of_rows(table) is not RowKind.CUMULATIVE:
        return statement.on_conflict_do_nothing()
    keys = [column.name for column in table.primary_key]
    return statement.on_conflict_do_update(
        index_elements=keys,
        set_={name: statement.excluded[name] for name in names if name not in keys},
        where=statement.excluded.number > table.c.number,
    )


def insert_text(table: Table, names: Sequence[str]) -> str:
    """Return that insert as a text with a question mark for each column."""
    values: dict[str, Any] = {name: bindparam(name) for name in names}
    compiled = insert_into(table, names).values(values).compile(dialect=sqlite.dialect())
    order = compiled.positiontup or []
    assert list(order) == list(names), order  # noqa: S101 - what follows relies on it
    return str(compiled)
