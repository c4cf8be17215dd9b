"""Requests that run, and those that were lost: what the ledger tells of them without a bill."""

import sqlite3
from contextlib import closing

import pytest

from tests.component.ledger.test_reader import NOW, T0, Ledger, http, part, snapshot
from tests.support.builders import make_open
from vllm_cost_meter.ledger.ends.lost import MAX_LOST
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.queries.requests import Match
from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.requests import OpenRequest
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.units.time import rfc3339

USED = Accrued(100, 200, 8, 5, 30, 1, 2, 3, 4, 7, 9, 2_500_000, 900, 6, 12)
DEAD = NOW + 16 * 10**9
USD = "3600"  # 1 nano-USD a nanosecond


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield ledger
    ledger.close()


def open_(number: int = 1, http_id: str | None = "h1", **changes) -> OpenRequest:
    """Whose `internal-number` is, as its part says later."""
    changes.setdefault("started_at_ns", T0 + number * 1000)
    return make_open(
        request_id=f"internal-{number}",
        external_id=f"external-{number}",
        response_id=f"resp-{http_id}" if http_id else None,
        http_request_id=http_id,
        x_request_id=f"x-{http_id}" if http_id else None,
        prompt_group=f"group-{number}",
        **changes,
    )


def seen(*live, bills=(), number=1, step_ns=40, **changes):
    """A snapshot that tells what requests have used."""
    totals = ClassTotals(
        requests=sum(b.bill.gpu_time_ns for b in bills),
        in_flight=sum(used.gpu_time_ns for _, used in live) + step_ns,
    )
    return snapshot(list(bills), number, totals=totals, live=live, **changes)


def row_of(ledger: Ledger, id: str = "h1", now_ns: int = NOW):
    (match,) = ledger.reader.find(id)
    return ledger.reader.request(match, AsOf(now_ns, settle_s=0))


# ---- one request that runs


@pytest.mark.parametrize("id", ["h1", "resp-h1", "x-h1", "internal-1", "external-1"])
def test_a_running_request_is_found_by_every_id_it_has(ledger, id):
    ledger.write(open_())
    assert ledger.reader.find(id) == [Match("h1")]


def test_a_running_request_costs_what_it_used_at_the_last_snapshot(ledger):
    ledger.write(open_(), seen(("internal-1", USED)), usd=USD)
    row = row_of(ledger)
    assert (row["state"], row["as_of"], row["finished_at"]) == ("running", rfc3339(NOW), None)
    assert (row["gpu_time_ns"], row["prefill_ns"], row["decode_ns"]) == (300, 100, 200)
    assert (row["cost_nanousd"], row["cost_usd"]) == (300, "0.000000300")
    assert (row["marginal_ns"], row["marginal_cost_usd"]) == (30, "0.000000030")
    assert (row["recomputed_ns"], row["rejected_ns"], row["cut_ns"]) == (1, 3, 7)
    assert (row["tenant"], row["route"], row["model"]) == ("alice", "/v1/completions", "m")
    assert (row["request_id"], row["x_request_id"]) == ("internal-1", "x-h1")
    assert (row["engine_status"], row["output_tokens"], row["method"]) == (None, None, "tokens")
    (shown,) = row["parts"]
    assert (shown["run_id"], shown["seq"], shown["state"]) == ("run", None, "running")
    assert (shown["decode_tokens"], shown["cut_tokens"]) == (5, 9)
    assert (shown["steps"], shown["batch"]) == (6, 12)
    assert (shown["kv_block_ms"], shown["step_ns"], shown["saved_estimate_ns"]) == (2, 900, None)
    later = Accrued(100, 900, 8, 9, 30)
    ledger.write(seen(("internal-1", later), number=2, taken_at_ns=NOW + 10**9))
    row = row_of(ledger)
    assert (row["gpu_time_ns"], row["as_of"]) == (1000, rfc3339(NOW + 10**9))


