"""The spend log of a typical proxy in PostgreSQL, as a yardstick for the ledger.

One row for each request, with about the columns and indexes of the table `LiteLLM_SpendLogs` of the
LiteLLM proxy: ids, tokens and times, a hashed key, and two JSON columns with the facts about the
request, some hundred bytes. A proxy gathers rows and inserts a hundred at once, and so does this.

The server is that of `tests/ecosystem`: a real PostgreSQL on this machine, its files not synced.
Its processor time is that of the one process that serves the connection; those that write the log
and the tables to the disk later are left out. So its times are the least that they can be.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import make_url

from tests.ecosystem.postgresql import postgresql
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest
from vllm_cost_meter.units.time import NS_PER_SECOND

AT_ONCE = 100
_COLUMNS = {
    "request_id": "text PRIMARY KEY",
    "call_type": "text NOT NULL",
    "api_key": "text NOT NULL",
    "spend": "double precision NOT NULL",
    "total_tokens": "integer NOT NULL",
    "prompt_tokens": "integer NOT NULL",
    "completion_tokens": "integer NOT NULL",
    "start_time": "timestamp(3) NOT NULL",
    "end_time": "timestamp(3) NOT NULL",
    "completion_start_time": "timestamp(3)",
    "model": "text NOT NULL",
    "model_id": "text",
    "model_group": "text",
    "custom_llm_provider": "text",
    "api_base": "text",
    "user_id": "text",
    "metadata": "jsonb",
    "cache_hit": "text",
    "cache_key": "text",
    "request_tags": "jsonb",
    "team_id": "text",
    "end_user": "text",
    "requester_ip_address": "text",
}
_TABLE = f"CREATE TABLE spend_logs ({', '.join(f'{n} {kind}' for n, kind in _COLUMNS.items())})"
_INDEXES = ("start_time", "start_time, request_id", "end_user")
_INSERT = (
    f"INSERT INTO spend_logs ({', '.join(_COLUMNS)}) VALUES ({', '.join(['%s'] * len(_COLUMNS))})"
    " ON CONFLICT DO NOTHING"
)


def measure(requests: list[tuple[EngineRequest, HttpRequest]]) -> dict[str, float]:
    """Insert a row for each request; return the times of each and its bytes."""
    rows = [_row(part, http) for part, http in requests]
    with postgresql() as server:
        url = make_url(server.new_database())
        address = {"host": url.query["host"], "user": url.username, "dbname": url.database}
        with psycopg.connect(**address, autocommit=True) as connection:
            connection.execute(_TABLE)
            for columns in _INDEXES:
                connection.execute(f"CREATE INDEX ON spend_logs ({columns})")
            before_s = _seconds(connection)
            for some in _chunks(rows):
                with connection.transaction(), connection.cursor() as cursor:
                    cursor.executemany(_INSERT, some)
            after_s = _seconds(connection)
            connection.execute("VACUUM ANALYZE spend_logs")
            sizes = "SELECT pg_table_size('spend_logs'), pg_indexes_size('spend_logs')"
            found = connection.execute(sizes).fetchone()
            assert found is not None
    wall_s, client_s, server_s = (after - at for at, after in zip(before_s, after_s, strict=True))
    return {
        "spend_log_per_s": round(len(rows) / wall_s),
        "spend_log_client_cpu_ms_each": round(client_s / len(rows) * 1e3, 4),
        "spend_log_server_cpu_ms_each": round(server_s / len(rows) * 1e3, 4),
        "spend_log_row_bytes_each": round(found[0] / len(rows)),
        "spend_log_index_bytes_each": round(found[1] / len(rows)),
    }


def _chunks(rows: list[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    for at in range(0, len(rows), AT_ONCE):
        yield rows[at : at + AT_ONCE]


def _seconds(connection: psycopg.Connection[Any]) -> tuple[float, float, float]:
    """Return the wall time, and the processor time of this process and of the server's for it."""
    (user, system) = Path(f"/proc/{connection.info.backend_pid}/stat").read_text().split()[13:15]
    ticks = int(user) + int(system)
    return time.perf_counter(), time.process_time(), ticks / os.sysconf("SC_CLK_TCK")


def _row(part: EngineRequest, http: HttpRequest) -> tuple[Any, ...]:
    bill, tenant = part.bill, http.owner.tenant
    key = hashlib.sha256(tenant.encode()).hexdigest()
    began, ended = _instant(http.started_at_ns), _instant(http.finished_at_ns)
    metadata = {
        "user_api_key": key,
        "user_api_key_alias": tenant,
        "user_api_key_team_id": tenant,
        "user_api_key_user_id": "default_user_id",
        "user_api_key_org_id": None,
        "requester_ip_address": "10.0.0.17",
        "applied_guardrails": [],
        "status": "success",
        "usage_object": {
            "prompt_tokens": bill.prompt_tokens,
            "completion_tokens": bill.output_tokens,
            "total_tokens": bill.prompt_tokens + bill.output_tokens,
            "prompt_tokens_details": {"cached_tokens": bill.cached_tokens},
        },
        "additional_usage_values": {},
    }
    return (
        *(http.response_id, "atext_completion", key, (http.cost_nanousd or 0) / 1e9),
        *(bill.prompt_tokens + bill.output_tokens, bill.prompt_tokens, bill.output_tokens),
        *(began, ended, began, http.model, hashlib.sha256(b"model").hexdigest(), http.model),
        *("hosted_vllm", "http://10.0.0.5:8000/v1", "default_user_id", json.dumps(metadata)),
        *("False", "Cache OFF", json.dumps([tenant, "User-Agent: client"]), tenant, ""),
        "10.0.0.17",
    )


def _instant(unix_ns: int) -> datetime:
    return datetime.fromtimestamp(unix_ns / NS_PER_SECOND, UTC).replace(tzinfo=None)
