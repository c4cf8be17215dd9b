"""Schema migrations: bring an older ledger to this version, one step per version.

A step is plain SQL that SQLite and PostgreSQL both take, or a function. It stays frozen as it was
released, so it does not follow later changes to the schema. New columns of old rows hold 0 for a
count that nobody kept, the text "unknown" for a name, and NULL for an unknown amount.

Invariant: a ledger has one version at any instant, because all steps and the new version number are
one transaction.
"""

import sqlite3
from collections.abc import Callable, Mapping
from typing import NamedTuple

from sqlalchemy import inspect, text
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.tables.replies import put_beside_bills
from vllm_cost_meter.ledger.tables.unpacked import keep_single_hours, pack_rows


class Column(NamedTuple):
    """A column that a step adds."""

    table: str
    name: str
    kind: str


def _added(table: str, kind: str, *names: str) -> tuple[Column, ...]:
    return tuple(Column(table, name, kind) for name in names)


def _index_again(
    table: str, name: str, columns: str, *, where: str | None = None
) -> tuple[str, ...]:
    """Return the statements that make an index anew, with other columns or fewer rows."""
    only = f" WHERE {where}" if where else ""
    index = f"ix_{table}_{name}"
    return (
        f"DROP INDEX IF EXISTS {index}",
        f"CREATE INDEX {index} ON {table} ({columns}){only}",
    )


_COUNT = "BIGINT NOT NULL DEFAULT 0"
_WASTED = (
    "marginal_ns",
    "recomputed_ns",
    "recomputed_tokens",
    "rejected_ns",
    "rejected_tokens",
)

_ENERGY_CLASSES = (
    "requests_mj",
    "in_flight_mj",
    "idle_mj",
    "sleep_mj",
    "tail_mj",
    "dummy_mj",
    "host_mj",
    "lost_mj",
    "unattributed_mj",
)


def _rename_error_of_one_plane(connection: Connection) -> None:
    """Give the error of the other form its name; a table made just now has it already."""
    if "error_one_plane" in _columns(connection, "cost_models"):
        connection.execute(
            text("ALTER TABLE cost_models RENAME COLUMN error_one_plane TO error_other_form")
        )


_LATENCIES = ("queue", "ttft", "tpot", "e2e")
_SQLITE_DROPS_SINCE = (3, 35)


def _make_rows_smaller(connection: Connection) -> None:
    """Change the rows of requests and replies to version 18, each table in one pass."""
    # A repair makes a table whose definition is lost as it is today.
    for table in ("requests", "http_requests"):
        if "cost_usd" in _columns(connection, table):
            connection.execute(text(_without(connection, table, "cost_usd")))
    if "queue_us" in _columns(connection, "requests"):
        return
    for name in _LATENCIES:
        connection.execute(text(f"ALTER TABLE requests RENAME COLUMN {name}_ms TO {name}_us"))
    for index in ("ix_requests_finished_at", "ix_requests_tenant"):
        connection.execute(text(f"DROP INDEX IF EXISTS {index}"))
    whole = ", ".join(f"{name}_us = {_whole(f'{name}_us * 1000')}" for name in _LATENCIES)
    connection.execute(
        text(
            f"UPDATE requests SET {whole}, ended_at = finished_at,"  # noqa: S608 - names of columns
            " prompt_group = CASE WHEN prompt_group = request_id THEN '' ELSE prompt_group END"
        )
    )
    put_beside_bills(connection, has_external=False)
    for statement in (
        *_index_again("requests", "ended_at", "ended_at"),
        *_index_again("requests", "tenant", "tenant, ended_at"),
        *_index_again("requests", "x_request_id", "x_request_id", where="x_request_id IS NOT NULL"),
    ):
        connection.execute(text(statement))


def _without(connection: Connection, table: str, column: str) -> str:
    """Return the statement that takes a column away; an older SQLite can empty it only."""
    if connection.dialect.name == "sqlite" and sqlite3.sqlite_version_info < _SQLITE_DROPS_SINCE:
        return f"UPDATE {table} SET {column} = NULL"  # noqa: S608 - names of this package
    return f"ALTER TABLE {table} DROP COLUMN {column}"


def _whole(us: str) -> str:
    """Return the SQL for a time as `rows.us_of` rounds it, as the sums have it: halves to even."""
    even = f"2 * round({us} / 2)"
    return (
        f"CASE WHEN {us} < 0 THEN 0 WHEN abs({us} - round({us})) = 0.5 THEN {even}"
        f" ELSE round({us}) END"
    )


