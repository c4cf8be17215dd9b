"""A server whose settings were never right for it says so in one line and does not serve."""

import asyncio
import logging
from types import SimpleNamespace

import pytest

from tests.component.endpoint.test_server import Client, application

UNSERVED = "requests run in a process without an HTTP application that starts the meter"


def test_a_budget_in_usd_that_no_price_applies_to_ends_the_start_with_one_line(make_world):
    """The server's own way to say so: uvicorn logs the message and ends."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "lifespan.startup.complete"})

    async def send(message):
        sent.append(message)

    price = {"amount": 2, "scope": "gpu", "kind": "spot", "source": "s", "host": "other-machine"}
    world = make_world(
        port=0,
        gpu_hour_usd=None,
        tenants=[{"name": "acme"}],
        prices=[{**price, "effective_from": "2026-01-01T00:00:00Z"}],
        budgets=[{"name": "b", "tenant": "acme", "usd": 1}],
    )
    client = Client()
    scope = {"type": "lifespan", "app": application(client)}
    asyncio.run(world.metered(app)(scope, None, send))
    assert client.calls == 0
    (message,) = sent
    assert message["type"] == "lifespan.startup.failed"
    assert message["message"].startswith(
        "cost meter: budgets (environment): expected a price that applies to this server now"
    )
    assert "\n" not in message["message"]


@pytest.mark.parametrize("index", [0, 1])
def test_an_admin_token_that_is_a_key_of_vllm_ends_the_start_of_each_api_server(make_world, index):
    """Also where `--middleware` brings the meter and no plugin has looked before."""
    key = "sk-of-a-client-and-of-the-operator"
    world = make_world(port=0, admin_token=key)
    client = Client(index)
    app = application(client)
    app.state.args = SimpleNamespace(api_key=["other", key])
    wrong = asyncio.run(world.runtime.start(app))
    assert wrong is not None
    assert wrong.startswith("COST_METER_ADMIN_TOKEN: expected a token other than vLLM's API keys")
    assert key not in wrong
    assert client.calls == 0


def test_requests_without_an_application_that_serves_are_warned_of_once(world, caplog):
    """As offline: each bill is kept, and is nobody's."""
    world.runtime.is_served = False
    with caplog.at_level(logging.WARNING, "vllm.cost_meter"):
        for request_id in ("a", "b"):
            world.engine.born(request_id)
            world.engine.billed(request_id)
    [line] = [record.getMessage() for record in caplog.records]
    assert UNSERVED in line
    assert "billed to 'unknown'" in line


def test_requests_of_an_application_that_serves_are_not(make_world, caplog):
    world = make_world(port="off")
    world.runtime.is_served = False

    async def serve() -> None:
        await world.runtime.start(application(Client()))
        world.engine.born("a")
        world.engine.billed("a")
        await world.runtime.stop()

    with caplog.at_level(logging.WARNING, "vllm.cost_meter"):
        asyncio.run(serve())
    assert UNSERVED not in caplog.text
