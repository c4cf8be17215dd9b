"""The background loops of an API server: each tries again after a failure, and says so.

What makes a loop fail passes: a ledger that is locked, an engine that is busy, a mount that is
away. It says nothing of the hooks, so a loop has an error account of its own and never switches the
meter off. It tries again after longer and longer pauses, and goes on as before once it works. The
log has the first failure of an outage, a line in each minute of it, and its end; the side endpoint
(`/cost/health`), the metrics and `doctor` show how each loop does now.

Invariant: a loop ends only when it is cancelled.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from vllm_cost_meter.endpoint.answers import LoopHealth
from vllm_cost_meter.errors import CostMeterError, cause_of_error, in_one_line
from vllm_cost_meter.guard import in_daemon_thread
from vllm_cost_meter.logs import Outage, meter_logger
from vllm_cost_meter.metrics import series

logger = meter_logger()

P = ParamSpec("P")
R = TypeVar("R")

# A loop that fails waits twice as long each time, up to this.
PAUSE_S_MAX = 5.0

# What a failure means for whoever reads the log, by loop.
MEANWHILE = {
    "announce": "requests that run cannot be looked up",
    "budgets": "budgets are held to by the figures of before, and to none once those are stale",
    "engines": "the figures of that engine are as old as its last snapshot",
    "poll": "the figures of the engines are as old as their last snapshots",
    "reload": "the settings stay as they were",
}


class Loop:
    """One background loop, and its error account."""

    def __init__(self, name: str, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.name = name
        self.failures = 0
        self._outage = Outage(clock_ns)
        self._last_error: str | None = None
        series.set_loop_failing(name, is_failing=False)

    @property
    def failing(self) -> bool:
        """True while the last attempt failed."""
        return bool(self._outage.failures_in_a_row)

    async def run(self, work: Callable[[], Awaitable[None]], pause_s: float) -> None:
        """Do the work for ever, with a pause after each time."""
        while True:
            await self.attempt(work)
            await asyncio.sleep(self.pause_s(pause_s))

    async def attempt(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do the work once; an error is contained and counted."""
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
            self.failed(error)
        else:
            self.succeeded()

    def pause_s(self, usual_s: float) -> float:
        """Return how long to wait before the next attempt."""
        if not self.failing:
            return usual_s
        doubled_s = usual_s * 2.0 ** min(self._outage.failures_in_a_row, 30)
        return max(usual_s, min(doubled_s, PAUSE_S_MAX))

    def succeeded(self) -> None:
        """Record that an attempt worked, which ends an outage."""
        if not self.failing:
            return
        if (ended := self._outage.ended()) is not None:
            logger.warning(
                "cost meter: the loop `%s` works again, after %.1f s and %d failures",
                self.name,
                *ended,
            )
        series.set_loop_failing(self.name, is_failing=False)

    def failed(self, error: BaseException) -> None:
        """Count a failed attempt; log the first one of an outage, and one in each minute."""
        self.failures += 1
        self._last_error = in_one_line(error)
        series.set_loop_failing(self.name, is_failing=True)
        series.count_loop_failure(self.name)
        if self._outage.failed():
            self._log(error)

    def health(self) -> LoopHealth:
        """Return how the loop does now."""
        seconds = self._outage.lasts_s
        return {
            "loop": self.name,
            "state": "failing" if self.failing else "ok",
            "failing_for_s": None if seconds is None else round(seconds, 3),
            "failures_in_a_row": self._outage.failures_in_a_row,
            "failures": self.failures,
            "last_error": self._last_error,
        }

    def _log(self, error: BaseException) -> None:
        logger.error(
            "cost meter: the loop `%s` failed%s: %s. It tries again, with pauses of up to %g s, and"
            " says when it works; until then %s.",
            self.name,
            self._outage.so_far,
            self._last_error,
            PAUSE_S_MAX,
            MEANWHILE[self.name],
            # Of what is known to happen the line says enough; anything else may be our own fault.
            exc_info=None if _is_known_to_happen(error) else error,
        )


class Loops:
    """The loops of one API server, by name."""

    def __init__(self) -> None:
        self._loops: dict[str, Loop] = {}

    def __getitem__(self, name: str) -> Loop:
        """Return the loop of a name, made at its first use."""
        if name not in self._loops:
            self._loops[name] = Loop(name)
        return self._loops[name]

    def health(self) -> list[LoopHealth]:
        """Return how each loop does now, by name."""
        return [loop.health() for _, loop in sorted(self._loops.items())]


async def in_own_thread(body: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Return what `body` returns, called in a daemon thread of its own.

    What hangs in vLLM's thread pool would take one of its few threads, and hold up the end of the
    process.
    """
    return await asyncio.wrap_future(in_daemon_thread(body, *args, **kwargs))


def _is_known_to_happen(error: BaseException) -> bool:
    return isinstance(error, CostMeterError | OSError) or cause_of_error(error) is not error
