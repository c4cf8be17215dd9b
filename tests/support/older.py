"""Ledgers of before version 18, made from ledgers of today: for tests of what brings them back."""

from collections.abc import Callable

LATENCIES = ("queue", "ttft", "tpot", "e2e")
_REPLY = (
    *("http_request_id", "response_id", "x_request_id", "tenant", "tenant_rule", "tenant_above"),
    *("model", "route", "status", "streamed", "started_at", "finished_at", "prompt_tokens"),
    *("cached_tokens", "output_tokens", "gpu_time_ns", "cost_nanousd"),
)
_ADDED = (
    *("ended_at", "reply_status", "reply_told", "reply_streamed", "reply_started_at"),
    *("reply_gpu_time_ns", "reply_cost_nanousd", "x_request_id"),
)


def as_version_17(execute: Callable[[str], object]) -> None:
    """Give all replies a row of their own, and all rows the columns of version 17.

    `execute` takes a statement that SQLite and PostgreSQL understand.
    """
    names = ", ".join(_REPLY)
    beside = "SELECT http_request_id FROM requests WHERE reply_status IS NOT NULL"
    execute(
        f"INSERT INTO http_requests ({names})"
        f" SELECT {names} FROM replies WHERE http_request_id IN ({beside})"
    )
    execute("DROP VIEW replies")
    for index in ("ended_at", "tenant", "x_request_id"):
        execute(f"DROP INDEX ix_requests_{index}")
    for column in (*_ADDED, "external_tokens", "kv_role"):
        execute(f"ALTER TABLE requests DROP COLUMN {column}")
    execute("ALTER TABLE open_requests DROP COLUMN kv_role")
    for table in ("requests", "http_requests"):
        execute(f"ALTER TABLE {table} ADD COLUMN cost_usd TEXT")
        execute(f"UPDATE {table} SET cost_usd = 'told' WHERE cost_nanousd IS NOT NULL")
    execute("UPDATE requests SET prompt_group = request_id WHERE prompt_group = ''")
    for name in LATENCIES:
        execute(f"UPDATE requests SET {name}_us = {name}_us / 1000.0")
        execute(f"ALTER TABLE requests RENAME COLUMN {name}_us TO {name}_ms")
    execute("CREATE INDEX ix_requests_finished_at ON requests (finished_at)")
    execute("CREATE INDEX ix_requests_tenant ON requests (tenant, finished_at)")
    execute("UPDATE schema_version SET version = 17")
