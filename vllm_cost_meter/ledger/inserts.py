"""One batch of records into an open transaction, idempotent by key.

A fact that is already there stays as it is (`ON CONFLICT DO NOTHING`): bills may be replayed.
Cumulative totals give way to those of a higher snapshot number only. Snapshots of one run are
merged before they are written, because PostgreSQL refuses to touch a row twice in one statement,
and because nobody needs the older one.

Invariant: writing a batch twice, or its records in another order or grouping, leaves the same rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from sqlalchemy import Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger import rows, schema
from vllm_cost_meter.records import EngineRequest, HttpRequest, Price, Snapshot

Record = EngineRequest | HttpRequest | Snapshot


def merge_snapshots(one: Snapshot, other: Snapshot) -> Snapshot:
    """Return the newer of two snapshots of a run, with the hours of both, the newer ones' first."""
    older, newer = sorted((one, other), key=lambda snapshot: snapshot.number)
    return replace(newer, hours={**older.hours, **newer.hours})


def newest_snapshots(snapshots: Iterable[Snapshot]) -> dict[str, Snapshot]:
    """Return the merged snapshot of each run."""
    merged: dict[str, Snapshot] = {}
    for snapshot in snapshots:
        known = merged.get(snapshot.run_id)
        merged[snapshot.run_id] = merge_snapshots(known, snapshot) if known else snapshot
    return merged


def write(connection: Connection, records: Sequence[Record], price: Price | None) -> None:
    """Write records; `price` is that of the runs that start with them."""
    parts = [record for record in records if isinstance(record, EngineRequest)]
    https = [record for record in records if isinstance(record, HttpRequest)]
    merged = newest_snapshots(record for record in records if isinstance(record, Snapshot))
    snapshots = merged.values()
    known = len(parts) + len(https) + sum(isinstance(record, Snapshot) for record in records)
    if known != len(records):
        kinds = sorted({type(record).__name__ for record in records})
        raise TypeError(f"expected EngineRequest, HttpRequest or Snapshot among {kinds}")
    price_id = price.price_id if price else None
    _insert(connection, schema.requests, [rows.part_row(part) for part in parts])
    pieces = [row for part in parts for row in rows.piece_rows(part)]
    _insert(connection, schema.usage_pieces, pieces)
    _insert(connection, schema.http_requests, [rows.http_row(http) for http in https])
    _insert(connection, schema.runs, [rows.run_row(s, price_id) for s in snapshots])
    _upsert(connection, schema.snapshots, [rows.snapshot_row(s) for s in snapshots])
    hours = [row for snapshot in snapshots for row in rows.hour_rows(snapshot)]
    _upsert(connection, schema.engine_hours, hours)


def write_price(connection: Connection, price: Price) -> None:
    """Write a price unless it is there."""
    _insert(connection, schema.prices, [rows.price_row(price)])


def _statement(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def _insert(connection: Connection, table: Table, values: list[rows.Row]) -> None:
    """Insert rows, leaving those alone whose key is there."""
    if values:
        connection.execute(_statement(connection, table).on_conflict_do_nothing(), values)


def _upsert(connection: Connection, table: Table, values: list[rows.Row]) -> None:
    """Insert rows, or overwrite those of a lower snapshot number."""
    if not values:
        return
    statement = _statement(connection, table)
    keys = list(table.primary_key.columns)
    changed: Mapping[str, object] = {
        column.name: statement.excluded[column.name] for column in table.c if column not in keys
    }
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=keys,
            set_=changed,
            where=statement.excluded.number > table.c.number,
        ),
        values,
    )
