"""Rows that a question brings along, as a table to be joined: all of them in one parameter.

A question about many runs names each with a number. As VALUES each row would be a piece of the SQL
text: SQLAlchemy would write it anew each time, and SQLite takes 32,766 parameters. As one JSON text
the statement stays the same, and any number of rows is one parameter.

Invariant: the table has the rows as they were given, each value with the type of its column.
"""

from collections.abc import Iterable
from typing import Any

import orjson
from sqlalchemy import CTE, Text, cast, literal, literal_column, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import GenericFunction
from sqlalchemy.types import TypeEngine

# A name and the type of its values.
GivenColumn = tuple[str, TypeEngine[Any]]


def given_rows(name: str, columns: Iterable[GivenColumn], rows: Iterable[Iterable[Any]]) -> CTE:
    """Return rows of texts, integers and NULLs as a table of that name with these columns."""
    text = literal(orjson.dumps([list(row) for row in rows]).decode(), Text)
    each = _JsonRows(text).table_valued("value", name=f"{name}_json")
    items = (
        cast(_JsonItem(each.c.value, literal_column(str(place))), kind).label(column)
        for place, (column, kind) in enumerate(columns)
    )
    return select(*items).select_from(each).cte(name)


class _JsonRows(GenericFunction[Any]):
    """The items of a JSON array, each in a row."""

    name = "given_rows"
    inherit_cache = True


class _JsonItem(GenericFunction[str]):
    """One item of a JSON array, by its place."""

    name = "given_item"
    inherit_cache = True


@compiles(_JsonRows, "sqlite")
def _rows_in_sqlite(element: _JsonRows, compiler: SQLCompiler, **options: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **options)})"


@compiles(_JsonRows, "postgresql")
def _rows_in_postgresql(element: _JsonRows, compiler: SQLCompiler, **options: Any) -> str:
    return f"json_array_elements(CAST({compiler.process(element.clauses, **options)} AS JSON))"


@compiles(_JsonItem, "sqlite")
def _item_in_sqlite(element: _JsonItem, compiler: SQLCompiler, **options: Any) -> str:
    value, place = (compiler.process(clause, **options) for clause in element.clauses)
    return f"json_extract({value}, '$[{place}]')"


@compiles(_JsonItem, "postgresql")
def _item_in_postgresql(element: _JsonItem, compiler: SQLCompiler, **options: Any) -> str:
    value, place = (compiler.process(clause, **options) for clause in element.clauses)
    return f"({value} ->> {place})"
