"""The join of bills with their exchanges, in the real runtime with a real ledger."""

import asyncio
import contextlib
import sqlite3
import time
from types import SimpleNamespace

import pytest

from tests.support.waiting import wait_for
from tests.support.world import COST_HEADERS, JSON, misses, replying
from vllm_cost_meter import activation
from vllm_cost_meter.api_server.breaker import Breaker
from vllm_cost_meter.api_server.open_requests import OpenRequests
from vllm_cost_meter.api_server.record_making import latencies
from vllm_cost_meter.api_server.runtime import NoRuntime, Runtime, get_runtime, make_runtime
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.exchange import Exchange
from vllm_cost_meter.guard import Guard
from vllm_cost_meter.journal.places import journal_ids
from vllm_cost_meter.journal.segments import Segment
from vllm_cost_meter.ledger.catching_up import catch_up
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.metrics import owners
from vllm_cost_meter.records.owner import NamedBy, Owner
from vllm_cost_meter.records.requests import KV_CONSUMER, KV_PRODUCER, Latencies

EVERYTHING = "SELECT request_id, http_request_id, tenant, route, response_id FROM requests"


def exchange_of(route: str = "/v1/completions", tenant: str = "alice") -> Exchange:
    return Exchange(route, Owner(tenant, NamedBy("api_key")), None, time.time_ns())


# ---- births and bills


def test_a_bill_without_a_birth_is_kept_under_unknown(world):
    world.engine.billed("stranger")
    assert world.rows(EVERYTHING) == [("stranger", None, "unknown", None, None)]
    assert world.rows("SELECT started_at = finished_at FROM requests") == [(1,)]
    with LedgerReader(world.runtime.ledger_url) as reader:
        (found,) = reader.look_up("stranger")
    assert found["parts"][0]["prompt_group"] == "stranger"


def test_a_bill_of_an_exchange_has_its_tenant_route_and_response(world):
    exchange = exchange_of()
    world.engine.born("cmpl-x-0-abc", "cmpl-x-0", exchange=exchange, prompt_group="g", lora="l")
    world.engine.billed("cmpl-x-0-abc")
    assert world.rows(EVERYTHING) == [
        ("cmpl-x-0-abc", exchange.http_request_id, "alice", "/v1/completions", "cmpl-x")
    ]
    assert world.rows("SELECT external_id, prompt_group, lora, cost_nanousd FROM requests") == [
        ("cmpl-x-0", "g", "l", 30)
    ]
    assert exchange.response_id == "cmpl-x"
    assert (exchange.gpu_time_ns, exchange.prefill_ns, exchange.cost_nanousd) == (3_000, 1_000, 30)


def test_a_bill_says_which_half_it_is_by_its_router_else_by_its_server(world):
    world.engine.born("told", exchange=exchange_of(), kv_role=KV_PRODUCER)
    world.engine.born("not told", exchange=exchange_of())
    world.runtime.collector.kv_role = KV_CONSUMER
    world.engine.born("of its server", exchange=exchange_of())
    world.engine.born("told otherwise", exchange=exchange_of(), kv_role=KV_PRODUCER)
    for name in ("told", "not told", "of its server", "told otherwise"):
        world.engine.billed(name)
    assert world.rows("SELECT request_id, kv_role FROM requests ORDER BY seq") == [
        ("told", KV_PRODUCER), ("not told", None), ("of its server", KV_CONSUMER),
        ("told otherwise", KV_PRODUCER),
    ]  # fmt: skip


def test_a_birth_told_twice_is_one_birth(world):
    exchange = exchange_of()
    for _ in range(2):
        world.engine.born("r", exchange=exchange)
    assert (exchange.born, exchange.unbilled) == (1, 1)
    world.engine.billed("r")
    assert exchange.unbilled == 0


def test_a_bill_told_twice_does_not_make_a_reply_wait_less(world):
    exchange = exchange_of()
    for name in ("a", "b"):
        world.engine.born(name, exchange=exchange)
    for _ in range(2):
        world.engine.billed("a")
    assert exchange.unbilled == 1


def test_births_are_bounded_and_the_oldest_goes_first(make_world):
    open_requests = OpenRequests(requests_max=3)
    world = make_world(open_requests=open_requests)
    exchange = exchange_of()
    for name in "abcde":
        world.engine.born(name, exchange=exchange)
    assert len(open_requests) == 3
    for name in "abcde":
        world.engine.billed(name)
    tenants = world.rows("SELECT request_id, tenant FROM requests ORDER BY seq")
    assert tenants == [("a", "unknown"), ("b", "unknown"), *((n, "alice") for n in "cde")]