def test_a_running_request_has_the_shape_of_a_finished_one(ledger):
    ledger.write(open_(), seen(("internal-1", USED)), part(2, "h2"), http("h2"))
    running, finished = row_of(ledger), row_of(ledger, "h2")
    assert list(running) == list(finished)
    assert list(running["parts"][0]) == list(finished["parts"][0])
    assert (finished["state"], finished["parts"][0]["state"]) == ("finished", "finished")


def test_without_a_price_the_time_of_a_running_request_is_told_and_its_cost_is_unknown(ledger):
    ledger.write(open_(), seen(("internal-1", USED)))
    row = row_of(ledger)
    assert (row["gpu_time_ns"], row["cost_nanousd"], row["marginal_cost_usd"]) == (300, None, None)


def test_a_request_that_waits_has_used_nothing_so_far(ledger):
    ledger.write(open_(), seen(("another", USED)), usd=USD)
    row = row_of(ledger)
    assert (row["state"], row["gpu_time_ns"], row["cost_nanousd"]) == ("running", 0, 0)
    assert row["parts"][0]["run_id"] is None


def test_parts_with_a_bill_and_parts_that_run_are_added(ledger):
    bill = part(1)
    ledger.write(bill, open_(2), seen(("internal-2", USED), bills=[bill]), usd=USD)
    row = row_of(ledger)
    assert (row["state"], row["gpu_time_ns"], row["cost_nanousd"]) == ("running", 600, 307)
    assert [p["state"] for p in row["parts"]] == ["finished", "running"]
    # What only bills say is not told of some parts as if it were of all.
    assert (row["engine_status"], row["output_tokens"], row["finished_at"]) == (None, None, None)


def test_a_reply_that_was_told_runs_on_while_a_part_does(ledger):
    ledger.write(open_(), http(at=5), seen(("internal-1", USED)))
    row = row_of(ledger)
    assert (row["state"], row["status"], row["gpu_time_ns"]) == ("running", 200, 300)
    assert row["finished_at"] == rfc3339(T0 + 5 * 10**6)


def test_a_running_request_without_an_exchange_is_found_before_and_after_its_bill(ledger):
    ledger.write(open_(http_id=None), seen(("internal-1", USED)))
    (match,) = ledger.reader.find("internal-1")
    assert match == Match(None, request_id="internal-1")
    assert ledger.reader.request(match, AsOf(NOW))["state"] == "running"
    ledger.write(part(1, None, announced=True))
    assert ledger.reader.request(match, AsOf(NOW))["state"] == "finished"
    assert ledger.reader.find("internal-1") == [Match(None, "run", 1)]


def test_with_two_engines_the_one_that_has_it_says_what_it_used(ledger):
    other = seen(("internal-2", USED._replace(decode_ns=0)), run_id="run2", engine_index=1)
    ledger.write(open_(), open_(2), seen(("internal-1", USED)), other)
    row = row_of(ledger)
    assert [(p["run_id"], p["gpu_time_ns"]) for p in row["parts"]] == [("run", 300), ("run2", 100)]


def test_an_engine_that_began_after_a_request_does_not_have_it(ledger):
    ledger.write(open_(), seen(("internal-1", USED), started_at_ns=T0 + 10**9))
    row = row_of(ledger)
    assert (row["state"], row["gpu_time_ns"], row["as_of"]) == ("lost", None, None)


def test_what_a_meter_of_another_version_told_is_read_by_its_names(ledger, tmp_path):
    ledger.write(open_(), seen(("internal-1", USED)))
    told = '{"fields": ["decode_ns", "news", "prefill_ns"], "requests": [["internal-1", 7, 8, 9]]}'
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection, connection:
        connection.execute("UPDATE live_usage SET requests = ?", (told,))
    row = row_of(ledger)
    assert (row["prefill_ns"], row["decode_ns"], row["marginal_ns"]) == (9, 7, 0)


# ---- its end


