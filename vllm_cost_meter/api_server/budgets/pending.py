"""The bills of one API server that its budgets' figures do not have yet.

A bill is in the ledger a moment after it is told, and while the ledger cannot be written not at
all. Budgets count it meanwhile: each look takes these bills along, adds those that the ledger
lacks, and says which these were. What the ledger never gets (it was damaged, or dropped) is told
from what is late by the journals: once they hold nothing more, it does not come.

Invariant: a bill is pending from the moment it is handed to the journal until a look has found it
in the ledger, or that it never will be there.
"""

import time
from collections.abc import Callable, Iterable
from itertools import islice

from vllm_cost_meter.records.pending import PendingBill
from vllm_cost_meter.records.requests import EngineRequest
from vllm_cost_meter.units.time import NS_PER_SECOND

# So many at most are sent with a look: more would hold up the event loop for milliseconds.
SENT_MAX = 10_000
# Beyond so many no more are noted: the ledger is far behind then, and figures are stale anyway.
PENDING_MAX = 50_000
# From this age of the oldest on, a look does not wait for a new snapshot.
BEHIND_NS = NS_PER_SECOND
# From this age on it is looked for in the journals.
OVERDUE_NS = 3 * NS_PER_SECOND

BillKey = tuple[str, int]


class PendingBills:
    """The pending bills, the oldest first. Used by one event loop only."""

    def __init__(self, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._bills: dict[BillKey, tuple[int, PendingBill]] = {}

    def add(self, part: EngineRequest) -> None:
        """Note a bill that is handed to the journal."""
        if len(self._bills) >= PENDING_MAX:
            return
        self._bills[part.bill.run_id, part.bill.seq] = self._clock_ns(), PendingBill.of(part)

    def sent(self) -> tuple[PendingBill, ...]:
        """Return the bills for a look, the oldest of too many."""
        return tuple(bill for _, bill in islice(self._bills.values(), SENT_MAX))

    @property
    def lag_ns(self) -> int:
        """How long the oldest has waited, in nanoseconds; 0 without one."""
        oldest = next(iter(self._bills.values()), None)
        return 0 if oldest is None else self._clock_ns() - oldest[0]

    def settle(self, bills: Iterable[PendingBill], left: Iterable[BillKey]) -> None:
        """Drop the bills of a look but those that the ledger lacks."""
        keep = set(left)
        for bill in bills:
            if (bill.run_id, bill.seq) not in keep:
                self._bills.pop((bill.run_id, bill.seq), None)
