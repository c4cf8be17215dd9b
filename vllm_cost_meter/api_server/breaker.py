"""The circuit breaker: bounds how long a reply waits for its bills, and stops useless waiting.

Invariant: no reply waits longer than its bound. After `misses_in_a_row_max` waits in vain in a row
no reply waits at all, until a bill is committed again.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.guard import Guard
from vllm_cost_meter.metrics import series

T = TypeVar("T")

# After this many replies in a row that waited in vain, replies stop waiting.
MISSES_IN_A_ROW_MAX = 5


class Breaker:
    """Decides whether replies wait for their bills."""

    def __init__(self, guard: Guard, misses_in_a_row_max: int = MISSES_IN_A_ROW_MAX) -> None:
        self._guard = guard
        self._misses_in_a_row_max = misses_in_a_row_max
        self._in_a_row = 0

    @property
    def open(self) -> bool:
        """True while replies should not wait."""
        return self._in_a_row >= self._misses_in_a_row_max

    def missed(self) -> None:
        """Count a reply that waited in vain, or would have."""
        self._in_a_row += 1
        series.count_miss()

    def bill_came(self) -> None:
        """Note a committed bill: replies may wait again."""
        self._in_a_row = 0

    async def settle(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T | None:
        """Await `work` and return its result; None if it fails, is too slow, or we do not wait."""
        if self.open:
            work.close()
            self.missed()
            return None
        try:
            async with asyncio.timeout(timeout_s):
                result = await work
        except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
            # A ledger that fails is counted and spoken of by its writer, and no hook is broken.
            if not isinstance(error, TimeoutError | LedgerError):
                self._guard.failed("settle", error)
                series.count_error("api")
            self.missed()
            return None
        self.bill_came()
        self._guard.succeeded("settle")
        return result
