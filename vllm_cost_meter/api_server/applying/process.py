"""The process that applies journals to the ledger, beside an API server: its main program.

To write a bill into SQLite takes ten times as long as into a journal, and holds the interpreter's
lock meanwhile: no token may wait for that. It applies all the time what comes, and at once when it
is asked.

Invariant: an answer to a question means that all journaled before it is in the ledger.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from vllm_cost_meter.api_server.applying.messages import (
    CATCH_UP,
    STATE,
    ApplierHello,
    ApplierState,
)
from vllm_cost_meter.api_server.applying.watching import watch
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.apply_loop import ApplyLoop
from vllm_cost_meter.ledger.retention.keeping import RowKeeper
from vllm_cost_meter.side_process import entry
from vllm_cost_meter.side_process.asked import settle
from vllm_cost_meter.side_process.entry import ToServer

# Behind the tokens, and before questions, which wait for it.
PRIORITY = 5
# So old is the ledger at most, where nobody asks.
PAUSE_S = 0.1
# Where another process applies, this one looks so often whether it still does.
LOCK_PAUSE_S = 0.5
TELL_PAUSE_S = 1.0
RETRY_FIRST_S = 0.05
RETRY_MOST_S = 1.0


class _Applying:
    """Applies, and answers the API server's questions."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cost-meter-applier")
        self._wake = asyncio.Event()
        self._asked: list[asyncio.Future[bool]] = []
        self._tell_at_s = 0.0
        self._told_error: str | None = None

    async def main(self, server: ToServer, hello: ApplierHello) -> None:
        """Begin: from now on there are answers."""
        second = None if hello.second is None else Path(hello.second)
        archive = None if hello.archive is None else Path(hello.archive)
        keeper = RowKeeper(hello.keep_rows_days, hello.keep_rows_bytes, archive)
        loop = ApplyLoop(hello.url, second=second, keeper=keeper, sends=hello.sends)
        server.ready()
        self._task = asyncio.create_task(self._run(server, loop))
        self._watch_task = asyncio.create_task(watch(loop, self._wake.set))

    async def answer(self, name: str, _given: msgspec.Raw) -> bool:
        """Answer a question once all is applied that was journaled before it."""
        if name != CATCH_UP:
            raise ValueError(f"expected the question {CATCH_UP!r}, got {name!r}")
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._asked.append(done)
        self._wake.set()
        return await done

    def take(self, name: str, _value: msgspec.Raw) -> None:
        """Take up news; there are none."""
        raise ValueError(f"expected no news, got {name!r}")

    async def _run(self, server: ToServer, loop: ApplyLoop) -> None:
        retry_s = RETRY_FIRST_S
        while True:
            asked, self._asked = self._asked, []
            self._wake.clear()
            failure = await self._pass(loop, is_asked=bool(asked))
            self._tell(server, loop)
            for each in asked:
                settle(each, failure)
            if failure is None:
                pause_s, retry_s = PAUSE_S if loop.is_ours else LOCK_PAUSE_S, RETRY_FIRST_S
            else:
                pause_s, retry_s = retry_s, min(2 * retry_s, RETRY_MOST_S)
            try:
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _pass(self, loop: ApplyLoop, *, is_asked: bool) -> LedgerError | None:
        def run() -> None:
            loop.run_pass(is_asked=is_asked)

        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, run)
        except LedgerError as error:
            return error
        return None

    def _tell(self, server: ToServer, loop: ApplyLoop) -> None:
        """Tell how the ledger does: each second, and at once when it begins or ends to fail."""
        now_s = time.monotonic()
        if now_s < self._tell_at_s and loop.last_error == self._told_error:
            return
        self._tell_at_s, self._told_error = now_s + TELL_PAUSE_S, loop.last_error
        server.tell(
            STATE,
            ApplierState(
                loop.is_ours,
                loop.last_error,
                loop.failures,
                *loop.sizes(),
                applied_at_ns=loop.applied_at_ns,
                set_aside=loop.set_aside,
            ),
        )


if __name__ == "__main__":
    applying = _Applying()
    entry.run(ApplierHello, applying.main, applying.answer, applying.take, priority=PRIORITY)
