"""Decode the pages of a SQLite file: cells, their overflow chains, and the records in them.

Nothing is believed. Every offset and length is checked against the page, every record against its
own length; a cell that does not fit raises `NotACell`. (sqlite.org/fileformat2.html, sections 1.6
and 2.1.)

Invariant: whatever bytes a page has, decoding it ends, and gives values or `NotACell`.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from vllm_cost_meter.ledger.upkeep.wal import PAGE_SIZES, WalFrames

Value = int | float | str | bytes | None

INTERIOR_INDEX, INTERIOR_TABLE, LEAF_INDEX, LEAF_TABLE = 2, 5, 10, 13
INTERIORS = frozenset({INTERIOR_INDEX, INTERIOR_TABLE})
KINDS = INTERIORS | {LEAF_INDEX, LEAF_TABLE}
FILE_HEADER_BYTES = 100
DEFAULT_PAGE_SIZE = 4096
_MAGIC = b"SQLite format 3\0"
# SQLite tidies a page up before it has more bytes in pieces that are too small for a cell.
_FRAGMENTS_MAX = 60
_INT_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}


class NotACell(ValueError):  # noqa: N818 - it says what was expected and not found
    """The bytes of a page are not the cell that was expected there."""


@dataclass(frozen=True, slots=True)
class PageRow:
    """A decoded record: its rowid (None in an index or a table without rowids) and its values."""

    rowid: int | None
    values: list[Value]


class PageFile:
    """The pages of a file as its log leaves them. Page numbers begin with 1."""

    def __init__(self, db: BinaryIO, size: int, page_size: int) -> None:
        self._db = db
        self._size = size
        self._wal: BinaryIO | None = None
        self._in_wal: dict[int, int] = {}
        self.page_size = page_size
        self.count = size // page_size

    def overlay(self, wal: BinaryIO, frames: WalFrames) -> None:
        """Let the good frames of a log count instead of the file's own pages."""
        self._wal, self._in_wal = wal, frames.pages
        self.count = max(self.count, frames.page_count)

    def read(self, page: int) -> bytes:
        """Return the bytes of a page. Raises NotACell outside of the file."""
        if not 1 <= page <= self.count:
            raise NotACell(f"page {page}")
        if self._wal is not None and page in self._in_wal:
            self._wal.seek(self._in_wal[page])
            data = self._wal.read(self.page_size)
        else:
            self._db.seek((page - 1) * self.page_size)
            data = self._db.read(self.page_size)
        if len(data) < self.page_size:
            raise NotACell(f"page {page}")
        return data


def page_size_of(header: bytes) -> int | None:
    """Return the page size that a file's first bytes give; None if they are damaged."""
    if len(header) < FILE_HEADER_BYTES or not header.startswith(_MAGIC):
        return None
    (size,) = struct.unpack(">H", header[16:18])
    size = 1 << 16 if size == 1 else size
    return size if size in PAGE_SIZES and header[21:24] == bytes((64, 32, 32)) else None


def start_of(page: int) -> int:
    """Return where the b-tree begins in a page: behind the file's header in the first one."""
    return FILE_HEADER_BYTES if page == 1 else 0


def kind_of(data: bytes, page: int) -> int | None:
    """Return the kind of b-tree page that this is; None if it is none."""
    kind = data[start_of(page)]
    return kind if kind in KINDS else None


def cell_offsets(data: bytes, page: int) -> list[int]:
    """Return where the cells of a b-tree page begin; those outside of the page are left out."""
    at = start_of(page)
    head = 12 if data[at] in INTERIORS else 8
    (count,) = struct.unpack(">H", data[at + 3 : at + 5])
    begin, end = at + head, at + head + 2 * count
    if end > len(data):
        return []
    offsets = struct.unpack(f">{count}H", data[begin:end])
    return [offset for offset in offsets if end <= offset < len(data) - 1]


