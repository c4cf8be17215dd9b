"""What bills cost in an API server: each hour by its price, and nothing guessed."""

import asyncio
import contextlib
import platform
import sqlite3
from types import SimpleNamespace

import pytest
from vllm.platforms import current_platform

from tests.component.api_server.test_collector import exchange_of
from tests.support.builders import make_bill, make_snapshot
from vllm_cost_meter.api_server.record_making import price_of_run
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.ledger.catching_up import catch_up
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.units.time import NS_PER_HOUR


def test_a_price_of_zero_is_a_cost_of_zero_and_no_price_is_no_cost(make_world):
    for price, cost in ((0, 0), (None, None)):
        world = make_world(gpu_hour_usd=price)
        exchange = exchange_of()
        world.engine.born("r", exchange=exchange)
        world.engine.billed("r")
        assert world.rows("SELECT cost_nanousd FROM requests") == [(cost,)]
        assert exchange.cost_nanousd == cost


def price_setting(amount: str, since: str = "2026-01-01T00:00:00Z", **more) -> dict:
    values = {"scope": "gpu", "kind": "spot", "source": "the invoice"}
    return {**values, "amount": amount, "effective_from": since, **more}


def serving(**parallel) -> SimpleNamespace:
    """vLLM's engine client in an API server that is not the first one."""
    return SimpleNamespace(
        engine_core=SimpleNamespace(client_index=1),
        vllm_config=SimpleNamespace(
            model_config=SimpleNamespace(served_model_name="llama"),
            parallel_config=SimpleNamespace(world_size=2, **parallel),
        ),
    )


def costs_of(world, client: SimpleNamespace, *pieces: UsagePiece) -> tuple:
    """The cost and the marginal cost of a bill of these pieces, by an API server's book."""

    async def bill() -> None:
        assert await world.runtime.start_work(client) is False
        world.collector.billed(make_bill(request_id="r", pieces=pieces))
        await world.runtime.stop()

    asyncio.run(bill())
    assert catch_up(world.runtime.ledger_url) == 0
    with contextlib.closing(sqlite3.connect(world.path)) as connection:
        columns = "cost_nanousd, marginal_cost_nanousd"
        return connection.execute(f"SELECT {columns} FROM requests").fetchone()


def test_each_hour_of_a_bill_is_priced_by_the_price_of_that_hour(make_world):
    prices = [price_setting("36"), price_setting("72", "2026-01-01T01:00:00Z")]
    world = make_world(prices=prices)
    pieces = [
        UsagePiece(490_896, 1_000, 2_000, 8, 5, marginal_ns=500),
        UsagePiece(490_897, 0, 1_000, 0, 3, marginal_ns=500),
        UsagePiece(490_898, 0, 1_000, 0, 3, marginal_ns=500),
    ]
    assert costs_of(world, serving(), *pieces) == (30 + 40, 5 + 20)


def test_blocks_cost_on_top_of_time_and_are_no_part_of_the_marginal_cost(make_world):
    # At 0.0036 USD an hour a block-ms costs 1 nano-USD.
    prices = [
        price_setting("36", usd_per_kv_block_hour="0.0036"),
        price_setting("36", "2026-01-01T01:00:00Z", usd_per_kv_block_hour="0.036"),
        price_setting("36", "2026-01-01T02:00:00Z"),
    ]
    pieces = [
        UsagePiece(490_896 + n, 1_000, 0, 8, 0, marginal_ns=500, kv_block_ms=7) for n in range(3)
    ]
    assert costs_of(make_world(prices=prices), serving(), *pieces) == (30 + 7 + 70, 15)


def test_a_price_of_blocks_of_zero_costs_what_none_costs(make_world):
    piece = UsagePiece(490_896, 1_000, 2_000, 8, 5, marginal_ns=500, kv_block_ms=7)
    found = [
        costs_of(make_world(prices=[price_setting("36", **more)]), serving(), piece)
        for more in ({}, {"usd_per_kv_block_hour": 0})
    ]
    assert found == [(30, 5), (30, 5)]


def test_a_bill_with_an_hour_before_all_prices_has_no_cost(make_world):
    world = make_world(gpu_hour_usd=None, prices=[price_setting("36")])
    pieces = [UsagePiece(490_895, 1, 0, 1, 0), UsagePiece(490_896, 1, 0, 1, 0)]
    assert costs_of(world, serving(), *pieces) == (None, None)


