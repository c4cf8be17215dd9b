"""What a budget has used, from a real ledger: bills as they come, and what still runs."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from zoneinfo import ZoneInfo

import pytest

from tests.support.builders import make_bill, make_open, make_part, make_snapshot
from tests.support.ledger_writer import LedgerWriter
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.queries import bill_count
from vllm_cost_meter.ledger.queries.bill_count import GAPS_AT_ONCE
from vllm_cost_meter.ledger.queries.cut import DEAD_AFTER_NS, AsOf
from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import NO_PRICES, PriceBook, PriceEntry, RunMatch
from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.pending import PendingBill
from vllm_cost_meter.records.requests import Price
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.tenants.budgets import Budget
from vllm_cost_meter.units.time import NS_PER_HOUR, NS_PER_SECOND

NOW = (time.time_ns() // NS_PER_HOUR) * NS_PER_HOUR + NS_PER_HOUR // 2
THIS_HOUR = NOW // NS_PER_HOUR


def price(amount: str, since: int | None = None, host: str | None = None) -> PriceEntry:
    return PriceEntry(f"at {amount}", Decimal(amount), "s", since, matches=RunMatch(host=host))


# 36 USD an hour are 0.01 nano-USD a nanosecond.
PRICES = PriceBook([price("36")])


class Ledger:
    """A ledger in a file, and what writes records into it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.writers: dict[str | None, LedgerWriter] = {}

    def write(self, *records, recorded: str | None = None) -> None:
        """Write records; runs that begin with them record a price."""
        if recorded not in self.writers:
            begun = Price(f"p{recorded}", recorded, "settings", 0) if recorded else None
            self.writers[recorded] = LedgerWriter(self.url, price_of=lambda _: begun)
            self.writers[recorded].start()
        self.writers[recorded].commit(*records).result(10)

    def run(self, run_id: str, recorded: str | None = None, **changes) -> None:
        """Write the first snapshot of a run, of which nothing has been heard for a day."""
        taken_at_ns = NOW - 24 * NS_PER_HOUR
        values = {"number": 0, "taken_at_ns": taken_at_ns, **changes}
        self.write(make_snapshot(run_id=run_id, **values), recorded=recorded)

    @contextmanager
    def without(self, table: str) -> Iterator[None]:
        """Have a table away, as one that cannot be read."""
        with closing(sqlite3.connect(self.url.removeprefix("sqlite:///"))) as connection:
            connection.execute(f"ALTER TABLE {table} RENAME TO away")
            yield
            connection.execute(f"ALTER TABLE away RENAME TO {table}")

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


@pytest.fixture
def ledger(tmp_path):
    """Return a ledger with the run `run`."""
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    ledger.run("run")
    yield ledger
    ledger.close()


@pytest.fixture
def spending(ledger):
    follower = Spending(ledger.url)
    yield follower
    follower.close()


def budget(**changes) -> Budget:
    # Hours around now, so that no test depends on the day on which it runs.
    values = {"name": "b", "limit": 100, "unit": "gpu_seconds", "period": "rolling"}
    return Budget(**{**values, "tenant": "acme", **changes})


def part(
    seq: int, ns: int, tenant: str = "acme", hour: int = THIS_HOUR, run_id: str = "run", **changes
):
    pieces = (UsagePiece(hour, 0, ns, 0, 1),)
    bill = make_bill(run_id=run_id, seq=seq, request_id=f"r{seq}", pieces=pieces)
    return make_part(bill, tenant=tenant, **{"finished_at_ns": NOW, **changes})


def running(**used_ns: int):
    """Return a snapshot taken now, of requests that run, by their ids."""
    live = tuple((name, Accrued(decode_ns=ns)) for name, ns in used_ns.items())
    totals = ClassTotals(idle=1000, in_flight=sum(used_ns.values()))
    number = running.number = getattr(running, "number", 0) + 1
    return make_snapshot(number=number, taken_at_ns=NOW, totals=totals, live=live)


def look(spending, budgets=None, now_ns=NOW, book=PRICES, monotonic_ns=None):
    budgets = (budget(),) if budgets is None else budgets
    return spending.look(budgets, book, now_ns, monotonic_ns)


def total(spending, budgets=None, now_ns=NOW, book=PRICES, monotonic_ns=None):
    figures = look(spending, budgets, now_ns, book, monotonic_ns)
    return [standing.total for standing in figures.standings]


