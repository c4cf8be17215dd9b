"""Where vLLM checks keys, its check says who asks: is it found, and does that tenant pay?

Goal: of two credentials that name two tenants, the one by which vLLM admitted the request pays, on
the routes that vLLM guards, and on no other. Method: a real Starlette application, with a check of
keys that does what vLLM's does in each version of the matrix; tests/integration asks vLLM's own.
"""

import asyncio
import hashlib

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute

from tests.support.key_check import AuthenticationMiddleware, OfAnother
from tests.support.world import Client, scope_of
from vllm_cost_meter.api_server.access.key_check import KeyCheck
from vllm_cost_meter.api_server.middleware import CostMiddleware

TENANTS = [
    {"name": name, "api_key_sha256": [hashlib.sha256(name.encode()).hexdigest()]}
    for name in ("alice", "bob")
]
GUARDED, OPEN = "/v1/completions", "/invocations"
ALICE, BOB = (b"authorization", b"Bearer alice"), (b"x-api-key", b"bob")


@pytest.fixture
def world(make_world):
    return make_world(tenants=TENANTS)


def application(world, check=AuthenticationMiddleware):
    async def generate(request):
        world.engine.generate()
        return JSONResponse({})

    async def talk(socket):
        await socket.accept()
        world.engine.generate()
        await socket.close()

    app = Starlette(
        routes=[
            *(Route(path, generate, methods=["POST"]) for path in (GUARDED, OPEN)),
            WebSocketRoute("/v1/realtime", talk),
        ]
    )
    app.add_middleware(CostMiddleware, runtime=lambda: world.found)
    if check is not None:
        app.add_middleware(check, tokens=["alice", "bob", "shared"])
    return app


async def ask(app, *headers, path=GUARDED, type="http") -> Client:
    client, messages = Client(), [{"type": "websocket.connect"}]

    async def receive():
        if type == "websocket" and messages:
            return messages.pop()
        return {"type": "http.request"}

    scope = scope_of(path, headers, type, query_string=b"", root_path="", subprotocols=[])
    await app(scope, receive, client.send)
    return client


def payers(world) -> list[str]:
    return [tenant for (tenant,) in world.rows("SELECT tenant FROM requests ORDER BY seq")]


def test_the_routes_that_vllm_guards_are_found_by_asking_its_own_middleware(world):
    found = KeyCheck(application(world)).guarded_routes()
    assert {GUARDED, "/v1/messages", "/v1/realtime"} <= found
    assert not {OPEN, "/pooling", "/score"} & found


@pytest.mark.parametrize("check", [None, OfAnother])
def test_without_vllms_own_check_no_route_is_guarded(world, check):
    assert KeyCheck(application(world, check)).guarded_routes() == frozenset()


@pytest.mark.parametrize("app", [None, object()])
def test_what_cannot_be_asked_guards_nothing(app):
    assert KeyCheck(app).guarded_routes() == frozenset()


def test_the_key_by_which_vllm_admits_a_request_pays(world):
    app = application(world)
    shared = (b"authorization", b"Bearer shared")

    async def ask_all():
        for headers in (
            [ALICE, BOB],
            [BOB, ALICE],
            [ALICE, (b"authorization", b"Bearer bob")],
            [(b"authorization", b"Bearer bob"), ALICE],
            [ALICE, (b"authorization", b"")],
            [shared, BOB],
        ):
            assert (await ask(app, *headers)).status == 200
        assert (await ask(app, shared, ALICE, BOB)).status == 400

    asyncio.run(ask_all())
    assert payers(world) == ["alice", "alice", "alice", "bob", "alice", "bob"]


def test_on_a_route_that_vllm_leaves_open_two_tenants_are_refused(world):
    app = application(world)
    assert asyncio.run(ask(app, ALICE, BOB, path=OPEN)).status == 400
    assert asyncio.run(ask(app, ALICE, path=OPEN)).status == 200
    assert asyncio.run(ask(application(world, None), ALICE, BOB)).status == 400
    assert payers(world) == ["alice"]


def test_a_websocket_is_admitted_by_the_same_key(world):
    asyncio.run(ask(application(world), ALICE, BOB, path="/v1/realtime", type="websocket"))
    assert payers(world) == ["alice"]
