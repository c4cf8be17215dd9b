"""The tables of a damaged ledger: their columns as the file stores them, whatever its version.

A ledger that was migrated has its columns in another order than a new one, so the file's own
definitions count. One that cannot be read is taken from today's schema, unless the other tables
show that the ledger is of an older version and this table has changed since: then nobody knows
which value is which, and none of its rows is read.

Invariant: a form's definition creates its table, with the columns in the file's order.
"""

import ast
import sqlite3
from collections.abc import Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property

from sqlalchemy import Table
from sqlalchemy.dialects import sqlite
from sqlalchemy.schema import CreateTable

from vllm_cost_meter.ledger.migrations import DROPPED_COLUMNS, MIGRATIONS, RENAMED_COLUMNS
from vllm_cost_meter.ledger.migrations import Column as AddedColumn
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION, metadata
from vllm_cost_meter.ledger.tables.packed import PackedId, is_packed_id
from vllm_cost_meter.ledger.tables.unpacked import UNPACKED
from vllm_cost_meter.ledger.upkeep.btree import PageRow, Value


def _added_since(table: str, version: int) -> frozenset[str]:
    """Return the columns of a table that a ledger of this version lacks."""
    return frozenset(
        step.name
        for since, steps in MIGRATIONS.items()
        for step in steps
        if since >= version and isinstance(step, AddedColumn) and step.table == table
    )


# The columns that held an instant as a text before version 14.
INSTANTS_OF = {table.name: table.instants for table in UNPACKED}
# What each version lacks of each table, the oldest first.
_LACKED = {
    table: [_added_since(table, version) for version in range(1, SCHEMA_VERSION + 1)]
    for table in metadata.tables
}


def _renamed_of(form: "TableForm") -> dict[str, str]:
    """Return today's names of the columns that have another one in a file."""
    names = {column.name for column in form.columns}
    return {
        old: name
        for renamed in RENAMED_COLUMNS.values()
        for (table, old), name in renamed.items()
        if table == form.name and old in names and name not in names
    }


def dropped_of(table: str) -> frozenset[str]:
    """Return the columns that a table had in older ledgers, and has no more."""
    every = (column for columns in DROPPED_COLUMNS.values() for column in columns)
    return frozenset(name for of, name in every if of == table)


@dataclass(frozen=True, slots=True)
class ColumnForm:
    """A column as the file stores it; `default` is what rows that are older than it hold."""

    name: str
    kind: str
    not_null: bool
    default: Value
    key_place: int
    is_id: bool = False

    def takes(self, value: Value) -> bool:
        """Return whether a value may stand in this column, by its declared type."""
        if value is None:
            return not self.not_null
        if self.is_id and isinstance(value, bytes):
            return is_packed_id(value)
        if "INT" in self.kind or self.kind == "BOOLEAN":
            return isinstance(value, int)
        if "CHAR" in self.kind or "TEXT" in self.kind:
            return isinstance(value, str)
        if "BLOB" in self.kind:
            return isinstance(value, bytes)
        return isinstance(value, int | float)


@dataclass(frozen=True)
class TableForm:
    """A table as a file has it: its definition, its columns and the order in which it stores."""

    name: str
    sql: str
    columns: tuple[ColumnForm, ...]
    without_rowid: bool
    # Whether the order of its columns is unknown: no row of it can be read.
    is_unknown: bool = False
    # The names in the definition of those columns that have another one today.
    names_in_file: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def stored(self) -> tuple[ColumnForm, ...]:
        """The columns in the order of the records: without rowids the key comes first."""
        if not self.without_rowid:
            return self.columns
        key = sorted((c for c in self.columns if c.key_place), key=lambda c: c.key_place)
        return (*key, *(c for c in self.columns if not c.key_place))

    @cached_property
    def rowid_column(self) -> int | None:
        """The place of the column that is the rowid itself, and stored as NULL."""
        keys = [at for at, column in enumerate(self.columns) if column.key_place]
        if self.without_rowid or len(keys) != 1 or self.columns[keys[0]].kind != "INTEGER":
            return None
        return keys[0]

    @cached_property
    def fewest_values(self) -> int:
        """The number of values in the oldest rows: migrations added the columns after those."""
        added = _LACKED[self.name][0]
        count = len(self.stored)
        while count and self.stored[count - 1].name in added:
            count -= 1
        return count

    def values_of(self, row: PageRow) -> tuple[Value, ...] | None:
        """Return a record's values in the stored order; None if it is not a row of this table.

        A row that was written before columns were added gets their defaults.
        """
        values, stored = list(row.values), self.stored
        if self.is_unknown or not self.fewest_values <= len(values) <= len(stored):
            return None
        if (row.rowid is None) != self.without_rowid:
            return None
        values += [column.default for column in stored[len(values) :]]
        if self.rowid_column is not None:
            values[self.rowid_column] = row.rowid
        if all(column.takes(value) for column, value in zip(stored, values, strict=True)):
            return tuple(values)
        return None


