"""Read a journal in order, from a position on, while its process may be appending to it.

A reader stops at a frame that is not whole: at the end of a journal that is what is being written,
or what was when the process died, and nobody was told of it. Whole frames behind a torn one mean
damage. Then the reader says how many frames are gone, and goes on behind them. A group that a
failed sync has had written twice is read once.

Invariant: frames come in the order of their numbers, each at most once, and a number that is passed
over is in exactly one `Gap`.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.journal import files, segments
from vllm_cost_meter.journal.entries import Record, read_entry
from vllm_cost_meter.journal.frames import HEAD_BYTES as FRAME_HEAD_BYTES
from vllm_cost_meter.journal.frames import Frame, next_whole_frame, scan, whole_frame

# What is read at once: a thousand requests, which SQLite takes within 100 ms. A commit writes each
# page of an index that it changed, so commits of half as many would write nearly twice as much.
CHUNK_BYTES = 1 << 19


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """How far a journal was read: the segment, the offset there, and the last frame's number."""

    segment: int = 0
    offset: int = 0
    number: int = 0


START = Position()


@dataclass(frozen=True, slots=True)
class Gap:
    """Frames of a journal that nobody can read: how many, and the number of the one before."""

    after: int
    frames: int
    reason: str


@dataclass(frozen=True, slots=True)
class JournalPart:
    """What was read at once: records in order with their numbers, gaps, the position behind them.

    `is_all` is False if there may be more.
    """

    records: tuple[tuple[int, Record], ...]
    gaps: tuple[Gap, ...]
    position: Position
    is_all: bool