# The step for each version, which makes it the next version.
MIGRATIONS: Mapping[int, tuple[str | Column | Callable[[Connection], None], ...]] = {
    1: (
        *_added("runs", "TEXT NOT NULL DEFAULT 'unknown'", "hardware", "parallelism"),
        *_added("snapshots", "TEXT NOT NULL DEFAULT 'unknown'", "prior"),
        *_added("requests", _COUNT, *_WASTED, "batch"),
        *_added("requests", "BIGINT", "marginal_cost_nanousd"),
        *_added("requests", "INTEGER NOT NULL DEFAULT 0", "first_model", "last_model"),
        *_added("usage_pieces", _COUNT, *_WASTED),
        # `create_all` creates the missing table cost_models.
    ),
    2: (
        *_added("runs", "BIGINT", "kv_blocks"),
        *_added("runs", "INTEGER", "kv_block_size"),
        *_added("requests", _COUNT, "kv_block_ms", "step_ns", "saved_estimate_ns"),
        *_added("usage_pieces", _COUNT, "kv_block_ms", "step_ns", "saved_estimate_ns"),
        *_added("runs", "TEXT", "devices"),
        *_added("snapshots", "BIGINT", "energy_mj", *_ENERGY_CLASSES, "energy_unknown_ns"),
        *_added("snapshots", "TEXT", "energy_reason"),
        "UPDATE snapshots SET energy_reason = 'earlier: this version did not measure it'",
        # `create_all` creates energy_hours, request_energy, live_usage and open_requests.
    ),
    3: (
        *_added("runs", "TEXT NOT NULL DEFAULT 'unknown'", "host"),
        *(
            column
            for table in ("requests", "open_requests", "http_requests")
            for column in _added(table, "TEXT NOT NULL DEFAULT 'unknown'", "tenant_rule")
        ),
        *_added("requests", "TEXT", "tenant_parent", "tags"),
        *_added("open_requests", "TEXT", "tenant_parent", "tags"),
    ),
    4: (*_added("runs", "TEXT NOT NULL DEFAULT 'unknown'", "precision"),),
    # `create_all` creates saturation_points, billing_snapshots, invoice_lines and billed_hours.
    5: (),
    6: (
        *_added("requests", _COUNT, "cut_ns", "cut_tokens"),
        *_added("usage_pieces", _COUNT, "cut_ns", "cut_tokens"),
    ),
    7: (*_added("runs", "TEXT", "labels"),),
    8: (
        *(
            column
            for table in ("requests", "open_requests", "http_requests")
            for column in _added(table, "TEXT", "tenant_above")
        ),
        # Older rows know the parent only. Each name has a line of its own.
        "UPDATE requests SET tenant_above = '\n' || tenant_parent || '\n'"
        " WHERE tenant_parent IS NOT NULL",
        "UPDATE open_requests SET tenant_above = '\n' || tenant_parent || '\n'"
        " WHERE tenant_parent IS NOT NULL",
        "UPDATE http_requests SET tenant_above = (SELECT MIN(r.tenant_above) FROM requests r"
        " WHERE r.http_request_id = http_requests.http_request_id)",
        "CREATE INDEX IF NOT EXISTS ix_requests_tenant ON requests (tenant, tenant_above)",
    ),
    # `create_all` creates journals and journal_losses.
    9: (),
    # `create_all` creates the rollups, and `rollups.rebuilding` makes their sums.
    10: (),
    # `create_all` creates bill_sums and energy_sums, and `rollups.bill_sums` makes them.
    # Reports read sums: fewer indexes, and smaller ones.
    11: (
        "DROP INDEX IF EXISTS ix_requests_tenant",
        *_index_again("requests", "http", "http_request_id"),
        *_index_again("requests", "external_id", "external_id", where="external_id IS NOT NULL"),
        *_index_again("requests", "response_id", "response_id", where="response_id IS NOT NULL"),
        *_index_again("http_requests", "finished", "finished_at"),
        *_index_again("http_requests", "tenant", "tenant, finished_at"),
        *_index_again(
            "http_requests", "response_id", "response_id", where="response_id IS NOT NULL"
        ),
        *_index_again(
            "http_requests", "x_request_id", "x_request_id", where="x_request_id IS NOT NULL"
        ),
        *_index_again("rollup_groups", "tenant", "tenant, tenant_above"),
    ),
    # `create_all` creates the tables of retention.
    12: (),
    # Rows of requests have instants as integers, short ids, and their hour if it is one. Two
    # indexes have fewer rows.
    13: (
        *_added("requests", "INTEGER", "hour"),
        # Indexes that change are made once, of the packed rows.
        "DROP INDEX IF EXISTS ix_requests_external_id",
        "DROP INDEX IF EXISTS ix_requests_response_id",
        "DROP INDEX IF EXISTS ix_usage_pieces_hour",
        pack_rows,
        keep_single_hours,
        *(
            statement
            for name in ("external_id", "response_id")
            for statement in _index_again(
                "requests", name, name, where=f"substr(request_id, 1, length({name})) <> {name}"
            )
        ),
        *_index_again("requests", "tenant", "tenant, finished_at"),
    ),
    14: (*_added("cost_models", "TEXT", "curve"), _rename_error_of_one_plane),
    15: (
        *_added("cost_models", "TEXT", "charge_errors"),
        *_added("prices", "TEXT", "usd_per_kv_block_hour"),
        *_added("runs", "TEXT NOT NULL DEFAULT 'victim'", "preemption_paid_by"),
        *_added("snapshots", _COUNT, "recomputed_ns"),
        *_added("engine_hours", _COUNT, "recomputed_ns"),
        *_added("snapshots", "BIGINT", "recomputed_mj"),
        # Energy that is known has every class.
        "UPDATE snapshots SET recomputed_mj = 0 WHERE energy_mj IS NOT NULL",
        *_added("energy_hours", _COUNT, "recomputed_mj"),
    ),
    # Of older bills nobody knows how far their charges may be off. So in their rows that is NULL,
    # and in sums no GPU time has a known error.
    16: (
        *_added("requests", "BIGINT", "charge_error_ns"),
        *_added("usage_pieces", "BIGINT", "charge_error_ns"),
        *(
            column
            for table in ("rollup_hours", "rollup_days", "dropped_hours")
            for column in _added(table, _COUNT, "charge_known_ns", "charge_error_ns")
        ),
    ),
    # A reply stands beside its bill where it can, and the rest of a row takes fewer bytes.
    17: (
        Column("requests", "ended_at", "BIGINT DEFAULT 0 NOT NULL"),
        Column("requests", "reply_status", "INTEGER"),
        Column("requests", "reply_streamed", "BOOLEAN"),
        Column("requests", "reply_started_at", "BIGINT"),
        Column("requests", "reply_told", "INTEGER"),
        Column("requests", "reply_gpu_time_ns", "BIGINT"),
        Column("requests", "reply_cost_nanousd", "BIGINT"),
        Column("requests", "x_request_id", "TEXT"),
        _make_rows_smaller,
    ),
    # The outbox: new tables only.
    18: (),
    # Of older bills nobody knows which of their cached tokens came over a KV connector. So in their
    # rows that is NULL, and in sums no prompt is known.
    19: (
        *_added("requests", "BIGINT", "external_tokens"),
        *_added("requests", "TEXT", "kv_role"),
        *_added("open_requests", "TEXT", "kv_role"),
        *(
            column
            for table in ("rollup_hours", "rollup_days", "dropped_hours")
            for column in _added(table, _COUNT, "external_tokens", "external_known_tokens")
        ),
    ),
}
# The columns that a step gives another name, by the version that still had the old one.
RENAMED_COLUMNS: Mapping[int, Mapping[tuple[str, str], str]] = {
    14: {("cost_models", "error_one_plane"): "error_other_form"},
    17: {("requests", f"{name}_ms"): f"{name}_us" for name in _LATENCIES},
}
# Columns that a step takes away, by the version that still had them.
DROPPED_COLUMNS: Mapping[int, tuple[tuple[str, str], ...]] = {
    17: (("requests", "cost_usd"), ("http_requests", "cost_usd")),
}
FIRST_WITH_ROLLUPS = 11
FIRST_WITH_BILL_SUMS = 12
# Later steps change no row of a request: a new column is a word in the schema.
FIRST_WITH_TODAYS_ROWS = 18


def migrate(connection: Connection, found: int, wanted: int) -> None:
    """Bring a ledger from version `found` to `wanted`, within the connection's transaction."""
    for version in range(found, wanted):
        for step in MIGRATIONS[version]:
            if callable(step):
                step(connection)
            elif isinstance(step, str):
                connection.execute(text(step))
            elif step.name not in _columns(connection, step.table):
                connection.execute(
                    text(f"ALTER TABLE {step.table} ADD COLUMN {step.name} {step.kind}")
                )
    connection.execute(text("UPDATE schema_version SET version = :v"), {"v": wanted})


def _columns(connection: Connection, table: str) -> set[str]:
    # A table that the older version lacked exists already, with today's columns.
    return {column["name"] for column in inspect(connection).get_columns(table)}
