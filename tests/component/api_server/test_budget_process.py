"""Budgets are counted by a process of its own: real processes, which also die.

What is counted says test_spending.py; here it is that the figures come over, of the right budgets,
and come again after whatever happened to the process or the ledger.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.component.ledger.test_spending import Ledger, part
from tests.support.builders import make_snapshot
from vllm_cost_meter.api_server.budgets.follower import BudgetFollower
from vllm_cost_meter.api_server.budgets.messages import SentFigures, SentRules
from vllm_cost_meter.errors import AwayError, CostMeterError, LedgerError
from vllm_cost_meter.journal.writer import JournalWriter
from vllm_cost_meter.ledger.catching_up import catch_up
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.journal_place import journal_folder
from vllm_cost_meter.prices.book import NO_PRICES, PriceBook, PriceEntry, RunMatch
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures, Others, Standing

WAIT_S = 60
HALF_USD = PriceBook([PriceEntry("p", Decimal("0.5"), "s", None, gpus=3, scope="node")])


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    ledger.write(make_snapshot(taken_at_ns=time.time_ns()))
    yield ledger
    ledger.close()


def budget(**changes) -> Budget:
    values = {"name": "b", "limit": 10**9, "unit": "gpu_seconds", "period": "rolling"}
    zone = ZoneInfo("Europe/Berlin")
    return Budget(**{**values, "tenant": "acme", "zone": zone, **changes})


@asynccontextmanager
async def following(url: str) -> AsyncIterator[BudgetFollower]:
    follower = BudgetFollower(url, timeout_s=WAIT_S)
    try:
        yield follower
    finally:
        await follower.stop()


async def until(
    follower: BudgetFollower, budgets, is_so: Callable[[BudgetFigures], bool]
) -> BudgetFigures:
    """Follow until the figures are so; what fails on the way is tried again."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                figures = await follower.follow(budgets, NO_PRICES)
                if figures is not None and is_so(figures):
                    return figures
            except CostMeterError:
                pass
            await asyncio.sleep(0.02)


def totals(figures: BudgetFigures) -> list[int | None]:
    return [standing.total for standing in figures.standings]


