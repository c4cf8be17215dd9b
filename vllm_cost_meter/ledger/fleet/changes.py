"""What a transaction writes into the ledger, noted row by row, and packed for the outbox.

The few functions that write rows note them here, so whatever the ledger gets, the fleet gets. There
are three kinds of tables. A *fact* stays as it was first written. A *state* is overwritten by a
higher snapshot number. To a *sum* amounts are added, so what is noted is the amounts.

Invariant: what `unpacked` returns is what was noted and not taken back, table by table, in its
order.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import orjson
from sqlalchemy import Table
from sqlalchemy.engine import Connection

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger import schema

_VERSION = 1
# Most of the content are numbers and ids: more effort makes it hardly smaller.
_EFFORT = 1
_OPTION = "cost_meter_changes"

FACTS = (
    *(schema.rollup_groups, schema.prices, schema.runs, schema.cost_models),
    *(schema.open_requests, schema.http_requests, schema.requests, schema.usage_pieces),
    *(schema.request_energy, schema.journal_losses),
)
STATES = (schema.snapshots, schema.engine_hours, schema.energy_hours, schema.live_usage)
# Days follow from the hours.
SUMS = (
    *(schema.rollup_hours, schema.rollup_latencies, schema.rollup_arrivals),
    *(schema.bill_sums, schema.energy_sums),
)
SENT: Mapping[str, Table] = {table.name: table for table in (*FACTS, *STATES, *SUMS)}

RowTuple = tuple[Any, ...]


class TableRows(NamedTuple):
    """Rows of a table, each with the values of `columns`."""

    table: str
    columns: tuple[str, ...]
    rows: list[RowTuple]


class Changes:
    """The rows that a transaction has written so far."""

    def __init__(self) -> None:
        self._noted: list[tuple[Table, RowTuple]] = []

    def note(self, table: Table, rows: Iterable[RowTuple]) -> None:
        """Note rows whose values are in the order of the table's columns."""
        if table.name in SENT:
            self._noted.extend((table, tuple(row)) for row in rows)

    def passing(self, table: Table, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield rows by name, each noted as it passes."""
        names = tuple(table.c.keys())
        is_sent = table.name in SENT
        for row in rows:
            if is_sent:
                self._noted.append((table, tuple(row[name] for name in names)))
            yield row

    def mark(self) -> int:
        """Return a mark that `back_to` takes."""
        return len(self._noted)

    def back_to(self, mark: int) -> None:
        """Forget what was noted since a mark: it was rolled back."""
        del self._noted[mark:]

    def by_table(self) -> list[TableRows]:
        """Return all rows, a table at a time."""
        found: dict[str, TableRows] = {}
        for table, row in self._noted:
            known = found.get(table.name)
            if known is None:
                columns = tuple(table.c.keys())
                known = found[table.name] = TableRows(table.name, columns, [])
            known.rows.append(row)
        return list(found.values())


def noting(connection: Connection, changes: Changes) -> None:
    """Have what is written on a connection noted from now on."""
    connection.execution_options(**{_OPTION: changes})


def changes_of(connection: Connection) -> Changes | None:
    """Return where what is written on a connection is noted; None if it is not."""
    found: Changes | None = connection.get_execution_options().get(_OPTION)
    return found


def note(connection: Connection, table: Table, rows: Iterable[RowTuple]) -> None:
    """Note rows that are being written, with values in the order of the table's columns."""
    if (changes := changes_of(connection)) is not None:
        changes.note(table, rows)


def packed(tables: Sequence[TableRows]) -> bytes:
    """Return rows as the outbox keeps them."""
    return zlib.compress(orjson.dumps([_VERSION, *map(tuple, tables)]), _EFFORT)


def unpacked(content: bytes) -> list[TableRows]:
    """Return the rows of a packed content. Raises LedgerError for one of another version."""
    try:
        version, *tables = orjson.loads(zlib.decompress(content))
    except (zlib.error, ValueError) as error:
        raise LedgerError(f"outbox: expected packed rows, got damaged ones: {error}") from None
    if version != _VERSION:
        raise LedgerError(
            f"outbox: expected rows of version {_VERSION}, got version {version}; upgrade"
            " vllm-cost-meter where it sends to the fleet"
        )
    return [_whole(table, columns, rows) for table, columns, rows in tables]


def _whole(name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> TableRows:
    """Return rows with the columns that their table has got since an earlier version wrote them."""
    table = SENT.get(name)
    later = [] if table is None else [each for each in table.c if each.name not in columns]
    # Amounts were not known, as migrations have it: unknown in a row, and nothing in a sum.
    filled = tuple(None if each.nullable else 0 for each in later)
    names = (*columns, *(each.name for each in later))
    return TableRows(name, names, [(*row, *filled) for row in rows])
