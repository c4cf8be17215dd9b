"""Requests that no rule names, and routes that vLLM's API keys leave open.

Method: a FastAPI application with routes as vLLM has them, behind a key check with the contract of
vLLM's and the real middleware. The real check is asked in tests/integration/test_access.py.
"""

import asyncio
import hashlib
import logging
import re
from types import SimpleNamespace

import httpx
import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Match, Mount
from starlette.staticfiles import StaticFiles

from tests.support.world import World
from vllm_cost_meter.api_server.access.key_check import KeyCheck
from vllm_cost_meter.api_server.access.start_warnings import start_warnings
from vllm_cost_meter.api_server.runtime import NoRuntime
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.plugin import check_admin_token

ACME, OPERATOR = "acme-key-of-32-characters-000000", "operator-key-of-32-characters-00"


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


RIVAL = "rival-key-of-32-characters-00000"
TENANTS = [
    {"name": "acme", "api_key_sha256": [sha256(ACME)]},
    {"name": "rival", "api_key_sha256": [sha256(RIVAL)]},
]


class AuthenticationMiddleware:
    """A key check such as vLLM's: it guards prefixes, and passes on everything else."""

    def __init__(self, app, tokens):
        self.app, self.tokens = app, tokens

    def __call__(self, scope, receive, send):
        guarded = scope["type"] != "lifespan" and scope["path"].startswith(("/v1", "/v2"))
        keys = [f"Bearer {token}".encode() for token in self.tokens]
        if guarded and dict(scope["headers"]).get(b"authorization") not in keys:
            return JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
        return self.app(scope, receive, send)


AuthenticationMiddleware.__module__ = "vllm.somewhere"


def vllm_app(*, tokens=(ACME, OPERATOR), middleware=()) -> FastAPI:
    """Return an application with routes of every kind that vLLM has."""
    app, router = FastAPI(), APIRouter()

    async def answer() -> dict[str, str]:
        return {"served": "yes"}

    for path in ("/v1/completions", "/v1/messages", "/pooling", "/invocations", "/tokenize"):
        router.post(path)(answer)
    router.post("/brand_new/{name}")(answer)
    for path in ("/health", "/v1/models", "/load"):
        router.get(path)(answer)

    @router.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        await socket.accept()

    app.include_router(router)
    for each in middleware:
        app.add_middleware(each)
    if tokens:
        app.add_middleware(AuthenticationMiddleware, tokens=list(tokens))
    app.state.args = SimpleNamespace(api_key=list(tokens))
    return app


def with_mounts(**options) -> FastAPI:
    """Return the application with others below it, one of which keeps its routes to itself."""
    app, inner, innermost = vllm_app(**options), FastAPI(), FastAPI()

    async def answer() -> dict[str, str]:
        return {"served": "yes"}

    for each in (inner, innermost):
        each.post("/work")(answer)
        each.get("/work")(answer)
        each.post("/tokenize")(answer)
    inner.mount("/deeper", innermost)
    app.mount("/sub", inner)
    app.mount("/opaque", lambda *asgi: JSONResponse({"served": "yes"})(*asgi))
    app.mount("/static", StaticFiles(directory="."))
    metrics = Mount("/metrics", lambda *asgi: JSONResponse({})(*asgi))
    metrics.path_regex = re.compile("^/metrics(?P<path>.*)$")  # as vLLM has it
    app.routes.append(metrics)
    return app


def served(
    world: World, path: str, key: str | None, *, method="POST", made=vllm_app, **options
) -> httpx.Response:
    app = made(middleware=[world.metered], **options)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(ask())


@pytest.fixture
def refusing(make_world) -> World:
    return make_world(tenants=TENANTS, unnamed_requests="refuse")


def test_by_default_nobody_is_refused(make_world):
    world = make_world(tenants=TENANTS)
    assert served(world, "/v1/completions", OPERATOR).status_code == 200
    assert served(world, "/pooling", None).status_code == 200


def test_a_request_that_no_rule_names_is_refused_in_openais_form(refusing):
    reply = served(refusing, "/v1/completions", OPERATOR)
    assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert reply.json()["error"]["code"] == "invalid_api_key"
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert served(refusing, "/v1/completions", ACME).status_code == 200