def test_a_bill_takes_the_open_request_away(ledger, tmp_path):
    ledger.write(open_())
    ledger.write(part(1, announced=True), http())
    assert row_of(ledger)["state"] == "finished"
    assert opened(tmp_path) == []


def test_an_open_request_and_its_bill_may_be_in_one_transaction(ledger, tmp_path):
    ledger.write(part(1, announced=True), open_())
    assert opened(tmp_path) == []


def test_an_open_request_that_is_replayed_after_its_bill_is_not_open_again(ledger, tmp_path):
    ledger.write(open_())
    ledger.write(part(1, announced=True))
    ledger.write(open_())
    assert opened(tmp_path) == []


def test_the_same_id_used_again_is_another_request(ledger, tmp_path):
    ledger.write(part(1, announced=True), seen(bills=[part(1)]))
    ledger.write(open_(started_at_ns=NOW))
    assert opened(tmp_path) == ["internal-1"]
    row = row_of(ledger)
    assert (row["state"], [p["state"] for p in row["parts"]]) == (
        "running",
        ["finished", "running"],
    )


def test_a_bill_whose_birth_was_forgotten_ends_a_request_all_the_same(ledger):
    ledger.write(open_(), seen(("internal-1", USED)))
    bill = part(1, None, tenant="unknown", started_at_ns=NOW, finished_at_ns=NOW)
    ledger.write(bill)
    assert ledger.reader.find("h1") == []
    assert row_of(ledger, "internal-1")["state"] == "finished"


def opened(folder) -> list[str]:
    with closing(sqlite3.connect(folder / "ledger.db")) as connection:
        return [id for (id,) in connection.execute("SELECT request_id FROM open_requests")]


# ---- lists


def test_running_requests_are_listed_apart_the_newest_first(ledger):
    ledger.write(part(1, "h1"), http("h1"), open_(2, "h2"), open_(3, "h3"), open_(4, "h3"))
    ledger.write(seen(("internal-2", USED), ("internal-4", USED), bills=[part(1)]))
    page = ledger.reader.requests(as_of=AsOf(NOW))
    assert [(r["http_request_id"], r["state"]) for r in page["requests"]] == [("h1", "finished")]
    assert [(r["http_request_id"], r["gpu_time_ns"]) for r in page["running"]] == [
        ("h3", 300),
        ("h2", 300),
    ]
    assert "parts" not in page["running"][0]
    assert ledger.reader.requests(tenant="bob", as_of=AsOf(NOW))["running"] == []
    assert len(ledger.reader.requests(limit=1, as_of=AsOf(NOW))["running"]) == 1


def test_an_exchange_is_in_one_list_only_and_on_the_first_page_only(ledger):
    bills = [part(1, "h1"), part(2, "h2")]
    ledger.write(*bills, http("h1"), open_(3, "h2"), open_(4, "h4"))
    ledger.write(seen(("internal-3", USED), bills=bills))
    first = ledger.reader.requests(limit=1, as_of=AsOf(NOW))
    assert [(r["http_request_id"], r["state"]) for r in first["requests"]] == [("h2", "running")]
    assert first["requests"][0]["gpu_time_ns"] == 600
    assert [r["http_request_id"] for r in first["running"]] == ["h4"]
    second = ledger.reader.requests(limit=1, next=first["next"], as_of=AsOf(NOW))
    assert [r["http_request_id"] for r in second["requests"]] == ["h1"]
    assert second["running"] == []


def test_what_a_dead_engine_had_is_not_listed_as_running(ledger):
    ledger.write(open_(), seen(("internal-1", USED)))
    assert ledger.reader.requests(as_of=AsOf(DEAD))["running"] == []
    ledger.write(open_(2, started_at_ns=DEAD), seen(run_id="run2", started_at_ns=DEAD - 1))
    ledger.knowing("run2")
    page = ledger.reader.requests(as_of=AsOf(DEAD))
    assert [r["request_id"] for r in page["running"]] == ["internal-2"]


# ---- what was lost


