"""A server whose settings were never right for it says so in one line and does not serve."""

import asyncio

from tests.component.endpoint.test_server import Client, application


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
