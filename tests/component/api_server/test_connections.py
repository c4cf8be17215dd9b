"""Connections that do not just ask and listen: upgrades, HEAD, half-closed ones, WebSockets.

Goal: whatever a connection does, a request is billed to its own tenant and recorded as it ended.
Method: a real uvicorn with both of its parsers, and a client that writes bytes.
"""

import asyncio
import base64

import pytest

from tests.component.api_server.test_pipelining import PARTS, TWO_TENANTS
from tests.support.world import (
    ASKED,
    BODY,
    COST_HEADERS,
    DONE,
    JSON,
    SSE,
    USAGE,
    listening,
    replying,
    scope_of,
)

HTTP_REQUESTS = "SELECT tenant, status FROM replies ORDER BY started_at"
PARSERS = pytest.mark.parametrize("http", ["h11", "httptools"])


def asking(name: str, *headers: str, method: str = "GET", path: str = "/v1/completions") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {name}", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def upgrading(name: str) -> bytes:
    key = base64.b64encode(b"0" * 16).decode()
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    return asking(name, *upgrade, f"Sec-WebSocket-Key: {key}", path="/v1/realtime")


def told_tenants(answer: bytes) -> list[bytes]:
    name = b"x-cost-meter-tenant: "
    return [line[len(name) :] for line in answer.split(b"\r\n") if line.startswith(name)]


def application(world):
    """Over HTTP it generates and replies; a WebSocket it accepts, generates for, and closes."""

    async def app(scope, receive, send):
        if scope["type"] == "http":
            await replying(JSON, [BODY], lambda: world.engine.generate("of-http"))(
                scope, receive, send
            )
            return
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        world.engine.generate("of-websocket")
        await send({"type": "websocket.close", "code": 1000})

    return app


@pytest.mark.parametrize(
    ("http", "in_one_write"), [("h11", True), ("h11", False), ("httptools", False)]
)
def test_a_websocket_after_another_tenants_request_is_billed_to_its_own(
    make_world, http, in_one_write
):
    world = make_world(tenants=TWO_TENANTS)

    async def ask() -> bytes:
        async with listening(world.metered(application(world)), http) as address:
            reader, writer = await asyncio.open_connection(*address)
            if in_one_write:
                writer.write(asking("alpha") + upgrading("beta"))
                answer = await reader.readuntil(b"101 Switching Protocols")
            else:
                writer.write(asking("alpha"))
                answer = await reader.readuntil(b"\r\n0\r\n\r\n")
                writer.write(upgrading("beta"))
                await reader.readuntil(b"101 Switching Protocols")
            while not world.rows("SELECT 1 FROM requests WHERE request_id = 'of-websocket'"):
                await asyncio.sleep(0.01)
            writer.close()
            return answer

    assert told_tenants(asyncio.run(asyncio.wait_for(ask(), 20))) == [b"alpha"]
    assert world.rows(PARTS) == [("alpha", "of-http"), ("beta", "of-websocket")]
    assert world.rows(HTTP_REQUESTS) == [("alpha", 200), ("beta", 101)]


def test_a_websocket_that_httptools_accepts_before_the_reply_is_billed_to_its_own(make_world):
    """uvicorn gives the connection away at once, so the reply before it is never seen."""
    world = make_world(tenants=TWO_TENANTS)

    async def ask() -> None:
        async with listening(world.metered(application(world)), "httptools") as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(asking("alpha") + upgrading("beta"))
            await reader.readuntil(b"101 Switching Protocols")
            while len(world.rows(PARTS)) < 2:
                await asyncio.sleep(0.01)
            writer.close()

    asyncio.run(asyncio.wait_for(ask(), 20))
    assert world.rows(PARTS) == [("alpha", "of-http"), ("beta", "of-websocket")]


@PARSERS
def test_a_request_that_offers_another_protocol_is_metered_as_any_other(make_world, http):
    """uvicorn knows no HTTP/2 and goes on with HTTP/1.1."""
    world = make_world(tenants=TWO_TENANTS)

    async def ask() -> bytes:
        async with listening(world.metered(application(world)), http) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(asking("alpha", "Connection: Upgrade", "Upgrade: h2c"))
            answer = await reader.readuntil(b"\r\n0\r\n\r\n")
            writer.close()
            return answer

    assert told_tenants(asyncio.run(asyncio.wait_for(ask(), 20))) == [b"alpha"]
    assert world.rows(PARTS) == [("alpha", "of-http")]


@PARSERS
def test_a_head_request_that_generates_is_told_its_cost_and_has_no_body(make_world, http):
    world = make_world(tenants=TWO_TENANTS)

    async def ask() -> bytes:
        async with listening(world.metered(application(world)), http) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(
                asking("alpha", method="HEAD") + asking("beta", "Connection: close", method="HEAD")
            )
            answer = await reader.read()
            writer.close()
            return answer

    answer = asyncio.run(asyncio.wait_for(ask(), 20))
    assert told_tenants(answer) == [b"alpha", b"beta"]
    assert BODY not in answer
    assert all(answer.count(name + b": ") == 2 for name in COST_HEADERS)
    assert world.rows(HTTP_REQUESTS) == [("alpha", 200), ("beta", 200)]


@PARSERS
def test_a_client_that_half_closes_has_left_and_the_next_one_is_told_its_own(make_world, http):
    """uvicorn ends the connection of a client that will say no more."""
    world = make_world(tenants=TWO_TENANTS)

    async def app(scope, receive, send):
        name = dict(scope["headers"])[b"authorization"].removeprefix(b"Bearer ").decode()
        world.engine.born(name)
        while name == "alpha" and (await receive())["type"] != "http.disconnect":
            pass
        world.engine.billed(name)
        await replying(JSON, [BODY])(scope, receive, send)

    async def ask() -> tuple[bytes, bytes]:
        async with listening(world.metered(app), http) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(asking("alpha"))
            writer.write_eof()
            nothing = await reader.read()
            writer.close()
            reader, writer = await asyncio.open_connection(*address)
            writer.write(asking("beta", "Connection: close"))
            answer = await reader.read()
            writer.close()
            return nothing, answer

    nothing, answer = asyncio.run(asyncio.wait_for(ask(), 20))
    assert nothing == b""
    assert told_tenants(answer) == [b"beta"]
    assert world.rows(PARTS) == [("alpha", "alpha"), ("beta", "beta")]
    assert world.rows(HTTP_REQUESTS) == [("alpha", 499), ("beta", 200)]


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ({"type": "websocket.close", "code": 1008}, 403),
        ({"type": "websocket.http.response.start", "status": 429, "headers": []}, 429),
    ],
)
def test_a_websocket_that_the_application_refuses_is_recorded_as_refused(world, answer, status):
    async def app(scope, receive, send):
        world.engine.generate()
        await send(answer)

    client = world.run(app, scope_of("/v1/realtime", type="websocket"))
    assert client.messages == [answer]
    assert world.rows("SELECT status FROM replies") == [(status,)]


def test_a_stream_tells_the_cost_that_was_committed_though_more_is_billed_before_its_end(world):
    async def app(scope, receive, send):
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", SSE)]}
        world.engine.generate("first")
        await send(start)
        await send({"type": "http.response.body", "body": USAGE, "more_body": True})
        world.engine.generate("second")
        await send({"type": "http.response.body", "body": DONE})

    client = world.run(app, scope_of(headers=[ASKED]))
    assert client.body.count(b'"cost":0.000000030') == 1
    assert client.body.count(b"cost_usd=0.000000030 ") == 1
    assert world.rows("SELECT cost_nanousd FROM replies") == [(30,)]
