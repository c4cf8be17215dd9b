"""A tenant's own figures on vLLM's port: to whom they are told, and whose they are."""

import asyncio
import hashlib

import httpx
import pytest
from fastapi import FastAPI

from tests.support.coarse import assert_coarse
from tests.support.key_check import AuthenticationMiddleware
from tests.support.openapi import assert_fits
from tests.support.world import BODY, JSON, World, replying, scope_of
from vllm_cost_meter.api_server.collector import Collector
from vllm_cost_meter.api_server.middleware import CostMiddleware
from vllm_cost_meter.api_server.routes import OWN_ROUTES, route_of
from vllm_cost_meter.endpoint.handed import OwnAnswer, OwnQuestion
from vllm_cost_meter.endpoint.own_figures import OwnFiguresOf
from vllm_cost_meter.endpoint.questions import Questions
from vllm_cost_meter.endpoint.tenant_routes import AskSideEndpoint, make_router
from vllm_cost_meter.errors import AwayError
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures, Standing

TENANTS = [
    {"name": name, "api_key_sha256": [hashlib.sha256(name.encode()).hexdigest()]}
    for name in ("acme", "rival")
]
BUDGETS = [
    Standing(Budget(name, 10, "usd", "day", **of), {}, 0)
    for name, of in (
        ("acme's", {"tenant": "acme"}),
        ("rival's", {"tenant": "rival"}),
        ("a tag's", {"tag": ("team", "x")}),
    )
]


@pytest.fixture
def world(make_world) -> World:
    """Return a server on which acme and rival have each asked once."""
    world = make_world(tenants=TENANTS)
    for name in ("acme", "rival"):
        key = (b"authorization", f"Bearer {name}".encode())
        scope = scope_of(headers=[key, (b"x-request-id", f"of-{name}".encode())])
        app = replying(JSON, [BODY], lambda name=name: world.engine.generate(f"cmpl-{name}-0"))
        world.run(app, scope)
    world.rows("SELECT 1")  # all is written
    return world


async def nobody(_asked: OwnQuestion) -> OwnAnswer:
    """The process of the side endpoint while there is none."""
    raise AwayError("the side endpoint's process gave no answer within 35 s")


def ask(
    world: World,
    path: str,
    key: str | None = "acme",
    answer: AskSideEndpoint | None = None,
    *,
    is_coarse: bool = False,
    also: dict[str, str] | None = None,
    check: type | None = None,
) -> httpx.Response:
    """Ask as a tenant, with further headers `also`; `check` is vLLM's check of keys."""
    reader = LedgerReader(world.runtime.ledger_url)
    app = FastAPI()
    own = OwnFiguresOf(
        reader, lambda: None, lambda: BudgetFigures(BUDGETS), Questions(), lambda: is_coarse
    )
    app.include_router(make_router(answer or own.answer))
    app.add_middleware(CostMiddleware, runtime=lambda: world.found)
    if check is not None:
        app.add_middleware(check, tokens=["acme", "rival"])

    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://vllm", follow_redirects=True
        ) as client:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            return await client.get(path, headers={**headers, **(also or {})})

    try:
        return asyncio.run(get())
    finally:
        reader.close()


def test_a_tenant_is_told_what_it_used_and_where_its_own_budgets_stand(world):
    told = ask(world, "/v1/cost/me").json()
    assert (told["tenant"], told["requests"]) == ("acme", 1)
    assert [row["tenant"] for row in told["recent"]] == ["acme"]
    assert [budget["budget"] for budget in told["budgets"]] == ["acme's"]


@pytest.mark.parametrize(
    ("error_ns", "told"), [(None, (0, 0, None)), (0, (3_000, 0, 0.0)), (150, (3_000, 150, 0.05))]
)
def test_a_tenant_is_told_how_well_its_split_is_known_unless_figures_are_coarse(
    make_world, error_ns, told
):
    names = ("charge_known_ns", "charge_error_ns", "charge_error")
    world = make_world(tenants=TENANTS)
    key = (b"authorization", b"Bearer acme")
    scope = scope_of(headers=[key, (b"x-request-id", b"of-acme")])
    engine = world.engine

    def work() -> None:
        engine.born("cmpl-acme-0")
        bill = engine.bill("cmpl-acme-0")
        pieces = tuple(piece._replace(charge_error_ns=error_ns) for piece in bill.pieces)
        engine.runtime.run("bill", Collector.billed, bill._replace(pieces=pieces))

    world.run(replying(JSON, [BODY], work), scope)
    world.rows("SELECT 1")
    exact = ask(world, "/v1/cost/me").json()
    coarse = ask(world, "/v1/cost/me", is_coarse=True).json()
    assert tuple(exact[name] for name in names) == told
    # That it is 0 would tell that nobody else was there.
    assert [coarse[name] for name in names] == [None, None, None]
    for is_coarse, of_part in ((False, error_ns), (True, None)):
        row = ask(world, "/v1/cost/requests/of-acme", is_coarse=is_coarse).json()
        assert [part["charge_error_ns"] for part in row["parts"]] == [of_part]


