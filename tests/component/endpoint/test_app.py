"""The side endpoint over a real ledger, asked by a real HTTP client."""

import asyncio
import contextlib
import hmac
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest

from tests.component.ledger.test_reader import HOUR, T0, http, part, snapshot
from tests.support.builders import make_open
from tests.support.ledger_writer import LedgerWriter
from vllm_cost_meter.endpoint.access import Access, sha256
from vllm_cost_meter.endpoint.app import make_app
from vllm_cost_meter.endpoint.guarding import Failures
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.tables.replies import TOLD
from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.reports.grammar import question
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures, Standing
from vllm_cost_meter.units.time import rfc3339

BASE = "http://localhost"
JSON_ROUTES = [
    "/health",
    "/cost/requests",
    "/cost/requests/h1",
    "/cost/tenants",
    "/cost/tenants/alice",
    "/cost/summary",
    "/cost/report",
    "/cost/economics",
    "/cost/economics/method",
    "/cost/invoices",
    "/cost/audit",
    "/openapi.json",
]


class Side:
    """A ledger with three exchanges, and the side endpoint over it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.path = folder / "ledger.db"
        self.url = f"sqlite:///{self.path}"
        bills = [part(1), part(2, "h2"), part(3, "h3", tenant="bob")]
        writer = LedgerWriter(self.url)
        writer.start()
        told = [http(), http("h2", at=1), http("h3", at=2, tenant="bob", x_request_id="a/b c")]
        writer.commit(*bills, *told, snapshot(bills)).result(10)
        writer.close(5)
        self.refreshed = 0
        self.on_refresh = lambda: None
        # As in a server, which knows that its engine lives whatever the clock says.
        self.reader = LedgerReader(self.url, alive=lambda: ["run"])
        self.app = make_app(self.reader, refresh=self._refresh, **options)

    def _refresh(self) -> None:
        self.refreshed += 1
        self.on_refresh()

    def write(self, *records: Any) -> None:
        writer = LedgerWriter(self.url)
        writer.start()
        writer.commit(*records).result(10)
        writer.close(5)

    def get(self, path: str, method: str = "GET", **headers: str) -> httpx.Response:
        return self._ask(method, path, headers=headers)

    def post(self, path: str, body: bytes) -> httpx.Response:
        return self._ask("POST", path, content=body, headers={"content-type": "application/json"})

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())

    def sql(self, statement: str) -> None:
        with contextlib.closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute(statement)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    made: list[Side] = []

    def make(**options: Any) -> Side:
        made.append(Side(tmp_path, **options))
        return made[-1]

    yield make
    for side in made:
        side.reader.close()


@pytest.fixture
def side(make) -> Side:
    return make()


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """The error of a reply, whose body must be of the one shape there is."""
    body = reply.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "code"]
    assert body["error"]["code"] == reply.status_code
    assert reply.headers["content-type"] == "application/json"
    return body["error"]


# ---- answers


@pytest.mark.parametrize("path", JSON_ROUTES)
def test_every_body_is_an_object(side, path):
    reply = side.get(path)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert isinstance(reply.json(), dict)


@pytest.mark.parametrize("path", ["h1", "resp-h1", "x-h1", "internal-1", "external-1"])
def test_a_request_is_found_by_every_id_it_has(side, path):
    row = side.get(f"/cost/requests/{path}").json()
    assert row["http_request_id"] == "h1"
    assert row["gpu_time_ns"] == 300
    assert [p["request_id"] for p in row["parts"]] == ["internal-1"]


def test_an_id_that_one_more_client_was_just_told_a_cost_by_means_both_requests(side):
    assert side.get("/cost/requests/x-h1").json()["state"] == "finished"
    side.on_refresh = lambda: side.write(part(4, "h4"), http("h4", x_request_id="x-h1"))
    assert side.get("/cost/requests/x-h1").status_code == 300
    assert side.refreshed == 2


def test_what_is_not_found_finished_is_looked_up_again_with_the_engines_asked(side):
    assert side.get("/cost/requests/h4").status_code == 404
    assert side.refreshed == 1
    opened = make_open(request_id="internal-4", http_request_id="h4", started_at_ns=T0)
    side.on_refresh = lambda: side.write(opened)
    row = side.get("/cost/requests/h4").json()
    assert (row["request_id"], row["state"]) == ("internal-4", "running")
    side.on_refresh = lambda: side.write(part(4, "h4"), http("h4"))
    assert side.get("/cost/requests/h4").json()["state"] == "finished"
    assert side.refreshed == 3


def test_a_running_request_is_listed_and_its_cost_grows(side):
    def told(decode_ns: int, number: int) -> None:
        live = (("internal-4", Accrued(decode_ns=decode_ns)),)
        totals = ClassTotals(requests=900, in_flight=decode_ns)
        now_ns = time.time_ns()
        bills = [part(1), part(2, "h2"), part(3, "h3")]
        changes = {"totals": totals, "live": live, "taken_at_ns": now_ns, "step_ns": 0}
        side.write(snapshot(bills, number, **changes))

    side.write(make_open(request_id="internal-4", http_request_id="h4", started_at_ns=T0))
    told(70, 2)
    (listed,) = side.get("/cost/requests").json()["running"]
    assert (listed["http_request_id"], listed["gpu_time_ns"]) == ("h4", 70)
    assert side.get("/cost/requests?tenant=bob").json()["running"] == []
    side.on_refresh = lambda: told(90, 3)
    row = side.get("/cost/requests/h4").json()
    assert (row["state"], row["gpu_time_ns"]) == ("running", 90)


def test_an_id_may_hold_what_a_path_does_not(side):
    assert side.get("/cost/requests/a/b%20c").json()["http_request_id"] == "h3"
    assert side.get("/cost/requests/a%2Fb%20c").json()["http_request_id"] == "h3"


def test_an_id_of_several_requests_lists_them(side):
    side.sql("UPDATE requests SET x_request_id = 'same' WHERE tenant = 'alice'")
    reply = side.get("/cost/requests/same")
    assert reply.status_code == 300
    assert [match["http_request_id"] for match in reply.json()["matches"]] == ["h2", "h1"]


def test_pages_go_from_the_newest_to_the_oldest_and_end(side):
    seen, path = [], "/cost/requests?limit=2"
    while path:
        page = side.get(path).json()
        seen.append([row["http_request_id"] for row in page["requests"]])
        path = page["next"] and f"/cost/requests?limit=2&next={page['next']}"
    assert seen == [["h3", "h2"], ["h1"]]
    alice = side.get("/cost/requests?tenant=alice").json()["requests"]
    assert {row["tenant"] for row in alice} == {"alice"}


def test_integers_are_exact_and_costs_are_text(side):
    side.sql("UPDATE requests SET prompt_tokens = 9007199254740993 WHERE seq = 1")
    side.sql(f"UPDATE requests SET reply_told = reply_told - {TOLD['prompt_tokens']}")
    row = side.get("/cost/requests/h1")
    assert orjson.loads(row.content)["prompt_tokens"] == 9_007_199_254_740_993
    assert row.json()["cost_usd"] == "0.000000007"


@pytest.mark.parametrize("path", ["tenants", "tenants/alice", "summary", "report", "audit"])
def test_the_ledger_is_brought_up_to_now_before_a_figure_is_read(side, path):
    side.get(f"/cost/{path}")
    assert side.refreshed == 1


def test_a_window_chooses_whole_hours(side):
    start, end = (rfc3339((HOUR + n) * 3_600 * 10**9) for n in (0, 1))
    inside = side.get(f"/cost/tenants?window={start},{end}").json()
    assert inside["window"]["from"] == rfc3339(T0)
    rows = {row["tenant"]: row["gpu_time_ns"] for row in inside["tenants"]}
    assert (rows["alice"], rows["bob"]) == (600, 300)
    assert inside["adds_up"]
    outside = side.get("/cost/summary?window=1h").json()
    assert outside["requests_ns"] == 0


def test_a_report_answers_in_the_words_of_its_question(side):
    words = "aggregate=tenant,model&idle=reserved:bob=50&filter=tenant:bob+model:m&price=3600"
    answer = side.get(f"/cost/report?{words}&window=2027-01&tz=Europe/Berlin").json()
    assert (answer["aggregate"], answer["idle"]) == (["tenant", "model"], "reserved:bob=50")
    assert (answer["what_if_usd_per_gpu_hour"], answer["window"]["tz"]) == ("3600", "Europe/Berlin")
    (series,) = answer["series"]
    (row,) = series["rows"]
    # Half of 1000 idle and 3 tail; of the two halves the first row is rounded up.
    assert (row["tenant"], row["gpu_time_ns"], row["idle_share_ns"]) == ("bob", 300, 502)
    assert (row["usage_cost_nanousd"], row["cost_nanousd"]) == (300, 802)
    assert series["cost_nanousd"] == answer["wall_cost_nanousd"] == 1943


def test_a_report_in_steps_can_be_added_up_again(side):
    stepped = side.get("/cost/report?step=1h&aggregate=tenant,hour").json()["series"]
    assert [one["from"] for one in stepped] == ["2027-01-15T08:00:00.000000Z"]
    (together,) = side.get("/cost/report?step=1h&accumulate=true").json()["series"]
    assert (together["from"], together["gpu_time_ns"]) == (None, 1943)


def test_the_openapi_document_names_every_route(side):
    paths = side.get("/openapi.json").json()["paths"]
    assert {
        "/cost/requests/{request_id}",
        "/cost/requests",
        "/cost/tenants",
        "/cost/tenants/{tenant}",
        "/cost/summary",
        "/cost/audit",
        "/health",
    } <= set(paths)


def test_metrics_are_those_of_the_registry_it_was_given(make):
    registry = CollectorRegistry()
    Counter("mine", "A counter", registry=registry).inc()
    reply = make(metrics=lambda: generate_latest(registry)).get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    assert "mine_total 1.0" in reply.text


def test_without_a_registry_there_are_no_metrics(side):
    assert error_of(side.get("/metrics"))["code"] == 404


# ---- errors


@pytest.mark.parametrize(
    "path",
    ["/", "/nope", "/cost/requests/nope", "/cost/requests/", "/cost/tenants/nope"],
)
def test_what_is_not_there_is_404(side, path):
    error = error_of(side.get(path))
    assert (error["code"], error["type"]) == (404, "not_found")


@pytest.mark.parametrize(
    "query",
    [
        "requests?limit=0",
        "requests?limit=1001",
        "requests?limit=x",
        "requests?next=x",
        "requests?next=e30=",
        "tenants?window=now",
        "tenants?window=0h",
        "tenants/alice?window=1h,2h",
        "summary?window=2026-01-02T00:00:00Z,2026-01-01T00:00:00Z",
        "report?window=now",
        "invoices?window=now",
        "report?tz=Mars/Olympus",
        "report?aggregate=pod",
        "report?step=1m",
        "report?accumulate=perhaps",
        "report?idle=weighted",
        "report?idle=reserved:alice=60,bob=41",
        "report?filter=alice",
        "report?price=cheap",
    ],
)
def test_a_wrong_parameter_is_422_and_says_what_came(side, query):
    error = error_of(side.get(f"/cost/{query}"))
    assert (error["code"], error["type"]) == (422, "invalid_request")
    assert "got" in error["message"]


@pytest.mark.parametrize("window", ["999999d", "0001-01-01T00:00:00Z,9999-12-31T23:59:59Z"])
def test_the_widest_window_is_everything(side, window):
    assert side.get(f"/cost/tenants?window={window}").json()["adds_up"]


def test_a_wrong_method_is_405_and_names_the_right_ones(side):
    reply = side.get("/cost/tenants", method="POST")
    assert error_of(reply)["code"] == 405
    assert reply.headers["allow"] == "GET"


def test_a_ledger_that_cannot_be_read_is_503(side):
    side.sql("DROP TABLE requests")
    for path in ("/cost/requests/h1", "/cost/requests", "/cost/tenants", "/cost/audit"):
        error = error_of(side.get(path))
        assert (error["code"], error["type"]) == (503, "ledger_unavailable")


def test_what_nobody_expected_is_500_of_the_same_shape_and_not_the_askers_fault(side):
    side.sql("UPDATE snapshots SET taken_at = 'corrupt'")
    error = error_of(side.get("/cost/audit"))
    assert (error["code"], error["type"]) == (500, "internal_error")


TOKEN = "s3cret-token"


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer wrong", TOKEN, f"Basic {TOKEN}", f"Bearer  {TOKEN}"]
    + [f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"],
)
def test_without_the_token_nothing_is_told(make, authorization):
    side = make(access=Access(sha256(TOKEN)), metrics=bytes, failures=Failures(delay_s=0))
    headers = {} if authorization is None else {"authorization": authorization}
    for path in [*JSON_ROUTES[:-1], "/metrics"]:
        reply = side.get(path, **headers)
        assert error_of(reply)["code"] == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert TOKEN not in reply.text
    assert side.refreshed == 0


def test_with_the_token_all_is_told_and_the_comparison_takes_the_same_time(make, monkeypatch):
    side = make(access=Access(sha256(TOKEN)))
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or compare(a, b))
    assert side.get("/cost/tenants", authorization=f"Bearer {TOKEN}").status_code == 200
    assert compared == [sha256(TOKEN)]


def test_a_token_outside_ascii_is_wrong_and_no_error(make):
    side = make(access=Access(sha256(TOKEN)))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(side.app), base_url=BASE
        ) as client:
            return await client.get("/cost/tenants", headers={b"authorization": b"Bearer \xff"})

    assert error_of(asyncio.run(ask()))["code"] == 401


# ---- tenants


KEYS = {"alice": "key-of-alice", "bob": "key-of-bob"}
BY_HASH = {sha256(key): tenant for tenant, key in KEYS.items()}
ADMIN_ONLY = [
    "/cost/tenants",
    "/cost/summary",
    "/cost/invoices",
    "/cost/audit",
    "/cost/models",
    "/cost/economics",
    "/cost/economics/method",
    "/metrics",
]


@pytest.fixture(params=[None, sha256(TOKEN)], ids=["without an admin token", "with one"])
def shared(request, make):
    """Return a side endpoint that tenants may ask."""
    budgets = [
        Standing(Budget(name, 10, "usd", "day", **of), {}, 0)
        for name, of in (
            ("of alice", {"tenant": "alice"}),
            ("of bob", {"tenant": "bob"}),
            ("of a tag", {"tag": ("team", "x")}),
        )
    ]
    access = Access(request.param, lambda: BY_HASH)
    return make(access=access, metrics=bytes, budgets=lambda: BudgetFigures(budgets))


def as_alice(side, path: str) -> httpx.Response:
    return side.get(path, authorization=f"Bearer {KEYS['alice']}")


def test_a_tenant_sees_its_own_requests_and_no_others(shared):
    assert {row["tenant"] for row in as_alice(shared, "/cost/requests").json()["requests"]} == {
        "alice"
    }
    assert as_alice(shared, "/cost/requests/h1").json()["tenant"] == "alice"
    assert as_alice(shared, "/cost/tenants/alice").json()["tenant"] == "alice"
    page = as_alice(shared, "/cost/requests?tenant=bob").json()
    nothing = dict.fromkeys(("rows_kept_from", "next")) | {"requests": [], "running": []}
    assert page == {"tenant": "bob", "covers": "with_children", **nothing}


@pytest.mark.parametrize("after", ["", "/explain"])
def test_another_tenants_request_and_an_unknown_one_answer_alike(shared, after):
    # h3 is bob's, and so is its X-Request-Id.
    answers = [
        as_alice(shared, f"/cost/requests/{name}{after}") for name in ("h3", "a/b c", "none")
    ]
    assert [answer.status_code for answer in answers] == [404] * 3
    assert {
        answer.text.replace(name, "ID")
        for answer, name in zip(answers, ("h3", "a/b c", "none"), strict=True)
    } == {answers[2].text.replace("none", "ID")}


def test_another_tenants_row_and_an_unknown_one_answer_alike(shared):
    of_bob, unknown = (as_alice(shared, f"/cost/tenants/{name}") for name in ("bob", "none"))
    assert of_bob.status_code == unknown.status_code == 404
    assert of_bob.text.replace("bob", "none") == unknown.text


@pytest.mark.parametrize("path", [*ADMIN_ONLY, "/openapi.json"])
def test_what_holds_figures_of_all_is_for_the_admin(shared, path):
    assert error_of(as_alice(shared, path))["code"] == 403


WORDS = ["aggregate=model", "aggregate=tenant,hour&step=1h", "filter=tenant:bob", "aggregate=day"]


@pytest.mark.parametrize("words", WORDS)
def test_a_report_tells_a_tenant_its_own_rows_and_nothing_of_the_whole(shared, words):
    answer = as_alice(shared, f"/cost/report?{words}").json()
    whole = {"wall_gpu_ns", "wall_cost_nanousd", "wall_cost_usd", "adds_up", "difference_ns"}
    assert not whole & set(answer)
    rows = [row for piece in answer["series"] for row in piece["rows"]]
    assert {row["class"] for row in rows} <= {"requests"}
    own_ns = 0 if "bob" in words else 600
    assert sum(row["gpu_time_ns"] for row in rows) == own_ns
    assert sum(piece["gpu_time_ns"] for piece in answer["series"]) == own_ns


def test_a_report_does_not_tell_a_tenant_when_others_were_served(shared):
    at = T0 + 3_600 * 10**9
    pieces = (UsagePiece(HOUR + 1, 100, 200, 8, 5),)
    late = part(4, "h4", tenant="bob", finished_at_ns=at, pieces=pieces)
    hours = {HOUR: ClassTotals(requests=900), HOUR + 1: ClassTotals(requests=300)}
    totals = ClassTotals(requests=1200)
    taken = {"number": 2, "taken_at_ns": at + 60 * 10**9, "last_seq": 4, "billed_ns": 1200}
    shared.write(late, snapshot([], totals=totals, hours=hours, **taken))
    whole = shared.reader.report(question(step="1h"))["series"]
    assert [piece["gpu_time_ns"] for piece in whole] == [900, 300]
    pieces_of_alice = as_alice(shared, "/cost/report?step=1h").json()["series"]
    assert [piece["from"] for piece in pieces_of_alice] == ["2027-01-15T08:00:00.000000Z"]


@pytest.mark.parametrize("idle", ["proportional", "even", "owner:alice", "reserved:alice=50"])
def test_a_tenant_is_not_told_how_much_was_idle(shared, idle):
    assert error_of(as_alice(shared, f"/cost/report?idle={idle}"))["code"] == 403


def test_a_tenant_sees_its_own_budgets_and_none_that_it_shares(shared):
    assert [each["budget"] for each in as_alice(shared, "/cost/budgets").json()["budgets"]] == [
        "of alice"
    ]


def test_a_wrong_token_is_nobody_also_where_none_is_needed(shared):
    assert error_of(shared.get("/cost/requests", authorization="Bearer wrong"))["code"] == 401


def test_an_id_that_a_tenant_chose_twice_is_not_listed_to_it(shared):
    shared.write(http("h4", at=3, x_request_id="twice"), http("h5", at=4, x_request_id="twice"))
    assert as_alice(shared, "/cost/requests/twice").status_code == 404
