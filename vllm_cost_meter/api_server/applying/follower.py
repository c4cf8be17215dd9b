"""Has journals applied by a process of its own, and asks it to catch up.

Invariant: after `catch_up` returned, all that was journaled before the call is in the ledger.
"""

import msgspec

from vllm_cost_meter.api_server.applying.messages import (
    CATCH_UP,
    STATE,
    ApplierHello,
    ApplierState,
)
from vllm_cost_meter.errors import AwayError, LedgerError
from vllm_cost_meter.metrics import series
from vllm_cost_meter.side_process.channel import RefusedError, decoded
from vllm_cost_meter.side_process.supervisor import Pauses, SideProcess

MODULE = "vllm_cost_meter.api_server.applying.process"
PAUSES = Pauses(first=0.1, longest=5.0)
# A ledger that waits for a lock, or an outage: the question fails then, and applying goes on.
CATCH_UP_TIMEOUT_S = 2.0
# It takes half a second to start.
START_TIMEOUT_S = 5.0


class Applying:
    """The API server's end of the process that applies journals. Used by one event loop only."""

    def __init__(self, hello: ApplierHello, timeout_s: float = CATCH_UP_TIMEOUT_S) -> None:
        """`hello` says which ledger it is, and for how long its rows are kept."""
        self._url = hello.url
        self._timeout_s = timeout_s
        self.start_timeout_s = START_TIMEOUT_S
        self.state = ApplierState()
        self.process = SideProcess(
            "the process that writes the ledger",
            MODULE,
            hello=lambda: hello,
            answer=_answer_nothing,
            take=self._take,
            pauses=PAUSES,
        )

    def start(self) -> None:
        """Start it. Idempotent."""
        self.process.start()

    def _take(self, name: str, value: msgspec.Raw) -> None:
        if name == STATE:
            self.state = decoded(value, ApplierState)
            series.set_ledger(
                is_up=self.state.last_error is None,
                failures=self.state.failures,
                journal_bytes=self.state.journal_bytes,
                wal_bytes=self.state.wal_bytes,
                free_bytes=self.state.free_bytes,
                applied_at_s=None
                if self.state.applied_at_ns is None
                else self.state.applied_at_ns / 1e9,
                set_aside=self.state.set_aside,
            )

    async def catch_up(self) -> None:
        """Have the ledger hold all that is journaled now; starts the process at the first call.

        Raises LedgerError if the ledger cannot be written, AwayError where that takes too long.
        """
        self.process.start()
        if not await self.process.wait(self.start_timeout_s):
            raise AwayError("the process that writes the ledger did not start in time")
        try:
            await self.process.ask(CATCH_UP, None, bool, self._timeout_s)
        except RefusedError as error:
            if error.kind == LedgerError.__name__:
                raise LedgerError(str(error)) from None
            raise

    async def stop(self) -> None:
        """Apply what the journals hold, for a short time, and end the process."""
        if self.process.state == "ok":
            try:
                await self.catch_up()
            except (AwayError, LedgerError, RefusedError):
                pass  # The journals keep it, and the next start applies it.
        await self.process.stop()


async def _answer_nothing(name: str, _given: msgspec.Raw) -> object:
    raise ValueError(f"expected no question, got {name!r}")
