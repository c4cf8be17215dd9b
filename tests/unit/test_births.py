"""Requests that run are announced to the ledger, by the real collector; short ones never are."""

import asyncio
import contextlib
import sqlite3
import time
from types import SimpleNamespace

from tests.unit.test_collector import exchange_of
from tests.unit.world import Engine, make_collector
from vllm_cost_meter.api_server import open_requests as births_module
from vllm_cost_meter.api_server.collector import Collector
from vllm_cost_meter.exchange import Exchange
from vllm_cost_meter.records.owner import NamedBy, Owner

ANNOUNCED = "SELECT request_id, http_request_id, tenant, x_request_id FROM open_requests"


def sweep(world, times: int = 1) -> None:
    """What the collector does after each snapshot interval."""
    for _ in range(times):
        world.collector._announce(world.collector._births.due())


def test_a_request_is_announced_at_its_second_sweep_and_gone_with_its_bill(world):
    exchange = Exchange(
        "/v1/completions", Owner("alice", NamedBy("api_key")), "mine", time.time_ns()
    )
    world.engine.born("cmpl-x-0-abc", "cmpl-x-0", exchange=exchange, prompt_group="g", lora="l")
    sweep(world)
    assert world.rows(ANNOUNCED) == []
    sweep(world)
    assert world.rows(ANNOUNCED) == [("cmpl-x-0-abc", exchange.http_request_id, "alice", "mine")]
    assert world.rows(
        "SELECT external_id, response_id, prompt_group, lora, route FROM open_requests"
    ) == [("cmpl-x-0", "cmpl-x", "g", "l", "/v1/completions")]
    world.engine.billed("cmpl-x-0-abc")
    assert world.rows(ANNOUNCED) == []
    assert world.rows("SELECT count(*) FROM requests") == [(1,)]


def test_a_short_request_is_never_announced(world, monkeypatch):
    announced = []
    monkeypatch.setattr(world.collector, "_open_request", announced.append)
    for number in range(20):
        world.engine.born(f"r{number}")
        sweep(world)
        world.engine.billed(f"r{number}")
    sweep(world, 2)
    assert announced == []


def test_a_request_is_announced_once(world):
    world.engine.born("r")
    sweep(world, 2)
    queued = world.collector.writer.queued
    sweep(world, 3)
    world.collector.announce_all()
    assert world.collector.writer.queued == queued


def test_who_asks_has_the_youngest_announced_too(world):
    world.engine.born("old")
    sweep(world)
    world.engine.born("young")
    world.collector.announce_all()
    assert world.rows(ANNOUNCED) == [
        ("old", None, "unknown", None),
        ("young", None, "unknown", None),
    ]


def test_a_request_that_cannot_be_announced_still_gets_its_bill(world, monkeypatch):
    def fail(_birth) -> None:
        raise RuntimeError("boom")

    world.engine.born("r", exchange=exchange_of())
    with monkeypatch.context() as patch:
        patch.setattr(world.collector, "_open_request", fail)
        world.collector.run("announce", Collector.announce_all)
    assert world.collector.guard.errors == 1
    world.engine.billed("r")
    assert world.rows("SELECT request_id, tenant FROM requests") == [("r", "alice")]
    assert world.rows(ANNOUNCED) == []


def test_many_are_announced_by_and_by_the_oldest_first(world, monkeypatch):
    monkeypatch.setattr(births_module, "ANNOUNCED_MAX", 2)
    for name in "abcde":
        world.engine.born(name)
    told = []
    for _ in range(5):
        sweep(world)
        told.append("".join(id for id, *_ in world.rows(ANNOUNCED)))
    assert told == ["", "ab", "abcd", "abcde", "abcde"]


def test_a_request_forgotten_for_a_younger_one_is_not_announced(world, monkeypatch):
    monkeypatch.setattr(births_module, "BIRTHS_MAX", 1)
    for name in "ab":
        world.engine.born(name)
    sweep(world, 2)
    assert [id for id, *_ in world.rows(ANNOUNCED)] == ["b"]


def test_every_api_server_sweeps_and_names_what_runs_when_it_stops(tmp_path):
    async def live(index: int) -> list[str]:
        folder = tmp_path / str(index)
        folder.mkdir()
        collector = make_collector(folder, snapshot_interval_s=0.05, port="off")
        engine = Engine(collector)
        client = SimpleNamespace(
            engine_core=SimpleNamespace(client_index=index, core_engines=[]),
            vllm_config=SimpleNamespace(
                model_config=SimpleNamespace(served_model_name="m"),
                parallel_config=SimpleNamespace(world_size=1),
            ),
        )
        for _ in range(2):  # as when the middleware is installed twice
            await collector.start(client)
        engine.born("old")
        while not opened(folder):
            await asyncio.sleep(0.01)
        engine.born("young")
        await collector.stop()
        assert collector.guard.errors == 0
        return opened(folder)

    for index in (0, 1):
        assert asyncio.run(asyncio.wait_for(live(index), 20)) == ["old", "young"]


def opened(folder) -> list[str]:
    with contextlib.closing(sqlite3.connect(folder / "ledger.db")) as connection:
        return [id for (id,) in connection.execute("SELECT request_id FROM open_requests")]


def test_a_reader_who_asks_finds_a_request_that_has_just_begun(tmp_path):
    async def ask() -> list[str]:
        collector = make_collector(tmp_path, snapshot_interval_s=3_600, port="off")
        client = SimpleNamespace(
            engine_core=SimpleNamespace(client_index=0, core_engines=[]),
            vllm_config=SimpleNamespace(
                model_config=SimpleNamespace(served_model_name="m"),
                parallel_config=SimpleNamespace(world_size=1),
            ),
        )
        await collector.start(client)
        Engine(collector).born("young")
        await collector.poller.look()
        found = opened(tmp_path)
        await collector.stop()
        return found

    assert asyncio.run(ask()) == ["young"]
