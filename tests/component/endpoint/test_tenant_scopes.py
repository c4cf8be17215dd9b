"""What a tenant means at the side endpoint: itself and all below it, for whoever asks.

The family: `search` has the declared child `ads`, which has the declared child `lab`, and a client
made `search/web`. The figures of each are a power of two, so that every sum says what is in it.
"""

from decimal import Decimal
from pathlib import Path

import httpx
import pytest

from tests.component.endpoint.test_app import Side
from tests.component.ledger.test_reader import http, part, snapshot
from vllm_cost_meter.endpoint.access import Access, sha256
from vllm_cost_meter.endpoint.app import make_app
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import PriceBook, PriceEntry, RunMatch
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures, Standing

HOUR = 500_000
OWNERS = {
    "search": Owner("search"),
    "search/web": Owner("search/web", parent="search"),
    "ads": Owner("ads", parent="search"),
    "lab": Owner("lab", parent="ads", higher=("search",)),
    "lab/ü": Owner("lab/ü", parent="lab", higher=("ads", "search")),
    # Names that a careless comparison takes for those of the family.
    "searches": Owner("searches"),
    "Search/web": Owner("Search/web", parent="Search"),
    "sea%": Owner("sea%"),
    "sea%/x": Owner("sea%/x", parent="sea%"),
    "seaside/x": Owner("seaside/x", parent="seaside"),
}
NS = {name: 2**place for place, name in enumerate(OWNERS)}
FAMILY = {"search", "search/web", "ads", "lab", "lab/ü"}
BELOW = {
    "search": FAMILY,
    "search/web": {"search/web"},
    "ads": {"ads", "lab", "lab/ü"},
    "lab": {"lab", "lab/ü"},
    "searches": {"searches"},
    "sea%": {"sea%", "sea%/x"},
    "Search": {"Search/web"},
    "sea": set(),
}
BUDGETS = [
    Standing(Budget(f"of {name}", 10, "gpu_seconds", "day", tenant=name, above=of.above), {}, 0)
    for name, of in OWNERS.items()
]