def test_keys_of_two_tenants_are_refused_as_a_contradiction(refusing):
    app = vllm_app(tokens=(), middleware=[refusing.metered])

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as client:
            both = {"authorization": f"Bearer {ACME}", "x-api-key": RIVAL}
            return await client.post("/v1/completions", headers=both)

    reply = asyncio.run(ask())
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "contradicting_credentials")


def test_for_messages_the_refusal_has_anthropics_form(refusing):
    said = served(refusing, "/v1/messages", OPERATOR).json()
    assert (said["type"], said["error"]["type"]) == ("error", "authentication_error")


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/pooling", None, 401),
        ("/pooling", "some-other-key-that-nobody-knows", 401),
        ("/pooling", OPERATOR, 401),  # vLLM's, and no tenant's
        ("/pooling", ACME, 200),
        ("/invocations", None, 401),
        ("/invocations", ACME, 200),
        # A route that the meter has never heard of demands vLLM's key as guarded routes do.
        ("/brand_new/x", None, 401),
        ("/brand_new/x", OPERATOR, 200),
        ("/tokenize", None, 200),
    ],
)
def test_an_open_route_is_closed_to_whoever_has_no_key_or_no_name(refusing, path, key, status):
    assert served(refusing, path, key).status_code == status


@pytest.mark.parametrize("path", ["/health", "/load"])
def test_routes_that_do_no_work_stay_open(refusing, path):
    assert served(refusing, path, None, method="GET").status_code == 200


@pytest.mark.parametrize("path", ["/sub/work", "/sub/deeper/work", "/sub/tokenize", "/opaque/x"])
def test_a_route_of_a_mounted_application_is_judged_as_any_other(refusing, path):
    for key, status in ((None, 401), (OPERATOR, 200)):
        assert served(refusing, path, key, made=with_mounts).status_code == status


@pytest.mark.parametrize("path", ["/sub/work", "/sub/deeper/work", "/opaque/x", "/metrics"])
def test_what_reads_in_a_mounted_application_stays_open(refusing, path):
    assert served(refusing, path, None, method="GET", made=with_mounts).status_code == 200
    assert served(refusing, "/tokenize", None, made=with_mounts).status_code == 200


@pytest.mark.parametrize("path", ["/sub/nothing", "/static/x"])
def test_what_a_mounted_application_does_not_serve_is_no_work(refusing, path):
    assert served(refusing, path, None, made=with_mounts).status_code in (404, 405)


def test_a_route_of_a_kind_that_nobody_knows_counts_as_work(refusing):
    class Odd(BaseRoute):
        def matches(self, scope):
            return (Match.FULL if scope["path"] == "/odd" else Match.NONE), {}

        async def handle(self, scope, receive, send):
            await JSONResponse({})(scope, receive, send)

    def with_odd(**options):
        app = vllm_app(**options)
        app.routes.append(Odd())
        return app

    assert served(refusing, "/odd", None, made=with_odd).status_code == 401
    assert served(refusing, "/odd", OPERATOR, made=with_odd).status_code == 200
    assert served(refusing, "/odd", None, method="GET", made=with_odd).status_code == 200


def test_without_keys_of_vllm_the_name_alone_counts(refusing):
    assert served(refusing, "/pooling", None, tokens=()).status_code == 401
    assert served(refusing, "/pooling", ACME, tokens=()).status_code == 200
    assert served(refusing, "/brand_new/x", None, tokens=()).status_code == 200


@pytest.mark.parametrize("state", ["switched off", "not made"])
def test_a_meter_that_does_not_work_refuses_them_too(refusing, state):
    if state == "switched off":
        refusing.runtime.guard.off = True
    else:
        refusing.found = NoRuntime(refusing.runtime.settings)
    assert served(refusing, "/v1/completions", OPERATOR).status_code == 401
    assert served(refusing, "/pooling", None).status_code == 401
    assert served(refusing, "/v1/completions", ACME).status_code == 200


