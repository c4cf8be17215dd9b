"""Requests that begin in the context of another, as uvicorn begins pipelined ones: whose are they?

Goal: a request is billed to its own tenant whatever context it begins in. Method: tasks made inside
an exchange, and a real uvicorn with both of its parsers, to which one write brings all requests.
"""

import asyncio
import hashlib
import re

import pytest

from tests.support.world import BODY, JSON, listening, replying, scope_of
from vllm_cost_meter.api_server import middleware
from vllm_cost_meter.exchange import current_exchange, exchange_of
from vllm_cost_meter.records.owner import Owner

TWO_TENANTS = [
    {"name": name, "api_key_sha256": [hashlib.sha256(name.encode()).hexdigest()]}
    for name in ("alpha", "beta")
]


# Which engine request was billed to whom.
PARTS = (
    "SELECT http_requests.tenant, request_id FROM requests JOIN http_requests"
    " USING (http_request_id)"
    " ORDER BY request_id"
)


def as_tenant(name: str) -> dict:
    return scope_of(headers=[(b"authorization", f"Bearer {name}".encode())])


def test_an_exchange_begun_in_the_context_of_another_is_its_own(make_world):
    world = make_world(tenants=TWO_TENANTS)
    second = None

    async def app(scope, receive, send):
        nonlocal second
        name = scope["headers"][0][1].removeprefix(b"Bearer ").decode()
        if second is None:
            # A task copies the context of its creator, and the creator is an exchange.
            second = asyncio.create_task(world.ask(app, as_tenant("beta")))
            await asyncio.sleep(0)
        await replying(JSON, [BODY], lambda: world.engine.generate(name))(scope, receive, send)

    async def both():
        first = await world.ask(app, as_tenant("alpha"))
        return first, await second

    first, later = asyncio.run(both())
    assert first.ours[b"x-cost-meter-tenant"] == b"alpha"
    assert later.ours[b"x-cost-meter-tenant"] == b"beta"
    assert world.rows(PARTS) == [("alpha", "alpha"), ("beta", "beta")]


@pytest.mark.parametrize("broken", ["_new_exchange", "ReplyEditor"])
def test_what_cannot_be_metered_is_never_billed_to_whoever_asked_before(
    make_world, monkeypatch, broken
):
    world = make_world(tenants=TWO_TENANTS)
    seen = []

    async def inner(scope, receive, send):
        world.engine.generate("second")
        seen.append(current_exchange.get())

    async def app(scope, receive, send):
        def fail(*_arguments):
            raise RuntimeError("broken")

        monkeypatch.setattr(middleware, broken, fail)
        await asyncio.create_task(world.ask(inner, as_tenant("beta")))
        await replying(JSON, [BODY], lambda: world.engine.generate("first"))(scope, receive, send)

    world.run(app, as_tenant("alpha"))
    assert seen == [None]
    assert world.rows(PARTS) == [("alpha", "first")]


def test_a_route_finds_the_exchange_of_its_own_scope(world):
    found = []

    async def app(scope, receive, send):
        found.append(exchange_of(scope))

    scope = scope_of()
    assert exchange_of(scope) is None
    world.run(app, scope)
    assert isinstance(found[0].owner, Owner)


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_pipelined_requests_of_two_tenants_in_one_write_are_billed_to_each(make_world, http):
    world = make_world(tenants=TWO_TENANTS)

    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        keys = dict(scope["headers"])
        name = keys[b"x-name"].decode()
        await replying(JSON, [BODY], lambda: world.engine.generate(name))(scope, receive, send)

    names = ["alpha", "beta", "beta", "alpha", "beta"]
    connections = ["keep-alive"] * 4 + ["close"]
    requests = b"".join(
        f"GET /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {name}\r\n"
        f"X-Name: r{number}\r\nConnection: {connection}\r\n\r\n".encode()
        for number, (name, connection) in enumerate(zip(names, connections, strict=True))
    )

    async def ask() -> bytes:
        async with listening(world.metered(app), http) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(requests)
            answer = await asyncio.wait_for(reader.read(), 20)
            writer.close()
            return answer

    answer = asyncio.run(ask())
    assert re.findall(rb"x-cost-meter-tenant: (\w+)", answer) == [n.encode() for n in names]
    assert world.rows(PARTS) == [(name, f"r{number}") for number, name in enumerate(names)]