# ---- which bills count


def test_bills_count_for_their_tenant_as_they_come(ledger, spending):
    assert total(spending) == [0]
    ledger.write(part(1, 30), part(2, 500, tenant="other"))
    assert total(spending) == [30]
    ledger.write(part(3, 12), part(4, 5, tenant="acme/bob"))
    assert total(spending) == [47]
    assert total(spending) == [47]


@pytest.mark.parametrize("later_s", [0, 30, 3_600, 7 * 24 * 3_600, -7_200])
def test_a_look_counts_what_came_since_the_one_before_however_long_ago(ledger, spending, later_s):
    """The bill ended 5 s after the first look; the next one may come late, or its clock go back."""
    assert total(spending) == [0]
    ledger.write(part(1, 500, finished_at_ns=NOW + 5 * NS_PER_SECOND))
    assert total(spending, now_ns=NOW + later_s * NS_PER_SECOND) == [500]


def test_the_clock_of_the_machine_that_wrote_a_bill_does_not_matter(ledger, spending):
    assert total(spending) == [0]
    ledger.write(part(1, 10, finished_at_ns=NOW - 24 * NS_PER_HOUR))
    ledger.write(part(2, 20, finished_at_ns=NOW + 24 * NS_PER_HOUR))
    assert total(spending) == [30]


def test_bills_that_are_committed_out_of_order_count_once_each_as_they_come(ledger, spending):
    ledger.write(part(1, 1), part(6, 100_000), part(9, 10**7))
    assert total(spending) == [10_100_001]
    ledger.write(part(4, 1_000))
    assert total(spending) == [10_101_001]
    ledger.write(part(3, 100), part(5, 10_000), part(10, 10**8))
    assert total(spending) == [110_111_101]
    ledger.write(part(2, 10), part(7, 10**6))
    # The eighth is lost.
    assert total(spending) == total(spending) == [111_111_111]


def test_a_bill_without_time_and_one_of_several_hours_count_as_what_they_are(ledger, spending):
    hours = [UsagePiece(THIS_HOUR - n, 0, 10, 0, 1) for n in range(3)]
    ledger.write(make_part(make_bill(seq=1, pieces=()), tenant="acme"))
    ledger.write(make_part(make_bill(seq=2, pieces=tuple(hours)), tenant="acme"))
    assert total(spending) == total(spending) == [30]


def test_of_many_gaps_the_latest_are_looked_at_each_time_and_the_others_in_turn(ledger, spending):
    numbers = range(2, 4 * GAPS_AT_ONCE, 2)
    ledger.write(*(part(seq, 1) for seq in numbers))
    assert total(spending) == [len(numbers)]
    latest, first = numbers[-1] - 1, 1
    ledger.write(part(latest, 10_000), part(first, 1_000_000))
    looks = [total(spending)[0] for _ in range(8)]
    assert looks[0] in (len(numbers) + 10_000, len(numbers) + 1_010_000)
    assert looks[-1] == len(numbers) + 1_010_000


def test_a_bill_that_was_missing_at_the_end_of_a_piece_counts_when_it_comes(
    ledger, spending, monkeypatch
):
    monkeypatch.setattr(bill_count, "_BILLS_AT_ONCE", 2)
    ledger.write(part(1, 1), part(3, 100))
    assert total(spending) == [101]
    ledger.write(part(2, 10))
    assert total(spending) == [111]


def test_a_look_that_fails_half_way_counts_nothing_twice(ledger, spending):
    for run in "ab":
        ledger.run(run)
        ledger.write(part(1, 10, run_id=run))
    assert total(spending) == [20]
    ledger.write(part(3, 10, run_id="a"), part(2, 10, run_id="b"))
    # The bills are counted before the gaps of a run and what runs are read.
    with ledger.without("live_usage"), pytest.raises(LedgerError):
        look(spending)
    ledger.write(part(2, 10, run_id="a"))
    assert total(spending) == [50]


def test_a_bill_of_a_period_counts_though_the_one_after_it_was_committed_first(ledger):
    """At midnight, by a process that starts then: what is older is not read at all."""
    yesterday = THIS_HOUR - 24
    ledger.write(*(part(seq, 1_000, hour=yesterday) for seq in range(1, 10)), part(11, 10))
    daily = (budget(days=1),)
    follower = Spending(ledger.url)
    assert total(follower, daily) == [10]
    ledger.write(part(10, 5))
    assert total(follower, daily) == [15]
    follower.close()


