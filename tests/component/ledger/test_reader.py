"""The reader's answers: exchanges with several parts, paging, tenants at a cut, the audit."""

import json
import sqlite3
import threading
from dataclasses import replace
from typing import Any

import pytest

from tests.support.builders import make_bill, make_part, make_snapshot, owned
from tests.support.ledger_writer import LedgerWriter
from tests.support.statements import asked_by
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.queries.requests import Match
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import PriceBook, PriceEntry
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, Latencies, Price, Usage
from vllm_cost_meter.records.snapshot import CLASSES, ClassTotals
from vllm_cost_meter.units.time import NS_PER_HOUR

HOUR = 500_000
T0 = HOUR * NS_PER_HOUR
NOW = T0 + 60 * 10**9
CLASS_ROWS = [f"__{n}__" for n in (*CLASSES[2:], "in_flight")]
NULLS = dict.fromkeys(("tenant", "covers", "rows_kept_from", "next"))
NO_REQUESTS = NULLS | {"requests": [], "running": []}


def part(seq: int, http_id: str | None = "h1", **changes: object) -> EngineRequest:
    """An engine request of 10 prompt tokens (2 cached), 5 output tokens, 100 + 200 ns."""
    own = {name: changes.pop(name) for name in ("run_id", "pieces", "status") if name in changes}
    bill = make_bill(
        run_id=own.get("run_id", "run"),
        seq=seq,
        request_id=f"internal-{seq}",
        engine_status=own.get("status", "stop"),
        pieces=own.get("pieces", (UsagePiece(HOUR, 100, 200, 8, 5),)),
    )
    record = make_part(
        bill,
        http_request_id=http_id,
        response_id=f"resp-{http_id}" if http_id else None,
        external_id=f"external-{seq}",
        prompt_group=f"group-{seq}",
        cost_nanousd=7,
        started_at_ns=T0 + seq * 1000,
        finished_at_ns=T0 + seq * 10**6,
        latencies=Latencies(seq, 2.0 * seq, 3.0, 4.0 * seq),
    )
    return replace(record, **owned(changes))


def http(http_id: str = "h1", usage: Usage | None = None, at: int = 0, **changes) -> HttpRequest:
    record = HttpRequest(
        http_id, f"resp-{http_id}", f"x-{http_id}", Owner("alice"), "m", "/v1/completions", 200,
        False, usage or Usage(), 300, 7, T0, T0 + at * 10**6,
    )  # fmt: skip
    return replace(record, **owned(changes))


def snapshot(bills: list[EngineRequest], number: int = 1, run_id: str = "run", **changes: object):
    """The snapshot of an engine that wrote these bills, all within HOUR, and idled 1000 ns."""
    billed = sum(b.bill.gpu_time_ns for b in bills)
    totals = changes.pop("totals", ClassTotals(requests=billed, idle=1000, in_flight=40, tail=3))
    values = {
        "run_id": run_id,
        "number": number,
        "taken_at_ns": NOW,
        "started_at_ns": T0,
        "totals": totals,
        "last_seq": len(bills),
        "billed_ns": billed,
        "running": 1,
        "kv_cache_usage": 0.5,
        **{"steps": 9, "busy_ns": 1000, "own_ns": 10},
    }
    return make_snapshot(**{**values, **changes})


class Ledger:
    """A ledger in a file, with its writer and its reader."""

    def __init__(self, url: str) -> None:
        self.writers: dict[str | None, LedgerWriter] = {}
        self.url = url
        self.write()
        self.reader = LedgerReader(url)

    def priced(self, *entries: PriceEntry, **more: Any) -> None:
        """Read from now on with a book of these prices."""
        self.reader.close()
        self.reader = LedgerReader(self.url, book=PriceBook(entries, **more))

    def write(self, *records, usd: str | None = None) -> None:
        if usd not in self.writers:
            price = Price(f"p{usd}", usd, "settings", T0) if usd else None
            self.writers[usd] = LedgerWriter(self.url, price_of=lambda _: price)
            self.writers[usd].start()
        self.writers[usd].commit(*records).result(10)

    def knowing(self, *run_ids: str) -> None:
        """Read from now on by somebody who knows that these runs live."""
        self.reader.close()
        self.reader = LedgerReader(self.url, alive=lambda: run_ids)

    def tenants(self, *window, now_ns: int = NOW, settle_s: float = 0):
        return self.reader.tenants(*window, as_of=AsOf(now_ns, settle_s))

    def rows(self, *window, **options):
        return {row["tenant"]: row for row in self.tenants(*window, **options)["tenants"]}

    def audit(self, now_ns: int = NOW, settle_s: float = 0, *, full: bool = False):
        return self.reader.audit(AsOf(now_ns, settle_s), full=full)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close(5)
        self.reader.close()


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield ledger
    ledger.close()