def test_parts_that_come_after_the_reply_link_to_it(world):
    async def ask():
        late = []

        async def app(scope, receive, send):
            async def background():
                await asyncio.sleep(0.02)
                world.engine.generate("turn-2")

            late.append(asyncio.create_task(background()))
            await replying(JSON, [b"{}"], lambda: world.engine.generate("turn-1"))(
                scope, receive, send
            )

        await world.ask(app)
        await asyncio.gather(*late)

    asyncio.run(ask())
    assert world.rows(
        "SELECT count(*), count(DISTINCT http_request_id), min(tenant) FROM requests"
        " JOIN replies USING (http_request_id, tenant)"
    ) == [(2, 1, "unknown")]


def test_an_exchange_waits_for_births_that_follow_a_bill(world):
    async def wait() -> bool:
        exchange = exchange_of()
        world.engine.born("a", exchange=exchange)
        world.engine.billed("a")
        world.engine.born("b", exchange=exchange)
        waiting = asyncio.create_task(exchange.all_billed())
        await asyncio.sleep(0)
        assert not waiting.done()
        world.engine.billed("b")
        await asyncio.wait_for(waiting, 1)
        return exchange.gpu_time_ns == 6_000

    assert asyncio.run(wait())


# ---- latencies


def times(**changes) -> SimpleNamespace:
    values = {
        "arrival_time": 1_000.0,
        "queued_ts": 5.0,
        "scheduled_ts": 5.5,
        "first_token_ts": 6.0,
        "last_token_ts": 8.0,
        "first_token_latency": 1.25,
        **changes,
    }
    return SimpleNamespace(**values)


def test_latencies_are_in_milliseconds():
    assert latencies(times(), 5, 1_004 * 10**9) == Latencies(500.0, 1_250.0, 500.0, 4_000.0)


def test_what_has_not_happened_has_no_latency():
    assert latencies(times(scheduled_ts=0.0), 5, 0).queue_ms is None
    assert latencies(times(first_token_ts=0.0), 5, 0).ttft_ms is None
    assert latencies(times(last_token_ts=0.0, first_token_ts=0.0), 5, 0).tpot_ms is None
    assert latencies(times(), 1, 0).tpot_ms is None
    assert latencies(times(), 0, 0).tpot_ms is None
    assert latencies(times(arrival_time=0.0), 5, 0).e2e_ms is None


def test_latencies_are_unknown_where_the_wall_clock_was_set_back_meanwhile():
    told = latencies(times(first_token_latency=-3_598.75), 5, 500 * 10**9)
    assert (told.ttft_ms, told.e2e_ms) == (None, None)
    assert (told.queue_ms, told.tpot_ms) == (500.0, 500.0), "by a clock that nobody sets"


def test_latencies_are_columns_of_the_record(world):
    world.engine.born("r", times=times(), exchange=None)
    world.engine.billed("r")
    assert world.rows("SELECT queue_us, ttft_us, tpot_us FROM requests") == [
        (500_000, 1_250_000, 500_000)
    ]


@pytest.mark.parametrize("broken", [SimpleNamespace(), times(queued_ts=None)])
def test_times_that_are_not_understood_cost_their_columns_and_not_the_bill(world, broken):
    for number in range(20):
        world.engine.born(f"r{number}", times=broken)
        world.engine.billed(f"r{number}")
    assert world.rows("SELECT count(*), count(queue_us) FROM requests") == [(20, 0)]
    assert not world.runtime.guard.off


# ---- errors


def test_run_contains_and_counts_and_gives_up_after_ten_in_a_row(world):
    runtime = world.runtime

    def fail(_collector: object) -> None:
        raise RuntimeError("boom")

    for _ in range(9):
        assert runtime.run("hook", fail) is None
    assert runtime.run("hook", lambda collector: collector is runtime.collector) is True
    for _ in range(10):
        runtime.run("hook", fail)
    assert runtime.guard.off
    assert runtime.guard.errors == 19
    assert runtime.run("hook", lambda _: 1) is None


def test_a_metric_that_cannot_be_counted_costs_no_bill(world, monkeypatch):
    def full(*_labels):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owners.BILLS, "labels", full)
    client = world.run(replying(JSON, [b"{}"], world.engine.generate))
    assert len(client.ours) == len(COST_HEADERS)
    assert world.rows("SELECT count(*) FROM requests") == [(1,)]
    assert world.runtime.guard.errors == 1


def test_a_runtime_that_cannot_be_made_is_one_that_does_nothing(monkeypatch):
    monkeypatch.setenv("COST_METER_PORT", "wrong")
    found = make_runtime()
    assert isinstance(found, NoRuntime)
    assert found.run("hook", lambda: 1 / 0) is None


