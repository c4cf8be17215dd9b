"""Read SQLite's write-ahead log, and find the frames in it that are damaged.

A log is a header of 32 bytes and frames of 24 bytes and a page each. A frame belongs to the log if
it has the log's two salts. Its checksum goes on from the one stored in the frame before, so each
frame can be verified by itself as long as the checksum before it can be read. SQLite stops at the
first frame that is wrong and takes the rest for uncommitted, without a word. Here the rest counts.

The log's file may be opened: SQLite's locks are not on it (sqlite.org/fileformat2.html, section 4).

Invariant: no frame after the last commit is used, and none that its checksum contradicts.
"""

import struct
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

HEADER_BYTES = 32
FRAME_BYTES = 24
_MAGIC = {0x377F0682: "<", 0x377F0683: ">"}
_VERSION = 3_007_000
_LOOKS = 5
PAGE_SIZES = frozenset(1 << n for n in range(9, 17))

_Sums = tuple[int, int]


@dataclass(frozen=True, slots=True)
class WalFrames:
    """What a log holds: where in it the newest good copy of each page is, and what is damaged.

    `ignored` is the number of committed frames that SQLite leaves out: the damaged ones and all
    good ones behind the first of them, which is at `first_damaged`.
    """

    page_size: int = 0
    pages: dict[int, int] = field(default_factory=dict)
    damaged: int = 0
    ignored: int = 0
    page_count: int = 0
    first_damaged: int | None = None


@dataclass(slots=True)
class _Frame:
    at: int
    page: int
    size_after: int
    salts: bytes
    stored: _Sums
    # The checksum as it follows from the frame before; None behind a header that cannot be read.
    computed: _Sums | None
    is_whole: bool
    # SQLite refuses it, though only its own checksum is damaged.
    is_refused: bool = False


def read_wal(file: Path, page_size: int) -> WalFrames:
    """Read the log beside a ledger, or return an empty one if there is none.

    `page_size` is the ledger's, which counts where the log's header is damaged.
    """
    try:
        with file.open("rb") as wal:
            return _read(wal, page_size)
    except FileNotFoundError:
        return WalFrames(page_size)


def lasting_damage(file: Path, page_size: int) -> WalFrames:
    """Read a log that a server may be writing to, until what is damaged there is seen to stay.

    A log that is written to while it is read looks damaged, each time elsewhere.
    """
    before = None
    for _ in range(_LOOKS):
        header = header_of(file)
        frames = read_wal(file, page_size)
        place = (header, frames.first_damaged)
        if not frames.ignored or place == before:
            return frames
        before = place
    return replace(frames, damaged=0, ignored=0, first_damaged=None)


def header_of(file: Path) -> bytes:
    """Return the header of a log, empty if there is none: it changes when the log starts anew."""
    try:
        with file.open("rb") as wal:
            return wal.read(HEADER_BYTES)
    except FileNotFoundError:
        return b""


def _read(wal: BinaryIO, page_size: int) -> WalFrames:
    header = wal.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return WalFrames(page_size)
    magic, version, size, _, *rest = struct.unpack(">8I", header)
    order = _MAGIC.get(magic, "<")
    stored = (rest[2], rest[3])
    is_good = (
        magic in _MAGIC
        and version == _VERSION
        and size in PAGE_SIZES
        and _checksum(header[:24], (0, 0), order) == stored
    )
    page_size = size if is_good else page_size
    frames: list[_Frame] = []
    salts_in = Counter[bytes]()
    while (frame := _next(wal, page_size, order, frames, stored if is_good else None)) is not None:
        frames.append(frame)
        salts_in[frame.salts] += 1
    if not frames:
        return WalFrames(page_size)
    salts = header[16:24] if is_good else salts_in.most_common(1)[0][0]
    return _judged(frames, salts, page_size, is_good)


def _next(
    wal: BinaryIO, page_size: int, order: str, frames: list[_Frame], first: _Sums | None
) -> _Frame | None:
    """Read the next frame and verify it; None at the end."""
    head, data = wal.read(FRAME_BYTES), wal.read(page_size)
    if len(data) < page_size:
        return None
    page, size_after = struct.unpack(">2I", head[:8])
    stored: _Sums = struct.unpack(">2I", head[16:])
    before = frames[-1] if frames else None
    at = (before.at + page_size if before else HEADER_BYTES) + FRAME_BYTES
    computed = None
    for start in (before.stored, before.computed) if before else (first,):
        if start is None:
            continue
        sums = _checksum(data, _checksum(head[:8], start, order), order)
        if sums == stored:
            if before is not None and start == before.computed:
                before.is_refused = not before.is_whole
                before.is_whole = True
            return _Frame(at, page, size_after, head[8:16], stored, sums, True)
        computed = sums if computed is None else computed
    return _Frame(at, page, size_after, head[8:16], stored, computed, False)


def _judged(frames: list[_Frame], salts: bytes, page_size: int, header_is_good: bool) -> WalFrames:
    """Return the newest good copy of each page up to the last commit."""
    good = []
    for at, frame in enumerate(frames):
        # Nothing verifies the first frame behind a header that is lost: its salts must do.
        is_unverifiable = frames[at - 1].salts != salts if at else not header_is_good
        is_ours = frame.salts == salts and frame.page > 0
        good.append(is_ours and (frame.is_whole or is_unverifiable))
    # Frames of an older log lie behind ours; they do not count, nor does what was not committed.
    last = max((at for at, frame in enumerate(frames) if good[at] and frame.size_after), default=-1)
    if last < 0:
        return WalFrames(page_size)
    bad = [at for at in range(last + 1) if not good[at] or frames[at].is_refused]
    first_bad = bad[0] if bad else last + 1
    return WalFrames(
        page_size,
        {frames[at].page: frames[at].at for at in range(last + 1) if good[at]},
        len(bad),
        last + 1 - (first_bad if header_is_good else 0),
        frames[last].size_after,
        frames[first_bad].at if bad else None,
    )


def _checksum(data: bytes, before: _Sums, order: str) -> _Sums:
    """Return the checksum of a log, which goes on from the one before."""
    first, second = before
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for at in range(0, len(words), 2):
        first = (first + words[at] + second) & 0xFFFFFFFF
        second = (second + words[at + 1] + first) & 0xFFFFFFFF
    return first, second