def test_a_websocket_that_no_rule_names_is_refused(refusing):
    sent = []

    async def handshake() -> None:
        scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}

        async def send(message):
            sent.append(message)

        await refusing.metered(vllm_app())(scope, lambda: None, send)

    asyncio.run(handshake())
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_open_routes_are_found_in_the_application():
    expected = ["POST /pooling", "POST /invocations", "POST /brand_new/{name}"]
    assert KeyCheck(vllm_app()).open_routes() == expected
    assert KeyCheck(vllm_app(tokens=())).open_routes() == [], "nothing is guarded without keys"


def test_open_routes_of_mounted_applications_are_found_too():
    found = KeyCheck(with_mounts()).open_routes()[3:]
    at_sub = ["POST /sub/work", "POST /sub/tokenize"]
    deeper = ["POST /sub/deeper/work", "POST /sub/deeper/tokenize"]
    assert found == [*at_sub, *deeper, "ANY /opaque"]


def test_a_key_check_that_fails_or_waits_lets_nobody_in(caplog):
    class Waiting(AuthenticationMiddleware):
        async def __call__(self, scope, receive, send):
            await asyncio.sleep(1)

    Waiting.__module__, Waiting.__name__ = "vllm.somewhere", "AuthenticationMiddleware"
    app = vllm_app(tokens=())
    app.add_middleware(Waiting, tokens=[])
    with caplog.at_level(logging.WARNING, "vllm.cost_meter"):
        assert not KeyCheck(app).accepts([(b"authorization", b"Bearer x")])


def test_an_admin_token_that_is_one_of_vllms_keys_stops_the_start(monkeypatch):
    monkeypatch.setenv("COST_METER_ADMIN_TOKEN", OPERATOR)
    with pytest.raises(SystemExit) as caught:
        check_admin_token(vllm_app().state.args)
    assert str(caught.value).startswith(
        "cost meter: COST_METER_ADMIN_TOKEN: expected a token other"
    )
    assert OPERATOR not in str(caught.value)
    check_admin_token(vllm_app(tokens=[ACME]).state.args)
    monkeypatch.setenv("VLLM_API_KEY", OPERATOR)
    with pytest.raises(SystemExit):
        check_admin_token(vllm_app(tokens=()).state.args)


# ---- warnings at the start


def warned(tokens=(ACME, OPERATOR), **settings) -> list[str]:
    return list(start_warnings(vllm_app(tokens=tokens), Settings(**settings)))


def test_the_start_warns_once_tenants_are_declared():
    unnamed, open_routes = warned(tenants=TENANTS)
    assert "COST_METER_UNNAMED_REQUESTS=refuse" in unnamed
    assert "POST /pooling, POST /invocations, POST /brand_new/{name}" in open_routes
    assert "COST_METER_UNNAMED_REQUESTS=refuse closes them" in open_routes


def test_without_tenants_the_start_warns_of_open_routes_only():
    (line,) = warned()
    assert "POST /pooling" in line
    assert "once tenants are declared" in line


def test_there_is_nothing_to_warn_of():
    assert warned(tenants=TENANTS, unnamed_requests="refuse") == []
    assert warned(tokens=()) == []
    everybody = [{"rule": "constant", "tenant": "everybody"}]
    assert warned(tokens=(), tenant_rules=everybody) == []


def test_a_short_api_key_seen_in_clear_is_a_warning_that_does_not_show_it():
    tenants = [{"name": "acme", "api_key_sha256": [sha256("k3y-of-acme")]}]
    short = warned(tokens=("k3y-of-acme", "other"), tenants=tenants, unnamed_requests="refuse")
    assert len(short) == 1
    assert "'acme'" in short[0]
    assert "k3y-of-acme" not in short[0]


def test_a_ledger_over_the_network_is_warned_of_and_a_file_is_not():
    quiet = {"tenants": TENANTS, "unnamed_requests": "refuse"}
    (line,) = warned(**quiet, ledger="postgresql+psycopg://u:secret@db/ledger")
    assert "COST_METER_FLEET" in line
    assert "secret" not in line
    assert warned(**quiet, ledger="sqlite:////tmp/ledger.db") == []
