"""A dead run is cut at its last bill; a run without totals is in every report with its bills."""

import json
import os
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.component.ledger.test_open_requests import DEAD, USED, open_
from tests.component.ledger.test_reader import HOUR, NOW, T0, Ledger, http, part, snapshot
from tests.component.ledger.test_run_prices import price
from tests.support.upkeep import server, sql, url_of
from vllm_cost_meter.cli.commands import app
from vllm_cost_meter.economics import Declared
from vllm_cost_meter.ledger.economics.query import economics
from vllm_cost_meter.ledger.queries.cut import DEAD_AFTER_NS, AsOf
from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import PriceBook
from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.tenants.budgets import Budget
from vllm_cost_meter.units.time import rfc3339


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(url_of(tmp_path / "ledger.db"))
    yield ledger
    ledger.close()


def at_work(*live, step_ns=40, idle=1000, **changes):
    """The snapshot of an engine with requests in flight and a step that runs."""
    in_flight = sum(used.gpu_time_ns for _, used in live) + step_ns
    totals = ClassTotals(idle=idle, in_flight=in_flight)
    return snapshot([], totals=totals, live=live, step_ns=step_ns, **changes)


def used(ns):
    return Accrued(decode_ns=ns)


def run_of(ledger, now_ns=DEAD):
    (run,) = ledger.audit(now_ns)["runs"]
    return run


# ---- the last bills of a dead run


def test_a_bill_after_the_last_snapshot_of_a_dead_run_is_in_its_tenants_row(ledger):
    ledger.write(at_work(step_ns=0), part(1))
    assert ledger.rows()["alice"]["gpu_time_ns"] == 0
    report = ledger.tenants(now_ns=DEAD)
    rows = {row["tenant"]: row["gpu_time_ns"] for row in report["tenants"]}
    assert (rows["alice"], rows["__idle__"], rows["__lost__"]) == (300, 1000, 0)
    # The engine worked for it after the snapshot, so it ran for longer than that says.
    assert (report["wall_gpu_ns"], report["adds_up"]) == (1300, True)
    assert report["after_cut"] == {"bills": 0, "gpu_time_ns": 0}


def test_what_a_bill_had_in_flight_at_the_snapshot_is_not_counted_twice(ledger):
    ledger.write(at_work(("internal-1", used(120)), step_ns=0), part(1))
    rows = {row["tenant"]: row["gpu_time_ns"] for row in ledger.tenants(now_ns=DEAD)["tenants"]}
    assert (rows["alice"], rows["__in_flight__"], rows["__lost__"]) == (300, 0, 0)
    assert ledger.tenants(now_ns=DEAD)["wall_gpu_ns"] == 1120 + 180
    run = run_of(ledger)
    assert (run["last_bills"], run["last_bills_ns"], run["last_bills_in_flight_ns"]) == (
        1, 300, 120,
    )  # fmt: skip


def test_what_others_had_in_flight_stays_lost_whatever_came_after_them(ledger):
    ledger.write(at_work(("gone", used(10**9)), step_ns=0), part(1))
    run = run_of(ledger)
    assert (run["requests_ns"], run["lost_ns"], run["lost_requests_ns"]) == (300, 10**9, 10**9)
    assert [one["request_id"] for one in run["lost_requests"]] == ["gone"]


def test_the_step_of_the_snapshot_is_in_the_bills_as_far_as_they_go(ledger):
    # All but 10 of the bill's 300 ns were used before: they hold at most 10 ns of the step.
    ledger.write(at_work(("internal-1", used(290)), step_ns=40), part(1))
    run = run_of(ledger)
    assert (run["lost_step_ns"], run["lost_ns"], run["last_bills_in_flight_ns"]) == (30, 30, 300)
    assert ledger.tenants(now_ns=DEAD)["wall_gpu_ns"] == run["wall_ns"] == 1330
    ledger.write(part(2))
    run = run_of(ledger)
    assert (run["lost_step_ns"], run["lost_ns"]) == (0, 0)
    assert ledger.tenants(now_ns=DEAD)["wall_gpu_ns"] == 1330 + 270


def test_bills_over_an_hour_are_counted_in_each_hour(ledger):
    pieces = (UsagePiece(HOUR, 100, 0, 1, 0), UsagePiece(HOUR + 1, 50, 0, 1, 0))
    ledger.write(at_work(("internal-1", used(70)), step_ns=0), part(1, pieces=pieces))
    for hour, ns, wall in ((HOUR, 100, 1070 + 30), (HOUR + 1, 50, 50)):
        report = ledger.tenants(hour, hour + 1, now_ns=DEAD)
        rows = {row["tenant"]: row["gpu_time_ns"] for row in report["tenants"]}
        assert (rows["alice"], report["wall_gpu_ns"], report["adds_up"]) == (ns, wall, True)