def test_only_the_hours_of_the_period_count(ledger, spending):
    ledger.write(part(1, 10), part(2, 100, hour=THIS_HOUR - 24 * 40))
    both = [budget(days=days) for days in (30, 60)]
    assert total(spending, both[:1]) == [10]
    assert total(spending, both[1:]) == [110]
    assert total(spending, both) == [10, 110]


def test_a_day_has_the_hours_that_begin_in_it_where_the_budget_is(ledger, spending):
    """Midnight of 2026-11-25 in Kolkata is 18:30 UTC: the day begins with the hour of 19:00."""
    first = int(datetime(2026, 11, 24, 19, tzinfo=UTC).timestamp()) // 3600
    ledger.write(*(part(n, 10**n, hour=first - 2 + n) for n in range(1, 4)))
    ledger.write(part(4, 10**4, hour=first + 23), part(5, 10**5, hour=first + 24))
    daily = (budget(period="day", zone=ZoneInfo("Asia/Kolkata")),)
    assert total(spending, daily, now_ns=(first + 2) * NS_PER_HOUR) == [11_100]


def test_what_a_machine_whose_clock_is_ahead_used_counts_in_a_rolling_period(ledger, spending):
    ledger.write(part(1, 10), part(2, 100, hour=THIS_HOUR + 2))
    assert total(spending, (budget(days=1),)) == [110]


def test_tags_and_parents_are_those_that_the_record_holds(ledger, spending):
    ledger.write(
        part(1, 10, tenant="x", tags='{"team":"a"}'), part(2, 20, tenant="y", tenant_parent="x")
    )
    budgets = (budget(tenant=None, tag=("team", "a")), budget(name="of x", tenant="x"))
    assert total(spending, budgets) == [10, 30]


# ---- what changes while it follows


def test_a_new_limit_price_or_hour_needs_no_new_count(ledger, spending):
    ledger.write(part(1, 30_000))
    assert total(spending) == [30_000]
    changed = (budget(limit=7, unit="usd"), budget(name="c", over="throttle"))
    with ledger.without("rollup_hours"):  # which a count begins with
        assert total(spending, changed) == [300, 30_000]
        assert total(spending, changed, NOW + NS_PER_HOUR) == [300, 30_000]
        assert total(spending, changed, book=PriceBook([price("72")])) == [600, 30_000]


def test_a_new_budget_counts_what_was_used_before_it_came(ledger, spending):
    ledger.write(part(1, 10), part(2, 1_000, "rival"))
    assert total(spending) == [10]
    new = (budget(tenant="rival"),)
    ledger.write(part(4, 500, "rival"))
    assert total(spending, new) == [1_500]
    ledger.write(part(3, 5, "rival"), part(5, 50, "rival"))
    assert total(spending, new) == [1_555]


def test_the_first_look_reads_no_bill(ledger, spending):
    ledger.write(part(1, 10), part(2, 1_000, "rival"))
    with ledger.without("usage_pieces"):
        assert total(spending) == [10]


def test_when_the_clock_goes_back_into_a_period_before_it_is_counted_again(ledger, spending):
    for n, run in enumerate("abc"):
        ledger.run(run)
        ledger.write(part(1, 10, run_id=run), part(2, 1_000, run_id=run, hour=THIS_HOUR - 24 - n))
    daily = (budget(days=1),)
    assert total(spending, daily) == [30]
    # What is now ahead of the clock was used all the same.
    assert total(spending, daily, NOW - 24 * NS_PER_HOUR) == [3_030]


def test_when_the_clock_goes_back_by_less_than_two_days_nothing_is_counted_again(ledger, spending):
    daily = (budget(days=1),)
    for run in "ab":
        ledger.run(run)
        ledger.write(part(1, 10, run_id=run), part(2, 1_000, hour=THIS_HOUR - 20, run_id=run))
    assert total(spending, daily) == [2_020]
    with ledger.without("rollup_hours"):
        assert total(spending, daily, NOW + 24 * NS_PER_HOUR) == [0]
        assert total(spending, daily, NOW) == [2_020]


def test_without_budgets_no_bill_is_read(ledger, spending):
    ledger.write(part(1, 10))
    with ledger.without("usage_pieces"):
        assert list(look(spending, ()).standings) == []
    assert total(spending) == [10]


