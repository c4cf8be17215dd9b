"""The HTTP pages say what the side endpoint has: its routes, parameters and every field."""

import re
from inspect import signature
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tests.support.pages import DOCS, section, table_rows
from tests.support.small_ledger import small_ledger
from vllm_cost_meter.api_server.side_endpoint import REFRESH_TIMEOUT_S
from vllm_cost_meter.endpoint.access import Access, sha256
from vllm_cost_meter.endpoint.app import REQUESTS_PER_PAGE_MAX, make_app
from vllm_cost_meter.ledger.queries.cut import DEAD_AFTER_NS, SETTLE_S
from vllm_cost_meter.ledger.queries.requests import MAX_MATCHES
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures, Standing

REFERENCE = DOCS / "reference"
PAGE = REFERENCE / "http-api.md"
ROWS = REFERENCE / "request-rows.md"
TOTALS = REFERENCE / "totals.md"


@pytest.fixture
def client(tmp_path):
    reader = small_ledger(tmp_path)
    budget = Budget("b", 10, "usd", "month", tenant="search")
    figures = BudgetFigures([Standing(budget, {0: 1}, 0)], as_of_ns=0)
    app = make_app(reader, metrics=bytes, budgets=lambda: figures)
    yield TestClient(app, base_url="http://localhost")
    reader.close()


@pytest.fixture
def get(client):
    return lambda path: client.get(path).json()


def paths(app) -> list[str]:
    return [route.path.replace(":path}", "}") for route in app.routes]


def test_every_route_is_documented_and_no_other(client):
    documented = [
        name
        for row in table_rows(section(PAGE, "Routes"))
        for name in re.findall("`(/.*?)`", row[0])
    ]
    assert sorted(documented) == sorted(paths(client.app))


def test_every_query_parameter_is_documented_and_no_other(client):
    documented = {
        path: set(re.findall("`(.*?)`", row[1]))
        for row in table_rows(section(PAGE, "Routes"))
        for path in re.findall("`(/.*?)`", row[0])
        if len(row) == 3
    }
    description = client.get("/openapi.json").json()["paths"]
    for path, methods in description.items():
        (method,) = methods.values()
        parameters = method.get("parameters", [])
        query = {each["name"] for each in parameters if each["in"] == "query"}
        assert documented[path] == query, path


@pytest.mark.parametrize(
    ("page", "heading", "answer"),
    [
        (ROWS, "Parts", lambda get: get("/cost/requests/mine")["parts"][0]),
        (TOTALS, "Tenant row", lambda get: get("/cost/tenants")["tenants"][0]),
        (TOTALS, "Tenant row", lambda get: get("/cost/tenants")["tenants"][-1]),
        (TOTALS, "Tenant report", lambda get: get("/cost/tenants")),
        (TOTALS, "Runs", lambda get: get("/cost/summary")["runs"][0]),
        (ROWS, "Explanation", lambda get: get("/cost/requests/mine/explain")["parts"][0]),
        (TOTALS, "Prices", lambda get: get("/cost/tenants")["prices"][0]),
        (TOTALS, "Overheads", lambda get: get("/cost/summary")["overheads"][0]),
        (ROWS, "Cost models", lambda get: get("/cost/models")["models"][0]),
        (TOTALS, "Budgets", lambda get: get("/cost/budgets")["budgets"][0]),
        (TOTALS, "Run of an audit", lambda get: get("/cost/audit")["runs"][0]),
    ],
)
def test_every_field_is_documented_and_no_other(get, page, heading, answer):
    assert _fields(page, heading) == list(answer(get))


def test_every_field_of_a_request_row_is_documented_and_no_other(get):
    one = get("/cost/requests/mine")
    listed = get("/cost/requests")["requests"][0]
    before_parts = section(ROWS, "Request row").partition("### Parts")[0]
    assert [row[0].strip("`") for row in table_rows(before_parts)] == list(one)
    assert list(one) == [*listed, "parts"]


def test_a_summary_is_the_report_without_its_rows_and_the_fields_documented(get):
    summary = set(get("/cost/summary"))
    asked = {"aggregate", "covers", "engines", "idle", "idle_unseen"}
    asked |= {"what_if_usd_per_gpu_hour"}
    report = set(get("/cost/tenants")) - {"tenants", "series"} - asked
    assert report <= summary
    assert set(_fields(TOTALS, "Summary")) == summary - report


