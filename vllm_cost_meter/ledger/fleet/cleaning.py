"""Texts that SQLite has taken and PostgreSQL cannot take, in a form that it can.

PostgreSQL takes no NUL, and no long text into an index. One such row would hold up all that comes
after it in an outbox, for ever. What clients choose never comes so far (`records/client_text.py`);
what an operator wrote, or a damaged ledger has, may.

Invariant: a text that PostgreSQL can take stays as it is, and every other one has one form.
"""

from collections.abc import Iterable, Iterator

from sqlalchemy import Table

from vllm_cost_meter.ledger.fleet.changes import TableRows
from vllm_cost_meter.records.client_text import stored

# An index of PostgreSQL takes some 2,700 bytes, and a character may have four.
INDEXED_CHARS_MAX = 600


def cleaned(tables: Iterable[TableRows], known: dict[str, Table]) -> Iterator[TableRows]:
    """Yield rows with every text in a form that PostgreSQL takes; `known` are tables by name."""
    for name, columns, rows in tables:
        indexed = _indexed(known[name])
        is_indexed = [column in indexed for column in columns]
        yield TableRows(
            name,
            columns,
            [
                tuple(
                    _clean(value, is_indexed=known_to_index)
                    for value, known_to_index in zip(row, is_indexed, strict=True)
                )
                for row in rows
            ],
        )


def _indexed(table: Table) -> set[str]:
    found = {column.name for column in table.primary_key}
    for index in table.indexes:
        found |= {column.name for column in index.columns}
    return found


def _clean(value: object, *, is_indexed: bool) -> object:
    if not isinstance(value, str):
        return value
    if is_indexed and (len(value) > INDEXED_CHARS_MAX or "\0" in value):
        return stored(value)
    return storable(value)


def storable(text: str) -> str:
    """Return a text as PostgreSQL can store it, also within JSON."""
    return text.replace("\0", "?").encode(errors="replace").decode()
