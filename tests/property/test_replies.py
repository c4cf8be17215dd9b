"""Every reply reads the same wherever its row went: beside its bill, or into a table of its own.

The judge is the drawn record itself, and what is told of it column by column.
"""

import sqlite3
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from tests.component.ledger.test_reader import http, part
from tests.support.batches import batches_of, write_batches
from tests.support.builders import reply_of
from tests.support.examples import examples
from tests.support.older import as_version_17
from tests.support.upkeep import sql, url_of, wrong_sums
from vllm_cost_meter.ledger.database import open_database, writing
from vllm_cost_meter.ledger.inserts import write
from vllm_cost_meter.ledger.tables.replies import put_beside_bills, replies
from vllm_cost_meter.records.owner import NamedBy, Owner
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, Usage
from vllm_cost_meter.units.time import rfc3339

# What a reply may say otherwise than its bill, and where its ids and times are its own.
OTHERWISE: list[dict[str, Any]] = [
    {"response_id": None},
    {"response_id": "another"},
    {"owner": Owner("bob")},
    {"owner": Owner("alice", NamedBy("api_key"))},
    {"owner": Owner("alice", parent="above")},
    {"model": None},
    {"route": "/v1/chat/completions"},
    {"usage": Usage(10, 2, 6)},
    {"usage": Usage(11, None, None)},
    {"gpu_time_ns": 301, "model": "another"},
]
OF_ITS_OWN: list[dict[str, Any]] = [
    {},
    {"x_request_id": None},
    {"status": 499, "streamed": True},
    {"usage": Usage()},
    {"usage": Usage(10, None, 5)},
    {"gpu_time_ns": None, "cost_nanousd": None},
    # Coarser than the bill.
    {"gpu_time_ns": 0, "cost_nanousd": 8},
    {"finished_at_ns": 1_800_000_000 * 10**9},
]
ids = [f"cost-{number:032x}" for number in range(3)]


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[list[EngineRequest], list[HttpRequest]]:
    parts, told = [], []
    for number, id in enumerate(ids):
        mine = [part(10 * number + at, id) for at in range(1, draw(st.integers(0, 2)) + 1)]
        mine = [replace(one, prompt_group=one.bill.request_id) for one in mine]
        parts += mine
        if draw(st.integers(0, 3)):
            reply = reply_of(mine[0], http(id)) if mine else http(id)
            reply = replace(reply, **draw(st.sampled_from(OF_ITS_OWN)))
            told.append(replace(reply, **draw(st.just({}) | st.sampled_from(OTHERWISE))))
    return parts, told


def columns_of(reply: HttpRequest) -> dict[str, Any]:
    return {
        "http_request_id": reply.http_request_id,
        "response_id": reply.response_id,
        "x_request_id": reply.x_request_id,
        "tenant": reply.owner.tenant,
        "tenant_rule": reply.owner.rule_text,
        "tenant_above": reply.owner.above_text,
        "model": reply.model,
        "route": reply.route,
        "status": reply.status,
        "streamed": reply.streamed,
        "prompt_tokens": reply.usage.prompt_tokens,
        "cached_tokens": reply.usage.cached_tokens,
        "output_tokens": reply.usage.output_tokens,
        "gpu_time_ns": reply.gpu_time_ns,
        "cost_nanousd": reply.cost_nanousd,
        "started_at": rfc3339(reply.started_at_ns),
        "finished_at": rfc3339(reply.finished_at_ns),
    }


def seen(path: Path) -> list[dict[str, Any]]:
    engine = open_database(url_of(path), create=False)
    with engine.connect() as connection:
        rows = connection.execute(select(replies).order_by(replies.c.http_request_id))
        found = [row._asdict() for row in rows]
    engine.dispose()
    return found


@settings(max_examples=examples(60))
@given(exchanges(), st.data())
def test_a_reply_reads_as_it_was_told_in_any_batches_and_after_any_move(drawn, data):
    parts, told = drawn
    expected = [columns_of(reply) for reply in sorted(told, key=lambda one: one.http_request_id)]
    batches = data.draw(batches_of([*parts, *told]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        engine = open_database(url_of(path))
        write_batches(engine, batches)
        assert seen(path) == expected
        with writing(engine).begin() as connection:
            put_beside_bills(connection)
        engine.dispose()
        assert seen(path) == expected
        assert wrong_sums(path) == []
        with closing(sqlite3.connect(path, isolation_level=None)) as plain:
            as_version_17(plain.execute)
            assert len(told) == plain.execute("SELECT count(*) FROM http_requests").fetchone()[0]
        open_database(url_of(path)).dispose()
        assert seen(path) == expected
        assert wrong_sums(path) == []


def test_a_reply_is_beside_its_only_bill_exactly_where_it_says_the_same(tmp_path):
    path = tmp_path / "ledger.db"
    bills, told = [], []
    for number, changes in enumerate([*OF_ITS_OWN, *OTHERWISE]):
        bills.append(part(number + 1, f"h{number}"))
        told.append(replace(reply_of(bills[-1], http(f"h{number}")), **changes))
    engine = open_database(url_of(path))
    with writing(engine).begin() as connection:
        write(connection, [*bills, *told])
    engine.dispose()
    beside = sql(path, "SELECT http_request_id FROM requests WHERE reply_status IS NOT NULL")
    alone = sql(path, "SELECT http_request_id FROM http_requests")
    assert {id for (id,) in beside} == {f"h{number}" for number in range(len(OF_ITS_OWN))}
    assert len(alone) == len(OTHERWISE)
