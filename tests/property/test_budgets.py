"""Any bills, committed in any order, and any prices: a budget has used what the report says.

The judge of the count is plain Python over what was committed so far; the judge of the money is the
report of the same ledger, whose rows are rounded down or up from what the budget rounds once.
"""

import itertools
import random
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC
from fractions import Fraction
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.property.test_ledger_books import NOW, parts_of, runs, slow, snapshot_of
from tests.support.builders import make_snapshot
from vllm_cost_meter.ledger.database import open_database, writing
from vllm_cost_meter.ledger.inserts import write
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import PriceBook, PriceEntry, RunFacts, RunMatch
from vllm_cost_meter.records.requests import EngineRequest, Price
from vllm_cost_meter.tenants.budgets import Budget
from vllm_cost_meter.units.time import NS_PER_HOUR

HOUR = NOW // NS_PER_HOUR
LATER = NOW + 5 * NS_PER_HOUR
TENANTS = "abc"
HOSTS = ("spot-1", "vm")
books = st.lists(
    st.tuples(
        st.none() | st.integers(HOUR - 1, HOUR + 4),
        st.sampled_from([None, *HOSTS]),
        st.decimals(0, 1_000, places=3),
        st.integers(1, 7),
    ),
    max_size=6,
    unique_by=lambda entry: entry[:2],
)
# The GPU-hour that a run's row records, or none.
recorded = st.lists(st.none() | st.decimals(0, 9, places=2), min_size=3, max_size=3)


def book_of(drawn: Sequence) -> PriceBook:
    return PriceBook(
        PriceEntry(f"p{n}", amount, "s", since, "node", gpus, matches=RunMatch(host=host))
        for n, (since, host, amount, gpus) in enumerate(drawn)
    )


def budgets(unit: str, days: int = 1) -> tuple[Budget, ...]:
    """Return a budget for each tenant; none has a limit that is reached at once."""
    return tuple(
        Budget(name, 10**30, unit, "rolling", UTC, name, days=days)  # type: ignore[arg-type]
        for name in TENANTS
    )


def committed_in_pieces(bills: Sequence[EngineRequest], seed: int) -> list[list[EngineRequest]]:
    """Return bills shuffled and cut anywhere; some are lost for ever."""
    chance = random.Random(seed)
    left = chance.sample(list(bills), len(bills) - chance.randint(0, len(bills) // 4))
    pieces = []
    while left:
        size = chance.randint(1, len(left))
        pieces.append(left[:size])
        left = left[size:]
    return pieces


@slow
@given(runs, st.integers(0, 2**32), st.integers(0, 2**32))
def test_every_look_has_counted_each_bill_that_was_committed_once(drawn, seed, clock_seed):
    parts = [parts_of(n, bills) for n, (bills, _, _) in enumerate(drawn)]
    clock = random.Random(clock_seed)
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'ledger.db'}"
        engine = open_database(url)
        begun = [make_snapshot(run_id=f"run{n}", taken_at_ns=NOW) for n in range(len(parts))]
        followers = [Spending(url), Spending(url)]
        so_far: list[EngineRequest] = []
        for piece in [begun, *committed_in_pieces(list(itertools.chain(*parts)), seed)]:
            with writing(engine).begin() as connection:
                write(connection, piece)
            so_far += [record for record in piece if isinstance(record, EngineRequest)]
            # One looks each time, at any instant; the other now and then.
            at_ns = LATER + clock.randint(-3, 10**4) * NS_PER_HOUR
            assert totals(followers[0], "gpu_seconds", at_ns, 366 * 2) == judged(so_far)
            if clock.random() < 0.3:
                assert totals(followers[1], "gpu_seconds", at_ns, 366 * 2) == judged(so_far)
        for follower in followers:
            follower.close()
        engine.dispose()


def totals(follower: Spending, unit: str, at_ns: int, days: int) -> dict[str, int | None]:
    figures = follower.look(budgets(unit, days), PriceBook(), at_ns)
    return {standing.budget.name: standing.total for standing in figures.standings}


def judged(bills: Sequence[EngineRequest]) -> dict[str, int]:
    return {
        name: sum(part.bill.gpu_time_ns for part in bills if part.owner.tenant == name)
        for name in TENANTS
    }


@slow
@given(
    runs.filter(bool), books, recorded, st.lists(st.sampled_from(HOSTS), min_size=3, max_size=3),
    st.integers(0, 3),
)  # fmt: skip
def test_a_budget_has_used_what_the_report_of_its_period_costs(
    drawn, entries, begun_at, hosts, begins
):
    """The period is the 24 hours that begin 0 to 3 hours after the first bill's."""
    parts = [parts_of(n, bills) for n, (bills, _, _) in enumerate(drawn)]
    book = book_of(entries)
    first, now_ns = HOUR + begins, (HOUR + begins + 23) * NS_PER_HOUR
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'ledger.db'}"
        engine = open_database(url)
        for n, (bills, (_, overhead, gpus)) in enumerate(zip(parts, drawn, strict=True)):
            told = snapshot_of(n, bills, overhead, gpus)
            told = replace(told, engine=replace(told.engine, host=hosts[n]))
            usd = begun_at[n]
            price = None if usd is None else Price(f"p{n}", str(usd), "s", 0)
            with writing(engine).begin() as connection:
                write(connection, [*bills, replace(told, first_price=price)])
        engine.dispose()
        with LedgerReader(url, book=book) as reader:
            rows = reader.tenants(first, first + 24, as_of=AsOf(now_ns, 0))["tenants"]
        with closing(Spending(url)) as follower:
            standings = follower.look(budgets("usd"), book, now_ns).standings
    costs = {row["tenant"]: row["cost_nanousd"] for row in rows}

    def usd_at(run: int, hour: int) -> Fraction | None:
        facts = RunFacts(drawn[run][2], "m", "a GPU", hosts[run])
        price = book.price_at(facts, hour)
        if price is not None:
            return price.usd_per_gpu_hour
        return None if begun_at[run] is None else Fraction(begun_at[run])

    for standing in standings:
        spent = [
            (piece.gpu_time_ns, usd_at(run, piece.hour))
            for run, bills in enumerate(parts)
            for part in bills
            for piece in part.bill.pieces
            if part.owner.tenant == standing.budget.name
            and piece.hour >= first
            and piece.gpu_time_ns
        ]
        assert standing.total == judged_cost(spent)
        assert (standing.total is None) == (standing.unknown is not None)
        if spent and standing.total is not None:
            assert abs(costs[standing.budget.name] - standing.total) <= 1
        elif spent:
            assert costs[standing.budget.name] is None


def judged_cost(spent: Sequence[tuple[int, Fraction | None]]) -> int | None:
    """Return nano-USD, rounded once; None if any time has no price."""
    exact = Fraction(0)
    for gpu_time_ns, usd in spent:
        if usd is None:
            return None
        exact += Fraction(gpu_time_ns, 3600) * usd
    return round(exact)