# ---- an empty ledger, and none


def test_an_empty_ledger_answers_everything(ledger):
    reader = ledger.reader
    assert reader.find("x") == []
    assert reader.request(Match("x")) is None
    assert reader.requests() == NO_REQUESTS
    assert reader.tenant("alice") is None
    audit = reader.audit()
    assert (audit["balanced"], audit["reason"], audit["runs"]) == (None, "no_runs", [])
    report = reader.tenants()
    assert [row["tenant"] for row in report["tenants"]] == CLASS_ROWS
    assert (report["wall_gpu_ns"], report["adds_up"], report["cost_nanousd"]) == (0, True, None)
    summary = reader.summary()
    assert (summary["requests"], summary["utilization"], summary["own_time_share"]) == (
        0, None, None,
    )  # fmt: skip
    json.dumps([report, summary])


def test_a_ledger_that_is_not_there_is_said_in_one_line(tmp_path):
    with pytest.raises(LedgerError, match="no such file"):
        LedgerReader(f"sqlite:///{tmp_path}/nothing.db")


# ---- one request


def test_every_id_of_an_exchange_finds_it(ledger):
    ledger.write(part(1), part(2), http())
    for id in ("h1", "resp-h1", "x-h1", "internal-1", "internal-2", "external-2"):
        assert ledger.reader.find(id) == [Match("h1")]
    assert ledger.reader.find("other") == []


def test_an_ambiguous_id_finds_the_newest_first(ledger):
    for n in range(1, 4):
        ledger.write(http(f"h{n}", at=n, x_request_id="same"))
    assert ledger.reader.find("same") == [Match("h3"), Match("h2"), Match("h1")]


def test_a_part_without_an_exchange_is_found_and_told(ledger):
    ledger.write(part(1, None))
    (match,) = ledger.reader.find("internal-1")
    assert match == Match(None, "run", 1)
    row = ledger.reader.request(match)
    assert (row["http_request_id"], row["status"], row["gpu_time_ns"]) == (None, None, 300)


def test_a_request_row_has_the_names_that_others_rely_on(ledger):
    ledger.write(part(1), http(usage=Usage(10, 2, 5), at=3))
    row = ledger.reader.request(Match("h1"))
    (shown,) = row.pop("parts")
    assert row == {
        "request_id": "internal-1", "response_id": "resp-h1", "http_request_id": "h1",
        "x_request_id": "x-h1", "tenant": "alice", "tenant_rule": "none", "model": "m",
        "route": "/v1/completions", "status": 200, "streamed": False, "state": "finished",
        "as_of": None, "engine_status": "stop", "prompt_tokens": 10,
        "cached_tokens": 2, "output_tokens": 5, "gpu_time_ns": 300, "prefill_ns": 100,
        "decode_ns": 200, "cost_nanousd": 7, "cost_usd": "0.000000007", "cost_reason": None,
        "method": "tokens", "marginal_ns": 0, "marginal_cost_usd": None, "recomputed_ns": 0,
        "rejected_ns": 0, "cut_ns": 0, "kv_block_ms": 0, "saved_estimate_ns": 0,
        "started_at": "2027-01-15T08:00:00.000000Z", "finished_at": "2027-01-15T08:00:00.003000Z",
        "queue_ms": 1.0, "ttft_ms": 2.0, "tpot_ms": 3.0, "e2e_ms": 4.0,
        "energy_mj": None, "energy_reason": "pending", "external_tokens": None, "kv_role": None,
        "prefill_http_request_id": None,
    }  # fmt: skip
    assert (shown["seq"], shown["prefill_tokens"], shown["decode_tokens"]) == (1, 8, 5)


