"""A journal that goes on in a second folder where the first one refuses it, and comes back.

The second place is meant to be on another disk. A journal's numbers have no gap, so each change of
place begins a new journal, and the one before is closed: a dead one, which the applier brings in
and removes. Frames that a failed write may have left in the one are written again in the other;
applying them twice changes nothing.

Invariant: what `append` returned for is in a journal in one of the two places.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from vllm_cost_meter.errors import in_one_line
from vllm_cost_meter.journal.places import link_second
from vllm_cost_meter.logs import Outage, meter_logger

logger = meter_logger()

# The first place is tried again so often, in seconds.
TRY_FIRST_S = 10.0


class Journal(Protocol):
    """What a writer appends to."""

    @property
    def reserve_error(self) -> OSError | None:
        """Why there is no room in reserve; None while there is."""

    def append(self, first_number: int, frames: Sequence[bytes]) -> int:
        """Append as many frames as fit, at least one; return how many."""

    def is_there(self) -> bool:
        """Return whether others still find the journal."""

    def close(self) -> None:
        """Close it."""


class TwoPlaces:
    """A journal in the first of two folders that takes it. Used by one thread."""

    def __init__(
        self,
        first: Path,
        second: Path,
        open_: Callable[[Path], Journal],
        try_first_s: float = TRY_FIRST_S,
    ) -> None:
        """Open nothing yet. `open_` makes a journal in a folder."""
        self.first, self.second = first, second
        self.is_in_second = False
        self._open = open_
        self._try_first_s = try_first_s
        self._try_first_at_s = 0.0
        self._journal: Journal | None = None
        self._outage = Outage()

    def open(self) -> "TwoPlaces":
        """Make a journal in the first place that takes one. Raises OSError if neither does."""
        try:
            self._journal = self._open(self.first)
        except OSError as error:
            self._journal = self._in_second(error)
        else:
            self._is_back()
        return self

    @property
    def reserve_error(self) -> OSError | None:
        """Why there is no room in reserve in the present place."""
        return None if self._journal is None else self._journal.reserve_error

    def append(self, first_number: int, frames: Sequence[bytes]) -> int:
        """Append as many frames as fit into a segment; return how many. Raises OSError."""
        if self.is_in_second and time.monotonic() >= self._try_first_at_s:
            appended = self._try_first(first_number, frames)
            if appended is not None:
                return appended
        if self._journal is None:
            raise OSError("the journal is closed")
        try:
            return self._journal.append(first_number, frames)
        except OSError as error:
            if self.is_in_second:
                self._try_first_at_s = 0.0  # Now either is as good as the other.
                raise
            after = self._in_second(error)
            self._replace(after)
            return after.append(first_number, frames)

    def _in_second(self, error: OSError) -> Journal:
        """Make a journal in the second place, as the first one refuses."""
        journal = self._open(self.second)
        self.is_in_second = True
        self._try_first_at_s = time.monotonic() + self._try_first_s
        if self._outage.failed():
            logger.error(
                "cost meter: the journal cannot be written in %s (%s): bills are journaled in %s,"
                " and costs are told as before. The first place is tried again each %g s.",
                *(self.first, in_one_line(error), self.second, self._try_first_s),
            )
        return journal

    def _try_first(self, first_number: int, frames: Sequence[bytes]) -> int | None:
        """Append to a new journal in the first place; return how many, None if it refuses."""
        self._try_first_at_s = time.monotonic() + self._try_first_s
        journal: Journal | None = None
        try:
            journal = self._open(self.first)
            appended = journal.append(first_number, frames)
        except OSError as error:
            if journal is not None:
                journal.close()
            if self._outage.failed():
                logger.error(
                    "cost meter: the journal still cannot be written in %s%s (%s): bills are"
                    " journaled in %s",
                    *(self.first, self._outage.so_far, in_one_line(error), self.second),
                )
            return None
        self._replace(journal)
        self._is_back()
        return appended

    def _is_back(self) -> None:
        self.is_in_second = False
        link_second(self.first, self.second)
        if (ended := self._outage.ended()) is not None:
            logger.warning(
                "cost meter: the journal is written in %s again, after %.1f s", self.first, ended[0]
            )

    def _replace(self, journal: Journal) -> None:
        before, self._journal = self._journal, journal
        if before is not None:
            before.close()

    def is_there(self) -> bool:
        """Return whether others still find the present journal."""
        return self._journal is not None and self._journal.is_there()

    def close(self) -> None:
        """Close the present journal. Idempotent."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
