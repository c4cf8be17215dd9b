"""The process that counts what budgets have used, beside an API server: its main program.

To count the bills of a busy month takes seconds of a processor, and each look some milliseconds of
the interpreter's lock: no token may wait for that. The process looks when it is asked. A question
that comes while it still looks has the answer of that look. A fleet's database is read by a thread
of its own each few seconds, and no look waits for that.

Invariant: the ledger is read by one thread only, and the fleet by another one.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from vllm_cost_meter.api_server.budgets.looks import BudgetLooks
from vllm_cost_meter.api_server.budgets.messages import (
    LOOK,
    RULES,
    CountedFleet,
    CounterHello,
    Looked,
    LookQuestion,
    SentFigures,
    SentRules,
)
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.fleet_use.others import FleetUse
from vllm_cost_meter.logs import Outage, meter_logger
from vllm_cost_meter.prices.book import PriceBook
from vllm_cost_meter.side_process import entry
from vllm_cost_meter.side_process.channel import decoded
from vllm_cost_meter.side_process.entry import ToServer
from vllm_cost_meter.tenants.budgets import Budget

logger = meter_logger()

# Above the lowest: on a machine without a spare moment figures would be stale, and fail closed.
PRIORITY = 5


class _Counting:
    """Answers the API server's questions."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cost-meter-budgets")
        self._fleet_thread = ThreadPoolExecutor(1, thread_name_prefix="cost-meter-fleet")
        self._looks: BudgetLooks | None = None
        self._version = 0
        self._budgets: tuple[Budget, ...] = ()
        self._book = PriceBook()
        self._looking: asyncio.Task[Looked] | None = None

    async def main(self, server: ToServer, hello: CounterHello) -> None:
        """Begin: from now on there are answers."""
        self._take_rules(hello.rules)
        fleet = None if hello.fleet is None else await self._follow(hello.url, hello.fleet)
        self._looks = BudgetLooks(hello.url, fleet)
        server.ready()

    async def _follow(self, ledger_url: str, told: CountedFleet) -> FleetUse:
        """Begin to read the fleet, and return what is read of it."""
        fleet = fleet_use(ledger_url, told)
        self._following = asyncio.create_task(self._read(fleet, told.interval_s))
        return fleet

    async def _read(self, fleet: FleetUse, interval_s: float) -> None:
        """Read the fleet for ever, for the budgets that count it."""
        loop, outage = asyncio.get_running_loop(), Outage()
        while True:
            over_all = [budget for budget in self._budgets if not budget.each_server]
            try:
                await loop.run_in_executor(self._fleet_thread, fleet.look, over_all, time.time_ns())
            except LedgerError as error:
                # The sender beside makes the tables of a new fleet, or says why it cannot.
                if not error.is_missing and outage.failed():
                    logger.warning(
                        "cost meter: budgets: %s%s; what other servers have used counts as last"
                        " known",
                        *(error, outage.so_far),
                    )
            except Exception:
                logger.exception("cost meter: budgets: the fleet could not be read")
            else:
                if (lasted := outage.ended()) is not None:
                    logger.info(
                        "cost meter: budgets: the fleet is read again after %.0f s", lasted[0]
                    )
            await asyncio.sleep(interval_s)

    async def answer(self, name: str, given: msgspec.Raw) -> Looked:
        """Answer a question; what is asked with it, an `LookQuestion` says."""
        if name != LOOK:
            raise ValueError(f"expected the question {LOOK!r}, got {name!r}")
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(decoded(given, LookQuestion)))
        # Who asked may be gone before the end; the next one has this answer.
        return await asyncio.shield(self._looking)

    def take(self, name: str, value: msgspec.Raw) -> None:
        """Take up news."""
        if name == RULES:
            self._take_rules(decoded(value, SentRules))

    def _take_rules(self, rules: SentRules) -> None:
        self._version = rules.version
        self._budgets, self._book = rules.rules()

    async def _look(self, asked: LookQuestion) -> Looked:
        looks = self._looks
        if looks is None:
            raise RuntimeError("asked before the greeting")
        version = self._version  # Others may come meanwhile.
        given = self._budgets, self._book, asked
        loop = asyncio.get_running_loop()
        figures = await loop.run_in_executor(self._thread, looks.look, *given)
        if figures is None:
            return Looked(None)
        return Looked(SentFigures.of(version, figures), looks.left)


def fleet_use(ledger_url: str, told: CountedFleet) -> FleetUse:
    """Return what is kept of a fleet; in memory where it cannot be kept."""
    try:
        return FleetUse(ledger_url, told.url, told.interval_s, Path(told.kept_at))
    except LedgerError as error:
        logger.warning(
            "cost meter: budgets: %s: a start while the fleet's database is away will not know what"
            " other servers have used",
            error,
        )
        return FleetUse(ledger_url, told.url, told.interval_s)


if __name__ == "__main__":
    counting = _Counting()
    entry.run(CounterHello, counting.main, counting.answer, counting.take, priority=PRIORITY)