def test_a_prompt_shared_by_two_parts_counts_once_and_their_output_twice(ledger):
    ledger.write(*(part(seq, prompt_group="same") for seq in (1, 2)), part(3), http())
    row = ledger.reader.request(Match("h1"))
    assert (row["prompt_tokens"], row["cached_tokens"], row["output_tokens"]) == (20, 4, 15)
    assert (row["gpu_time_ns"], row["cost_nanousd"], len(row["parts"])) == (900, 21, 3)
    assert (row["queue_ms"], row["ttft_ms"], row["tpot_ms"], row["e2e_ms"]) == (1, 2, None, 12)
    alice = ledger.rows()["alice"]
    assert (alice["prompt_tokens"], alice["cached_tokens"], alice["output_tokens"]) == (20, 4, 15)


def test_what_the_client_was_told_goes_before_what_the_engine_computed(ledger):
    ledger.write(part(1), http(usage=Usage(9, None, 4)))
    for row in (ledger.reader.request(Match("h1")), ledger.rows()["alice"]):
        assert (row["prompt_tokens"], row["cached_tokens"], row["output_tokens"]) == (9, 2, 4)


def test_parts_that_ended_differently_are_all_named(ledger):
    ledger.write(part(1, status="stop"), part(2, status="abort"), http())
    assert ledger.reader.request(Match("h1"))["engine_status"] == "abort+stop"


def test_the_cost_is_unknown_if_that_of_any_part_is(ledger):
    ledger.write(part(1), part(2, cost_nanousd=None), http())
    row = ledger.reader.request(Match("h1"))
    assert (row["cost_nanousd"], row["cost_usd"], row["gpu_time_ns"]) == (None, None, 600)


def test_a_bill_is_told_before_its_http_row_comes(ledger):
    ledger.write(part(1))
    row = ledger.reader.request(Match("h1"))
    assert (row["status"], row["gpu_time_ns"], row["response_id"]) == (None, 300, "resp-h1")


def test_a_request_that_never_reached_the_engine_has_no_time_of_its_own(ledger):
    ledger.write(http(status=400, gpu_time_ns=None, cost_nanousd=None))
    row = ledger.reader.request(Match("h1"))
    assert (row["status"], row["gpu_time_ns"], row["cost_nanousd"], row["parts"]) == (
        400, None, None, [],
    )  # fmt: skip
    assert "alice" not in ledger.rows()


# ---- pages


def test_pages_show_everything_once_the_newest_first(ledger):
    for n in range(1, 8):
        ledger.write(part(n, f"h{n}"), http(f"h{n}", at=n))
    ledger.write(part(8, "unanswered"), part(9, "unanswered"), part(10, None))
    ledger.write(http("tie", at=4))
    seen, token = [], None
    while True:
        page = ledger.reader.requests(limit=3, next=token)
        seen += [row["http_request_id"] for row in page["requests"]]
        token = page["next"]
        if token is None:
            break
        assert len(page["requests"]) == 3
    assert seen == [None, "unanswered", "h7", "h6", "h5", "tie", "h4", "h3", "h2", "h1"]


def test_a_page_can_be_of_one_tenant(ledger):
    ledger.write(http("h1"), http("h2", tenant="bob"), part(1, None, tenant="bob"))
    rows = ledger.reader.requests(tenant="bob")["requests"]
    assert [row["tenant"] for row in rows] == ["bob", "bob"]


@pytest.mark.parametrize("token", ["", "x", "é", "e30=", "WzEsMl0=", "bnVsbA=="])
def test_a_token_we_did_not_make_is_refused(ledger, token):
    with pytest.raises(ValueError, match="next"):
        ledger.reader.requests(next=token)


# ---- tenants


