"""How many requests of a budget run at once: the middleware with a real ledger."""

import asyncio
import contextlib
import json

import pytest

from tests.component.api_server.test_admission import (
    TENANTS,
    as_tenant,
    figures_of,
    held,
    standing_at,
)
from tests.support.world import BODY, JSON, Client, RefusedError, World, replying
from vllm_cost_meter.api_server.budgets.in_flight import DETACHED_S_MAX, InFlight
from vllm_cost_meter.exchange import Exchange, current_exchange
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.tenants.budgets import Budget

MOST = 3
PREPAID = {"name": "prepaid", "tenant": "acme", "gpu_seconds": 1, "max_concurrent": MOST}


def held_world(make_world, *budgets: dict) -> World:
    world = make_world(tenants=TENANTS, budgets=list(budgets))
    held(world.runtime)
    fresh(world)
    return world


def fresh(world: World, age_s: float = 0) -> None:
    budgets = world.runtime.settings.declared_budgets
    standings = [standing_at(budget, 0) for budget in budgets]
    world.runtime.admission.figures = figures_of(*standings, age_s=age_s)


@pytest.fixture
def world(make_world) -> World:
    return held_world(make_world, PREPAID)


class Burst:
    """Requests that come at once and are served until they may end."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.may_end = asyncio.Event()
        self.at_once = 0
        self.at_once_most = 0

    async def _served(self) -> None:
        self.at_once += 1
        self.at_once_most = max(self.at_once_most, self.at_once)
        await self.may_end.wait()
        self.at_once -= 1

    def ask(self, tenant: str = "acme") -> "asyncio.Task[Client]":
        app = replying(JSON, [BODY], self._served)
        return asyncio.create_task(self.world.ask(app, as_tenant(tenant)))


def test_a_burst_has_no_more_requests_run_at_once_than_the_budget_allows(world):
    async def run() -> tuple[list[Client], int]:
        burst = Burst(world)
        asked = [burst.ask() for _ in range(60)]
        await asyncio.sleep(0.1)
        burst.may_end.set()
        return await asyncio.gather(*asked), burst.at_once_most

    clients, most = asyncio.run(run())
    assert most == MOST
    statuses = [client.status for client in clients]
    assert (statuses.count(200), statuses.count(429)) == (MOST, 57)


def test_one_request_too_many_is_told_to_come_again_soon(world):
    async def run() -> Client:
        burst = Burst(world)
        asked = [burst.ask() for _ in range(MOST + 1)]
        await asyncio.sleep(0.05)
        burst.may_end.set()
        return (await asyncio.gather(*asked))[-1]

    client = asyncio.run(run())
    headers = dict(client.headers)
    assert (client.status, headers[b"retry-after"]) == (429, b"1")
    assert b"x-should-retry" not in headers
    assert json.loads(client.body)["error"] == {
        "message": "budget 'prepaid' has as many requests running as it allows (3 at once); try"
        " again when one has ended",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }


def test_a_place_is_free_again_when_its_request_has_ended(world):
    async def run() -> list[int]:
        app = replying(JSON, [BODY])
        clients = [await world.ask(app, as_tenant("acme")) for _ in range(MOST + 2)]
        return [client.status for client in clients]

    assert asyncio.run(run()) == [200] * (MOST + 2)


def test_an_application_that_fails_gives_its_place_back(world):
    async def fails(_scope, _receive, _send) -> None:
        raise RuntimeError("broken")

    async def run() -> None:
        for _ in range(MOST):
            with pytest.raises(RuntimeError):
                await world.ask(fails, as_tenant("acme"))

    asyncio.run(run())
    assert world.run(replying(JSON, [BODY]), as_tenant("acme")).status == 200


def test_tenants_that_the_budget_does_not_cover_have_no_bound(world):
    async def run() -> list[Client]:
        burst = Burst(world)
        asked = [burst.ask("rival") for _ in range(10)]
        await asyncio.sleep(0.05)
        burst.may_end.set()
        return await asyncio.gather(*asked)

    assert {client.status for client in asyncio.run(run())} == {200}


def test_the_bound_holds_though_figures_are_stale(world):
    """It needs no figures: what runs is known here."""
    fresh(world, age_s=60)

    async def run() -> int:
        burst = Burst(world)
        asked = [burst.ask() for _ in range(10)]
        await asyncio.sleep(0.05)
        burst.may_end.set()
        await asyncio.gather(*asked)
        return burst.at_once_most

    assert asyncio.run(run()) == MOST


def test_throttled_requests_have_a_place_while_they_wait(make_world):
    world = held_world(make_world, {**PREPAID, "over": "throttle"})
    world.runtime.settings = world.runtime.settings.model_copy(update={"budget_throttle_s": 0.1})
    (budget,) = world.runtime.settings.declared_budgets
    world.runtime.admission.figures = figures_of(standing_at(budget, budget.limit))

    async def run() -> list[int]:
        asked = [world.ask(replying(JSON, [BODY]), as_tenant("acme")) for _ in range(5)]
        return [client.status for client in await asyncio.gather(*asked)]

    assert sorted(asyncio.run(run())) == [200, 200, 200, 429, 429]


def test_a_request_whose_client_left_holds_its_place_until_it_is_billed(world):
    """An aborted request runs on for a moment, and a background response long after its reply."""

    async def run() -> list[int]:
        async def leaves(_scope, _receive, _send) -> None:
            world.engine.born(f"r{len(left)}")
            left.append(current_exchange.get())

        left: list[Exchange | None] = []
        statuses = []
        for _ in range(MOST):
            await world.ask(leaves, as_tenant("acme"))
        for billed in (None, "r1"):
            if billed:
                world.engine.billed(billed)
            client = await world.ask(replying(JSON, [BODY]), as_tenant("acme"))
            statuses.append(client.status)
        return statuses

    assert asyncio.run(run()) == [429, 200]


def test_where_bills_do_not_come_a_request_that_was_served_is_over(world):
    async def leaves(_scope, _receive, _send) -> None:
        world.engine.born(str(current_exchange.get().http_request_id))

    async def run() -> int:
        for _ in range(MOST):
            await world.ask(leaves, as_tenant("acme"))
        fresh(world, age_s=60)
        return (await world.ask(replying(JSON, [BODY]), as_tenant("acme"))).status

    assert asyncio.run(run()) == 200


def test_a_place_without_a_bill_is_free_after_an_hour_at_the_latest():
    now_ns = 0
    places = InFlight(lambda: now_ns)
    budget = Budget("b", 1, "usd", "month", tenant="acme", max_concurrent=1)
    lost = Exchange("/v1/completions", Owner("acme"), None, 0)
    lost.part_was_born("r")
    places.enter(lost, [budget], served=True)
    places.served(lost)
    now_ns = DETACHED_S_MAX * 10**9
    assert places.full([budget], bills_come=True) is budget
    now_ns += 1
    assert places.full([budget], bills_come=True) is None


def test_a_background_response_that_begins_later_takes_a_place_again(world):
    """Its reply was long sent, so it is as good as a new request."""

    async def run() -> list[str]:
        accepted: list[Exchange | None] = []

        async def accepts(_scope, _receive, _send) -> None:
            accepted.append(current_exchange.get())

        for _ in range(MOST + 1):
            await world.ask(accepts, as_tenant("acme"))
        born = []
        for number, exchange in enumerate(accepted):
            with contextlib.suppress(RefusedError):
                world.engine.asked(f"r{number}", exchange=exchange)
                born.append(f"r{number}")
        world.engine.billed("r0")
        world.engine.asked("later", exchange=accepted[-1])
        return born

    assert asyncio.run(run()) == ["r0", "r1", "r2"]


def test_a_budget_of_several_tells_none_of_them_how_many_it_runs(make_world):
    tagged = {**TENANTS[0], "tags": {"team": "blue"}}
    world = make_world(
        tenants=[tagged],
        budgets=[{"name": "t", "tag": "team=blue", "gpu_seconds": 1, "max_concurrent": 1}],
    )
    held(world.runtime)
    fresh(world)

    async def run() -> Client:
        burst = Burst(world)
        asked = [burst.ask() for _ in range(2)]
        await asyncio.sleep(0.05)
        burst.may_end.set()
        return (await asyncio.gather(*asked))[-1]

    client = asyncio.run(run())
    assert json.loads(client.body)["error"]["message"] == (
        "a budget that you share with others has as many requests running as it allows; try again"
        " when one has ended"
    )
    assert b"x-cost-meter-budget" not in dict(client.headers)


def test_a_bound_that_only_warns_is_refused_in_the_settings(make_world):
    with pytest.raises(ValueError, match="hard = true beside max_concurrent"):
        make_world(tenants=TENANTS, budgets=[{**PREPAID, "hard": False}])
