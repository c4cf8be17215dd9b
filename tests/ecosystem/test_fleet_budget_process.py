"""The process that counts budgets over a fleet: a real one, killed while the database is away."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.support.fleet_budgets import FleetServer, away, bill, budget, running
from vllm_cost_meter.api_server.budgets.follower import BudgetFollower
from vllm_cost_meter.api_server.budgets.messages import CountedFleet
from vllm_cost_meter.errors import CostMeterError
from vllm_cost_meter.ledger.fleet_use.kept import figures_path
from vllm_cost_meter.prices.book import NO_PRICES
from vllm_cost_meter.tenants.budgets import Standing

WAIT_S = 120
BUDGETS = (budget(), budget(name="each", each_server=True))


def follower_of(server: FleetServer, fleet: str) -> BudgetFollower:
    counted = CountedFleet(fleet, 0.1, str(figures_path(server.path, 1)))
    return BudgetFollower(server.url, timeout_s=WAIT_S, fleet=counted)


async def until(
    follower: BudgetFollower, is_so: Callable[[Standing], bool]
) -> tuple[int | None, ...]:
    """Follow until the budget over the fleet stands so; return what all have used."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                figures = await follower.follow(BUDGETS, NO_PRICES)
            except CostMeterError:
                figures = None
            if figures is not None and is_so(figures.standings[0]):
                return tuple(each.total for each in figures.standings)
            await asyncio.sleep(0.05)


def is_read(standing: Standing) -> bool:
    return standing.others is not None and standing.others.is_counted


def test_figures_of_the_fleet_come_by_themselves_and_outlive_the_process(
    tmp_path: Path, url: str
) -> None:
    one, two = FleetServer(tmp_path, "one", url), FleetServer(tmp_path, "two", url)
    two.write(bill("b", 1, 500))
    two.send()
    one.write(running("a", 1), bill("a", 1, 30))
    one.send()

    async def test() -> None:
        follower = follower_of(one, url)
        try:
            assert await until(follower, is_read) == (530, 30)
            two.write(bill("b", 2, 7_000))
            two.send()
            # Without any news in the own ledger.
            assert await until(follower, lambda each: each.total != 530) == (7_530, 30)
            with away(url):
                pid = follower.process.pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                assert await until(follower, is_read) == (7_530, 30)
                assert follower.process.pid != pid
                two.write(bill("b", 3, 80_000))
            two.send()
            assert await until(follower, lambda each: each.total != 7_530) == (87_530, 30)
        finally:
            await follower.stop()

    asyncio.run(test())
    one.stop()
    two.stop()


def test_until_the_fleet_is_read_once_its_part_is_unknown(tmp_path: Path, url: str) -> None:
    one = FleetServer(tmp_path, "one", url)
    one.write(running("a", 1), bill("a", 1, 30))

    async def test() -> None:
        follower = follower_of(one, url)
        try:
            assert await until(follower, lambda each: not is_read(each)) == (30, 30)
            one.send()  # It makes the tables.
            assert await until(follower, is_read) == (30, 30)
        finally:
            await follower.stop()

    asyncio.run(test())
    one.stop()