def gpu_is_called(monkeypatch, name):
    """Let vLLM's platform be one with GPUs, whose name is what `name` returns."""
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(current_platform, "get_device_name", name)


def test_every_api_server_chooses_by_model_gpu_and_host(make_world, monkeypatch):
    gpu_is_called(monkeypatch, lambda: "NVIDIA H100")
    monkeypatch.setattr(platform, "node", lambda: "node-1")
    matches = {"model": "LLAMA", "gpu_name": "*h100*", "host": "node-?"}
    world = make_world(prices=[price_setting("288", scope="node", gpus=8, **matches)])
    assert costs_of(world, serving(), UsagePiece(490_896, 1_000, 2_000, 8, 5)) == (30, 0)


@pytest.mark.parametrize(
    ("parallel", "cost"),
    [
        ({"data_parallel_size": 4, "data_parallel_size_local": 4}, 60),
        ({"data_parallel_size": 4, "data_parallel_size_local": 2}, None),
        (
            {
                "data_parallel_size": 4,
                "data_parallel_size_local": 1,
                "local_engines_only": True,
            },
            60,
        ),
    ],
)
def test_where_engines_run_on_several_machines_no_cost_is_guessed_that_depends_on_the_host(
    make_world, monkeypatch, parallel, cost
):
    monkeypatch.setattr(platform, "node", lambda: "node-1")
    world = make_world(prices=[price_setting("72", host="node-1")])
    piece = UsagePiece(490_896, 3_000, 0, 8, 0)
    marginal = None if cost is None else 0
    assert costs_of(world, serving(**parallel), piece) == (cost, marginal)


def test_an_api_server_without_a_gpu_prices_what_needs_none(make_world, monkeypatch):
    def no_gpu():
        raise NotImplementedError

    gpu_is_called(monkeypatch, no_gpu)
    world = make_world(prices=[price_setting("72", model="llama")])
    assert costs_of(world, serving(), UsagePiece(490_896, 3_000, 0, 8, 0)) == (60, 0)
    assert world.runtime.guard.errors == 0


def test_an_api_server_without_a_gpu_guesses_no_price_that_depends_on_it(make_world, monkeypatch):
    def no_gpu():
        raise NotImplementedError

    gpu_is_called(monkeypatch, no_gpu)
    world = make_world(prices=[price_setting("72", gpu_name="*")])
    piece = UsagePiece(490_896, 3_000, 0, 8, 0)
    assert costs_of(world, serving(), piece) == (None, None)


def test_a_run_is_told_the_price_of_the_hour_it_began_in():
    def told(**settings):
        book = Settings(**settings).price_book
        return price_of_run(book, make_snapshot(started_at_ns=490_897 * NS_PER_HOUR + 5, gpus=4))

    assert told() is None
    short = told(gpu_hour_usd="1e-7")
    assert (short.usd_per_gpu_hour, short.price_id) == ("0.0000001", "settings:0.0000001")
    assert (short.source, short.effective_from_ns) == (
        "COST_METER_GPU_HOUR_USD",
        490_897 * NS_PER_HOUR + 5,
    )
    assert told(gpu_hour_usd="2.50").price_id == "settings:2.50"
    prices = [
        price_setting("3"),
        price_setting("98.32", "2026-01-01T01:00:00Z", scope="node", gpus=8),
        price_setting("5", "2026-01-01T02:00:00Z"),
    ]
    node = told(gpu_hour_usd="2.50", prices=prices)
    assert (node.usd_per_gpu_hour, node.effective_from_ns) == ("12.29", 490_897 * NS_PER_HOUR)
    assert node.source == "the invoice: 98.32 USD per node of 8 GPUs"
    assert node.price_id == f"book:12.29:2026-01-01T01:00:00.000000Z:{node.source}"
    assert node.usd_per_kv_block_hour is None
    # Prices that differ in that of blocks alone are two.
    begun = price_setting("3", "2026-01-01T01:00:00Z", usd_per_kv_block_hour="1e-5")
    with_blocks = told(prices=[begun])
    assert with_blocks.usd_per_kv_block_hour == "0.00001"
    assert with_blocks.price_id == "book:3+0.00001:2026-01-01T01:00:00.000000Z:the invoice"
