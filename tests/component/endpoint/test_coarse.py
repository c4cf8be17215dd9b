"""What a tenant sees on the side endpoint where its figures are coarse, and what an operator sees.

Method: every GET route that the endpoint describes is asked by a tenant, so a new route is under
the rule too.
"""

import pytest
from fastapi.testclient import TestClient

from tests.support.coarse import assert_coarse, figures_of
from tests.support.small_ledger import small_ledger
from vllm_cost_meter.endpoint.access import Access, sha256
from vllm_cost_meter.endpoint.app import make_app
from vllm_cost_meter.reports.coarse import HIDDEN
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures, Others, Standing

ADMIN = {"authorization": "Bearer admin"}
TENANT = {"authorization": "Bearer key"}


@pytest.fixture
def side(tmp_path):
    reader = small_ledger(tmp_path)
    budget = Budget("search's", 10**9, "gpu_seconds", "day", tenant="search")
    others = Others(1_234_511, 1_234_522, None, is_counted=True)
    standing = Standing(budget, {0: 1_234_567}, 0, others=others)
    figures = BudgetFigures([standing], as_of_ns=1_234_567)
    access = Access(sha256("admin"), lambda: {sha256("key"): "search"}, lambda: True)
    with TestClient(make_app(reader, access=access, budgets=lambda: figures)) as client:
        yield client
    reader.close()


def paths_of(side: TestClient) -> list[str]:
    """Return every GET route of the endpoint, with values for its parameters."""
    rows = side.get("/cost/requests", headers=ADMIN).json()["requests"]
    own = next(row for row in rows if row["tenant"] == "search")
    values = {"request_id": own["http_request_id"], "tenant": "search"}
    document = side.get("/openapi.json", headers=ADMIN).json()
    return [
        path.format(**values) for path, methods in document["paths"].items() if "get" in methods
    ]


def test_no_route_tells_a_tenant_an_exact_figure(side):
    answered = []
    for path in paths_of(side):
        reply = side.get(path, headers=TENANT)
        if reply.status_code == 200:
            answered.append(path)
            assert_coarse(reply.json())
    kinds = {path.split("/")[2] for path in answered if path.startswith("/cost")}
    assert kinds == {"requests", "tenants", "report", "budgets"}


def test_an_operator_sees_exact_figures_all_the_same(side):
    rows = side.get("/cost/requests", headers=ADMIN).json()["requests"]
    told = [(name, value) for name, value in figures_of(rows) if name in HIDDEN]
    assert any(value is not None for _, value in told)


def test_a_report_with_a_supposed_price_tells_no_exact_time(side):
    asked = "/cost/report?price=1000000&aggregate=tenant"
    for row in side.get(asked, headers=TENANT).json()["series"][0]["rows"]:
        # A million USD an hour is 10^6 / 3600 nano-USD a nanosecond.
        assert row["usage_cost_nanousd"] == pytest.approx(row["gpu_time_ns"] * 10**6 / 3600, 1e-5)


def test_an_explanation_is_for_operators_where_figures_are_coarse(side):
    path = next(path for path in paths_of(side) if path.endswith("/explain"))
    reply = side.get(path, headers=TENANT)
    assert (reply.status_code, "coarse" in reply.json()["error"]["message"]) == (403, True)
    assert side.get(path, headers=ADMIN).status_code == 200