def test_figures_come_from_the_process_whenever_the_ledger_has_something_new(ledger):
    budgets = (budget(), budget(name="usd", unit="usd"), budget(name="other", tenant="rival"))

    async def test() -> None:
        async with following(ledger.url) as follower:
            figures = await follower.follow(budgets, HALF_USD)
            assert totals(figures) == [0, 0, 0]
            assert [standing.budget for standing in figures.standings] == list(budgets)
            assert figures.stale(time.monotonic_ns(), WAIT_S * 10**9) is None
            assert await follower.follow(budgets, HALF_USD) is None
            bill = part(1, 3600 * 10**9, hour=time.time_ns() // (3600 * 10**9))
            later = make_snapshot(number=2, taken_at_ns=time.time_ns())
            ledger.write(bill, later)
            figures = await follower.follow(budgets, HALF_USD)
            assert totals(figures) == [3600 * 10**9, 166_666_667, 0]
            # Others, at another price: the same process, and new at once.
            pid = follower.process.pid
            changed = (budget(name="usd", unit="usd", limit=7),)
            figures = await follower.follow(changed, NO_PRICES)
            assert [standing.budget for standing in figures.standings] == list(changed)
            assert figures.standings[0].unknown is not None
            assert follower.process.pid == pid

    asyncio.run(test())


def test_new_budgets_are_counted_at_the_next_look_however_many_bills_are_missing(ledger):
    hour = time.time_ns() // (3600 * 10**9)
    ledger.write(part(1, 50, hour=hour), part(200_000, 7, tenant="rival", hour=hour))

    async def test() -> list[list[int | None]]:
        async with following(ledger.url) as follower:
            asked = (budget(),), (budget(tenant="rival"),)
            return [totals(await follower.follow(budgets, NO_PRICES)) for budgets in asked]

    assert asyncio.run(test()) == [[50], [7]]


def test_a_process_that_is_killed_is_started_again_and_counts_as_before(ledger):
    ledger.write(part(1, 50, hour=time.time_ns() // (3600 * 10**9)))

    async def test() -> None:
        async with following(ledger.url) as follower:
            assert totals(await follower.follow((budget(),), NO_PRICES)) == [50]
            pid = follower.process.pid
            os.kill(pid, signal.SIGKILL)
            figures = await until(follower, (budget(),), lambda figures: True)
            assert totals(figures) == [50]
            assert follower.process.pid != pid

    asyncio.run(test())


def test_a_ledger_that_cannot_be_read_is_an_error_until_it_can(ledger, tmp_path):
    path = tmp_path / "other.db"
    path.write_text("no database, but a text")

    async def test() -> None:
        async with following(f"sqlite:///{path}") as follower:
            with pytest.raises(LedgerError, match="file is not a database"):
                await follower.follow((), NO_PRICES)
            path.unlink()
            open_database(f"sqlite:///{path}").dispose()
            assert (await follower.follow((), NO_PRICES)).heard_ns is None

    asyncio.run(test())


def test_whom_the_asker_knows_to_live_counts_though_it_is_silent(ledger):
    ledger.write(make_snapshot(run_id="silent", taken_at_ns=time.time_ns() - 3600 * 10**9))
    old = time.monotonic_ns() - 3600 * 10**9

    async def test(alive: tuple[str, ...]) -> int:
        follower = BudgetFollower(ledger.url, lambda: alive, timeout_s=WAIT_S)
        try:
            return (await follower.follow((), NO_PRICES)).heard_ns
        finally:
            await follower.stop()

    assert asyncio.run(test(())) > old + 10**12
    assert asyncio.run(test(("silent",))) < old + 10**12


def test_a_process_that_is_not_there_is_an_error_in_time(ledger):
    async def test() -> None:
        follower = BudgetFollower(ledger.url, timeout_s=0.001)
        try:
            with pytest.raises(AwayError):
                await follower.follow((), NO_PRICES)
        finally:
            await follower.stop()

    asyncio.run(test())


amounts = st.integers(0, 10**25)
names = st.text(min_size=1, max_size=8)
budgets = st.builds(
    Budget, names, amounts, st.sampled_from(["usd", "gpu_seconds"]),
    st.sampled_from(["day", "week", "month", "rolling"]),
    st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kolkata"]).map(ZoneInfo),
    st.none() | names, st.lists(names, max_size=3).map(tuple), st.none() | st.tuples(names, names),
    st.integers(1, 366), st.none() | amounts, st.booleans(), st.sampled_from(["block", "throttle"]),
    st.booleans(), st.none() | st.integers(1, 99), st.booleans(),
)  # fmt: skip
entries = st.builds(
    PriceEntry, names, st.decimals(0, 10**9, places=9), names,
    st.none() | st.integers(-(10**6), 10**6), st.sampled_from(["gpu", "node", "deployment"]),
    st.integers(1, 10**6), st.none() | st.sampled_from(["on_demand", "reserved", "spot"]), names,
    st.decimals("0.000001", 10**6, places=6),
    st.builds(RunMatch, *[st.none() | names] * 3),
)  # fmt: skip


def over_the_wire(value, type):
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type)


@given(st.lists(budgets, max_size=3), entries)
def test_budgets_and_prices_arrive_as_they_were_sent(sent, entry):
    rules = over_the_wire(SentRules.of(5, sent, PriceBook([entry])), SentRules)
    arrived, book = rules.rules()
    assert list(arrived) == sent
    assert (rules.version, book.entries) == (5, (entry,))


used = st.none() | st.dictionaries(st.integers(0, 10**7), amounts, max_size=3)


others = st.builds(
    Others, st.none() | amounts, st.none() | st.integers(0, 2**60), st.none() | names, st.booleans()
)


@given(
    budgets, used, st.none() | names, st.none() | st.integers(-(2**60), 2**60), st.none() | others
)
def test_figures_arrive_as_they_were_sent(of, hours, unknown, heard_ns, elsewhere):
    standing = Standing(of, hours, 10**18, unknown, elsewhere)
    figures = BudgetFigures([standing], 10**18, unknown, heard_ns)
    assert over_the_wire(SentFigures.of(1, figures), SentFigures).figures([of]) == figures


def test_what_the_ledger_does_not_have_yet_counts_and_is_let_go_once_it_has_it(ledger):
    """As where the ledger cannot be written: no snapshot comes, and figures are renewed anyway."""

    async def test() -> None:
        async with following(ledger.url) as follower:
            assert totals(await follower.follow((budget(),), NO_PRICES)) == [0]
            journal = JournalWriter(journal_folder(ledger.url))
            journal.start()
            for bill in (part(1, 50), part(2, 7)):
                follower.pending.add(bill)
                journal.append(bill).result(10)
            figures = await until(follower, (budget(),), lambda figures: True)
            assert totals(figures) == [57]
            assert follower.pending.lag_ns > 0
            assert catch_up(ledger.url) == 0
            figures = await until(follower, (budget(),), lambda figures: True)
            assert totals(figures) == [57]
            assert follower.pending.lag_ns == 0
            assert follower.pending.sent() == ()
            journal.close()

    asyncio.run(test())


def test_a_bill_that_the_ledger_will_never_get_is_not_waited_for(ledger):
    async def test() -> None:
        async with following(ledger.url) as follower:
            follower.pending.add(part(1, 50))  # no journal has it: it was dropped
            figures = await until(follower, (budget(),), lambda _: not follower.pending.sent())
            assert totals(figures) == [0]

    asyncio.run(test())