def _today(table: Table) -> TableForm:
    form = _form(table.name, str(CreateTable(table).compile(dialect=sqlite.dialect())).strip())
    assert form is not None  # noqa: S101 - our own definition
    columns = (
        replace(column, is_id=isinstance(table.c[column.name].type, PackedId))
        for column in form.columns
    )
    return replace(form, columns=tuple(columns))


def is_unpacked(form: TableForm) -> bool:
    """Return whether a table has its instants as texts, as before they were packed."""
    instants = INSTANTS_OF.get(form.name, ())
    kinds = {column.kind for column in form.columns if column.name in instants}
    return kinds == {"TEXT"}


def _form_in_file(table: Table, sql: str, *, may_be_newer: bool) -> TableForm | None:
    """Return the form of a table by the definition in the file; None if it is damaged.

    The file gives the order of columns and their defaults. Their types are today's, but for
    instants, which were texts: any other type in the file is damage. So is a column too many,
    unless the ledger may be newer than this cost meter.
    """
    today, found = _today(table), _form(table.name, sql)
    if found is None:
        return None
    known = {column.name: column for column in today.columns}
    dropped = dropped_of(table.name)
    known |= {column.name: column for column in found.columns if column.name in dropped}
    renamed = _renamed_of(found)
    found = replace(
        found, columns=tuple(replace(c, name=renamed.get(c.name, c.name)) for c in found.columns)
    )
    if len(found.columns) > len(known):
        return found if may_be_newer else None
    unknown = [column.name for column in found.columns if column.name not in known]
    missing = known.keys() - {column.name for column in found.columns}
    lacked = _lacked_of(table.name, missing, len(unknown))
    if lacked is None:
        return None  # No version has such columns: two became one.
    # A damaged name is that of a column that its version has.
    damaged = (name for name in known if name in missing - lacked)
    name_of = {name: name for name in known} | dict(zip(unknown, damaged, strict=True))
    columns = tuple(
        replace(known[name_of[column.name]], default=column.default) for column in found.columns
    )
    is_older = is_unpacked(found)
    if is_older:
        instants = INSTANTS_OF[table.name]
        columns = tuple(replace(c, kind="TEXT") if c.name in instants else c for c in columns)
    # Only the table of an older version needs its own definition: a migration brings it up to date.
    is_older = is_older or bool(renamed) or not known.keys().isdisjoint(dropped)
    sql_of_file = found.sql if lacked or is_older else today.sql
    of_file = {name: old for old, name in renamed.items()}
    return TableForm(table.name, sql_of_file, columns, today.without_rowid, names_in_file=of_file)


def _lacked_of(name: str, missing: Set[str], unknown: int) -> Set[str] | None:
    """Return what the version of a table lacks that lacks these columns; None if there is none.

    So many of the missing columns are there under a damaged name.
    """
    for lacked in reversed(_LACKED[name]):
        if lacked <= missing and len(missing) - len(lacked) == unknown:
            return lacked
    return None


def forms_of(definitions: Sequence[tuple[str, str]], *, may_be_newer: bool) -> dict[str, TableForm]:
    """Return the form of each table of the schema, by the names and definitions in a file."""
    texts = dict(definitions)
    read = {
        name: form
        for name, table in metadata.tables.items()
        if name in texts
        and (form := _form_in_file(table, texts[name], may_be_newer=may_be_newer)) is not None
    }
    today = {name: _today(table) for name, table in metadata.tables.items()}
    is_older = any(
        _names(form) != _names(today[name]) or is_unpacked(form) for name, form in read.items()
    )
    return {
        name: read.get(name) or replace(form, is_unknown=is_older and bool(_LACKED[name][0]))
        for name, form in today.items()
    }


def _names(form: TableForm) -> list[str]:
    return [column.name for column in form.columns]


def _form(name: str, sql: str) -> TableForm | None:
    """Read a definition as SQLite does, in an empty database of its own; None if it is damaged."""
    if not sql.upper().startswith("CREATE TABLE"):
        return None
    with closing(sqlite3.connect(":memory:")) as connection:
        try:
            connection.execute(sql)
            found = connection.execute("SELECT * FROM pragma_table_info(?)", (name,)).fetchall()
            columns = tuple(
                ColumnForm(column, kind.upper(), bool(not_null or key), _default(text), key)
                for _, column, kind, not_null, text, key in found
            )
        except (sqlite3.Error, ValueError, SyntaxError):
            return None
    without_rowid = sql.upper().rstrip().endswith("WITHOUT ROWID")
    return TableForm(name, sql, columns, without_rowid) if columns else None


def _default(text: str | None) -> Value:
    if text is None or text.upper() == "NULL":
        return None
    value = ast.literal_eval(text)
    return value if isinstance(value, int | float | str) else None