def test_a_process_has_one_runtime(monkeypatch):
    monkeypatch.setenv("COST_METER_PORT", "wrong")
    get_runtime.cache_clear()
    try:
        assert get_runtime() is get_runtime()
    finally:
        get_runtime.cache_clear()


def test_there_is_no_runtime_where_this_vllm_was_refused(monkeypatch, tmp_path):
    """`--middleware` brings the middleware into a vLLM that is to be left untouched, too."""
    monkeypatch.setattr(activation, "_refused", True)
    monkeypatch.setenv("COST_METER_LEDGER", f"sqlite:///{tmp_path}/ledger.db")
    assert isinstance(make_runtime(), NoRuntime)
    assert not (tmp_path / "ledger.db").exists()


def test_errors_that_are_not_in_a_row_do_not_switch_the_meter_off(world):
    """An exchange of which no record can be made is an error of `settle`; so is another, later."""

    async def settle(good: bool) -> bool:
        exchange = exchange_of()
        if not good:
            exchange.sent = None
        return await world.collector.settle(exchange) is not None

    for _ in range(12):
        assert asyncio.run(settle(False)) is False
        assert asyncio.run(settle(True)) is True
    assert not world.runtime.guard.off
    assert world.runtime.guard.errors == 12


# ---- the breaker and the ledger


def test_the_breaker_opens_at_five_in_a_row_and_closes_at_the_first_bill():
    breaker, before = Breaker(Guard("test")), misses()
    for _ in range(4):
        breaker.missed()
    breaker.bill_came()
    for _ in range(4):
        breaker.missed()
    assert not breaker.open
    breaker.missed()
    assert breaker.open
    breaker.missed()
    assert misses() - before == 10
    breaker.bill_came()
    assert not breaker.open


@contextlib.contextmanager
def writes():
    """Count what this process writes into journals."""
    seen: list[int] = []
    real = Segment.append

    def counted(segment: Segment, data: bytes) -> None:
        real(segment, data)
        seen.append(1)

    Segment.append = counted
    try:
        yield seen
    finally:
        Segment.append = real


def test_headers_of_many_replies_share_their_writes(world):
    async def ask() -> int:
        with writes() as seen:
            clients = await asyncio.gather(
                *(
                    world.ask(replying(JSON, [b"{}"], lambda n=n: world.engine.generate(f"r{n}")))
                    for n in range(64)
                )
            )
        assert all(len(client.ours) == len(COST_HEADERS) for client in clients)
        return len(seen)

    assert asyncio.run(ask()) < 64


def test_a_header_waits_for_at_most_the_write_under_way_and_its_own(world, monkeypatch):
    waited: list[int] = []

    async def ask() -> None:
        async def others():
            for number in range(2_000):
                world.engine.billed(f"other-{number}")
                await asyncio.sleep(0)

        busy = asyncio.create_task(others())
        for number in range(20):
            with writes() as seen:
                append = world.runtime.writer.append

                def counted(*records, append=append, seen=seen):
                    future = append(*records)
                    # Called by the writer, which may be writes ahead of the event loop.
                    future.add_done_callback(lambda _: waited.append(len(seen)))
                    return future

                with monkeypatch.context() as patch:
                    patch.setattr(world.runtime.writer, "append", counted)
                    client = await world.ask(
                        replying(JSON, [b"{}"], lambda n=number: world.engine.generate(f"r{n}"))
                    )
            assert len(client.ours) == len(COST_HEADERS)
        await busy

    asyncio.run(ask())
    assert len(waited) == 20
    assert max(waited) <= 2
    assert world.rows("SELECT count(*) FROM requests") == [(2_020,)]


def test_the_first_reply_does_not_wait_for_its_journal_to_be_made(tmp_path):
    """API servers but the first write nothing before their first bill."""
    runtime = Runtime(Settings(ledger=f"sqlite:///{tmp_path / 'new' / 'ledger.db'}"))
    wait_for(lambda: journal_ids(tmp_path / "new" / "ledger.db.journal"))
    runtime.writer.close(5)


def test_stop_journals_what_waits(tmp_path):
    runtime = Runtime(Settings(ledger=f"sqlite:///{tmp_path / 'ledger.db'}"))
    exchange = exchange_of()
    exchange.part_was_born(None)
    runtime.collector.ended(exchange)
    asyncio.run(runtime.stop())
    assert catch_up(runtime.ledger_url) == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        assert connection.execute("SELECT count(*) FROM replies").fetchall() == [(1,)]
