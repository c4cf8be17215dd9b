"""The OpenAPI document shows every answer: its fields, their units, and nothing that is not so."""

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.support.openapi import assert_fits, objects_in, schema_of
from tests.support.small_ledger import HOUR, small_ledger
from tests.unit.config.test_offers import PRICES
from tests.unit.economics.test_calculators import GIVEN
from vllm_cost_meter.economics import Declared
from vllm_cost_meter.endpoint.access import Access, sha256
from vllm_cost_meter.endpoint.app import make_app
from vllm_cost_meter.endpoint.economics import PUBLIC_FIGURES
from vllm_cost_meter.endpoint.tenant_routes import make_router
from vllm_cost_meter.invoices.files import InvoiceFile
from vllm_cost_meter.invoices.timeline import InvoiceLine
from vllm_cost_meter.ledger.billing.importing import import_invoice
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures, Standing
from vllm_cost_meter.units.time import NS_PER_HOUR

# How the description of a field begins, by the end of its name.
UNITS = {
    "_ns": "(GPU-ns|Wall ns)",
    "_ms": "(ms|Blocks x ms)",
    "_mj": "mJ",
    "_nanousd": "nano-USD",
    "_usd": "USD",
    "_per_s": "(USD|Output tokens|Requests) per second",
    "_tokens": "(Tokens|USD|Million tokens)",
    "_hours": "Hours",
    "_cents": "Cents",
}
ANY_UNIT = re.compile(
    rf"^({'|'.join(UNITS.values())}|1/s|GPU-s|s|%|RFC 3339( UTC)?|10\^-9 of `unit`)(?=[:.]|$)[:.]?"
)
# A description has at least so many words beside its unit.
WORDS_MIN = 2
# Inputs of calculators and figures have the words and units of the command line.
DESCRIBED_ELSEWHERE = ("Used", "Figures")
WINDOW = "2027-01-15T08:00:00Z,2027-01-15T09:00:00Z"
BUDGETS = BudgetFigures([Standing(Budget("b", 10, "usd", "month", tenant="search"), {0: 1}, 0)], 0)


@pytest.fixture
def reader(tmp_path):
    reader = small_ledger(tmp_path)
    hours = (HOUR * NS_PER_HOUR, (HOUR + 1) * NS_PER_HOUR)
    lines = {
        InvoiceLine("vol", "disk", *hours, 5): "f:1",
        InvoiceLine("gpu", "gpu", *hours, 7): "f:2",
    }
    import_invoice(reader.url, InvoiceFile("f", {}, lines, 0), NS_PER_HOUR, 0)
    yield reader
    reader.close()


@pytest.fixture
def side(reader) -> TestClient:
    return TestClient(
        make_app(
            reader,
            metrics=bytes,
            budgets=lambda: BUDGETS,
            declared=lambda: Declared(ttft_ms=100.0, theta_max=50.0),
        ),
        base_url="http://localhost",
    )


@pytest.fixture
def document(side) -> dict:
    return side.get("/openapi.json").json()


def routes(document: dict) -> list[tuple[str, dict]]:
    return [
        (path, route)
        for path, methods in document["paths"].items()
        for route in methods.values()
        if path != "/metrics"  # text
    ]


def test_every_answer_has_a_shape_with_fields(document, side):
    shown = {route.path.replace(":path}", "}") for route in side.app.routes} - {"/openapi.json"}
    assert set(document["paths"]) == shown
    for path, route in routes(document):
        found = dict(objects_in(document, schema_of(route)))
        assert found, path
        for name, schema in found.items():
            assert schema.get("properties"), f"{path}: {name}"
            assert schema.get("description"), f"{path}: {name}"


def test_every_field_of_an_answer_has_a_description_that_begins_with_its_unit(document):
    for path, route in routes(document):
        for name, schema in objects_in(document, schema_of(route)):
            for field, inner in schema["properties"].items():
                said = inner.get("description", "")
                assert said, f"{path}: {name}.{field}"
                unit = next((unit for end, unit in UNITS.items() if field.endswith(end)), "")
                if not name.endswith(DESCRIBED_ELSEWHERE):
                    assert re.match(unit, said), f"{path}: {name}.{field}: {said}"


def test_no_description_of_a_field_is_only_a_unit(document):
    for path, route in routes(document):
        for name, schema in objects_in(document, schema_of(route)):
            for field, inner in schema["properties"].items():
                rest = ANY_UNIT.sub("", inner["description"], count=1)
                assert len(rest.split()) >= WORDS_MIN, f"{path}: {name}.{field}: {rest}"


