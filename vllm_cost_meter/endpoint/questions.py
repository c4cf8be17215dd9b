"""Bounds on the questions that are answered at the same time, and on the time of each.

A few questions run at once, each in a thread; others wait their turn, and beyond a number of those
nobody may wait. A question's time begins when it comes, so waiting counts. When it is over, the
asker gets a 503 with `Retry-After`, and the query in the database is ended; so it is if the asker
leaves. The thread's place is free once the thread is.

Invariant: no more than `at_once` questions run, also of askers who have gone.
"""

import asyncio
import contextlib
import contextvars
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from typing_extensions import TypedDict

from vllm_cost_meter.errors import AwayError, OverdueError
from vllm_cost_meter.ledger.deadline import Deadline, deadline

T = TypeVar("T")

AT_ONCE = 2
TIMEOUT_S = 30.0
# A dashboard asks some dozen questions at a time.
WAITING_MAX = 64
# When to ask again after a 503.
RETRY_AFTER_S = 5


class AskerGoneError(Exception):
    """The asker did not wait for the answer."""


class QuestionCounts(TypedDict):
    """How many questions the side endpoint has at hand."""

    running: int
    """Questions that are being answered."""
    waiting: int
    """Questions that wait for their turn."""
    at_once: int
    """How many may run at the same time."""
    timeout_s: float
    """Seconds that a question may take."""
    overdue: int
    """Questions that took too long and were ended, since the side endpoint started."""
    refused: int
    """Questions that were refused because too many waited, since then."""


class Questions:
    """The questions of one side endpoint. Used by one event loop only."""

    def __init__(
        self, at_once: int = AT_ONCE, timeout_s: float = TIMEOUT_S, waiting_max: int = WAITING_MAX
    ) -> None:
        self._at_once = at_once
        self._timeout_s = timeout_s
        self._waiting_max = waiting_max
        self._turns = asyncio.Semaphore(at_once)
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="cost-meter-question")
        self._running = self._waiting = self._overdue = self._refused = 0

    def counts(self) -> QuestionCounts:
        """Return how many questions are at hand."""
        return {
            "running": self._running,
            "waiting": self._waiting,
            "at_once": self._at_once,
            "timeout_s": self._timeout_s,
            "overdue": self._overdue,
            "refused": self._refused,
        }

    async def answer(
        self, make: Callable[[], T], gone: Callable[[], Awaitable[None]] | None = None
    ) -> T:
        """Return what `make()` returns, from a thread. `gone` returns when the asker has left.

        Raises OverdueError, AwayError if too many wait, and AskerGoneError.
        """
        until = Deadline(self._timeout_s)
        leaving = None if gone is None else asyncio.ensure_future(gone())
        try:
            await self._turn(until, leaving)
            context = contextvars.copy_context()
            context.run(deadline.set, until)
            loop = asyncio.get_running_loop()
            running = loop.run_in_executor(self._threads, context.run, make)
            self._running += 1
            running.add_done_callback(self._ended)
            return await self._first(running, until, leaving)
        finally:
            if leaving is not None:
                leaving.cancel()

    async def _turn(self, until: Deadline, leaving: "asyncio.Future[None] | None") -> None:
        """Wait until the question may run."""
        if not self._turns.locked():
            await self._turns.acquire()  # At once: it never counts as one that waits.
            return
        if self._waiting >= self._waiting_max:
            self._refused += 1
            raise AwayError(f"{self._waiting} questions wait already; ask again later")
        self._waiting += 1
        turn = asyncio.ensure_future(self._turns.acquire())
        try:
            await self._first(turn, until, leaving)
        except BaseException:
            if not turn.cancel() and not turn.cancelled():
                self._turns.release()  # it came at the same moment
            raise
        finally:
            self._waiting -= 1

    async def _first(
        self, wanted: "asyncio.Future[T]", until: Deadline, leaving: "asyncio.Future[None] | None"
    ) -> T:
        """Return what is wanted, unless the time is over or the asker leaves before it."""
        waits: set[asyncio.Future[Any]] = {wanted}
        if leaving is not None:
            waits.add(leaving)
        try:
            await asyncio.wait(
                waits, timeout=until.remaining_s, return_when=asyncio.FIRST_COMPLETED
            )
            if wanted.done():
                return wanted.result()
        except OverdueError:
            self._overdue += 1
            raise
        except asyncio.CancelledError:
            until.end()
            raise
        if leaving is not None and leaving.done():
            until.end()
            raise AskerGoneError
        self._overdue += 1
        until.end()
        until.check()
        raise AssertionError("a deadline that has ended is over")

    def _ended(self, running: "asyncio.Future[Any]") -> None:
        self._running -= 1
        self._turns.release()
        with contextlib.suppress(BaseException):
            running.exception()  # nobody may be left to look at it