@pytest.fixture(scope="module")
def side(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("side")
    keys = {sha256(name): name for name in (*BELOW, *OWNERS)}
    access = Access(sha256("admin"), lambda: keys)
    side = Side(folder, access=access, budgets=lambda: BudgetFigures(BUDGETS))
    bills = [
        part(
            seq,
            f"of {name}",
            run_id="family",
            owner=OWNERS[name],
            pieces=(UsagePiece(HOUR, NS[name], 0, 8, 5),),
        )
        for seq, name in enumerate(OWNERS, 1)
    ]
    told = [http(f"of {name}", x_request_id="same", owner=of) for name, of in OWNERS.items()]
    side.write(*bills, *told, snapshot(bills, run_id="family"))
    yield side
    side.reader.close()


def ask(side: Side, path: str, key: str = "admin") -> httpx.Response:
    return side.get(path, authorization=f"Bearer {key}")


def whose(ns: int) -> set[str]:
    """The tenants whose bills a sum consists of."""
    return {name for name, own in NS.items() if ns & own}


@pytest.mark.parametrize("name", BELOW)
def test_a_tenants_figures_are_its_own_and_of_all_below_it(side, name):
    reply = ask(side, f"/cost/tenants/{name}")
    found = reply.json() if reply.status_code == 200 else None
    assert (whose(found["gpu_time_ns"]) if found else set()) == BELOW[name]
    if found:
        assert (found["tenant"], found["covers"]) == (name, "with_children")
        assert found["requests"] == found["tenants"] == len(BELOW[name])
        assert {row["tenant"] for row in found["recent"]} == BELOW[name]
    page = ask(side, f"/cost/requests?tenant={name.replace('%', '%25')}").json()
    assert {row["tenant"] for row in page["requests"]} == BELOW[name]
    assert (page["tenant"], page["covers"]) == (name, "with_children")


def test_own_leaves_out_what_is_below(side):
    found = ask(side, "/cost/tenants/search?covers=own").json()
    assert (whose(found["gpu_time_ns"]), found["covers"]) == ({"search"}, "own")
    assert [row["tenant"] for row in found["recent"]] == ["search"]
    page = ask(side, "/cost/requests?tenant=ads&covers=own").json()
    assert ([row["tenant"] for row in page["requests"]], page["covers"]) == (["ads"], "own")
    for covers, due in (("own", {"ads"}), ("with_children", BELOW["ads"])):
        answer = ask(side, f"/cost/report?filter=tenant:ads&covers={covers}").json()
        (series,) = answer["series"]
        assert answer["covers"] == covers
        assert {row["tenant"] for row in series["rows"]} == due
        assert {row["covers"] for row in series["rows"]} == {"own"}
        # The rows are those of all tenants, of which the filter shows some.
        assert series["gpu_time_ns"] > sum(NS.values())


def test_a_report_that_names_no_tenant_has_rows_of_each_on_its_own(side):
    answer = ask(side, "/cost/report").json()
    assert answer["covers"] is None
    rows = {row["tenant"]: row for row in answer["series"][0]["rows"]}
    assert {name: rows[name]["gpu_time_ns"] for name in OWNERS} == NS
    assert {rows[name]["covers"] for name in OWNERS} == {"own"}
    assert rows["__idle__"]["covers"] is None


def test_two_conditions_on_the_tenant_mean_what_is_of_both(side):
    answer = ask(side, "/cost/report?filter=tenant:search%2Btenant:search/web,seaside").json()
    assert [row["tenant"] for row in answer["series"][0]["rows"]] == ["search/web"]


@pytest.mark.parametrize("path", ["/cost/tenants/ads", "/cost/requests", "/cost/report"])
def test_another_word_than_the_two_is_refused(side, path):
    reply = ask(side, f"{path}?covers=siblings")
    assert reply.status_code == 422
    assert "with_children" in reply.json()["error"]["message"]


@pytest.mark.parametrize("name", BELOW)
def test_a_key_shows_its_tenant_and_all_below_it_and_no_others(side, name):
    mine = BELOW[name]
    page = ask(side, "/cost/requests", name).json()
    assert {row["tenant"] for row in page["requests"]} == mine
    series = ask(side, "/cost/report", name).json()["series"]
    assert {row["tenant"] for piece in series for row in piece["rows"]} == mine
    told = ask(side, "/cost/budgets", name).json()["budgets"]
    assert {budget["tenant"] for budget in told} == mine
    assert {budget["covers"] for budget in told} <= {"with_children"}
    for other in OWNERS:
        for path in (f"/cost/tenants/{other}", f"/cost/requests/of {other}"):
            assert ask(side, path, name).status_code == (200 if other in mine else 404), path
        # What is asked for is cut to what the key shows.
        asked = ask(side, f"/cost/requests?tenant={other.replace('%', '%25')}", name).json()
        shown = {row["tenant"] for row in asked["requests"]}
        assert shown == (BELOW.get(other, {other}) if other in mine else set())


def test_a_parent_that_its_child_asks_for_looks_as_if_it_did_not_exist(side):
    for path in ("/cost/tenants/search", "/cost/tenants/search?covers=own", "/cost/tenants/none"):
        assert ask(side, path, "lab").status_code == 404
    assert ask(side, "/cost/requests?tenant=search", "lab").json()["requests"] == []
    assert ask(side, "/cost/report?filter=tenant:search", "lab").json()["series"] == []


def test_a_report_by_a_key_may_mean_its_tenant_alone(side):
    answer = ask(side, "/cost/report?covers=own", "ads").json()
    assert [row["tenant"] for row in answer["series"][0]["rows"]] == ["ads"]
    assert answer["covers"] == "own"


def test_an_id_that_several_use_is_found_for_the_tenant_that_is_meant(side):
    assert ask(side, "/cost/requests/same", "search/web").json()["tenant"] == "search/web"
    for name in BELOW:
        found = {match.http_request_id for match in side.reader.find("same", only=name)}
        assert found == {f"of {each}" for each in BELOW[name]}


@pytest.mark.parametrize(
    "words",
    [
        "aggregate=label:pool",
        "aggregate=tenant,label:pod",
        "filter=label:node=gpu-3",
        "filter=tenant:search+label:node=gpu-3",
    ],
)
def test_labels_are_the_operators_own(side, words):
    refused = ask(side, f"/cost/report?{words}", key="search")
    assert refused.status_code == 403
    assert refused.json()["error"]["message"].startswith("label: expected the admin token")
    assert ask(side, f"/cost/report?{words}").status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/cost/report", "/cost/tenants/search", "/cost/requests/of%20search/explain"],
)
def test_a_tenant_does_not_see_for_which_labels_a_price_is(tmp_path, path):
    access = Access(sha256("admin"), lambda: {sha256("search"): "search"})
    side = Side(tmp_path, access=access)
    bill = part(1, "of search", run_id="family", owner=OWNERS["search"])
    labels = {"pool": "spot", "node": "gpu-3.example"}
    side.write(
        bill, http("of search", owner=OWNERS["search"]),
        snapshot([bill], run_id="family", labels=labels),
    )  # fmt: skip
    matches = RunMatch(labels=(("node", "gpu-3.*"),))
    book = PriceBook([PriceEntry("prices[0]", Decimal(36), "the invoice", None, matches=matches)])
    side.reader.close()
    with LedgerReader(side.url, book=book) as reader:
        side.app = make_app(reader, access=access)
        assert "gpu-3" in ask(side, path).text
        answer = ask(side, path, key="search")
        assert answer.status_code == 200
        assert "the invoice" in answer.text
        assert "gpu-3" not in answer.text


def test_why_a_tenants_cost_is_unknown_names_no_label(tmp_path):
    access = Access(sha256("admin"), lambda: {sha256("search"): "search"})
    side = Side(tmp_path, access=access)
    bill = part(1, "of search", run_id="family", owner=OWNERS["search"])
    side.write(bill, snapshot([bill], run_id="family", labels={"node": "gpu-3.example"}))
    matches = RunMatch(labels=(("node", "gpu-4.*"),))
    book = PriceBook([PriceEntry("prices[0]", Decimal(36), "the invoice", None, matches=matches)])
    side.reader.close()
    with LedgerReader(side.url, book=book) as reader:
        side.app = make_app(reader, access=access)
        answer = ask(side, "/cost/report", key="search")
        assert "and its labels" in answer.text
        assert "gpu-" not in answer.text
