"""Admission by budgets over a fleet: before other servers' use is known, and once that is stale."""

import asyncio
import json
from dataclasses import replace

import pytest

from tests.component.api_server.test_admission import (
    LIMITED,
    TENANTS,
    as_tenant,
    ask,
    budget,
    figures_of,
    held,
    standing_at,
)
from tests.support.world import BODY, JSON, Client, replying
from vllm_cost_meter.tenants.budgets import Others


@pytest.fixture
def world(make_world):
    world = make_world(tenants=TENANTS)
    held(world.runtime)
    return world


def of_fleet(amount: int, *, stale: str | None = None, is_counted: bool = True, **changes):
    """Return where a budget over a fleet stands."""
    standing = standing_at(budget(**changes), amount)
    return replace(standing, others=Others(0, 0 if is_counted else None, stale, is_counted))


def test_until_the_fleet_was_read_once_nobody_passes_a_hard_budget_over_it(make_world):
    world = make_world(tenants=TENANTS, budgets=LIMITED)
    held(world.runtime)
    unread = of_fleet(0, is_counted=False, stale="not read yet")
    alone = standing_at(budget(name="alone", tenant="rival"), 0)
    world.runtime.admission.figures = figures_of(unread, alone)
    client = ask(world)
    assert client.status == 503
    told = json.loads(client.body)["error"]["message"]
    assert "what other servers have used has not been read yet" in told
    assert ask(world, as_tenant("rival")).status == 200
    world.runtime.admission.figures = figures_of(of_fleet(0), alone)
    assert ask(world).status == 200


def test_a_request_that_comes_before_the_fleet_was_read_waits_for_that(make_world):
    world = make_world(tenants=TENANTS, budgets=LIMITED)
    held(world.runtime, first_figures_s=60)
    (declared,) = world.runtime.settings.declared_budgets
    limit = {"name": declared.name, "limit": declared.limit, "unit": declared.unit}
    world.runtime.admission.figures = figures_of(of_fleet(0, is_counted=False, **limit))

    async def ask_and_look() -> Client:
        app = replying(JSON, [BODY], world.engine.generate)
        asking = asyncio.create_task(world.ask(app, as_tenant("acme")))
        other = await world.ask(app, as_tenant("rival"))
        world.runtime.admission.figures = figures_of(of_fleet(0, is_counted=False, **limit))
        again = await world.ask(app, as_tenant("rival"))
        assert (other.status, again.status, asking.done()) == (200, 200, False)
        world.runtime.admission.figures = figures_of(of_fleet(declared.limit, **limit))
        return await asking

    assert asyncio.run(ask_and_look()).status == 429


def test_while_the_fleet_is_away_who_fails_closed_is_refused_and_others_by_what_was_known(world):
    stale = "the figures of the fleet are 12 s old"
    within, spent = of_fleet(1, stale=stale), of_fleet(10**9, stale=stale)
    strict = of_fleet(1, stale=stale, name="s", tenant="strict")
    world.runtime.admission.figures = figures_of(within, strict)
    assert ask(world).status == 200
    refused = ask(world, as_tenant("strict"))
    assert refused.status == 503
    assert stale in json.loads(refused.body)["error"]["message"]
    world.runtime.admission.figures = figures_of(spent, strict)
    assert ask(world).status == 429
    # A budget of this server alone needs no fleet.
    alone = standing_at(budget(name="s", tenant="strict"), 1)
    world.runtime.admission.figures = figures_of(within, alone)
    assert ask(world, as_tenant("strict")).status == 200
