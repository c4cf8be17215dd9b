"""Answers about some engines: their time with idle and cost, and rates over the time they ran."""

import io
from decimal import Decimal

import pytest

from tests.component.ledger.test_reader import HOUR, T0, Ledger, http, part, snapshot
from vllm_cost_meter.economics import Declared
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.economics.figures import OF_ALL_ENGINES
from vllm_cost_meter.ledger.economics.query import economics
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.retention.dropping import drop_rows
from vllm_cost_meter.prices.book import PriceEntry, RunMatch
from vllm_cost_meter.prices.overheads import Overhead
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.requests import Latencies
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.reports.facts import UNALLOCATED
from vllm_cost_meter.reports.grammar import engines_named, question
from vllm_cost_meter.reports.statement_text import print_statement
from vllm_cost_meter.units.calendar import HOURS_PER_DAY

S = 10**9
OFF = {"as_of": AsOf(T0 + 30 * S, 0)}
MONTH = "2027-01"
# The first one, UTC, after HOUR.
MIDNIGHT = -(-HOUR // HOURS_PER_DAY) * HOURS_PER_DAY
# GPU-seconds that requests used, and that were idle, by run.
USED = {"spot-1": 3, "spot-2": 6, "big": 12, "bare": 24}
IDLE = {"spot-1": 7, "spot-2": 4, "big": 8, "bare": 6}
LABELS = {
    "spot-1": {"pool": "spot", "zone": "a"}, "spot-2": {"pool": "spot"},
    "big": {"pool": "big", "zone": "a"}, "bare": {},
}  # fmt: skip


@pytest.fixture
def ledger(tmp_path):
    """Engines that began at one instant and ran 10, 10, 20 and 30 s, each with one bill.

    Bob uses the big one and Alice all others. A GPU-second costs a USD.
    """
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    for n, run in enumerate(USED, 1):
        tenant = "bob" if run == "big" else "alice"
        pieces = (UsagePiece(HOUR, USED[run] * S, 0, 8, 5),)
        took = Latencies(1.0, 2.0 * n, 3.0, 4.0 * n)
        bill = part(1, f"h-{run}", run_id=run, tenant=tenant, pieces=pieces, latencies=took)
        totals = ClassTotals(requests=USED[run] * S, idle=IDLE[run] * S)
        said = snapshot(
            [bill], run_id=run, totals=totals, hours={HOUR: totals}, labels=LABELS[run],
            wall_ns=totals.total(), taken_at_ns=T0 + totals.total(),
        )  # fmt: skip
        ledger.write(bill, http(f"h-{run}", tenant=tenant), said, usd="3600")
    yield ledger
    ledger.close()


def seconds(rows, *keys: str) -> dict:
    return {
        tuple(row[key] for key in keys): row["gpu_time_ns"] // S
        for row in rows
        if row["gpu_time_ns"]
    }


def report(ledger, **words):
    answer = ledger.reader.report(question(**words), **OFF)
    (piece,) = answer["series"]
    return answer, piece["rows"]


def test_idle_time_is_of_its_engines_label_and_a_run_without_one_is_a_group_of_its_own(ledger):
    answer, rows = report(ledger, aggregate="label:pool")
    assert seconds(rows, "class", "label:pool") == {
        ("requests", "spot"): 9, ("requests", "big"): 12, ("requests", UNALLOCATED): 24,
        ("idle", "spot"): 11, ("idle", "big"): 8, ("idle", UNALLOCATED): 6,
    }  # fmt: skip
    assert answer["adds_up"] is True
    assert answer["engines"] is None
    _, rows = report(ledger, aggregate="label:zone,label:pool,tenant")
    assert seconds(rows, "label:zone", "label:pool", "tenant") == {
        ("a", "spot", "alice"): 3, (UNALLOCATED, "spot", "alice"): 6, ("a", "big", "bob"): 12,
        (UNALLOCATED, UNALLOCATED, "alice"): 24, ("a", "spot", "__idle__"): 7,
        (UNALLOCATED, "spot", "__idle__"): 4, ("a", "big", "__idle__"): 8,
        (UNALLOCATED, UNALLOCATED, "__idle__"): 6,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("chosen", "runs"),
    [
        ("label:pool=spot", ["spot-1", "spot-2"]),
        ("label:pool=spot,big", ["spot-1", "spot-2", "big"]),
        ("label:pool=spot+label:zone=a", ["spot-1"]),
        (f"label:pool={UNALLOCATED}", ["bare"]),
        ("label:pool=other", []),
    ],
)
def test_a_report_of_some_engines_has_their_time_and_cost_and_adds_up(ledger, chosen, runs):
    answer, rows = report(ledger, filter=chosen)
    used, idle = (sum(of[run] for run in runs) for of in (USED, IDLE))
    assert sum(row["gpu_time_ns"] for row in rows if row["class"] == "requests") == used * S
    assert sum(row["gpu_time_ns"] for row in rows if row["class"] == "idle") == idle * S
    assert sum(row["requests"] for row in rows) == len(runs)
    assert answer["wall_gpu_ns"] == (used + idle) * S
    assert answer["wall_cost_nanousd"] == ((used + idle) * S if runs else None)
    assert (answer["adds_up"], answer["difference_ns"]) == (True, 0)
    assert answer["engines"] == "+".join(sorted(chosen.replace("spot,big", "big,spot").split("+")))


def test_engines_and_rows_are_chosen_together(ledger):
    answer, rows = report(ledger, filter="tenant:alice+label:zone=a", aggregate="tenant")
    assert seconds(rows, "tenant") == {("alice",): 3}
    assert answer["wall_gpu_ns"] == 30 * S
    assert answer["series"][0]["gpu_time_ns"] == 30 * S


def test_those_who_used_a_pool_carry_its_idle_time_and_no_other(ledger):
    _, rows = report(ledger, filter="label:pool=big", idle="proportional")
    shares = {row["tenant"]: row["idle_share_ns"] // S for row in rows if row["idle_share_ns"]}
    assert shares == {"bob": 8, "__idle__": -8}


def test_what_an_owner_of_idle_time_carries_stands_at_the_engines_that_were_idle(ledger):
    _, rows = report(ledger, aggregate="tenant,label:pool", idle="owner:operations")
    assert {
        row["label:pool"]: row["idle_share_ns"] // S
        for row in rows
        if row["tenant"] == "operations"
    } == {"spot": 11, "big": 8, UNALLOCATED: 6}


def test_steps_of_a_report_of_some_engines_are_those_in_which_they_ran(ledger):
    answer = ledger.reader.report(question(filter="label:pool=spot", step="1h"), **OFF)
    (piece,) = answer["series"]
    assert piece["gpu_time_ns"] == answer["wall_gpu_ns"] == 20 * S


# ---- statements


def statement(ledger, **words):
    return ledger.reader.statement(MONTH, **words, **OFF)


def test_statements_of_pools_make_up_the_statement_of_the_month(ledger):
    whole = statement(ledger)
    pools = [
        statement(ledger, filter=f"label:pool={pool}") for pool in ("spot", "big", UNALLOCATED)
    ]
    assert [pool["total"]["amount_cents"] for pool in pools] == [2_000, 2_000, 3_000]
    assert [pool["adds_up"] for pool in pools] == [True] * 3
    assert sum(pool["whole"]["amount_cents"] for pool in pools) == whole["total"]["amount_cents"]
    alice = statement(ledger, tenant="alice", filter="label:pool=spot")
    assert (alice["total"]["amount_cents"], alice["engines"]) == (900, "label:pool=spot")


def test_costs_beside_the_engines_are_in_no_statement_of_some_of_them(ledger):
    rack = Overhead("overheads[0]", "rack", "lease", usd_per_month=Decimal(744))
    ledger.priced(overheads=[rack])
    whole, spot = statement(ledger), statement(ledger, filter="label:pool=spot")
    assert "rack" in {line["item"] for line in whole["lines"]}
    assert "rack" not in {line["item"] for line in spot["lines"]}
    assert spot["whole"]["overhead"] == []
    out = io.StringIO()
    print_statement(spot, out)
    assert "engines: those of label:pool=spot alone; declared costs" in out.getvalue()


@pytest.mark.parametrize("words", ["tenant:alice", "label:pool=spot+model:m", "pool=spot"])
def test_a_statement_takes_a_filter_of_labels_only(ledger, words):
    with pytest.raises(ValueError, match="filter: expected"):
        statement(ledger, filter=words)


def test_a_tenants_statement_does_not_say_for_which_labels_a_price_is(ledger):
    matches = RunMatch(labels=(("pool", "spot"),))
    ledger.priced(PriceEntry("prices[0]", Decimal(3600), "list", None, matches=matches))
    assert [price["labels"] for price in statement(ledger)["prices"]] == [None, {"pool": "spot"}]
    assert [price["labels"] for price in statement(ledger, tenant="bob")["prices"]] == [None, None]


# ---- economics


def figures(ledger, chosen: str | None = None):
    engines = engines_named(chosen)
    return economics(ledger.reader, Declared(e2e_ms=5), engines=engines, **OFF)["figures"]


def test_rates_of_a_pool_are_over_the_time_in_which_any_of_its_engines_ran(ledger):
    spot, whole = figures(ledger, "label:pool=spot"), figures(ledger)
    assert (spot["observed_seconds"], whole["observed_seconds"]) == (10, 30)
    assert (spot["requests"], spot["arrivals"], spot["output_tokens"]) == (2, 2, 10)
    assert spot["arrivals_per_s"] == pytest.approx(2 / 10)
    assert spot["output_tokens_per_s"] == pytest.approx(10 / 10)
    assert (spot["cost_usd"], spot["wall_gpu_seconds"]) == (20, 20)
    assert spot["utilization"] == pytest.approx(9 / 20)
    assert spot["usd_per_m_output_tokens"] == pytest.approx(2_000_000)
    assert spot["cold_starts"] == 2
    assert spot["charged_usd"] == pytest.approx(9)


def test_latencies_of_a_pool_are_those_of_its_requests(ledger):
    spot, big = figures(ledger, "label:pool=spot"), figures(ledger, "label:pool=big")
    assert (spot["ttft_p50_ms"], spot["ttft_p99_ms"], spot["e2e_p99_ms"]) == (2, 4, 8)
    assert (big["ttft_p50_ms"], big["e2e_p99_ms"]) == (6, 12)
    assert spot["mean_e2e_seconds"] == pytest.approx(0.006)
    assert spot["concurrency"] == pytest.approx(0.012 / 10)
    assert (spot["good_requests"], big["good_requests"]) == (1, 0)


def test_where_rows_were_dropped_latencies_and_arrivals_of_a_pool_are_unknown_and_costs_are_not(
    ledger,
):
    before = figures(ledger, "label:pool=spot")
    engine = open_database(ledger.url)
    drop_rows(engine, MIDNIGHT)
    engine.dispose()
    after = figures(ledger, "label:pool=spot")
    unknown = {name for name in after if after[name] is None and before[name] is not None}
    assert {"ttft_p50_ms", "mean_e2e_seconds", "concurrency", "arrivals"} <= unknown
    kept = ("cost_usd", "requests", "output_tokens", "output_tokens_per_s", "charged_usd")
    assert [after[name] for name in kept] == [before[name] for name in kept]


def test_what_is_billed_or_declared_for_all_engines_is_unknown_of_some(ledger):
    rack = Overhead("overheads[0]", "rack", "lease", usd_per_month=Decimal(744))
    ledger.priced(overheads=[rack])
    whole, spot = figures(ledger), figures(ledger, "label:pool=spot")
    assert whole["overhead_usd"] == pytest.approx(1)
    assert whole["blended_cost_usd"] == pytest.approx(71)
    assert {spot[name] for name in OF_ALL_ENGINES} == {None}


# ---- prices


def test_a_price_for_a_label_holds_for_engines_with_it(ledger):
    matches = RunMatch(labels=(("pool", "sp*"), ("zone", "a")))
    cheap = PriceEntry("prices[0]", Decimal(360), "list", None, matches=matches)
    for_all = PriceEntry("prices[1]", Decimal(3600), "list", None)
    ledger.priced(cheap, for_all)
    answer, _ = report(ledger, filter="label:pool=spot")
    assert answer["wall_cost_nanousd"] == 1 * S + 10 * S
    assert [price["labels"] for price in answer["prices"]] == [{"pool": "sp*", "zone": "a"}, None]
    _, rows = report(ledger, aggregate="label:pool,label:zone")
    costs = {
        (row["label:pool"], row["label:zone"]): row["cost_nanousd"]
        for row in rows
        if row["class"] == "requests"
    }
    assert costs["spot", "a"] == 3 * S // 10
    assert costs["spot", UNALLOCATED] == 6 * S


def test_a_new_pod_changes_no_price_and_no_sum_of_its_pool(ledger):
    """A pod that is replaced has another name: only who asks for `pod` tells them apart."""
    of_spot = RunMatch(labels=(("pool", "spot"),))
    totals = ClassTotals(idle=5 * S)
    for pod in ("chat-7f9-aaaaa", "chat-7f9-bbbbb"):
        labels = {"pool": "spot", "pod": pod, "node": "node-1"}
        ledger.write(
            snapshot([], run_id=pod, totals=totals, hours={HOUR: totals}, labels=labels), usd="1"
        )
    ledger.priced(PriceEntry("prices[0]", Decimal(3600), "list", None, matches=of_spot))
    answer, rows = report(ledger, filter="label:pool=spot", aggregate="label:pod")
    assert answer["wall_cost_nanousd"] == 30 * S
    assert seconds(rows, "class", "label:pod") == {
        ("requests", UNALLOCATED): 9, ("idle", UNALLOCATED): 11, ("idle", "chat-7f9-aaaaa"): 5,
        ("idle", "chat-7f9-bbbbb"): 5,
    }  # fmt: skip
