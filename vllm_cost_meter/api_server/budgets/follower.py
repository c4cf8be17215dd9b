"""Has what budgets have used counted by a process of its own, and brings its figures here.

Invariant: figures are of the budgets that they were counted for, whatever was declared since.
"""

from collections.abc import Callable, Collection, Sequence

import msgspec

from vllm_cost_meter.api_server.budgets.messages import (
    LOOK,
    RULES,
    CountedFleet,
    CounterHello,
    Looked,
    LookQuestion,
    SentRules,
)
from vllm_cost_meter.api_server.budgets.pending import BEHIND_NS, OVERDUE_NS, PendingBills
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.prices.book import NO_PRICES, PriceBook
from vllm_cost_meter.side_process.channel import RefusedError
from vllm_cost_meter.side_process.supervisor import Pauses, SideProcess
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures

MODULE = "vllm_cost_meter.api_server.budgets.process"
# After this time a look is a failure in the log, and is waited for all the same.
LOOK_TIMEOUT_S = 10.0
# Budgets hold by the figures of before for some seconds only, so it starts again without delay.
PAUSES = Pauses(first=0.1, longest=5.0)


class BudgetFollower:
    """The API server's end of the process that counts its budgets. Used by one event loop only."""

    def __init__(
        self,
        url: str,
        alive: Callable[[], Collection[str]] = tuple,
        waiting: Callable[[], int] = lambda: 0,
        timeout_s: float = LOOK_TIMEOUT_S,
        fleet: CountedFleet | None = None,
    ) -> None:
        """Follow the ledger at `url`, and the fleet.

        `alive` names engine runs that are known to live though they are silent. `waiting` is how
        many records wait for the journal.
        """
        self.pending = PendingBills()
        self._waiting = waiting
        self._url = url
        self._fleet = fleet
        self._alive = alive
        self._timeout_s = timeout_s
        self._version = 0
        self._budgets: Sequence[Budget] = ()
        self._book: PriceBook = NO_PRICES
        # The budgets of each version of which figures may still come.
        self._sent: dict[int, Sequence[Budget]] = {}
        self.process = SideProcess(
            "the process that counts budgets",
            MODULE,
            hello=self._hello,
            answer=_answer_nothing,
            pauses=PAUSES,
        )

    def _hello(self) -> CounterHello:
        return CounterHello(self._url, self._rules(), self._fleet)

    def _rules(self) -> SentRules:
        return SentRules.of(self._version, self._budgets, self._book)

    async def follow(self, budgets: Sequence[Budget], book: PriceBook) -> BudgetFigures | None:
        """Return where the budgets stand; None if nothing is new since the last call.

        While new budgets are counted the figures are of those from before. Starts the process at
        the first call. Raises LedgerError if the ledger cannot be read, AwayError while the process
        is away, RefusedError for any other error in it.
        """
        if budgets != self._budgets or book is not self._book or not self._sent:
            self._version += 1
            self._budgets, self._book = budgets, book
            self._sent[self._version] = budgets
            self.process.tell(RULES, self._rules())
        self.process.start()
        pending, lag_ns = self.pending.sent(), self.pending.lag_ns
        is_overdue = lag_ns >= OVERDUE_NS and not self._waiting()
        asked = LookQuestion(tuple(self._alive()), pending, lag_ns >= BEHIND_NS, is_overdue)
        try:
            looked = await self.process.ask(LOOK, asked, Looked, self._timeout_s)
        except RefusedError as error:
            if error.kind == LedgerError.__name__:
                raise LedgerError(str(error)) from None
            raise
        found = looked.figures
        if found is None:
            return None
        self.pending.settle(pending, looked.left)
        self._sent = {v: budgets for v, budgets in self._sent.items() if v >= found.version}
        return found.figures(self._sent[found.version])

    async def stop(self) -> None:
        """End the process."""
        await self.process.stop()


async def _answer_nothing(name: str, _given: msgspec.Raw) -> object:
    raise ValueError(f"expected no question, got {name!r}")