# ---- money


def test_money_is_counted_by_the_price_of_the_hour_and_unknown_without_one(ledger, spending):
    ledger.write(part(1, 30_000), part(2, 10_000, hour=THIS_HOUR - 1))
    # One is spent, so that it tells its hours apart.
    of_money = (budget(unit="usd"), budget(name="far", unit="usd", limit=1_000))
    assert total(spending, of_money) == [400, 400]
    dearer = PriceBook([price("36"), price("72", THIS_HOUR)])
    assert total(spending, of_money, book=dearer) == [700, 700]
    standing, _ = look(spending, of_money, book=NO_PRICES).standings
    assert standing.total is None
    assert standing.unknown.startswith("no price for run run at ")


def test_two_runs_side_by_side_cost_what_each_costs_as_in_the_report(ledger, spending):
    """1561.239504 s at 0.90 USD and 251.761824 s at 1.60: 0.390309876 and 0.111894144 USD."""
    book = PriceBook([price("1.60", host="vm"), price("0.90", host="spot-*")])
    for run, host, ns in (("a", "spot-1", 1_561_239_504_000), ("b", "vm", 251_761_824_000)):
        totals = ClassTotals(requests=ns)
        ledger.run(run, host=host, totals=totals, hours={THIS_HOUR: totals}, last_seq=1)
        ledger.write(part(1, ns, run_id=run))
    (standing,) = look(spending, (budget(unit="usd", limit=750_000_000),), book=book).standings
    assert (standing.total, standing.is_spent) == (502_204_020, False)
    with LedgerReader(ledger.url, book=book) as reader:
        row = reader.tenants(as_of=AsOf(NOW, 0))["tenants"][0]
    assert (row["tenant"], row["cost_nanousd"]) == ("acme", 502_204_020)


def test_a_price_that_the_run_recorded_counts_where_the_settings_have_none(ledger, spending):
    ledger.run("cheap", recorded="18")
    ledger.write(part(1, 10_000, run_id="cheap"))
    assert total(spending, (budget(unit="usd"),), book=NO_PRICES) == [50]


def test_hours_are_rounded_together_and_not_one_by_one(ledger, spending):
    hours = [UsagePiece(THIS_HOUR - n, 0, 40, 0, 1) for n in range(5)]
    ledger.write(make_part(make_bill(pieces=tuple(hours)), tenant="acme"))
    rolling = budget(unit="usd", limit=2)
    # 40 ns cost 0.4 nano-USD, 200 ns cost 2.
    (standing,) = look(spending, (rolling,)).standings
    assert (standing.total, standing.is_spent) == (2, True)
    # Spent, it tells its hours apart: by the largest remainder, which the first hours get.
    assert {hour - THIS_HOUR: usd for hour, usd in standing.used.items() if usd} == {-4: 1, -3: 1}


def test_a_run_that_lives_without_a_price_makes_money_unknown_before_it_is_used(ledger, spending):
    ledger.run("a", host="vm", taken_at_ns=NOW)
    budgets = (budget(unit="usd"), budget(name="in time"))
    in_money, in_time = look(spending, budgets, book=PriceBook([price("1", host="x*")])).standings
    assert in_money.total == in_time.total == 0
    assert in_money.unknown.endswith("no entry matches model 'm', GPU 'a GPU', host 'vm'")
    assert in_time.unknown is None
    later = PriceBook([price("1", THIS_HOUR + 1)])
    assert "is effective from" in look(spending, budgets, book=later).standings[0].unknown
    now = PriceBook([price("1", THIS_HOUR)])
    assert look(spending, budgets, book=now).standings[0].unknown is None


# ---- what runs


def test_a_request_counts_while_it_runs_and_once_when_its_bill_comes(ledger, spending):
    opened = make_open(request_id="r1", tenant="acme", started_at_ns=NOW - 5)
    ledger.write(running(r1=70, r2=9), opened)
    assert total(spending) == [70]
    # Its bill comes, and the snapshot still says that it runs.
    ledger.write(part(1, 90, started_at_ns=NOW - 5, announced=True))
    assert total(spending) == [90]
    ledger.write(running())
    assert total(spending) == [90]


