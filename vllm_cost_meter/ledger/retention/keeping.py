"""Keep the rows of requests for so many days, beside a server: drop older ones, a step at a time.

The process that applies journals asks for a step after each pass that nobody waits for. A step is
a few small transactions. Once all is dropped that may go, the next look is an hour later.

A machine may begin with a wrong clock and set it after some minutes. No row may go by such a clock:
so the first look is a while after the start, and the clock must have run evenly since.

Invariant: a failure to drop is no failure to apply; only a damaged file is one.
"""

import time
from collections.abc import Callable

from sqlalchemy import Engine

from vllm_cost_meter.errors import in_one_line
from vllm_cost_meter.ledger.damage.noticing import damage_in
from vllm_cost_meter.ledger.retention.dropping import Dropper, date_of, newest_cutoff
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.units.calendar import HOURS_PER_DAY
from vllm_cost_meter.units.time import NS_PER_SECOND

logger = meter_logger()

# Until the first look, and between two.
FIRST_LOOK_S = 600.0
LOOK_PAUSE_S = 3_600.0
# So long transactions are begun in one step.
MOMENT_S = 0.03
# A clock that was set by more than this since it was looked at is watched anew.
CLOCK_SET_S = 60.0


class RowKeeper:
    """Drops rows that are older than a number of days. Used by one thread."""

    def __init__(
        self,
        days: int,
        now_ns: Callable[[], int] = time.time_ns,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Rows of today and of so many days before it are kept; at least one day."""
        self._days = days
        self._now_ns = now_ns
        self._monotonic_s = monotonic_s
        self._dropper: Dropper | None = None
        self._due_s = 0.0
        self._watch_clock()

    def step(self, engine: Engine) -> None:
        """Drop rows for a moment, if that is due.

        Raises only for a damaged file, whatever SQLite says of it.
        """
        until_s = self._monotonic_s() + MOMENT_S
        try:
            while self._due_s <= self._monotonic_s() < until_s:
                self._step(engine)
        except Exception as error:
            self._dropper = None
            self._due_s = self._monotonic_s() + LOOK_PAUSE_S
            if damage_in(error) is not None:
                raise
            logger.warning(
                "cost meter: old rows of requests cannot be dropped, trying again in an hour: %s",
                in_one_line(error),
            )

    def _step(self, engine: Engine) -> None:
        if self._dropper is None or self._dropper.engine is not engine:
            if not self._is_clock_even():
                self._watch_clock()
                return
            self._dropper = Dropper(engine, self._cutoff())
        self._dropper.step()
        if self._dropper.is_done:
            bills, replies = self._dropper.counts
            if bills or replies:
                logger.info(
                    "cost meter: dropped the rows of %d bills and %d HTTP requests from before %s,"
                    " as keep_rows_days says; their sums stay",
                    *(bills, replies, date_of(self._dropper.before_hour)),
                )
            self._dropper, self._due_s = None, self._monotonic_s() + LOOK_PAUSE_S

    def _cutoff(self) -> int:
        newest = newest_cutoff(self._now_ns())
        return newest - max(self._days - 1, 0) * HOURS_PER_DAY

    def _watch_clock(self) -> None:
        self._began_ns, self._began_s = self._now_ns(), self._monotonic_s()
        self._due_s = self._began_s + FIRST_LOOK_S

    def _is_clock_even(self) -> bool:
        by_clock_s = (self._now_ns() - self._began_ns) / NS_PER_SECOND
        return abs(by_clock_s - (self._monotonic_s() - self._began_s)) <= CLOCK_SET_S
