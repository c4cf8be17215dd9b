"""Requests that run are announced to the ledger, by the real collector; short ones never are."""

import asyncio
import contextlib
import sqlite3
import time
from types import SimpleNamespace

from tests.component.api_server.test_collector import exchange_of
from tests.support.world import Engine, make_runtime
from vllm_cost_meter.api_server import collector as collector_module
from vllm_cost_meter.api_server.collector import Collector
from vllm_cost_meter.api_server.open_requests import OpenRequests
from vllm_cost_meter.exchange import Exchange
from vllm_cost_meter.ledger.catching_up import catch_up
from vllm_cost_meter.records.owner import NamedBy, Owner

ANNOUNCED = "SELECT request_id, http_request_id, tenant, x_request_id FROM open_requests"


def pass_rounds(world, times: int = 1) -> None:
    """What the runtime does after each snapshot interval."""
    for _ in range(times):
        world.collector.announce_due()


def test_a_request_is_announced_at_its_second_round_and_gone_with_its_bill(world):
    exchange = Exchange(
        "/v1/completions", Owner("alice", NamedBy("api_key")), "mine", time.time_ns()
    )
    world.engine.born("cmpl-x-0-abc", "cmpl-x-0", exchange=exchange, prompt_group="g", lora="l")
    pass_rounds(world)
    assert world.rows(ANNOUNCED) == []
    pass_rounds(world)
    assert world.rows(ANNOUNCED) == [("cmpl-x-0-abc", exchange.http_request_id, "alice", "mine")]
    assert world.rows(
        "SELECT external_id, response_id, prompt_group, lora, route FROM open_requests"
    ) == [("cmpl-x-0", "cmpl-x", "g", "l", "/v1/completions")]
    world.engine.billed("cmpl-x-0-abc")
    assert world.rows(ANNOUNCED) == []
    assert world.rows("SELECT count(*) FROM requests") == [(1,)]


def test_a_short_request_is_never_announced(world, monkeypatch):
    announced = []
    monkeypatch.setattr(collector_module, "open_request", lambda birth, _: announced.append(birth))
    for number in range(20):
        world.engine.born(f"r{number}")
        pass_rounds(world)
        world.engine.billed(f"r{number}")
    pass_rounds(world, 2)
    assert announced == []


def test_a_request_is_announced_once(world):
    world.engine.born("r")
    pass_rounds(world, 2)
    queued = world.runtime.writer.queued
    pass_rounds(world, 3)
    world.collector.announce_all()
    assert world.runtime.writer.queued == queued


def test_who_asks_has_the_youngest_announced_too(world):
    world.engine.born("old")
    pass_rounds(world)
    world.engine.born("young")
    world.collector.announce_all()
    assert world.rows(ANNOUNCED) == [
        ("old", None, "unknown", None),
        ("young", None, "unknown", None),
    ]


def test_a_request_that_cannot_be_announced_still_gets_its_bill(world, monkeypatch):
    def fail(*_) -> None:
        raise RuntimeError("boom")

    world.engine.born("r", exchange=exchange_of())
    with monkeypatch.context() as patch:
        patch.setattr(collector_module, "open_request", fail)
        world.runtime.run("announce", Collector.announce_all)
    assert world.runtime.guard.errors == 1
    world.engine.billed("r")
    assert world.rows("SELECT request_id, tenant FROM requests") == [("r", "alice")]
    assert world.rows(ANNOUNCED) == []


def test_many_are_announced_by_and_by_the_oldest_first(make_world):
    world = make_world(open_requests=OpenRequests(announced_at_once_max=2))
    for name in "abcde":
        world.engine.born(name)
    told = []
    for _ in range(5):
        pass_rounds(world)
        told.append("".join(id for id, *_ in world.rows(ANNOUNCED)))
    assert told == ["", "ab", "abcd", "abcde", "abcde"]


def test_a_request_forgotten_for_a_younger_one_is_not_announced(make_world):
    world = make_world(open_requests=OpenRequests(requests_max=1))
    for name in "ab":
        world.engine.born(name)
    pass_rounds(world, 2)
    assert [id for id, *_ in world.rows(ANNOUNCED)] == ["b"]


def test_every_api_server_announces_and_names_what_runs_when_it_stops(tmp_path):
    async def live(index: int) -> list[str]:
        folder = tmp_path / str(index)
        folder.mkdir()
        runtime = make_runtime(folder, snapshot_interval_s=0.05, port="off")
        engine = Engine(runtime)
        client = SimpleNamespace(
            engine_core=SimpleNamespace(client_index=index, core_engines=[]),
            vllm_config=SimpleNamespace(
                model_config=SimpleNamespace(served_model_name="m"),
                parallel_config=SimpleNamespace(world_size=1),
            ),
        )
        for _ in range(2):  # as when the middleware is installed twice
            await runtime.start_work(client)
        engine.born("old")
        while not await asyncio.to_thread(opened, folder):
            await asyncio.sleep(0.01)
        engine.born("young")
        await runtime.stop()
        assert runtime.guard.errors == 0
        return opened(folder)

    for index in (0, 1):
        assert asyncio.run(asyncio.wait_for(live(index), 20)) == ["old", "young"]


def opened(folder) -> list[str]:
    assert catch_up(f"sqlite:///{folder / 'ledger.db'}") == 0
    with contextlib.closing(sqlite3.connect(folder / "ledger.db")) as connection:
        return [id for (id,) in connection.execute("SELECT request_id FROM open_requests")]


def test_a_reader_who_asks_finds_a_request_that_has_just_begun(tmp_path):
    async def ask() -> list[str]:
        runtime = make_runtime(tmp_path, snapshot_interval_s=3_600, port="off")
        client = SimpleNamespace(
            engine_core=SimpleNamespace(client_index=0, core_engines=[]),
            vllm_config=SimpleNamespace(
                model_config=SimpleNamespace(served_model_name="m"),
                parallel_config=SimpleNamespace(world_size=1),
            ),
        )
        await runtime.start_work(client)
        Engine(runtime).born("young")
        await runtime.poller.look()
        found = opened(tmp_path)
        await runtime.stop()
        return found

    assert asyncio.run(ask()) == ["young"]