def is_sound(data: bytes, page: int) -> bool:
    """Return whether a b-tree page's header and its list of cells fit together."""
    at = start_of(page)
    _, count, start, fragments = struct.unpack(">HHHB", data[at + 1 : at + 8])
    end = at + (12 if data[at] in INTERIORS else 8) + 2 * count
    start = start or 1 << 16
    if not end <= start <= len(data) or fragments > _FRAGMENTS_MAX:
        return False
    offsets = cell_offsets(data, page)
    return len(offsets) == count and all(offset >= start for offset in offsets)


def children(data: bytes, page: int) -> Iterator[int]:
    """Yield the pages below an interior page."""
    at = start_of(page)
    for offset in cell_offsets(data, page):
        if offset + 4 <= len(data):
            yield int.from_bytes(data[offset : offset + 4], "big")
    yield int.from_bytes(data[at + 8 : at + 12], "big")


def rows_of(pages: PageFile, page: int, data: bytes) -> Iterator[PageRow | None]:
    """Yield the rows in a page, and None for each cell that cannot be read."""
    kind = data[start_of(page)]
    if kind == INTERIOR_TABLE:
        return
    for offset in cell_offsets(data, page):
        try:
            yield _row(pages, data, offset, kind)
        except (NotACell, IndexError, struct.error, UnicodeDecodeError):
            yield None


def _row(pages: PageFile, data: bytes, at: int, kind: int) -> PageRow:
    if kind == INTERIOR_INDEX:
        at += 4
    length, at = _varint(data, at)
    rowid = None
    if kind == LEAF_TABLE:
        rowid, at = _varint(data, at)
        rowid = rowid - (1 << 64) if rowid >= 1 << 63 else rowid
    payload = _payload(pages, data, at, length, kind)
    return PageRow(rowid, _record(payload))


def _payload(pages: PageFile, data: bytes, at: int, length: int, kind: int) -> bytes:
    """Return a cell's payload, the part on overflow pages included."""
    usable = len(data)
    most = usable - 35 if kind == LEAF_TABLE else (usable - 12) * 64 // 255 - 23
    if length > pages.count * usable:
        raise NotACell("longer than the file")
    if length <= most:
        if at + length > usable:
            raise NotACell("outside of its page")
        return data[at : at + length]
    least = (usable - 12) * 32 // 255 - 23
    local = least + (length - least) % (usable - 4)
    local = local if local <= most else least
    if at + local + 4 > usable:
        raise NotACell("outside of its page")
    parts, left = [data[at : at + local]], length - local
    following = int.from_bytes(data[at + local : at + local + 4], "big")
    while left > 0:
        # `left` falls with each page, so a chain in a circle ends too.
        overflow = pages.read(following)
        following = int.from_bytes(overflow[:4], "big")
        parts.append(overflow[4 : 4 + left])
        left -= usable - 4
    if following:
        raise NotACell("its chain goes on")
    return b"".join(parts)


def _record(payload: bytes) -> list[Value]:
    """Return the values of a record, which must take the payload to its last byte."""
    head_end, at = _varint(payload, 0)
    if not at <= head_end <= len(payload):
        raise NotACell("its header is longer than it is")
    kinds = []
    while at < head_end:
        kind, at = _varint(payload, at)
        kinds.append(kind)
    if at != head_end:
        raise NotACell("its header ends within a number")
    values: list[Value] = []
    for kind in kinds:
        value, at = _value(payload, at, kind)
        values.append(value)
    if at != len(payload):
        raise NotACell("its values end elsewhere")
    return values


def _value(payload: bytes, at: int, kind: int) -> tuple[Value, int]:
    if kind == 0:
        return None, at
    if kind in (8, 9):
        return kind - 8, at
    if kind in (10, 11):
        raise NotACell("a kind of value that no file has")
    size = _INT_BYTES.get(kind, 8) if kind < 12 else (kind - 12) // 2
    end = at + size
    if end > len(payload):
        raise NotACell("a value is longer than the record")
    part = payload[at:end]
    if kind == 7:
        return float(struct.unpack(">d", part)[0]), end
    if kind < 7:
        return int.from_bytes(part, "big", signed=True), end
    return (part.decode() if kind % 2 else part), end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index in range(8):
        byte = data[at + index]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + index + 1
    return value << 8 | data[at + 8], at + 9