def test_one_tenant_has_a_row_and_what_the_page_says(get):
    row = set(get("/cost/tenants")["tenants"][0])
    more = {"tenants", "window", "taken_at", "prices", "recent"}
    assert set(get("/cost/tenants/search")) == row | more


def test_the_other_objects_have_the_keys_that_the_page_says(get):
    page = {"tenant", "covers", "requests", "running", "rows_kept_from", "next"}
    assert set(get("/cost/requests")) == page
    assert set(get("/cost/budgets")) == {"as_of", "broken", "budgets"}
    audit = table_rows(section(TOTALS, "Audit").partition("### ")[0])
    assert [row[0].strip("`") for row in audit] == list(get("/cost/audit"))
    assert set(get("/cost/tenants")["after_cut"]) == {"bills", "gpu_time_ns"}
    assert set(get("/cost/tenants")["window"]) == {"from", "to", "from_hour", "to_hour", "tz"}
    [energy] = get("/cost/tenants")["energy_prices"]
    assert set(energy) == {"usd_per_kwh", "source", "effective_from", "host"}
    [priced] = get("/cost/requests/mine/explain")["parts"][0]["prices"]
    assert set(priced) == {"gpu_time_ns", "kv_block_ms", *_fields(TOTALS, "Prices")}
    assert set(get("/health")) == {"status", "version"}


def test_every_class_has_the_row_that_the_page_names(get):
    named = set(re.findall("`(__.*?__)`", section(TOTALS, "Tenant row")))
    rows = {row["tenant"] for row in get("/cost/tenants")["tenants"]}
    assert named == {name for name in rows if name.startswith("__")}


def test_errors_are_as_documented(client, get, tmp_path):
    told = {row[0]: row[1] for row in _error_rows()}
    for path, status in (
        ("/cost/requests/none", "404"),
        ("/cost/tenants/none", "404"),
        ("/none", "404"),
        ("/cost/requests?limit=0", "422"),
        ("/cost/requests?next=x", "422"),
        ("/cost/summary?window=fortnight", "422"),
    ):
        reply = client.get(path)
        assert str(reply.status_code) == status
        assert reply.json()["error"]["type"] == told[status]
        assert reply.json()["error"]["code"] == reply.status_code
    reader = LedgerReader(f"sqlite:///{tmp_path}/ledger.db")
    keys = {sha256("key-of-search"): "search"}
    guarded = TestClient(make_app(reader, access=Access(sha256("secret"), lambda: keys)))
    reply = guarded.get("/cost/summary")
    assert (reply.status_code, reply.json()["error"]["type"]) == (401, told["401"])
    assert guarded.get("/openapi.json").status_code == 401
    assert guarded.get("/health").status_code == 401
    reply = guarded.get("/cost/summary", headers={"authorization": "Bearer key-of-search"})
    assert (reply.status_code, reply.json()["error"]["type"]) == (403, told["403"])
    reader.close()


def test_numbers_on_the_page_are_those_of_the_code():
    text = " ".join(PAGE.read_text().split())
    recent = signature(LedgerReader.tenant).parameters["recent"].default
    for said in (
        f"1 to {REQUESTS_PER_PAGE_MAX}, default 100",
        f"most {MAX_MATCHES} full request rows",
        f"is over {DEAD_AFTER_NS // 10**9} s old",
        f"totals (at most {REFRESH_TIMEOUT_S:.0f} s)",
        f"totals count (at most {SETTLE_S:.0f} s)",
        f"latest {recent} request rows",
    ):
        assert said in text, said
    assert f"at most {DEAD_AFTER_NS // 10**9} s old" in section(TOTALS, "Runs")


def _fields(page: Path, heading: str) -> list[str]:
    rows = table_rows(section(page, heading))
    return [re.findall("`(.*?)`", row[0])[0] for row in rows]


def _error_rows() -> list[list[str]]:
    lines = [line for line in section(PAGE, "Errors").splitlines() if line.startswith("| ")]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0].isdigit()]
