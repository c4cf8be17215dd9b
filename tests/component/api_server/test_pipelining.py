"""Requests that begin in the context of another, as uvicorn begins pipelined ones: whose are they?

Goal: a request is billed to its own tenant whatever context it begins in. Method: tasks made inside
an exchange, and a real uvicorn with both of its parsers, to which one write brings all requests.
"""

import asyncio
import hashlib
import re

import pytest
import uvloop

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
    "SELECT replies.tenant, request_id FROM requests JOIN replies"
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


# ---- over a raw socket

EVERYWHERE = [
    pytest.param(http, loop, id=f"{http}-{loop.__module__.partition('.')[0]}")
    for http in ("h11", "httptools")
    for loop in (asyncio.SelectorEventLoop, uvloop.new_event_loop)
]
GET, POST = "GET", "POST"
COMPLETIONS, HEALTH = "/v1/completions", "/health"


def asking(name: str, request: str, path: str = COMPLETIONS, body: bytes = b"") -> bytes:
    """A request of a tenant; the application takes `X-Name` for the engine request's id."""
    head = (
        f"{POST if body else GET} {path} HTTP/1.1\r\nHost: x\r\nX-Name: {request}\r\n"
        f"Authorization: Bearer {name}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def generating(world, later: list[asyncio.Task] | None = None):
    """An application that reads its body and generates; with `later` also after its reply."""

    async def app(scope, receive, send):
        while (await receive()).get("more_body", False):
            pass
        name = dict(scope["headers"])[b"x-name"].decode()

        async def generate_later() -> None:
            await asyncio.sleep(0.05)
            world.engine.generate(f"{name}-later")

        if scope["path"] != COMPLETIONS:
            await replying(JSON, [b"{}"])(scope, receive, send)
            return
        if later is not None:
            later.append(asyncio.create_task(generate_later()))
        await replying(JSON, [BODY], lambda: world.engine.generate(name))(scope, receive, send)

    return app


def converse(world, http, loop, writes: list[bytes], answers: int, app=None) -> list[bytes]:
    """Write each of these at once, and await all answers to it; return the tenants told."""

    async def talk() -> bytes:
        async with listening(world.metered(app or generating(world)), http) as address:
            reader, writer = await asyncio.open_connection(*address)
            told, each = b"", answers // len(writes)
            for number, write in enumerate(writes, 1):
                writer.write(write)
                while told.count(b"\r\n0\r\n\r\n") < each * number:
                    told += await asyncio.wait_for(reader.read(65_536), 20)
            writer.close()
            return told

    with asyncio.Runner(loop_factory=loop) as runner:
        answer = runner.run(talk())
    assert answer.count(b"HTTP/1.1 200") == answers
    return re.findall(rb"x-cost-meter-tenant: (\w+)", answer)


@pytest.mark.parametrize(("http", "loop"), EVERYWHERE)
@pytest.mark.parametrize("names", [["alpha", "beta"], ["alpha", "beta", "alpha"]])
def test_requests_of_two_tenants_in_one_write_are_billed_to_each(make_world, http, loop, names):
    world = make_world(tenants=TWO_TENANTS)
    requests = b"".join(asking(name, f"r{number}") for number, name in enumerate(names))
    assert converse(world, http, loop, [requests], len(names)) == [n.encode() for n in names]
    assert world.rows(PARTS) == [(name, f"r{number}") for number, name in enumerate(names)]


@pytest.mark.parametrize(("http", "loop"), EVERYWHERE)
def test_a_look_at_health_before_it_in_the_same_write_hides_no_request(make_world, http, loop):
    world = make_world(tenants=TWO_TENANTS)
    write = asking("alpha", "h", HEALTH) + asking("beta", "r1") + asking("alpha", "r2")
    # Neither is what comes after the look a part of it.
    assert converse(world, http, loop, [write], 3) == [b"beta", b"alpha"]
    assert world.rows(PARTS) == [("beta", "r1"), ("alpha", "r2")]


@pytest.mark.parametrize(("http", "loop"), EVERYWHERE)
def test_a_big_body_takes_none_of_what_comes_after_it_on_its_connection(make_world, http, loop):
    """A transport that was paused reads on in the context of whoever resumed it."""
    world = make_world(tenants=TWO_TENANTS)
    big = asking("alpha", "r0", body=b"x" * 600_000)
    small = [asking(name, f"r{number}") for number, name in enumerate(["beta", "alpha", "beta"], 1)]
    told = converse(world, http, loop, [big, *small], 4)
    assert told == [b"alpha", b"beta", b"alpha", b"beta"]
    assert [tenant for tenant, _ in world.rows(PARTS)] == ["alpha", "beta", "alpha", "beta"]


@pytest.mark.parametrize(("http", "loop"), EVERYWHERE)
def test_a_big_body_in_the_same_write_as_others_takes_none_of_them(make_world, http, loop):
    world = make_world(tenants=TWO_TENANTS)
    write = asking("alpha", "r0", body=b"x" * 600_000) + asking("beta", "r1", body=b"x" * 300_000)
    assert converse(world, http, loop, [write + asking("alpha", "r2")], 3) == [
        *(b"alpha", b"beta", b"alpha")
    ]
    assert world.rows(PARTS) == [("alpha", "r0"), ("beta", "r1"), ("alpha", "r2")]


@pytest.mark.parametrize(("http", "loop"), EVERYWHERE)
def test_work_that_outlives_its_request_stays_its_tenants_while_others_follow(
    make_world, http, loop
):
    world, later = make_world(tenants=TWO_TENANTS), []
    metered = generating(world, later)

    async def app(scope, receive, send):
        await metered(scope, receive, send)
        if len(later) == 3:  # The first ones run on while the last request is served.
            await asyncio.gather(*later)

    write = asking("alpha", "r0") + asking("beta", "r1") + asking("alpha", "r2")
    converse(world, http, loop, [write], 3, app)
    assert world.rows(PARTS) == [
        *(("alpha", "r0"), ("alpha", "r0-later"), ("beta", "r1"), ("beta", "r1-later")),
        *(("alpha", "r2"), ("alpha", "r2-later")),
    ]


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