def test_figures_are_as_old_as_the_oldest_living_engines_snapshot(ledger):
    follower = Spending(ledger.url)
    nothing = look(follower, (), monotonic_ns=0)
    assert nothing.as_of_ns is nothing.heard_ns is None
    follower.close()
    ledger.write(make_snapshot(run_id="one", taken_at_ns=NOW - 3 * NS_PER_SECOND))
    ledger.write(make_snapshot(run_id="two", taken_at_ns=NOW))
    ledger.write(make_snapshot(run_id="dead", taken_at_ns=NOW - NS_PER_HOUR))
    follower = Spending(ledger.url)
    figures = look(follower, (), monotonic_ns=0)
    assert figures.as_of_ns == NOW - 3 * NS_PER_SECOND
    assert figures.heard_ns == -3 * NS_PER_SECOND
    ledger.write(make_snapshot(run_id="two", number=2, taken_at_ns=NOW, state="off"))
    figures = look(follower, (), monotonic_ns=NS_PER_SECOND)
    assert figures.broken == "the meter of engine run two is off"
    follower.close()


def test_what_runs_in_a_silent_engine_counts_as_long_as_it_is_known_to_live(ledger):
    known: list[str] = []
    follower = Spending(ledger.url, alive=lambda: known)
    ledger.write(running(r1=70), make_open(request_id="r1", tenant="acme", started_at_ns=NOW - 5))

    def used(later_ns: int) -> list[int]:
        return total(follower, now_ns=NOW + later_ns, monotonic_ns=later_ns)

    assert used(0) == used(DEAD_AFTER_NS) == [70]
    assert used(DEAD_AFTER_NS + 1) == [0]
    known.append("run")
    assert used(DEAD_AFTER_NS + 2) == [70]
    figures = look(follower, (), NOW + DEAD_AFTER_NS, monotonic_ns=DEAD_AFTER_NS + 3)
    assert (figures.as_of_ns, figures.heard_ns) == (NOW, 0)
    known.clear()
    assert used(DEAD_AFTER_NS + 4) == [0]
    follower.close()


def test_the_bill_of_a_request_in_a_silent_engine_takes_the_place_of_what_ran(ledger):
    ledger.write(running(r1=70), make_open(request_id="r1", tenant="acme", started_at_ns=NOW - 5))
    follower = Spending(ledger.url, alive=lambda: ["run"])
    ledger.write(part(1, 90, started_at_ns=NOW - 5, announced=True))
    assert total(follower, now_ns=NOW + DEAD_AFTER_NS + NS_PER_SECOND) == [90]
    follower.close()


def test_a_bill_on_its_way_to_the_ledger_counts_once_and_in_place_of_its_running_request(ledger):
    ledger.write(running(r1=70), make_open(request_id="r1", tenant="acme", started_at_ns=NOW - 5))
    spending = Spending(ledger.url, alive=lambda: ["run"])
    bills = [part(seq, 10**seq) for seq in range(5)]
    pending = [PendingBill.of(bill) for bill in bills]

    def used(*seqs: int) -> int | None:
        asked = [pending[seq] for seq in seqs]
        return spending.look([budget()], NO_PRICES, NOW, pending=asked).standings[0].total

    def left() -> list[int]:
        return [bill.seq for bill in spending.pending]

    assert used() == 70
    assert (used(1), left()) == (10, [1])
    ledger.write(bills[1])
    assert (used(1), left()) == (10, [])
    # One that another server brought in first leaves a gap behind.
    ledger.write(bills[3])
    assert (used(2, 3, 4), left()) == (11_110, [2, 4])
    ledger.write(bills[2])
    assert (used(2, 3, 4), left()) == (11_110, [4])
    assert (used(), left()) == (1_110, [])
    spending.close()


def test_a_pending_bill_counts_for_its_owner_in_its_hour_at_its_price(ledger):
    spending = Spending(ledger.url)
    lifted = PendingBill.of(part(1, 300, tenant="acme/lift", hour=THIS_HOUR - 1, run_id="new run"))
    others = PendingBill.of(part(2, 5, tenant="rival"))
    wanted = [budget(), budget(name="usd", unit="usd"), budget(name="r", tenant="rival")]
    figures = spending.look(wanted, PRICES, NOW, pending=[lifted, others])
    assert [standing.total for standing in figures.standings] == [300, 3, 5]
    spending.close()


def test_without_budgets_no_bill_is_pending(ledger):
    spending = Spending(ledger.url)
    spending.look([], NO_PRICES, NOW, pending=[PendingBill.of(part(1, 5))])
    assert spending.pending == []
    spending.close()
