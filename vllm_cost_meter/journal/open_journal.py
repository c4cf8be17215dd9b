"""The journal that this process appends to: its lock, its segment, and one segment in reserve.

The next segment's space is set aside while the present one is used. So where the disk is full there
is still room for what waits at that moment, and for a stop.

Invariant: `append` returns only after the frames are in the page cache, or on the disk where that
is asked for; if it raises, the same frames can be appended again and are there once for a reader.
"""

import errno
from collections.abc import Sequence
from pathlib import Path

from vllm_cost_meter.journal import files
from vllm_cost_meter.journal.places import make_journal
from vllm_cost_meter.journal.segments import (
    RESERVE_NAME,
    SEGMENT_BYTES,
    Segment,
    segment_name,
    set_aside,
)

# What was set aside helps where the disk is full.
_FULL = (errno.ENOSPC, errno.EDQUOT)


class OpenJournal:
    """A journal of this process. Not thread-safe."""

    def __init__(
        self, folder: Path, *, to_disk: bool = False, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        """Make a journal in a ledger's folder of journals. Raises OSError."""
        self.journal_id, self._lock = make_journal(folder)
        self.place = folder / self.journal_id
        # Why no segment is in reserve; None while one is.
        self.reserve_error: OSError | None = None
        self._to_disk = to_disk
        self._segment_bytes = segment_bytes
        self._segment: Segment | None = None
        self._index = 0
        self._reserve: int | None = None

    @property
    def position(self) -> tuple[int, int]:
        """The segment that is written to, and the offset of its end."""
        return self._index, self._segment.end if self._segment is not None else 0

    def append(self, first_number: int, frames: Sequence[bytes]) -> int:
        """Append frames, of which the first has this number; return how many were appended.

        These are as many as fit into a segment; at least one. Raises OSError.
        """
        segment = self._segment
        count = segment.fitting(frames) if segment is not None else 0
        if segment is None or not count:
            segment = self._next_segment(first_number)
            count = segment.fitting(frames)
        segment.append(b"".join(frames[:count]))
        if self._to_disk:
            self._sync(segment)
        return count

    def _sync(self, segment: Segment) -> None:
        try:
            segment.sync()
        except OSError:
            # The kernel may have let go of what it could not write, and would say next time that
            # all is well. So these frames go into another segment.
            self._segment = None
            segment.close()
            raise

    def _next_segment(self, first_number: int) -> Segment:
        reserve = self.place / RESERVE_NAME
        if self._reserve is None:
            self._reserve = set_aside(reserve, self._segment_bytes)
        try:
            begun = Segment.begin(self._reserve, self._segment_bytes, first_number)
            if self._to_disk:
                begun.sync()
            files.rename(reserve, self.place / segment_name(self._index + 1))
        except OSError as error:
            if error.errno not in _FULL:
                # It is damaged, or somebody removed it: another one may do.
                broken, self._reserve = self._reserve, None
                files.close(broken)
            raise
        # If the disk fails now, the next attempt begins the segment after this one.
        self._reserve = None
        self._index += 1
        previous, self._segment = self._segment, None
        if previous is not None:
            previous.close()
        if self._to_disk:
            try:
                files.sync_folder(self.place)
            except OSError:
                begun.close()
                raise
        self._segment = begun
        self._set_reserve_aside()
        return begun

    def _set_reserve_aside(self) -> None:
        try:
            self._reserve = set_aside(self.place / RESERVE_NAME, self._segment_bytes)
        except OSError as error:
            self.reserve_error = error
        else:
            self.reserve_error = None

    def is_there(self) -> bool:
        """Return whether others still find this journal where it was made."""
        there = self.place if self._segment is None else self.place / segment_name(self._index)
        return files.exists(there)

    def close(self) -> None:
        """Close the files and let go of the lock: the journal is dead then. Idempotent."""
        segment, self._segment = self._segment, None
        reserve, self._reserve = self._reserve, None
        try:
            if segment is not None:
                segment.close()
            if reserve is not None:
                files.close(reserve)
                files.remove_file(self.place / RESERVE_NAME)
        finally:
            self._lock.release()