def test_tenant_rows_and_class_rows_add_up_to_wall_times_gpus(ledger):
    bills = [part(1, "h1"), part(2, "h2", tenant="bob"), part(3, "h3", tenant="bob")]
    ledger.write(*bills, *(http(b.http_request_id, owner=b.owner) for b in bills), usd="3600")
    ledger.write(snapshot(bills), usd="3600")
    report = ledger.tenants()
    rows = report["tenants"]
    assert [row["tenant"] for row in rows] == ["bob", "alice", *CLASS_ROWS]
    assert sum(row["gpu_time_ns"] for row in rows) == report["wall_gpu_ns"] == 1943
    assert (report["adds_up"], report["difference_ns"], report["gpus"]) == (True, 0, 1)
    bob = rows[0]
    assert (bob["requests"], bob["prompt_tokens"], bob["gpu_time_ns"]) == (2, 20, 600)
    assert (bob["prefill_ns"], bob["decode_ns"]) == (200, 400)
    assert (bob["cost_nanousd"], bob["cost_usd"]) == (600, "0.000000600")  # 1 nano-USD per ns
    idle = rows[2]
    assert (idle["requests"], idle["prompt_tokens"], idle["cost_nanousd"]) == (0, None, 1000)
    assert report["cost_nanousd"] == 1943


def test_bills_after_the_cut_wait_for_the_next(ledger):
    bills = [part(n, f"h{n}") for n in (1, 2, 3)]
    ledger.write(*bills, snapshot(bills[:2]))
    report = ledger.tenants()
    assert report["adds_up"]
    assert report["tenants"][0]["gpu_time_ns"] == 600
    assert report["after_cut"] == {"bills": 1, "gpu_time_ns": 300}
    ledger.write(snapshot(bills, number=2))
    assert ledger.tenants()["after_cut"] == {"bills": 0, "gpu_time_ns": 0}


def test_without_a_price_time_is_told_and_cost_is_unknown(ledger):
    bills = [part(1)]
    ledger.write(*bills, snapshot(bills))
    rows = ledger.rows()
    assert (rows["alice"]["gpu_time_ns"], rows["alice"]["cost_nanousd"]) == (300, None)
    assert (rows["__dummy__"]["gpu_time_ns"], rows["__dummy__"]["cost_usd"]) == (0, None)


def test_each_run_is_priced_with_its_own_price(ledger):
    first, second = [part(1)], [part(1, run_id="run2")]
    ledger.write(*first, snapshot(first), usd="3600")
    ledger.write(*second, snapshot(second, run_id="run2"), usd="7200")
    assert ledger.rows()["alice"]["cost_nanousd"] == 300 + 600
    third = [part(1, run_id="run3")]
    ledger.write(*third, snapshot(third, run_id="run3"))
    alice = ledger.rows()["alice"]
    assert (alice["cost_nanousd"], alice["cost_reason"]) == (
        None,
        "no price for run run3 at 2027-01-15T08Z: none is set by COST_METER_GPU_HOUR_USD or"
        " [[prices]]",
    )


def test_the_in_flight_time_of_a_dead_run_is_lost(ledger):
    ledger.write(snapshot([]))
    later = NOW + 16 * 10**9
    living, dead = ledger.rows(), ledger.rows(now_ns=later)
    assert (living["__in_flight__"]["gpu_time_ns"], living["__lost__"]["gpu_time_ns"]) == (40, 0)
    assert (dead["__in_flight__"]["gpu_time_ns"], dead["__lost__"]["gpu_time_ns"]) == (0, 40)
    (run,) = ledger.audit(now_ns=later)["runs"]
    assert (run["in_flight_ns"], run["lost_ns"]) == (0, 40)
    assert (run["alive"], run["balanced"]) == (False, True)
    ledger.knowing("run")
    assert ledger.rows(now_ns=later)["__in_flight__"]["gpu_time_ns"] == 40