def test_without_what_was_in_flight_by_request_all_of_it_may_be_in_the_bills(ledger, tmp_path):
    ledger.write(at_work(("x", used(200)), step_ns=40), part(1))
    ledger.reader.close()
    sql(tmp_path / "ledger.db", "DELETE FROM live_usage")
    run = run_of(ledger)
    assert (run["last_bills_in_flight_ns"], run["lost_ns"]) == (240, 0)
    assert (run["lost_requests_ns"], run["lost_step_ns"]) == (None, None)
    assert ledger.tenants(now_ns=DEAD)["wall_gpu_ns"] == 1240 + 60


def test_a_living_run_is_cut_at_its_snapshot(ledger):
    ledger.write(at_work(("internal-1", used(120))), part(1))
    run = run_of(ledger, NOW)
    assert (run["last_seq"], run["snapshot_seq"], run["last_bills"]) == (0, 0, 0)
    assert (run["requests_ns"], run["in_flight_ns"], run["lost_ns"]) == (0, 160, 0)
    assert ledger.tenants()["after_cut"] == {"bills": 1, "gpu_time_ns": 300}


def test_the_cost_of_the_last_bills_is_that_of_their_hours(ledger):
    pieces = (UsagePiece(HOUR, 100, 0, 1, 0), UsagePiece(HOUR + 1, 50, 0, 1, 0))
    ledger.write(at_work(step_ns=0, idle=0), part(1, pieces=pieces), http())
    ledger.priced(price("3600"), price("7200", HOUR + 1))
    report = ledger.tenants(now_ns=DEAD)
    costs = {row["tenant"]: row["cost_nanousd"] for row in report["tenants"]}
    assert (costs["alice"], report["wall_cost_nanousd"]) == (200, 200)
    figures = economics(ledger.reader, Declared(), as_of=AsOf(DEAD, 0))["figures"]
    assert figures["cost_usd"] == pytest.approx(200e-9)
    assert figures["observed_seconds"] == pytest.approx(150e-9)


def test_the_economics_of_more_runs_than_sqlite_takes_queries_in_a_union(ledger):
    of_run = {"totals": ClassTotals(idle=7), "step_ns": 0}
    runs = [f"run{number}" for number in range(501)]
    ledger.write(*(snapshot([], run_id=run_id, **of_run) for run_id in runs))
    ledger.write(*(part(1, f"h-{run_id}", run_id=run_id) for run_id in runs))
    ledger.priced(price("3600"))
    figures = economics(ledger.reader, Declared(), as_of=AsOf(DEAD, 0))["figures"]
    assert figures["cost_usd"] == pytest.approx(501 * 307e-9)


def test_a_bill_that_is_missing_among_the_last_ones_is_named(ledger):
    ledger.write(at_work(), part(1), part(3))
    assert run_of(ledger)["missing_bills"] == ["2"]
    assert ledger.audit(DEAD)["balanced"] is False
    assert run_of(ledger, NOW)["missing_bills"] == []


# ---- which requests were lost


def test_a_request_that_no_snapshot_had_is_named_by_who_announced_it(ledger):
    ledger.write(at_work(running=1, waiting=2), open_(5), open_(6, "h6", started_at_ns=NOW + 5000))
    run = run_of(ledger)
    assert run["lost_requests"] == [
        {"request_id": "internal-5", "http_request_id": "h1", "tenant": "alice",
         "gpu_time_ns": None, "as_of": None},
    ]  # fmt: skip
    assert (run["running"], run["waiting"], run["heard_at"]) == (1, 2, rfc3339(NOW))
    # It came before the last bill, so the engine lived then.
    ledger.write(part(1, finished_at_ns=NOW + 9000))
    run = run_of(ledger)
    assert [one["request_id"] for one in run["lost_requests"]] == ["internal-5", "internal-6"]
    assert run["heard_at"] == rfc3339(NOW + 9000)


def test_a_request_that_may_be_with_a_living_engine_is_not_lost(ledger):
    ledger.write(at_work(), open_(5))
    ledger.write(at_work(run_id="other", taken_at_ns=DEAD))
    dead, living = sorted(ledger.audit(DEAD)["runs"], key=lambda run: run["alive"])
    assert (dead["lost_requests"], living["lost_requests"]) == ([], [])


