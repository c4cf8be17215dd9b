"""Looks at what budgets have used, whenever the ledger or the fleet has something new of that.

Blocks. A ledger that cannot be opened at the start is tried again at each look.

Invariant: figures that are returned are of the budgets, or of those before while new ones are
counted; None means that nothing is new.
"""

import time
from collections.abc import Collection, Sequence

from vllm_cost_meter.api_server.budgets.messages import LookQuestion
from vllm_cost_meter.ledger.catching_up import is_all_applied
from vllm_cost_meter.ledger.fleet_use.others import FleetUse
from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.prices.book import PriceBook
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures

NOTHING_MORE = LookQuestion()
# The process that makes a new ledger starts at the same moment.
WAIT_S = 5.0


class BudgetLooks:
    """The looks of one API server."""

    def __init__(self, url: str, fleet: FleetUse | None = None) -> None:
        """With a `fleet`, budgets count what it has of other servers, too."""
        self._url = url
        self._fleet = fleet
        self._alive: Collection[str] = ()
        self.left: tuple[tuple[str, int], ...] = ()
        self._spending = Spending(url, wait_s=WAIT_S, alive=lambda: self._alive, fleet=fleet)
        self._latest: object = None

    def look(
        self, budgets: Sequence[Budget], book: PriceBook, asked: LookQuestion = NOTHING_MORE
    ) -> BudgetFigures | None:
        """Return where the budgets stand; None if nothing is new since the last look.

        After figures `left` has the pending bills that the ledger lacks and will get. Raises
        LedgerError while the ledger cannot be read.
        """
        self._alive = asked.alive
        looks = 0 if self._fleet is None else self._fleet.looks
        latest = (self._spending.latest_snapshots(), looks, budgets, book)
        if latest == self._latest and not asked.is_behind:
            return None
        # Before the look: what the journals no longer have is in the ledger that it sees, or never.
        pending = () if asked.is_overdue and is_all_applied(self._url) else asked.pending
        found = self._spending.look(budgets, book, time.time_ns(), pending=pending)
        self._latest = latest
        self.left = tuple((bill.run_id, bill.seq) for bill in self._spending.pending)
        return found

    def close(self) -> None:
        """Close the connections."""
        self._spending.close()
