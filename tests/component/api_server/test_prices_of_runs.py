"""What a client is told costs what the report says: the price is that of the run."""

import asyncio
import time

import pytest

from tests.component.api_server.test_poller import Engines
from tests.support.builders import make_snapshot
from tests.support.world import BODY, JSON, replying
from vllm_cost_meter.api_server.poller import Poller
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import RunFacts
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.units.time import NS_PER_HOUR

COST = b"x-cost-meter-cost-usd"


@pytest.fixture
def world(make_world):
    """Return an API server that knows its model only, as with engines on several machines."""
    price = {"scope": "gpu", "kind": "spot", "source": "s"}
    price["effective_from"] = "2026-01-01T00:00:00Z"
    world = make_world(
        gpu_hour_usd=None,
        prices=[{**price, "amount": 36}, {**price, "amount": 72, "host": "spot-*"}],
    )
    world.collector.run_facts = RunFacts(1, "m", None, None)
    return world


def ask(world, name: str) -> dict[bytes, bytes]:
    return world.run(replying(JSON, [BODY], lambda: world.engine.generate(name))).ours


def test_a_reply_has_no_cost_where_an_unknown_host_might_have_another_price(world):
    assert COST not in ask(world, "r1")
    assert world.rows("SELECT cost_nanousd FROM requests") == [(None,)]
    # That of another model changes nothing.
    world.collector.run_facts = RunFacts(1, "m", None, "vm")
    assert ask(world, "r2")[COST] == b"0.000000030"


@pytest.mark.parametrize(("host", "nanousd"), [("vm", 30), ("spot-1", 60)])
def test_who_sees_the_snapshots_of_a_run_prices_it_as_the_report_does(world, host, nanousd):
    runtime = world.runtime
    hour = time.time_ns() // NS_PER_HOUR
    totals = ClassTotals(requests=3_000)
    taken = make_snapshot(
        host=host, taken_at_ns=time.time_ns(), totals=totals, hours={hour: totals}, last_seq=1
    )
    poller = Poller(Engines(lambda _: taken), runtime.writer, runtime.loops, 1.0)
    asyncio.run(poller.refresh())
    world.collector.facts_of = poller.facts_of
    assert ask(world, "r1")[COST] == b"0.%09d" % nanousd
    assert world.rows("SELECT cost_nanousd FROM requests") == [(nanousd,)]
    with LedgerReader(runtime.ledger_url, book=runtime.book()) as reader:
        row = reader.tenants(as_of=AsOf(settle_s=0))["tenants"][0]
    assert (row["gpu_time_ns"], row["cost_nanousd"]) == (3_000, nanousd)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (None, None),
        ((), b"0.000000030"),
        ((("pool", "spot"),), b"0.000000003"),
        ((("node", "gpu-3"), ("pool", "big")), b"0.000000030"),
    ],
)
def test_a_reply_costs_what_a_price_for_its_engines_labels_says(make_world, labels, told):
    price = {"scope": "gpu", "kind": "spot", "source": "s"}
    price["effective_from"] = "2026-01-01T00:00:00Z"
    of_spot = {**price, "amount": 3.6, "labels": {"pool": "spot"}}
    world = make_world(gpu_hour_usd=None, prices=[{**price, "amount": 36}, of_spot])
    world.collector.run_facts = RunFacts(1, "m", "a GPU", "vm", labels)
    assert ask(world, "r1").get(COST) == told
