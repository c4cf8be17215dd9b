"""What a client is told of a budget: nothing of others that use it too, coarse amounts if so set.

Of a budget that others use it is told that there is one, and when it resets.
"""

import hashlib
import json

import pytest

from tests.component.api_server.test_admission import as_tenant, ask, figures_of, held, standing_at
from tests.support.world import Client, World
from vllm_cost_meter.tenants.budgets import Standing


def key_of(name: str) -> list[str]:
    return [hashlib.sha256(name.encode()).hexdigest()]


BUDGETS = [
    {"name": "team blue, 2026", "tag": "team=blue", "gpu_seconds": 3, "soft_percent": 80},
    {"name": "of the group", "tenant": "group", "gpu_seconds": 3, "soft_percent": 80},
    {"name": "of strangers", "tenant": "unknown", "gpu_seconds": 3, "soft_percent": 80},
]
# A client that shares the budget of this name with others.
SHARERS = {
    "team blue, 2026": as_tenant("acme"),
    "of the group": as_tenant("lab"),
    "of strangers": as_tenant("nobody knows me"),
}
USED = 2_718_281_828


@pytest.fixture
def world(make_world) -> World:
    world = make_world(
        tenants=[
            {"name": "acme", "api_key_sha256": key_of("acme"), "tags": {"team": "blue"}},
            {"name": "rival", "api_key_sha256": key_of("rival"), "tags": {"team": "blue"}},
            {"name": "group", "api_key_sha256": key_of("group")},
            {"name": "lab", "parent": "group", "api_key_sha256": key_of("lab")},
        ],
        tenant_rules=[{"rule": "api_key"}, {"rule": "user"}],
        budgets=BUDGETS,
    )
    held(world.runtime)
    return world


def stand_at(world: World, name: str, amount: int) -> Standing:
    declared = {each.name: each for each in world.runtime.settings.declared_budgets}
    standing = standing_at(declared[name], amount)
    world.runtime.admission.figures = figures_of(standing)
    return standing


def everything_told(client: Client) -> str:
    headers = b"\n".join(name + b": " + value for name, value in client.headers)
    return (headers + client.body).decode()


@pytest.mark.parametrize("name", SHARERS)
def test_a_spent_budget_of_several_tells_none_of_them_its_name_or_amounts(world, name):
    standing = stand_at(world, name, 3 * 10**9 + USED)
    client = ask(world, SHARERS[name])
    assert client.status == 429
    reset = standing.resets_at().isoformat()
    assert json.loads(client.body)["error"] == {
        "message": f"a budget that you share with others is used up; it resets at {reset} (UTC)",
        "type": "insufficient_quota",
        "param": None,
        "code": "budget_exceeded",
    }
    assert dict(client.headers)[b"x-cost-meter-budget-reset"].decode() == reset
    assert b"x-cost-meter-budget" not in dict(client.headers)
    told = everything_told(client)
    assert not [secret for secret in (name, "blue", "group", "5.71", "3.00") if secret in told]


@pytest.mark.parametrize("name", SHARERS)
def test_the_warning_of_a_budget_of_several_tells_no_name_and_no_amount(world, name):
    standing = stand_at(world, name, USED)
    headers = dict(ask(world, SHARERS[name]).headers)
    assert headers[b"x-cost-meter-budget-warning"].decode() == (
        f"a budget that you share with others is nearly used up; resets {standing.reset_text()}"
    )


def test_a_tenant_is_told_of_its_own_budget_in_figures_for_people(world):
    stand_at(world, "of the group", 3 * 10**9 + USED)
    client = ask(world, as_tenant("group"))
    message = json.loads(client.body)["error"]["message"]
    assert message.startswith("budget 'of the group' is used up: 5.72 GPU-seconds of 3.00 GPU-")
    assert dict(client.headers)[b"x-cost-meter-budget"] == b"of the group"


def test_a_tenant_is_told_of_its_own_budget_when_its_client_names_a_user(world):
    """The client has the tenant's key: there is no other."""
    stand_at(world, "of the group", 3 * 10**9)
    body = [{"type": "http.request", "body": b'{"user": "bob"}', "more_body": False}]

    async def receive():
        return body.pop()

    scope = as_tenant("group")
    scope["headers"].append((b"content-type", b"application/json"))
    client = world.run(lambda *_: None, scope, receive=receive)
    assert client.status == 429
    assert dict(client.headers)[b"x-cost-meter-budget"] == b"of the group"


def test_an_amount_that_is_unknown_is_told_without_the_name_of_the_budget(make_world):
    world = make_world(
        tenants=[
            {
                "name": "acme",
                "api_key_sha256": key_of("acme"),
                "tags": {"team": "blue"},
                "fail_closed": True,
            }
        ],
        budgets=[{"name": "team blue, 2026", "tag": "team=blue", "usd": 3}],
    )
    held(world.runtime)
    (declared,) = world.runtime.settings.declared_budgets
    unpriced = standing_at(declared, None, "no price for run r at 2026-11-29T00Z: none")
    world.runtime.admission.figures = figures_of(unpriced)
    client = ask(world)
    assert client.status == 503
    assert "blue" not in everything_told(client)


@pytest.mark.parametrize(
    ("unit", "use", "spent", "warned"),
    [
        ("gpu_seconds", 1_234_567, "0.012 GPU-seconds of 0.01", "0.001 GPU-seconds of 0.01"),
        ("usd", 1_234_567, "0.01235 USD of 0.01", "0.00123 USD of 0.01"),
    ],
)
def test_coarse_figures_are_coarse_in_refusals_and_warnings_too(
    make_world, unit, use, spent, warned
):
    budget = {"name": "b", "tenant": "acme", unit: "0.01", "soft_percent": 1}
    tenants = [{"name": "acme", "api_key_sha256": key_of("acme")}]
    world = make_world(tenants=tenants, budgets=[budget], tenant_detail="coarse")
    held(world.runtime)
    stand_at(world, "b", 10 * use)
    message = json.loads(ask(world).body)["error"]["message"]
    assert f"is used up: {spent}" in message
    stand_at(world, "b", use)
    told = dict(ask(world).headers)[b"x-cost-meter-budget-warning"].decode()
    assert told.startswith(f"b: {warned}")
