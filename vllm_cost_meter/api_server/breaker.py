"""Bounds how long a reply waits for its bills, and stops the waiting while bills do not come.

Invariant: no reply waits longer than its bound, or at all after `misses_in_a_row_max` waits in a
row were in vain, until a bill is committed again.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from vllm_cost_meter import metrics
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.guard import Guard

T = TypeVar("T")

# Replies that waited in vain, in a row, before nobody waits any more.
MISSES_IN_A_ROW_MAX = 5


class Breaker:
    """Decides whether replies wait for their bills."""

    def __init__(self, guard: Guard, misses_in_a_row_max: int = MISSES_IN_A_ROW_MAX) -> None:
        self._guard = guard
        self._misses_in_a_row_max = misses_in_a_row_max
        self._in_a_row = 0

    @property
    def open(self) -> bool:
        """True while nobody should wait."""
        return self._in_a_row >= self._misses_in_a_row_max

    def missed(self) -> None:
        """A reply waited in vain, or would have."""
        self._in_a_row += 1
        metrics.count_miss()

    def bill_came(self) -> None:
        """A bill came and was committed."""
        self._in_a_row = 0

    async def settle(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T | None:
        """Return what `work` returns; None if it failed, took too long, or nobody waits now."""
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
                metrics.count_error("api")
            self.missed()
            return None
        self.bill_came()
        self._guard.succeeded("settle")
        return result
