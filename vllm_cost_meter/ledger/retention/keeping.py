"""Keep the rows of requests for so many days or bytes, beside a server: drop older ones bit by bit.

The process that applies journals asks for a step after each pass that nobody waits for. A step is
a few small transactions. Once all is dropped that may go, the next look is an hour later.

With an archive, rows go into Parquet files first, in a thread of its own (`archiving.py`).

While a fleet is still to get all that the ledger holds, no row goes for its age.

Where more than a number of bytes of a SQLite file are used, the oldest day goes, and so on, even if
the fleet lacks it: then it gets what the rows add up to (`fleet/rows/unsent.py`). Free pages do not
count: they are used again. Indexes by ids get thin before they get small, so a few days more may go
than would have to.

A machine may begin with a wrong clock and set it after some minutes. No row may go by such a clock:
so the first look is a while after the start, and the clock must have run evenly since.

Invariant: a failure to drop is no failure to apply; only a damaged file is one.
"""

import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.engine import Connection

from vllm_cost_meter.errors import in_one_line
from vllm_cost_meter.ledger.damage.noticing import damage_in
from vllm_cost_meter.ledger.fleet.outbox import held_bytes, read_sender
from vllm_cost_meter.ledger.retention.archiving import ArchivingPass
from vllm_cost_meter.ledger.retention.dropping import (
    Dropper,
    date_of,
    newest_cutoff,
    oldest_hour,
)
from vllm_cost_meter.ledger.retention.parquet import ParquetArchive
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
    """Drops the oldest rows. Used by one thread."""

    def __init__(
        self,
        days: int | None,
        bytes_max: int | None = None,
        archive: Path | None = None,
        now_ns: Callable[[], int] = time.time_ns,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Rows of today and of so many days before it are kept, at least one; None is for ever.

        Of a SQLite file at most `bytes_max` bytes are to be used. `archive` is the folder that gets
        rows as Parquet files before they are dropped.
        """
        self._days = days
        self._bytes_max = bytes_max
        self._archive = archive
        self._is_said = False
        # Rows from before this hour were tried in this look: what is left of them must stay.
        self._tried_hour = 0
        self._now_ns = now_ns
        self._monotonic_s = monotonic_s
        self._dropper: Dropper | ArchivingPass | None = None
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
                if self._dropper is not None and self._dropper.is_waiting:
                    return
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
        if self._dropper is None or not (
            self._dropper.engine is engine or self._dropper.is_waiting
        ):
            if not self._is_clock_even():
                self._watch_clock()
                return
            self._next(engine, None if _is_joining(engine) else self._cutoff_by_days())
        if self._dropper is None:
            self._next(engine, self._cutoff_by_bytes(engine))
        if self._dropper is not None:
            self._dropper.step()
            if self._dropper.is_done:
                self._say(self._dropper, is_unsent=_is_joining(engine))
                self._next(engine, self._cutoff_by_bytes(engine))
        if self._dropper is None:
            self._due_s, self._tried_hour = self._monotonic_s() + LOOK_PAUSE_S, 0

    def _next(self, engine: Engine, before_hour: int | None) -> None:
        self._dropper = None
        if before_hour is not None and self._archive is not None:
            self._dropper = ArchivingPass(engine, before_hour, ParquetArchive(self._archive))
        elif before_hour is not None:
            self._dropper = Dropper(engine, before_hour)
        self._tried_hour = max(self._tried_hour, before_hour or 0)

    def _say(self, dropper: Dropper | ArchivingPass, *, is_unsent: bool) -> None:
        bills, replies = dropper.counts
        if bills or replies:
            logger.info(
                "cost meter: dropped the rows of %d bills and %d HTTP requests from before %s, as"
                " the settings keep_rows_... say; their sums stay",
                *(bills, replies, date_of(dropper.before_hour)),
            )
        if bills and is_unsent:
            logger.warning(
                "cost meter: some of these rows may not be in the fleet, which is still to get all"
                " of this ledger: of them it gets what they add up to"
            )

    def _cutoff_by_days(self) -> int | None:
        if self._days is None:
            return None
        return newest_cutoff(self._now_ns()) - (self._days - 1) * HOURS_PER_DAY

    def _cutoff_by_bytes(self, engine: Engine) -> int | None:
        """Return the midnight after the oldest day with rows, if the file is too large."""
        if self._bytes_max is None or engine.dialect.name != "sqlite":
            return None
        with engine.connect() as connection:
            used = _used_bytes(connection)
            if used <= self._bytes_max:
                return None
            oldest = oldest_hour(connection, self._tried_hour)
        newest = newest_cutoff(self._now_ns())
        if oldest is not None and (after := oldest // HOURS_PER_DAY * HOURS_PER_DAY) < newest:
            return after + HOURS_PER_DAY
        if not self._is_said:
            self._is_said = True
            logger.warning(
                "cost meter: %d bytes of the ledger are used, more than keep_rows_bytes (%d), and"
                " no row may be dropped: those of today and of the day before stay, as do sums",
                *(used, self._bytes_max),
            )
        return None

    def _watch_clock(self) -> None:
        self._began_ns, self._began_s = self._now_ns(), self._monotonic_s()
        self._due_s = self._began_s + FIRST_LOOK_S

    def _is_clock_even(self) -> bool:
        by_clock_s = (self._now_ns() - self._began_ns) / NS_PER_SECOND
        return abs(by_clock_s - (self._monotonic_s() - self._began_s)) <= CLOCK_SET_S


def _is_joining(engine: Engine) -> bool:
    """Return whether a fleet is still to get all that the ledger holds: then no day is too old."""
    with engine.connect() as connection:
        sender = read_sender(connection)
    return sender is not None and sender.joined_at is None


def _used_bytes(connection: Connection) -> int:
    """Return the bytes that are used but for what waits for a fleet: dropping rows frees none."""
    pages, free, size = (
        int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())
        for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size - held_bytes(connection)