def test_a_tenant_is_told_what_all_below_it_used_or_only_itself(make_world):
    keys = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("acme", "lab", "rival")}
    tenants = [{"name": name, "api_key_sha256": [digest]} for name, digest in keys.items()]
    tenants[1]["parent"] = "acme"
    world = make_world(tenants=tenants)
    for name in keys:
        scope = scope_of(headers=[(b"authorization", f"Bearer {name}".encode())])
        app = replying(JSON, [BODY], lambda name=name: world.engine.generate(f"cmpl-{name}-0"))
        world.run(app, scope)
    world.rows("SELECT 1")
    told = ask(world, "/v1/cost/me").json()
    assert (told["tenant"], told["covers"], told["tenants"]) == ("acme", "with_children", 2)
    assert (told["requests"], told["output_tokens"]) == (2, 10)
    assert {row["tenant"] for row in told["recent"]} == {"acme", "lab"}
    own = ask(world, "/v1/cost/me?covers=own").json()
    assert (own["covers"], own["requests"], own["output_tokens"]) == ("own", 1, 5)
    of_lab = ask(world, "/v1/cost/me", "lab").json()
    assert (of_lab["tenant"], of_lab["requests"], of_lab["output_tokens"]) == ("lab", 1, 5)
    assert of_lab["budgets"] == []


def test_a_tenant_finds_its_own_request(world):
    told = ask(world, "/v1/cost/requests/of-acme").json()
    assert (told["tenant"], told["x_request_id"]) == ("acme", "of-acme")


def test_another_tenants_request_and_an_unknown_one_answer_alike(world):
    of_rival, unknown = (
        ask(world, f"/v1/cost/requests/{name}") for name in ("of-rival", "of-nobody")
    )
    assert of_rival.status_code == unknown.status_code == 404
    assert of_rival.text.replace("rival", "nobody") == unknown.text


@pytest.mark.parametrize("key", [None, "wrong"])
@pytest.mark.parametrize("path", ["/v1/cost/me", "/v1/cost/requests/of-acme"])
def test_without_the_api_key_of_a_tenant_nothing_is_told(world, key, path):
    reply = ask(world, path, key)
    assert reply.status_code == 401
    assert "acme" not in reply.text


@pytest.mark.parametrize("path", ["/v1/cost/me", "/v1/cost/requests/of-acme"])
def test_keys_of_two_tenants_are_refused_as_a_completion_with_them_is(world, path):
    reply = ask(world, path, also={"x-api-key": "rival"})
    completion = scope_of(headers=[(b"authorization", b"Bearer acme"), (b"x-api-key", b"rival")])
    refused = world.run(replying(JSON, [BODY]), completion)
    assert (reply.status_code, refused.status) == (400, 400)
    assert reply.json()["error"]["code"] == "contradicting_credentials"
    assert reply.content == refused.body


@pytest.mark.parametrize("path", ["/v1/cost/me", "/v1/cost/requests/of-acme"])
def test_where_vllm_checks_keys_the_one_that_it_admitted_says_who_asks(world, path):
    told = ask(world, path, also={"x-api-key": "rival"}, check=AuthenticationMiddleware)
    assert (told.status_code, told.json()["tenant"]) == (200, "acme")


def test_the_meter_knows_its_own_routes_by_their_labels():
    paths = {route.path_format for route in make_router(nobody).routes}
    assert paths == OWN_ROUTES
    asked = ["/v1/cost/me", "/v1/cost/requests/of-acme", "/v1/cost/requests/a/b"]
    assert {route_of(path) for path in asked} == OWN_ROUTES


def test_nothing_else_of_the_meter_is_there(world):
    for path in ("/v1/cost", "/v1/cost/requests", "/v1/cost/tenants", "/v1/cost/budgets"):
        assert ask(world, path).status_code == 404


def test_asking_for_figures_is_no_request_in_the_books(world):
    before = world.rows("SELECT count(*) FROM replies")
    ask(world, "/v1/cost/me")
    assert world.rows("SELECT count(*) FROM replies") == before == [(2,)]


def test_own_figures_are_as_the_document_of_vllm_says(world):
    app = FastAPI()
    app.include_router(make_router(nobody))
    document = app.openapi()
    assert_fits(document, "/v1/cost/me", ask(world, "/v1/cost/me").json())
    never = "/v1/cost/me?window=2020-01"
    nothing = ask(world, never).json()
    assert set(nothing) == {"tenant", "covers", "requests", "gpu_time_ns", "budgets"}
    assert_fits(document, "/v1/cost/me", nothing)
    path = "/v1/cost/requests/{request_id}"
    assert_fits(document, path, ask(world, "/v1/cost/requests/of-acme").json())


@pytest.mark.parametrize("path", ["/v1/cost/me", "/v1/cost/requests/of-acme"])
def test_coarse_figures_tell_nothing_of_other_tenants(world, path):
    told = ask(world, path, is_coarse=True).json()
    assert_coarse(told)
    (row,) = told.get("recent", [told])
    assert (row["gpu_time_ns"], row["cost_usd"]) == (1_000_000, "0.000010000")
    exact = ask(world, path).json()
    (row,) = exact.get("recent", [exact])
    assert (row["gpu_time_ns"], row["cost_usd"]) == (3_000, "0.000000030")


@pytest.mark.parametrize("path", ["/v1/cost/me", "/v1/cost/requests/of-acme"])
def test_without_the_process_of_the_side_endpoint_a_tenant_is_told_to_ask_again(world, path):
    reply = ask(world, path, answer=nobody)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
    assert "gave no answer within 35 s" in reply.text


def test_what_is_asked_wrongly_is_said_as_vllm_says_it(world):
    reply = ask(world, "/v1/cost/me?window=x")
    assert reply.status_code == 422
    assert "window: expected" in reply.json()["detail"]
