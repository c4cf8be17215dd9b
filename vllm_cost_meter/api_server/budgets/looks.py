"""Looks at what the budgets have used, whenever the ledger has something new to say of that.

Blocks. A ledger that cannot be opened at the start is tried again at each look.

Invariant: figures that are returned are of the budgets, or of those before while new ones are
counted; None means that nothing is new.
"""

import time
from collections.abc import Collection, Sequence

from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.prices.book import PriceBook
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures

# The process that makes a new ledger starts at the same moment.
WAIT_S = 5.0


class BudgetLooks:
    """The looks of one API server."""

    def __init__(self, url: str) -> None:
        self._alive: Collection[str] = ()
        self._spending = Spending(url, wait_s=WAIT_S, alive=lambda: self._alive)
        self._latest: object = None

    def look(
        self, budgets: Sequence[Budget], book: PriceBook, alive: Collection[str] = ()
    ) -> BudgetFigures | None:
        """Return where the budgets stand; None if nothing is new since the last look.

        `alive` names engine runs that are known to live though they are silent. Raises LedgerError
        while the ledger cannot be read.
        """
        self._alive = alive
        latest = (self._spending.latest_snapshots(), budgets, book)
        if latest == self._latest and not self._spending.is_recounting:
            return None
        figures = self._spending.look(budgets, book, time.time_ns())
        self._latest = latest
        return figures

    @property
    def served(self) -> Sequence[Budget]:
        """The budgets of the latest figures."""
        return self._spending.served

    def close(self) -> None:
        """Close the connections."""
        self._spending.close()
