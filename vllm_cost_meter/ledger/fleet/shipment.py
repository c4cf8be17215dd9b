"""A shipment: rows of an outbox that are sent together, brought into the form in which they go.

What several rows of an outbox say of one thing is sent once: a fact, the latest state, the sum of
the amounts.

Invariant: a shipment says what its rows of the outbox say one after another.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy import Table

from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.fleet.changes import FACTS, STATES, SUMS, RowTuple, TableRows, unpacked
from vllm_cost_meter.ledger.rollups.bill_sums import BillSums

# A ledger that joins for the first time brings these too: which rows it had dropped before.
OF_FIRST_JOINING = (
    *(schema.row_cutoffs, schema.dropped_bills, schema.dropped_hours),
    *(schema.dropped_latencies, schema.dropped_unknown_energy),
)
FACT_TABLES = {table.name: table for table in (*FACTS, *OF_FIRST_JOINING)}
STATE_TABLES = {table.name: table for table in STATES}
SUM_TABLES = {table.name: table for table in SUMS}


class Shipment(NamedTuple):
    """Rows of an outbox that are sent together.

    `all_until_ns` is when the ledger held nothing but this and what was sent before, by the
    sender's clock; None if it holds more. `running` is what runs at the server once its ledger has
    these rows and no more; None if the ledger has more, or if that is what was told before.
    """

    sender_id: str
    first_number: int
    last_number: int
    last_digest: str
    interval_s: float
    all_until_ns: int | None
    tables: Sequence[TableRows]
    running: str | None = None


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
    """Return lists of rows by table: facts once each, the latest states, and amounts added up.

    Rows that an older version of the ledger put in may have their columns in another order.
    """
    facts: dict[tuple[str, tuple[str, ...]], list[RowTuple]] = {}
    others: dict[str, list[dict[str, Any]]] = {}
    for name, columns, rows in tables:
        if name in FACT_TABLES:
            facts.setdefault((name, columns), []).extend(rows)
        else:
            found = others.setdefault(name, [])
            found.extend(dict(zip(columns, row, strict=True)) for row in rows)
    once = [
        TableRows(name, columns, _each_once(FACT_TABLES[name], columns, rows))
        for (name, columns), rows in facts.items()
    ]
    by_name = {
        name: _latest(STATE_TABLES[name], rows)
        if name in STATE_TABLES
        else _added_up(SUM_TABLES[name], rows)
        for name, rows in others.items()
    }
    others_rows = [_rows_of(name, rows) for name, rows in by_name.items() if rows]
    return [*_without_billed(once), *others_rows]


def _without_billed(tables: Sequence[TableRows]) -> list[TableRows]:
    """Return facts without the open requests that have their bill among them.

    They are known by the ledger's own rule (`is_billed`).
    """
    bills = _billed_in(tables)
    if not bills:
        return list(tables)
    return [
        _still_open(table, bills) if table.table == schema.open_requests.name else table
        for table in tables
    ]


def _billed_in(tables: Iterable[TableRows]) -> dict[str, list[tuple[int, int]]]:
    """Return when the requests that have a bill in these rows began and ended, by internal id."""
    found: dict[str, list[tuple[int, int]]] = {}
    for name, columns, rows in tables:
        if name == schema.requests.name:
            values = itemgetter(*map(columns.index, ("request_id", "started_at", "finished_at")))
            for request_id, started_us, finished_us in map(values, rows):
                found.setdefault(request_id, []).append((started_us, finished_us))
    return found


def _still_open(opened: TableRows, bills: Mapping[str, Sequence[tuple[int, int]]]) -> TableRows:
    at, began = opened.columns.index("request_id"), opened.columns.index("started_at")
    rows = [
        row
        for row in opened.rows
        if not any(
            started_us == row[began] or finished_us >= row[began]
            for started_us, finished_us in bills.get(row[at], ())
        )
    ]
    return opened._replace(rows=rows)


def _rows_of(name: str, rows: Sequence[dict[str, Any]]) -> TableRows:
    columns = tuple(rows[0])
    return TableRows(name, columns, [tuple(row[one] for one in columns) for row in rows])


def _keys(table: Table) -> list[str]:
    return [column.name for column in table.primary_key]


def _each_once(table: Table, columns: Sequence[str], rows: Sequence[RowTuple]) -> list[RowTuple]:
    key = itemgetter(*(columns.index(name) for name in _keys(table)))
    return list({key(row): row for row in reversed(rows)}.values())[::-1]


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
                name: value if name in keys else value + row[name] for name, value in known.items()
            }
    return list(found.values())