def test_a_window_cuts_a_request_at_the_hour(ledger):
    pieces = (UsagePiece(HOUR, 100, 0, 8, 0), UsagePiece(HOUR + 1, 0, 200, 0, 5))
    late = T0 + NS_PER_HOUR + 5
    bill = part(1, pieces=pieces, finished_at_ns=late)
    hours = {HOUR: ClassTotals(requests=100, idle=7), HOUR + 1: ClassTotals(requests=200, host=1)}
    totals = hours[HOUR].plus(hours[HOUR + 1])
    ledger.write(bill, http(finished_at_ns=late), snapshot([bill], totals=totals, hours=hours))
    assert ledger.audit()["balanced"]
    first, second = ledger.tenants(HOUR, HOUR + 1), ledger.tenants(HOUR + 1, None)
    assert first["window"]["from"] == "2027-01-15T08:00:00.000000Z"
    assert (first["wall_gpu_ns"], second["wall_gpu_ns"]) == (107, 201)
    assert first["adds_up"]
    assert second["adds_up"]
    assert (first["tenants"][0]["requests"], second["tenants"][0]["requests"]) == (0, 1)
    assert (first["tenants"][0]["gpu_time_ns"], second["tenants"][0]["gpu_time_ns"]) == (100, 200)
    assert ledger.tenants(None, HOUR)["wall_gpu_ns"] == 0
    with pytest.raises(ValueError, match="from_hour"):
        ledger.tenants(HOUR, HOUR - 1)


def test_one_tenant_has_its_row_and_its_latest_requests(ledger):
    bills = [part(1, "h1"), part(2, "h2", tenant="bob")]
    ledger.write(*bills, http("h1"), http("h2", tenant="bob"), snapshot(bills))
    bob = ledger.reader.tenant("bob", as_of=AsOf(NOW))
    assert (bob["requests"], bob["gpu_time_ns"]) == (1, 300)
    assert [row["http_request_id"] for row in bob["recent"]] == ["h2"]
    assert bob["prices"] == []
    assert ledger.reader.tenant("carol", as_of=AsOf(NOW)) is None


def test_the_summary_totals_the_rows(ledger):
    bills = [part(1, "h1"), part(2, "h2", tenant="bob")]
    ledger.write(*bills, http("h1"), http("h2", tenant="bob"), snapshot(bills), usd="3600")
    summary = ledger.reader.summary(as_of=AsOf(NOW, 0))
    assert (summary["requests"], summary["output_tokens"], summary["requests_ns"]) == (2, 10, 600)
    assert summary["utilization"] == (600 + 40 + 3) / 1643
    assert (summary["cost_nanousd"], summary["usd_per_gpu_hour"]) == (1643, "3600")
    assert summary["own_time_share"] == 0.01
    assert [(run["run_id"], run["alive"]) for run in summary["runs"]] == [("run", True)]


# ---- audit


def test_books_that_balance_say_so(ledger):
    bills = [part(n) for n in (1, 2, 3)]
    ledger.write(*bills, snapshot(bills))
    audit = ledger.audit()
    (run,) = audit["runs"]
    assert audit["balanced"]
    assert (run["requests_ns"], run["billed_ns"], run["ledger_ns"], run["last_seq"]) == (
        900, 900, 900, 3,
    )  # fmt: skip
    assert (run["missing_bills"], run["difference_ns"], run["state"]) == ([], 0, "on")


def test_missing_bills_are_named_and_runs_of_them_compacted(ledger):
    bills = [part(n) for n in range(1, 21)]
    kept = [b for b in bills if b.bill.seq not in (1, 5, 6, 7, 10, 19, 20)]
    ledger.write(*kept, snapshot(bills))
    audit = ledger.audit()
    (run,) = audit["runs"]
    assert not audit["balanced"]
    assert run["missing_bills"] == ["1", "5-7", "10", "19-20"]
    assert run["ledger_difference_ns"] == 7 * 300
    assert not ledger.tenants()["adds_up"]
    assert ledger.tenants()["difference_ns"] == 7 * 300


def test_a_run_none_of_whose_bills_came_misses_them_all(ledger):
    ledger.write(snapshot([part(n) for n in range(1, 4)]))
    assert ledger.audit()["runs"][0]["missing_bills"] == ["1-3"]