class JournalReader:
    """Reads the journal in one folder. Used by one thread."""

    def __init__(self, place: Path, position: Position = START) -> None:
        self.place = place
        self.position = position

    def read(self, *, is_alive: bool) -> JournalPart:
        """Read on, at most about `CHUNK_BYTES`, and move the position.

        Damage behind the end of the last segment counts only where the process is dead: the kernel
        may show a write to a reader in pieces. Raises OSError, and LedgerError for what a newer
        version wrote: then the position is before it.
        """
        reading = _Reading()
        begin = self.position
        try:
            return self._read(reading, is_alive=is_alive)
        except LedgerError:
            if self.position == begin:
                raise
            # What comes before it is read; the next call meets it first.
            return reading.done(self.position, is_all=False)

    def _read(self, reading: "_Reading", *, is_alive: bool) -> JournalPart:
        present = segments.segment_indexes(self.place)
        for index in (index for index in present if index >= self.position.segment):
            if index > self.position.segment:
                if self.position == START:
                    reading.first_segment = index
                self.position = Position(index, 0, self.position.number)
            is_complete = index < present[-1] or not is_alive
            after = next((other for other in present if other > index), None)
            descriptor = self._open(index)
            try:
                while self._read_on(descriptor, reading, after, is_complete=is_complete):
                    if reading.size_bytes >= CHUNK_BYTES:
                        return reading.done(self.position, is_all=False)
            finally:
                files.close(descriptor)
        return reading.done(self.position, is_all=True)

    def _open(self, index: int) -> int:
        path = self.place / segments.segment_name(index)
        return files.open_file(path, os.O_RDONLY | os.O_NOFOLLOW)

    def _read_on(
        self, descriptor: int, reading: "_Reading", after: int | None, *, is_complete: bool
    ) -> bool:
        """Read a chunk of a segment; return False at its end. What is complete may have damage.

        `after` is the index of the segment after this one, if there is one.
        """
        if not self.position.offset and not self._read_head(
            descriptor, reading, is_complete=is_complete
        ):
            return False
        before = self.position
        chunk = files.pread(descriptor, CHUNK_BYTES, before.offset)
        self._take(chunk, reading)
        if self.position != before:
            return True
        if not is_complete and not chunk[:FRAME_HEAD_BYTES].strip(b"\0"):
            return False  # Nothing is written here yet; megabytes of zeros need not be read.
        # No frame begins here that ends within a chunk.
        rest = files.pread(descriptor, files.size_bytes(descriptor) - before.offset, before.offset)
        self._take(rest, reading)
        if self.position == before and is_complete:
            self._pass_over_damage(rest, reading, after)
        return self.position != before

    def _read_head(self, descriptor: int, reading: "_Reading", *, is_complete: bool) -> bool:
        """Move behind a segment's head; return False while there is none."""
        data = files.pread(descriptor, segments.HEAD_BYTES, 0)
        if not is_complete and not data.strip(b"\0"):
            return False
        # The frames tell by checksums of their own, where the head is damaged, or where a crash of
        # the machine took it.
        told = segments.read_head(data)
        if told is not None:
            if told.version > segments.FORMAT_VERSION:
                raise LedgerError(
                    f"journal {self.place}: has format {told.version}, this cost meter knows"
                    f" {segments.FORMAT_VERSION}; upgrade vllm-cost-meter, nothing is lost until"
                    " then"
                )
            if self.position.segment == reading.first_segment:
                # Whoever has never read this journal begins with what is still there.
                self.position = replace(self.position, number=told.first_number - 1)
            self._note_gap(told.first_number, "a segment is missing, or ends too early", reading)
        self.position = replace(self.position, offset=segments.HEAD_BYTES)
        return True

    def _take(self, data: bytes, reading: "_Reading") -> None:
        """Take the frames at the beginning of `data` that come next, and move behind them."""
        begin = self.position
        number, end = begin.number, 0
        try:
            for found in scan(data):
                if found.number > number + 1:
                    break  # Some are missing: that is damage.
                if found.number == number + 1:
                    reading.records.append((found.number, self._record(found)))
                    reading.size_bytes += len(found.payload)
                    number = found.number
                end = found.end
        finally:
            self.position = Position(begin.segment, begin.offset + end, number)

    def _record(self, found: Frame) -> Record:
        try:
            return read_entry(found.payload)
        except ValueError as error:
            raise LedgerError(
                f"journal {self.place}: record {found.number} is whole and cannot be read: {error};"
                " a newer vllm-cost-meter wrote it: upgrade this one, nothing is lost until then"
            ) from error

    def _pass_over_damage(self, rest: bytes, reading: "_Reading", after: int | None) -> None:
        """Move to the next whole frame of the segment, and note the gap; stay without one.

        After a failed sync the next segment begins with what was in doubt. From there on it decides
        which frames are gone, and what this one has of them does not count.
        """
        begin = next_whole_frame(rest, 0, self.position.number)
        found = whole_frame(rest, begin) if begin is not None else None
        if begin is not None and found is not None and not self._is_again(found.number, after):
            self._note_gap(found.number, "frames are damaged", reading)
            self.position = replace(self.position, offset=self.position.offset + begin)

    def _is_again(self, number: int, after: int | None) -> bool:
        """Return whether the segment `after` begins before a frame with this number."""
        if after is None:
            return False
        descriptor = self._open(after)
        try:
            told = segments.read_head(files.pread(descriptor, segments.HEAD_BYTES, 0))
        finally:
            files.close(descriptor)
        return told is not None and told.first_number < number

    def _note_gap(self, number: int, reason: str, reading: "_Reading") -> None:
        """Note that the frames before a number are gone, unless they were read."""
        before = self.position.number
        if number > before + 1:
            reading.gaps.append(Gap(before, number - 1 - before, reason))
            self.position = replace(self.position, number=number - 1)


@dataclass(slots=True)
class _Reading:
    """What is being read."""

    records: list[tuple[int, Record]] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    size_bytes: int = 0
    # The segment with which the reading of a journal begins.
    first_segment: int | None = None

    def done(self, position: Position, *, is_all: bool) -> JournalPart:
        return JournalPart(tuple(self.records), tuple(self.gaps), position, is_all)
