"""A large fleet for benchmarks: what its servers sent in 30 days, as tidying has added it up."""

import time
from typing import Any

from sqlalchemy import Boolean, String, Table, text

from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.fleet.opening import open_fleet, parse_fleet_url
from vllm_cost_meter.ledger.fleet.schema import TOLD
from vllm_cost_meter.ledger.fleet.views import day_columns
from vllm_cost_meter.units.time import NS_PER_HOUR

_HOURS = 720


def made_fleet(url: str, servers: int, tenants: int) -> None:
    """Make a fleet whose servers have a bill of each tenant in each hour of 30 days."""
    engine = open_fleet(parse_fleet_url(url))
    now = time.time_ns() // NS_PER_HOUR
    amounts = amount_names(engine)
    values = {
        **{"servers": servers, "tenants": tenants, "now": now},
        # Each tenant uses 1 us of prefill and 1 us of decode in each hour.
        "billed_ns": _HOURS * tenants * 2_000,
        "at": "2026-11-01T00:00:00.000000Z",
    }
    each_server = "FROM generate_series(1, :servers) AS s"
    each_tenant = f"{each_server}, generate_series(1, :tenants) AS t"
    days = day_columns()
    added = [name for name in days if name not in ("day", "group_id", "first_hour")]
    with engine.begin() as connection:
        for statement in (
            "INSERT INTO senders (sender_id, host, meter_version, joined_at, rows)"
            f" SELECT 's' || s, 'vm-' || s, '0', '', 'fleet' {each_server}",
            "INSERT INTO shipments (sender_id, first_number, last_number, last_digest, sent_at,"
            f" received_at, interval_s) SELECT 's' || s, 0, 9, '', '', '', 2 {each_server}",
            "INSERT INTO rollup_groups (group_id, run_id, tenant, tenant_rule, engine_status)"
            f" SELECT s * 1000 + t, 'run-' || s, 'tenant-' || t, 'key', 'ok' {each_tenant}",
            f"INSERT INTO sent_rollup_hours (sender_id, first_number, hour, group_id,"
            f" {', '.join(amounts)}) SELECT 's' || s, -1, :now - h, s * 1000 + t,"
            f" {', '.join('1000' for _ in amounts)} {each_tenant},"
            f" generate_series(0, {_HOURS - 1}) AS h",
            "INSERT INTO sent_rollup_days (sender_id, first_number, day, group_id, first_hour,"
            f" {', '.join(added)}) SELECT sender_id, -1, {days['day']}, group_id,"
            f" MIN({days['first_hour']}), {', '.join(f'SUM({name})' for name in added)}"
            f" FROM sent_rollup_hours GROUP BY sender_id, {days['day']}, group_id",
            "INSERT INTO sent_bill_sums (sender_id, first_number, run_id, bills, last_seq,"
            f" gpu_time_ns, digest, method, started_at, finished_at) SELECT 's' || s, -1,"
            f" 'run-' || s, {_HOURS}, {_HOURS}, :billed_ns, 0, 'x', :at, :at {each_server}",
            "INSERT INTO run_senders (run_id, sender_id)"
            f" SELECT 'run-' || s, 's' || s {each_server}",
            _filled(schema.runs, {"gpus": "1", "started_at": ":at"}, each_server),
            _filled(
                TOLD[schema.snapshots.name],
                {
                    **{"taken_at": ":at", "wall_ns": f"{_HOURS} * {NS_PER_HOUR}"},
                    **{"requests_ns": ":billed_ns", "billed_ns": ":billed_ns"},
                    **{"idle_ns": f"{_HOURS} * {NS_PER_HOUR} - :billed_ns", "state": "'on'"},
                    "last_seq": f"{_HOURS}",
                },
                each_server,
            ),
            _filled(
                TOLD[schema.engine_hours.name],
                {
                    **{"hour": ":now - h", "requests_ns": f":billed_ns / {_HOURS}"},
                    "idle_ns": f"{NS_PER_HOUR} - :billed_ns / {_HOURS}",
                },
                f"{each_server}, generate_series(0, {_HOURS - 1}) AS h",
            ),
        ):
            connection.execute(text(statement), values)
    # A database that has run for a month was analyzed by itself.
    with engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("ANALYZE"))
    engine.dispose()


def _filled(table: Table, given: dict[str, str], each: str) -> str:
    """Return the statement that inserts a row of a run for each server; what is not given is 0."""
    filled = {"run_id": "'run-' || s"} | {
        column.name: "''" if isinstance(column.type, String) else "false" if is_truth else "0"
        for column in table.c
        if (is_truth := isinstance(column.type, Boolean)) or not column.nullable
        if column.name != "run_id" and column.server_default is None
    }
    columns = filled | given
    names, values = ", ".join(columns), ", ".join(columns.values())
    return f"INSERT INTO {table.name} ({names}) SELECT {values} {each}"


def amount_names(engine: Any) -> list[str]:
    """Return the names of the amounts in the sums by hour."""
    keys = ("sender_id", "first_number", "hour", "group_id")
    asked = (
        "SELECT column_name FROM information_schema.columns WHERE table_name = 'sent_rollup_hours'"
    )
    with engine.connect() as connection:
        return [name for (name,) in connection.execute(text(asked)) if name not in keys]