def test_replies_that_ended_without_a_bill_as_the_engine_died_are_named(ledger):
    last = NOW // 10**6 - T0 // 10**6
    ledger.write(
        at_work(("internal-1", USED)),
        open_(),
        http("h1", at=last + 1, status=500),
        http("h2", at=last + 2, status=500, gpu_time_ns=None),
        http("old", at=last - 1),
        http("late", at=last + DEAD_AFTER_NS // 10**6 + 1),
        http("billed", at=last + 1),
        part(1, "billed", finished_at_ns=NOW),
    )
    ledger.write(http("h3", at=last + 3))
    run = run_of(ledger)
    named = [(one["http_request_id"], one["status"], one["gpu_time_ns"]) for one in run[
        "unbilled_replies"
    ]]  # fmt: skip
    # The last one was told a cost that no bill of the ledger has.
    assert named == [("h1", 500, 300), ("h2", 500, None), ("h3", 200, 300)]
    assert run_of(ledger, NOW)["unbilled_replies"] == []


def test_the_audit_prints_when_an_engine_died_and_what_it_took_along(ledger, tmp_path):
    last = NOW // 10**6 - T0 // 10**6
    ledger.write(at_work(("internal-1", USED), running=2), open_(), open_(5), part(7, "h7"))
    ledger.write(http("h2", at=last + 2, status=500, tenant="bob", gpu_time_ns=None))
    shown = CliRunner().invoke(app, ["audit", "--ledger", url_of(tmp_path / "ledger.db")]).stdout
    lines = [line.strip() for line in shown.splitlines()]
    text = " ".join(lines)
    at = rfc3339(NOW)
    assert f"died after {at} and bill 7; last snapshot {at}, after bill 0: 2 ran, 0 waited" in text
    assert "missing bills: 1-6" in lines
    assert f"0.000 s at {at}: tenant alice, h1" in lines
    assert "(unknown): tenant alice, h1" in lines
    assert "ended without a bill as it died, on this server or another:" in lines
    assert any(line.startswith("500 at ") and line.endswith("tenant bob, h2") for line in lines)


# ---- a run without totals


def test_the_bills_of_a_run_without_totals_are_in_every_report(ledger):
    ledger.write(part(1), part(2, "h2", tenant="bob"), http(), http("h2", tenant="bob"))
    ledger.priced(price("3600"))
    report = ledger.tenants()
    rows = {row["tenant"]: (row["gpu_time_ns"], row["cost_nanousd"]) for row in report["tenants"]}
    assert (rows["alice"], rows["bob"], rows["__idle__"]) == ((300, 300), (300, 300), (0, 0))
    assert (report["wall_gpu_ns"], report["without_totals_ns"]) == (600, 600)
    assert (report["adds_up"], report["wall_cost_nanousd"], report["runs"]) == (True, 600, [])
    assert report["after_cut"] == {"bills": 0, "gpu_time_ns": 0}
    summary = ledger.reader.summary(as_of=AsOf(NOW, 0))
    assert (summary["requests_ns"], summary["utilization"]) == (600, None)
    assert ledger.reader.tenant("bob", as_of=AsOf(NOW, 0))["gpu_time_ns"] == 300
    figures = economics(ledger.reader, Declared(), as_of=AsOf(NOW, 0))["figures"]
    assert figures["cost_usd"] == pytest.approx(600e-9)
    # What else the run did is unknown, so is every figure that divides by its time.
    names = ("observed_seconds", "output_tokens_per_s", "concurrency", "utilization")
    assert [figures[name] for name in names] == [None] * 4
    statement = ledger.reader.statement("2027-01", as_of=AsOf(NOW, 0))
    assert (statement["adds_up"], statement["without_totals_ns"]) == (True, 600)
    assert statement["methods"] == ["tokens"]
    spent = sum(line["gpu_time_ns"] for line in statement["lines"] if line["tenant"])
    assert spent == 600


def test_a_batch_without_an_http_request_is_counted_by_its_bills(ledger):
    """As `vllm run-batch` leaves it: no snapshot, no exchange, no tenant, no model."""
    ledger.write(*(part(seq, None, tenant="unknown", model=None) for seq in range(1, 9)))
    ledger.priced(price("2.5"))
    row = ledger.rows()["unknown"]
    assert (row["requests"], row["output_tokens"], row["gpu_time_ns"]) == (0, 40, 2400)
    assert ledger.tenants()["difference_ns"] == 0
    statement = ledger.reader.statement("2027-01", tenant="unknown", as_of=AsOf(NOW, 0))
    assert sum(line["gpu_time_ns"] for line in statement["lines"]) == 2400
    (bare,) = ledger.audit()["without_totals"]
    assert (bare["bills"], bare["missing_bills"]) == (8, [])


def test_an_hour_outside_of_a_run_without_totals_knows_all_its_time(ledger):
    ledger.write(part(1), at_work(run_id="other", hours={HOUR + 1: ClassTotals(idle=9)}))
    report = ledger.tenants(HOUR + 1, HOUR + 2)
    assert (report["wall_gpu_ns"], report["without_totals_ns"]) == (9, 0)


def test_budgets_count_the_bills_of_a_run_without_totals(ledger):
    ledger.write(part(1))
    budget = Budget("b", 10**6, "usd", "day", tenant="alice")
    spending = Spending(ledger.url)
    (standing,) = spending.look([budget], PriceBook([price("3600")]), NOW).standings
    spending.close()
    assert standing.total == 300


def test_the_audit_of_a_run_without_totals_says_that_nothing_is_known(ledger):
    ledger.write(part(1), part(2, "h2"))
    audit = ledger.audit()
    assert (audit["balanced"], audit["reason"], audit["runs"]) == (None, "no_totals", [])
    (bare,) = audit["without_totals"]
    assert (bare["bills"], bare["ledger_ns"], bare["last_seq"]) == (2, 600, 2)
    # A run whose books balance beside it proves nothing of this one.
    ledger.write(at_work(run_id="other"))
    assert (ledger.audit()["balanced"], ledger.audit()["reason"]) == (None, "no_totals")
    ledger.write(snapshot([part(1), part(2, "h2")]))
    assert (ledger.audit()["balanced"], ledger.audit()["reason"]) == (True, None)


def test_a_gap_in_a_run_without_totals_is_a_loss(ledger):
    ledger.write(part(1), part(3, "h3"))
    audit = ledger.audit()
    assert (audit["balanced"], audit["reason"]) == (False, None)
    assert audit["without_totals"][0]["missing_bills"] == ["2"]


# ---- on the command line


def audit_of(target: str) -> tuple[int, str, str]:
    shown = CliRunner().invoke(app, ["audit", "--ledger", target])
    return shown.exit_code, shown.stdout.strip(), shown.stderr.strip()


def test_report_and_audit_say_that_no_totals_are_known(ledger, tmp_path):
    ledger.write(part(1), http())
    target = url_of(tmp_path / "ledger.db")
    shown = CliRunner().invoke(app, ["report", "--ledger", target])
    assert shown.exit_code == 0
    assert "no totals are known of the runs with 0.000000 of them" in shown.stdout
    code, said, _ = audit_of(target)
    assert code == 1
    assert "run run: 1 bills, 0.000 s; no totals are known" in said
    assert said.endswith(
        "NOT PROVED: no totals are known of a run, so its bills cannot be held against anything"
    )


def test_an_empty_ledger_proves_nothing_and_its_reports_are_empty(ledger, tmp_path):
    target = url_of(tmp_path / "ledger.db")
    assert audit_of(target) == (1, "NOT PROVED: this ledger has no engine run", "")
    report = CliRunner().invoke(app, ["report", "--ledger", target])
    assert (report.exit_code, "adds up: the rows are all of 0.0" in report.stdout) == (0, True)
    assert CliRunner().invoke(app, ["report", "requests", "--csv", "--ledger", target]).stdout == ""


@pytest.mark.parametrize("text", [None, "", "no ledger at all\n" * 100])
def test_an_audit_of_a_missing_or_wrong_file_is_an_error(tmp_path: Path, text: str | None):
    path = tmp_path / "ledger.db"
    if text is not None:
        path.write_text(text)
    code, said, error = audit_of(url_of(path))
    assert (code, said) == (2, "")
    assert error.startswith("vllm-cost-meter: ledger ")
    assert path.exists() == (text is not None)


def test_an_audit_of_another_programs_database_is_an_error(tmp_path: Path):
    path = tmp_path / "other.db"
    sql(path, "CREATE TABLE things (name TEXT)")
    code, said, _ = audit_of(url_of(path))
    assert (code, said) == (2, "")


# ---- a real death


def test_what_a_process_told_before_kill_9_is_billed_and_in_its_tenants_row(tmp_path: Path):
    path = tmp_path / "ledger.db"
    with server(path, commits_per_s=200, snapshots=3) as served:
        told = [json.loads(served.process.stdout.readline())["committed"] for _ in range(40)][-1]
        os.kill(served.process.pid, signal.SIGKILL)
        told = [told, *(json.loads(line)["committed"] for line in served.process.stdout)][-1]
    with LedgerReader(url_of(path)) as reader:
        audit = reader.audit()
        report = reader.tenants()
    (run,) = audit["runs"]
    # The last commit may have been made and not told any more.
    assert run["last_seq"] in (told, told + 1)
    assert (audit["balanced"], run["snapshot_seq"]) == (True, 3)
    billed = 300 * run["last_seq"]
    rows = {row["tenant"]: row["gpu_time_ns"] for row in report["tenants"]}
    assert rows["alice"] == run["requests_ns"] == billed
    assert (report["adds_up"], sum(rows.values())) == (True, report["wall_gpu_ns"])
