"""Frames of a journal: a payload with its length, its number and a checksum.

A frame's number is one more than that of the frame before it, so whoever finds a whole frame behind
a torn one knows how many are gone between them. Space that was set aside but not written is zero,
and no frame begins with zeros, because numbers begin at 1.

Invariant: `scan` returns a frame's payload byte for byte as `frame` got it, or it returns no frame.
"""

import zlib
from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

# Little-endian: number, length of the payload, checksum of these two and the payload.
_HEAD = Struct("<QII")
_CHECKED = Struct("<QI")
HEAD_BYTES = _HEAD.size
# No record is larger: clients' texts are bounded, and a snapshot of 100,000 requests has 20 MB.
PAYLOAD_BYTES_MAX = 1 << 28
# No journal comes so far: a million records a second for eight years.
_NUMBER_END = 1 << 48


class Frame(NamedTuple):
    """A whole frame: its number, its payload, and the offset behind it in what was scanned."""

    number: int
    payload: bytes
    end: int


def frame(number: int, payload: bytes) -> bytes:
    """Return a payload's frame. Raises ValueError for one that is too long."""
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise ValueError(f"a record of {len(payload)} bytes, at most {PAYLOAD_BYTES_MAX} fit")
    checked = _CHECKED.pack(number, len(payload))
    checksum = zlib.crc32(payload, zlib.crc32(checked))
    return _HEAD.pack(number, len(payload), checksum) + payload


def whole_frame(data: bytes, at: int) -> Frame | None:
    """Return the frame that begins at an offset, None if no whole one does."""
    begin = at + HEAD_BYTES
    if begin > len(data):
        return None
    number, length, checksum = _HEAD.unpack_from(data, at)
    if not number or begin + length > len(data):
        return None
    payload = data[begin : begin + length]
    if zlib.crc32(payload, zlib.crc32(_CHECKED.pack(number, length))) != checksum:
        return None
    return Frame(number, payload, begin + length)


def scan(data: bytes, at: int = 0) -> Iterator[Frame]:
    """Return the whole frames from an offset up to the first that is not whole."""
    while (found := whole_frame(data, at)) is not None:
        yield found
        at = found.end


def next_whole_frame(data: bytes, at: int, after: int) -> int | None:
    """Return the offset of the first whole frame with a number above `after`; None without one.

    `at` is where a frame should have begun.
    """
    # A frame does not begin with zeros, and megabytes of them are behind the last one.
    used = len(data.rstrip(b"\0"))
    for begin in range(at, min(used, len(data) - HEAD_BYTES + 1)):
        # Most offsets are told apart by the number alone, without a checksum over megabytes.
        if not after < int.from_bytes(data[begin : begin + 8], "little") < _NUMBER_END:
            continue
        if whole_frame(data, begin) is not None:
            return begin
    return None
