"""What a budget has used, from a real ledger: bills as they come, and what still runs."""

import time
from decimal import Decimal

import pytest

from tests.support.builders import make_bill, make_open, make_part, make_snapshot
from vllm_cost_meter.ledger.queries.cut import DEAD_AFTER_NS
from vllm_cost_meter.ledger.queries.spending import LATE_NS, RECOUNT_NS, Spending
from vllm_cost_meter.ledger.writer import LedgerWriter
from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.tenants.budgets import Budget
from vllm_cost_meter.units.time import NS_PER_HOUR, NS_PER_SECOND

NOW = (time.time_ns() // NS_PER_HOUR) * NS_PER_HOUR + NS_PER_HOUR // 2
THIS_HOUR = NOW // NS_PER_HOUR
# 36 USD an hour are 0.01 nano-USD a nanosecond.
PRICE = Decimal(36)


@pytest.fixture
def ledger(tmp_path):
    """Return a ledger's URL, and what writes records into it."""
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    writer = LedgerWriter(url)
    writer.start()
    yield url, lambda *records: writer.commit(*records).result(10)
    writer.close()


@pytest.fixture
def spending(ledger):
    follower = Spending(ledger[0])
    yield follower
    follower.close()


def budget(**changes) -> Budget:
    values = {"name": "b", "limit": 100, "unit": "gpu_seconds", "period": "month", "tenant": "acme"}
    return Budget(**{**values, **changes})


def part(seq: int, ns: int, tenant: str = "acme", hour: int = THIS_HOUR, **changes):
    bill = make_bill(seq=seq, request_id=f"r{seq}", pieces=(UsagePiece(hour, 0, ns, 0, 1),))
    return make_part(bill, tenant=tenant, **{"finished_at_ns": NOW, **changes})


def running(**used_ns: int):
    """Return a snapshot taken now, of requests that run, by their ids."""
    live = tuple((name, Accrued(decode_ns=ns)) for name, ns in used_ns.items())
    totals = ClassTotals(idle=1000, in_flight=sum(used_ns.values()))
    number = running.number = getattr(running, "number", 0) + 1
    return make_snapshot(number=number, taken_at_ns=NOW, totals=totals, live=live)


def total(spending, budgets=None, now_ns=NOW, price=PRICE):
    budgets = (budget(),) if budgets is None else budgets
    figures = spending.look(budgets, lambda _run, _hour: price, now_ns)
    return [standing.total for standing in figures.standings]


def test_bills_count_for_their_tenant_as_they_come(ledger, spending):
    _, write = ledger
    assert total(spending) == [0]
    write(part(1, 30), part(2, 500, tenant="other"))
    assert total(spending) == [30]
    write(part(3, 12), part(4, 5, tenant="acme/bob"))
    assert total(spending) == [47]
    assert total(spending) == [47]


def test_money_is_counted_by_the_price_of_the_hour_and_unknown_without_one(ledger, spending):
    _, write = ledger
    write(part(1, 30_000))
    of_money = (budget(unit="usd"),)
    assert total(spending, of_money) == [300]
    assert total(spending, of_money, price=None) == [None]


def test_a_request_counts_while_it_runs_and_once_when_its_bill_comes(ledger, spending):
    _, write = ledger
    write(running(r1=70, r2=9), make_open(request_id="r1", tenant="acme", started_at_ns=NOW - 5))
    assert total(spending) == [70]
    # Its bill comes, and the snapshot still says that it runs.
    write(part(1, 90, started_at_ns=NOW - 5, announced=True))
    assert total(spending) == [90]
    write(running())
    assert total(spending) == [90]


def test_a_bill_that_comes_late_is_seen_at_once_or_at_the_next_recount(ledger, spending):
    _, write = ledger
    assert total(spending) == [0]
    write(part(1, 10, finished_at_ns=NOW - LATE_NS + NS_PER_SECOND))
    assert total(spending) == [10]
    write(part(2, 5, finished_at_ns=NOW - 2 * LATE_NS))
    assert total(spending) == [10]
    assert total(spending, now_ns=NOW + RECOUNT_NS) == [15]


def test_only_the_hours_of_the_period_count(ledger, spending):
    _, write = ledger
    write(part(1, 10), part(2, 100, hour=THIS_HOUR - 24 * 40, finished_at_ns=NOW - NS_PER_HOUR))
    assert total(spending, (budget(period="rolling", days=30),)) == [10]
    assert total(spending, (budget(period="rolling", days=60),)) == [110]


def test_tags_and_parents_are_those_that_the_record_holds(ledger, spending):
    _, write = ledger
    write(part(1, 10, tenant="x", tags='{"team":"a"}'), part(2, 20, tenant="y", tenant_parent="x"))
    budgets = (budget(tenant=None, tag=("team", "a")), budget(name="of x", tenant="x"))
    assert total(spending, budgets) == [10, 30]


def test_figures_are_as_old_as_the_oldest_living_engines_snapshot(ledger, spending):
    _, write = ledger
    assert spending.look((), lambda *_: None, NOW).as_of_ns is None
    write(make_snapshot(run_id="one", taken_at_ns=NOW - 3 * NS_PER_SECOND))
    write(make_snapshot(run_id="two", taken_at_ns=NOW))
    write(make_snapshot(run_id="dead", taken_at_ns=NOW - NS_PER_HOUR))
    figures = spending.look((), lambda *_: None, NOW)
    assert figures.as_of_ns == NOW - 3 * NS_PER_SECOND
    write(make_snapshot(run_id="two", number=2, taken_at_ns=NOW, state="off"))
    assert spending.look((), lambda *_: None, NOW).broken == "the meter of engine run two is off"


def test_what_runs_in_a_silent_engine_counts_as_long_as_it_is_known_to_live(ledger):
    url, write = ledger
    known: list[str] = []
    follower = Spending(url, alive=lambda: known)
    write(running(r1=70), make_open(request_id="r1", tenant="acme", started_at_ns=NOW - 5))
    [(run_id, _)] = follower.latest_snapshots()
    at = NOW + DEAD_AFTER_NS
    assert total(follower, now_ns=at) == [70]
    assert total(follower, now_ns=at + NS_PER_SECOND) == [0]
    known.append(run_id)
    assert total(follower, now_ns=at + NS_PER_SECOND) == [70]
    figures = follower.look((), lambda *_: None, at + NS_PER_SECOND)
    assert figures.as_of_ns == NOW
    known.clear()
    assert total(follower, now_ns=at + NS_PER_SECOND) == [0]
    follower.close()


def test_the_bill_of_a_request_in_a_silent_engine_takes_the_place_of_what_ran(ledger):
    url, write = ledger
    write(running(r1=70), make_open(request_id="r1", tenant="acme", started_at_ns=NOW - 5))
    follower = Spending(url)
    [(run_id, _)] = follower.latest_snapshots()
    follower.close()
    follower = Spending(url, alive=lambda: [run_id])
    write(part(1, 90, started_at_ns=NOW - 5, announced=True))
    assert total(follower, now_ns=NOW + DEAD_AFTER_NS + NS_PER_SECOND) == [90]
    follower.close()