def test_a_request_of_a_dead_engine_is_lost_with_what_it_had_used(ledger):
    ledger.write(open_(), seen(("internal-1", USED)), usd=USD)
    row = row_of(ledger, now_ns=DEAD)
    assert (row["state"], row["as_of"], row["cost_nanousd"]) == ("lost", rfc3339(NOW), 300)
    ledger.knowing("run")
    assert row_of(ledger, now_ns=DEAD)["state"] == "running"


def test_what_a_dead_engine_never_told_of_is_unknown(ledger):
    ledger.write(open_(), seen())
    row = row_of(ledger, now_ns=DEAD)
    assert (row["state"], row["gpu_time_ns"], row["cost_nanousd"]) == ("lost", None, None)


def test_an_engine_whose_meter_is_off_bills_nothing_any_more(ledger):
    ledger.write(open_(), seen(state="off", step_ns=0))
    assert row_of(ledger)["state"] == "lost"
    assert ledger.reader.requests(as_of=AsOf(NOW))["running"] == []


def test_the_audit_names_whose_time_a_dead_engine_lost(ledger):
    ledger.write(open_(), seen(("internal-1", USED), ("young", USED._replace(decode_ns=500))))
    (living,) = ledger.audit()["runs"]
    assert (living["lost_requests"], living["lost_requests_ns"], living["lost_step_ns"]) == (
        [],
        0,
        0,
    )
    audit = ledger.audit(now_ns=DEAD)
    (run,) = audit["runs"]
    assert audit["balanced"]
    at = rfc3339(NOW)
    assert run["lost_requests"] == [
        {"request_id": "young", "http_request_id": None, "tenant": None,
         "gpu_time_ns": 600, "as_of": at},
        {"request_id": "internal-1", "http_request_id": "h1", "tenant": "alice",
         "gpu_time_ns": 300, "as_of": at},
    ]  # fmt: skip
    assert (run["lost_ns"], run["lost_requests_ns"], run["lost_step_ns"]) == (940, 900, 40)


def test_a_request_whose_bill_came_after_the_last_snapshot_is_not_among_the_lost(ledger):
    ledger.write(open_(), open_(2), seen(("internal-1", USED), ("internal-2", USED)))
    ledger.write(part(1, announced=True))
    (run,) = ledger.audit(now_ns=DEAD)["runs"]
    assert [one["request_id"] for one in run["lost_requests"]] == ["internal-2"]
    assert (run["lost_ns"], run["lost_requests_ns"], run["lost_step_ns"]) == (340, 300, 40)


def test_more_lost_requests_than_are_listed_are_in_their_sum(ledger):
    live = [(f"r{n}", Accrued(decode_ns=n)) for n in range(MAX_LOST + 5)]
    ledger.write(seen(*live))
    (run,) = ledger.audit(now_ns=DEAD)["runs"]
    assert len(run["lost_requests"]) == MAX_LOST
    assert run["lost_requests"][0]["gpu_time_ns"] == MAX_LOST + 4
    assert run["lost_requests_ns"] == sum(range(MAX_LOST + 5))


def test_requests_that_are_not_what_was_in_flight_are_a_difference(ledger):
    ledger.write(seen(("internal-1", USED)), seen(("internal-1", USED), number=2, step_ns=39))
    assert ledger.audit()["balanced"]
    ledger.write(snapshot([], 3, live=(("internal-1", USED),), step_ns=-300))
    audit = ledger.audit()
    assert (audit["balanced"], audit["runs"][0]["in_flight_difference_ns"]) == (False, 40)


def test_of_a_run_of_an_older_meter_nobody_knows_whose_time_was_lost(ledger, tmp_path):
    ledger.write(seen(("internal-1", USED)))
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection, connection:
        connection.execute("DELETE FROM live_usage")
    audit = ledger.audit(now_ns=DEAD)
    (run,) = audit["runs"]
    assert audit["balanced"]
    assert (run["lost_requests"], run["lost_requests_ns"], run["lost_step_ns"]) == ([], None, None)