@pytest.mark.parametrize("said", ["GPU-ns.", "mJ.", "USD", "Blocks x ms.", "Cents.", "1/s: theta"])
def test_a_description_that_is_only_a_unit_would_be_found(said):
    assert len(ANY_UNIT.sub("", said, count=1).split()) < WORDS_MIN


def test_no_answer_is_checked_or_copied_when_it_is_sent(side):
    assert [route.path for route in side.app.routes if route.response_field is not None] == []


def test_errors_have_one_shape(document):
    for path, route in routes(document):
        for status in (401, 403, 422, 503):
            assert schema_of(route, status) == {"$ref": "#/components/schemas/ErrorAnswer"}, path
    for path in ("/cost/tenants/{tenant}", "/cost/requests/{request_id}"):
        of = document["paths"][path]["get"]
        assert schema_of(of, 404) == {"$ref": "#/components/schemas/ErrorAnswer"}


def test_errors_are_of_that_shape(document, side, reader):
    guarded = TestClient(make_app(reader, access=Access(sha256("secret"))))
    for client, path, asked, status in (
        (guarded, "/health", "/health", 401),
        (side, "/cost/tenants/{tenant}", "/cost/tenants/none", 404),
        (side, "/cost/summary", "/cost/summary?window=x", 422),
        (side, "/cost/requests", "/cost/requests?limit=0", 422),
    ):
        reply = client.get(asked)
        assert reply.status_code == status
        assert_fits(document, path, reply.json(), status)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/health", "/health"),
        ("/cost/requests/{request_id}", "/cost/requests/mine"),
        ("/cost/requests/{request_id}/explain", "/cost/requests/mine/explain"),
        ("/cost/requests", "/cost/requests"),
        ("/cost/tenants", "/cost/tenants"),
        ("/cost/tenants/{tenant}", "/cost/tenants/search"),
        ("/cost/summary", "/cost/summary"),
        ("/cost/invoices", "/cost/invoices"),
        ("/cost/audit", "/cost/audit"),
        ("/cost/report", "/cost/report"),
        ("/cost/report", "/cost/report?aggregate=tenant,day&step=1d&idle=proportional"),
        ("/cost/models", "/cost/models"),
        ("/cost/economics", f"/cost/economics?window={WINDOW}"),
        ("/cost/economics", "/cost/economics"),
        ("/cost/economics/method", "/cost/economics/method"),
        ("/cost/budgets", "/cost/budgets"),
    ],
)
def test_an_answer_is_as_the_document_says(document, side, path, asked):
    reply = side.get(asked)
    assert reply.status_code == 200, reply.text
    assert_fits(document, path, reply.json())


@pytest.mark.parametrize("name", GIVEN)
def test_a_calculators_answer_is_as_the_document_says(document, side, name):
    reply = side.post(f"/cost/calc/{name}", json=GIVEN[name])
    assert reply.status_code == 200
    assert_fits(document, f"/cost/calc/{name}", reply.json())


def test_a_comparison_is_as_the_document_says(document, side, tmp_path: Path, monkeypatch):
    path = tmp_path / "prices.toml"
    path.write_text(PRICES)
    monkeypatch.setenv("COST_METER_API_PRICES", str(path))
    words = {"window": WINDOW, "ratio": "2:1", "volume": "1M"}
    reply = side.get("/cost/compare", params=words)
    assert reply.status_code == 200, reply.text
    assert reply.json()["offers"]
    assert reply.json()["what_if"]["offers"]
    assert_fits(document, "/cost/compare", reply.json())


def test_the_public_page_is_as_the_document_says(document, reader):
    access = Access(sha256("secret"))
    anybody = TestClient(make_app(reader, access=access, public_economics=lambda: True))
    answer = anybody.get("/cost/economics").json()
    assert set(answer["figures"]) == set(PUBLIC_FIGURES)
    assert_fits(document, "/cost/economics", answer)
    assert_fits(document, "/cost/economics/method", anybody.get("/cost/economics/method").json())


def test_the_matches_of_an_ambiguous_id_are_in_the_document(document):
    schema = schema_of(document["paths"]["/cost/requests/{request_id}"]["get"], 300)
    assert schema == {"$ref": "#/components/schemas/Matches"}


def test_a_tenants_own_figures_are_in_the_document_of_vllm():
    app = FastAPI()
    app.include_router(make_router(lambda _: None))
    paths = app.openapi()["paths"]
    own = schema_of(paths["/v1/cost/me"]["get"])
    assert {each["$ref"].rpartition("/")[2] for each in own["anyOf"]} == {
        "OwnFigures",
        "NothingUsed",
    }
    one = schema_of(paths["/v1/cost/requests/{request_id}"]["get"])
    assert one == {"$ref": "#/components/schemas/RequestWithParts"}
