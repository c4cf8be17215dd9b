"""Insert a batch of records into an open transaction, idempotently by key.

A fact that is already there stays as it is (`ON CONFLICT DO NOTHING`), because bills may be
replayed. Only a higher snapshot number overwrites cumulative totals. Snapshots of one run are
merged before they are written: PostgreSQL refuses to change a row twice in one statement, and
nobody needs the older one. An open request and its bill may come in either order, and twice. If
both are there, the open request is deleted. A record of a row that was dropped is known already
(`retention/known.py`).

Invariant: writing a batch twice, or its records in another order or grouping, leaves the same rows.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from operator import itemgetter
from typing import TypeVar

from sqlalchemy import Table, delete
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from vllm_cost_meter.journal.entries import Record
from vllm_cost_meter.ledger import rows, schema
from vllm_cost_meter.ledger.fleet.changes import changes_of
from vllm_cost_meter.ledger.queries.open_requests import is_billed
from vllm_cost_meter.ledger.retention.known import without_dropped
from vllm_cost_meter.ledger.rollups.adding import NewRows, add, new_rows
from vllm_cost_meter.ledger.rollups.bill_sums import add_energy, new_energy
from vllm_cost_meter.ledger.tables.packed import PackedId, pack_id
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, OpenRequest
from vllm_cost_meter.records.snapshot import Snapshot

# SQLite takes 32,766 parameters since 3.32.
MAX_PARAMETERS = 8_000


def merge_snapshots(one: Snapshot, other: Snapshot) -> Snapshot:
    """Return the newer of two snapshots of a run, with the hours, models and energies of both.

    An hour, model or energy that both have comes from the newer one.
    """
    older, newer = sorted((one, other), key=lambda snapshot: snapshot.number)
    models = {model.version: model for model in (*older.cost_models, *newer.cost_models)}
    return replace(
        newer,
        hours={**older.hours, **newer.hours},
        cost_models=tuple(models.values()),
        energy=newer.energy.merged_over(older.energy),
    )


def newest_snapshots(snapshots: Iterable[Snapshot]) -> dict[str, Snapshot]:
    """Return the merged snapshot of each run."""
    merged: dict[str, Snapshot] = {}
    for snapshot in snapshots:
        known = merged.get(snapshot.run_id)
        merged[snapshot.run_id] = merge_snapshots(known, snapshot) if known else snapshot
    return merged


def write(connection: Connection, records: Sequence[Record]) -> None:
    """Write records."""
    parts: Sequence[EngineRequest] = [r for r in records if isinstance(r, EngineRequest)]
    https: Sequence[HttpRequest] = [r for r in records if isinstance(r, HttpRequest)]
    opened: Sequence[OpenRequest] = [r for r in records if isinstance(r, OpenRequest)]
    told = [record for record in records if isinstance(record, Snapshot)]
    if len(parts) + len(https) + len(opened) + len(told) != len(records):
        kinds = sorted({type(record).__name__ for record in records})
        raise TypeError(f"expected {Record} among {kinds}")
    merged = newest_snapshots(told)
    snapshots = merged.values()
    unknown = without_dropped(connection, parts, https, opened, merged.keys())
    parts, https, opened = unknown.parts, unknown.replies, unknown.opened
    new = new_rows(connection, parts, https)
    _write_requests(connection, new)
    add(connection, new)
    insert_rows(connection, schema.open_requests, [rows.open_row(request) for request in opened])
    announced = [part.bill.request_id for part in parts if part.announced]
    _close_billed(connection, [*announced, *(request.request_id for request in opened)])
    prices = {s.first_price.price_id: s.first_price for s in snapshots if s.first_price is not None}
    insert_rows(connection, schema.prices, [rows.price_row(price) for price in prices.values()])
    insert_rows(connection, schema.runs, [rows.run_row(snapshot) for snapshot in snapshots])
    upsert_rows(connection, schema.snapshots, [rows.snapshot_row(s) for s in snapshots])
    upsert_rows(connection, schema.live_usage, [rows.live_row(s) for s in snapshots])
    models = [row for snapshot in snapshots for row in rows.model_rows(snapshot)]
    insert_rows(connection, schema.cost_models, models)
    hours = [row for snapshot in snapshots for row in rows.hour_rows(snapshot)]
    upsert_rows(connection, schema.engine_hours, hours)
    energy_hours = [row for snapshot in snapshots for row in rows.energy_hour_rows(snapshot)]
    upsert_rows(connection, schema.energy_hours, energy_hours)
    energies = [row for snapshot in snapshots for row in rows.request_energy_rows(snapshot)]
    energies = unknown.energies(energies)
    energy_mj = new_energy(connection, energies)
    insert_rows(connection, schema.request_energy, energies)
    add_energy(connection, energy_mj)


def _write_requests(connection: Connection, new: NewRows) -> None:
    """Write new bills, and the new replies beside their bills or into rows of their own."""
    by_exchange: dict[str, list[EngineRequest]] = defaultdict(list)
    for part in new.parts.values():
        if (id := part.http_request_id) is not None and id in new.replies:
            by_exchange[id].append(part)
    beside: dict[tuple[str, int], rows.BesideBill | None] = {
        (only.bill.run_id, only.bill.seq): rows.beside_bill(only, new.replies[id])
        for id, (only, *others) in by_exchange.items()
        if not others and id not in new.begun
    }
    placed = {one.reply.http_request_id for one in beside.values() if one is not None}
    insert_rows(
        connection,
        schema.requests,
        (rows.part_row(part, beside.get(key)) for key, part in new.parts.items()),
    )
    pieces = chain.from_iterable(map(rows.piece_rows, new.parts.values()))
    insert_rows(connection, schema.usage_pieces, pieces)
    alone = (reply for id, reply in new.replies.items() if id not in placed)
    insert_rows(connection, schema.http_requests, map(rows.http_row, alone))


def _close_billed(connection: Connection, request_ids: Sequence[str]) -> None:
    """Delete the open requests with these ids that have their bill."""
    opened = schema.open_requests.c
    for at in range(0, len(request_ids), MAX_PARAMETERS):
        chunk = request_ids[at : at + MAX_PARAMETERS]
        connection.execute(
            delete(schema.open_requests).where(opened.request_id.in_(chunk), is_billed())
        )


def insert_rows(connection: Connection, table: Table, values: Iterable[rows.TableRow]) -> None:
    """Insert rows; a row with the same key stays as it is."""
    _run(connection, table, values, upsert=False)


def upsert_rows(connection: Connection, table: Table, values: Iterable[rows.TableRow]) -> None:
    """Insert rows; a row with the same key and a lower snapshot number is overwritten."""
    _run(connection, table, values, upsert=True)


def _run(
    connection: Connection, table: Table, values: Iterable[rows.TableRow], *, upsert: bool
) -> None:
    """Execute an insert of whole rows.

    On SQLite a statement of one row is executed for each: one of many rows would take SQLite half
    as long again, and SQLAlchemy longer for the parameters than SQLite for the rows. sqlite3 gives
    up the GIL for every row, which would hold up whoever shares the process with an event loop;
    the applier has a process of its own.
    """
    changes = changes_of(connection)
    values = values if changes is None else changes.passing(table, values)
    if connection.dialect.name == "postgresql":
        if whole := list(values):
            connection.execute(_statement(postgresql.insert(table), upsert=upsert), whole)
        return
    text, in_order = _sqlite_text(table, upsert)
    # Rows by name take five times the memory of tuples, so no more than one is there at once.
    if in_columns := list(map(in_order, values)):
        connection.exec_driver_sql(text, in_columns)


@cache
def _sqlite_text(
    table: Table, upsert: bool
) -> tuple[str, Callable[[rows.TableRow], Sequence[object]]]:
    """Return the insert of one row, and what puts a row's values into its order as stored."""
    statement = _statement(sqlite.insert(table), upsert=upsert)
    values_of = itemgetter(*table.c.keys())
    ids = [at for at, column in enumerate(table.c) if isinstance(column.type, PackedId)]

    def packed(row: rows.TableRow) -> Sequence[object]:
        values = list(values_of(row))
        for at in ids:
            if values[at] is not None:
                values[at] = pack_id(values[at])
        return tuple(values)

    return str(statement.compile(dialect=sqlite.dialect())), packed if ids else values_of


_Statement = TypeVar("_Statement", sqlite.Insert, postgresql.Insert)


def _statement(statement: _Statement, *, upsert: bool) -> _Statement:
    if not upsert:
        return statement.on_conflict_do_nothing()
    table = statement.table
    keys = list(table.primary_key)
    changed: Mapping[str, object] = {
        column.name: statement.excluded[column.name] for column in table.c if column not in keys
    }
    return statement.on_conflict_do_update(
        index_elements=keys, set_=changed, where=statement.excluded.number > table.c.number
    )