def test_more_gaps_than_can_be_listed_are_said_to_be_more(ledger):
    bills = [part(n) for n in range(1, 2101)]
    ledger.write(*bills[::2], snapshot(bills))
    missing = ledger.audit()["runs"][0]["missing_bills"]
    assert (len(missing), missing[0], missing[-1]) == (1001, "2", "more")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"wall_ns": 5}, "difference_ns"),
        ({"billed_ns": 299}, "ledger_difference_ns"),
        ({"totals": ClassTotals(requests=301)}, "billed_difference_ns"),
        ({"hours": {HOUR: ClassTotals(requests=300, idle=1043)}}, "hours_difference_ns"),
        ({"hours": {}}, "hours_difference_ns"),
    ],
)
def test_each_way_of_not_adding_up_is_seen(ledger, changes, name):
    ledger.write(part(1), snapshot([part(1)], **changes))
    audit = ledger.audit()
    assert not audit["balanced"]
    assert audit["runs"][0][name] != 0


@pytest.mark.parametrize(
    "changed",
    [
        "decode_ns = 199, prefill_ns = 101",
        "marginal_ns = 1",
        "recomputed_tokens = 1",
        "rejected_ns = 1",
        "cut_ns = 1",
        "kv_block_ms = 1",
        "step_ns = 1",
        "saved_estimate_ns = 1",
    ],
)
def test_a_bill_that_is_not_the_sum_of_its_pieces_is_seen(ledger, tmp_path, changed):
    pieces = (UsagePiece(HOUR - 1, 50, 100, 4, 3), UsagePiece(HOUR, 50, 100, 4, 2))
    ledger.write(part(1, pieces=pieces), snapshot([part(1)]))
    connection = sqlite3.connect(tmp_path / "ledger.db")
    with connection:
        connection.execute(f"UPDATE usage_pieces SET {changed}")
    connection.close()
    assert ledger.audit()["runs"][0]["uneven_bills"] is None
    audit = ledger.audit(full=True)
    assert (audit["balanced"], audit["runs"][0]["uneven_bills"]) == (False, 1)


def test_the_audit_waits_for_a_bill_on_its_way(ledger):
    bills = [part(1), part(2)]
    ledger.write(bills[0], snapshot(bills))
    late = threading.Timer(0.2, lambda: ledger.write(bills[1]))
    late.start()
    assert ledger.audit(settle_s=10)["balanced"]
    late.join()


def test_nobody_waits_twice_for_the_same_missing_bill_nor_for_a_dead_run(ledger):
    ledger.write(snapshot([part(1)]))
    ledger.audit(settle_s=0.05)
    assert asked_by(ledger.tenants, settle_s=5) == asked_by(ledger.tenants)
    assert asked_by(ledger.audit, settle_s=5) == asked_by(ledger.audit)
    assert not ledger.audit(settle_s=5)["balanced"]
    ledger.write(snapshot([part(1, run_id="old")], run_id="old"))
    dead = {"now_ns": NOW + 10**12}
    assert asked_by(ledger.audit, settle_s=5, **dead) == asked_by(ledger.audit, **dead)


def test_a_tenants_share_of_the_cache_is_its_blocks_over_time(ledger):
    pieces = (UsagePiece(HOUR, 100, 200, 8, 5, kv_block_ms=30, saved_estimate_ns=7),)
    bills = [part(1, pieces=pieces), part(2, pieces=pieces), part(3, "h2", tenant="bob")]
    totals = ClassTotals(requests=900, idle=10 * 10**6 - 900)
    ledger.write(*bills, snapshot(bills, totals=totals, kv_blocks=20))
    rows = ledger.rows()
    assert (rows["alice"]["kv_block_ms"], rows["alice"]["saved_estimate_ns"]) == (60, 14)
    assert rows["alice"]["kv_cache_share"] == 60 / (20 * 10)
    assert [rows[name]["kv_cache_share"] for name in ("bob", "__idle__")] == [0, None]


def test_a_cache_of_unknown_size_has_no_shares(ledger):
    ledger.write(part(1), snapshot([part(1)], kv_blocks=None))
    assert ledger.rows()["alice"]["kv_cache_share"] is None
