"""A large fleet for benchmarks: what its servers sent in 30 days, as tidying has added it up."""

import time
from typing import Any

from sqlalchemy import text

from vllm_cost_meter.ledger.fleet.opening import open_fleet, parse_fleet_url
from vllm_cost_meter.ledger.fleet.views import day_columns
from vllm_cost_meter.units.time import NS_PER_HOUR

_HOURS = 720


def made_fleet(url: str, servers: int, tenants: int) -> None:
    """Make a fleet whose servers have a bill of each tenant in each hour of 30 days."""
    engine = open_fleet(parse_fleet_url(url))
    now = time.time_ns() // NS_PER_HOUR
    amounts = amount_names(engine)
    values = {"servers": servers, "tenants": tenants, "now": now}
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
            " gpu_time_ns, digest, method, started_at, finished_at)"
            f" SELECT 's' || s, -1, 'run-' || s, {_HOURS}, {_HOURS}, 1000, 0, 'x', :at, :at"
            f" {each_server}",
        ):
            connection.execute(text(statement), {**values, "at": "2026-11-01T00:00:00.000000Z"})
    # A database that has run for a month was analyzed by itself.
    with engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("ANALYZE"))
    engine.dispose()


def amount_names(engine: Any) -> list[str]:
    """Return the names of the amounts in the sums by hour."""
    keys = ("sender_id", "first_number", "hour", "group_id")
    asked = (
        "SELECT column_name FROM information_schema.columns WHERE table_name = 'sent_rollup_hours'"
    )
    with engine.connect() as connection:
        return [name for (name,) in connection.execute(text(asked)) if name not in keys]
