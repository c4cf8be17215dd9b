"""Segments of a journal: files of bounded size that frames are appended to.

A segment's space is set aside before it is used, so a full disk is met between two segments and not
in the middle of one. A write that failed or was short is made again at the same place with the same
bytes, so what a reader saw of it stays true.

Invariant: every byte before `end` is a whole frame that was written, and is never written again.
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from struct import Struct
from typing import NamedTuple, Self

from vllm_cost_meter.journal import files

SEGMENT_BYTES = 8 << 20
SUFFIX = ".segment"
RESERVE_NAME = "reserve"
MAGIC = b"vcmjrnl"
# A reader refuses a higher one.
FORMAT_VERSION = 1
# Magic text, format version, the number of the segment's first frame, and their checksum.
_HEAD = Struct("<7sBQI")
HEAD_BYTES = _HEAD.size


class SegmentHead(NamedTuple):
    """What a segment says of itself."""

    version: int
    first_number: int


def head(first_number: int) -> bytes:
    """Return the beginning of a segment whose first frame has this number."""
    checked = _HEAD.pack(MAGIC, FORMAT_VERSION, first_number, 0)[:-4]
    return checked + zlib.crc32(checked).to_bytes(4, "little")


def read_head(data: bytes) -> SegmentHead | None:
    """Return what a segment's first bytes say, None if they are not whole yet."""
    if len(data) < HEAD_BYTES:
        return None
    magic, version, first_number, checksum = _HEAD.unpack_from(data)
    if magic != MAGIC or checksum != zlib.crc32(data[: HEAD_BYTES - 4]):
        return None
    return SegmentHead(version, first_number)


def segment_name(index: int) -> str:
    """Return the file name of a journal's segment; indexes begin at 1."""
    return f"{index:010}{SUFFIX}"


def segment_indexes(journal: Path) -> list[int]:
    """Return the indexes of a journal's segments, ascending."""
    stems = (name.removesuffix(SUFFIX) for name in files.names(journal) if name.endswith(SUFFIX))
    return sorted(int(stem) for stem in stems if stem.isdigit())


def set_aside(path: Path, size_bytes: int) -> int:
    """Make a file of this size, all zeros, and return its descriptor. Raises OSError."""
    descriptor = files.open_file(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC)
    try:
        files.allocate(descriptor, 0, size_bytes)
    except BaseException:
        files.close(descriptor)
        files.remove_file(path)
        raise
    return descriptor


class Segment:
    """The segment that a journal appends to."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self._descriptor = descriptor
        self._size_bytes = size_bytes
        self.end = 0

    @classmethod
    def begin(cls, descriptor: int, size_bytes: int, first_number: int) -> Self:
        """Begin a segment in a file that was set aside. Raises OSError; then it may be repeated."""
        segment = cls(descriptor, size_bytes)
        segment.append(head(first_number))
        return segment

    def fitting(self, frames: Sequence[bytes]) -> int:
        """Return how many of these frames fit, from the first on.

        An empty segment takes at least one: a frame larger than a segment has one of its own.
        """
        room = self._size_bytes - self.end
        for count, each in enumerate(frames):
            room -= len(each)
            if room < 0:
                return max(count, 1) if self.end <= HEAD_BYTES else count
        return len(frames)

    def append(self, data: bytes) -> None:
        """Write at the end. Raises OSError if not all could be written; then nothing counts."""
        written, view = 0, memoryview(data)
        while written < len(data):
            written += files.pwrite(self._descriptor, view[written:], self.end + written)
        self.end += len(data)

    def sync(self) -> None:
        """Have the disk keep what was written. Raises OSError."""
        files.sync_data(self._descriptor)

    def close(self) -> None:
        """Close the file. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            files.close(descriptor)
