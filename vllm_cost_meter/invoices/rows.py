"""Rows of a bill file, from CSV or JSON, with checked cells.

The file comes from outside, so every cell is checked. The first wrong cell is refused in one line
with file, line and column. Nothing here knows which columns exist.

Invariant: an amount is an exact fraction, and RFC 3339 can write every instant.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from vllm_cost_meter.units.calendar import FIRST_HOUR, LAST_HOUR
from vllm_cost_meter.units.time import NS_PER_HOUR, unix_ns_of

FILE_BYTES_MAX = 64_000_000
NAME_CHARS_MAX = 500
USD_MAX = 1_000_000_000
_NUMBER = re.compile(r"[+-]?(\d{1,18}(\.\d{0,30})?|\.\d{1,30})([eE][+-]?\d{1,2})?\Z", re.ASCII)
_SHOWN_CHARS_MAX = 60


@dataclass(frozen=True, slots=True)
class FileRow:
    """One row: its cells by column, and its place as "file:line"."""

    where: str
    cells: Mapping[str, str]

    def wrong(self, column: str, expected: str, got: str) -> ValueError:
        """Return the error for a wrong cell: place, column, expected, got."""
        shown = got if len(got) <= _SHOWN_CHARS_MAX else f"{got[:_SHOWN_CHARS_MAX]}..."
        return ValueError(f"{self.where}: {column}: expected {expected}, got {shown!r}")

    def get(self, column: str) -> str:
        """Return a cell's text; empty if the row has no such cell."""
        return self.cells.get(column, "").strip()

    def name(self, column: str) -> str:
        """Return a cell that holds a name. Raises ValueError for an empty or unprintable one."""
        text = self.get(column)
        if not 1 <= len(text) <= NAME_CHARS_MAX or not text.isprintable():
            raise self.wrong(column, f"1 to {NAME_CHARS_MAX} printable characters", text)
        return text

    def number(self, column: str) -> Fraction:
        """Return a cell's number, exact and of either sign. Raises ValueError for other text."""
        text = self.get(column)
        if not _NUMBER.match(text):
            raise self.wrong(column, "a decimal number, such as 12.50", text)
        return Fraction(Decimal(text))

    def instant_ns(self, column: str, format: str | None = None, zone: tzinfo = UTC) -> int:
        """Return a cell's instant in ns since the epoch; `zone` counts if the cell names none.

        `format` is a `strptime` format; without it the cell is RFC 3339. Raises ValueError.
        """
        text = self.get(column)
        like = f"an instant like {format}" if format else "an RFC 3339 instant"
        try:
            instant = datetime.strptime(text, format) if format else datetime.fromisoformat(text)
            aware = instant if instant.tzinfo else instant.replace(tzinfo=zone)
            unix_ns = unix_ns_of(aware.isoformat())
        except (ValueError, OverflowError):
            raise self.wrong(column, like, text) from None
        if not FIRST_HOUR * NS_PER_HOUR <= unix_ns < LAST_HOUR * NS_PER_HOUR:
            raise self.wrong(column, like, text)
        return unix_ns


def read_text(path: Path) -> str:
    """Return a file's text. Raises ValueError if it is missing, too large or not UTF-8."""
    try:
        size = path.stat().st_size
        if size > FILE_BYTES_MAX:
            raise ValueError(
                f"{path}: expected at most {FILE_BYTES_MAX:,} bytes, got {size:,}: import the file"
                " in parts"
            )
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got {error.reason}") from None


def csv_rows(
    path: Path, text: str, needed: tuple[str, ...], delimiter: str = ","
) -> Iterator[FileRow]:
    """Yield the rows of a CSV file. Raises ValueError unless its header has each needed column."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        first = FileRow(f"{path}:1", {})
        for column in needed:
            if (times := header.count(column)) != 1:
                raise first.wrong("header", f"one column {column!r}", f"{times} of it")
        for cells in reader:
            if not cells:
                continue
            row = FileRow(f"{path}:{reader.line_num}", dict(zip(header, cells, strict=False)))
            if len(cells) != len(header):
                raise row.wrong("row", f"{len(header)} cells", f"{len(cells)}")
            yield row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: expected CSV, got {error}") from None


def json_rows(path: Path, text: str) -> Iterator[FileRow]:
    """Yield the objects in a JSON list as rows; `where` has their number, from 0.

    Raises ValueError for any other JSON.
    """
    try:
        # Decimals keep an amount as it is written; a float would round it.
        found = json.loads(text, parse_float=Decimal, parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a JSON list of objects, got {type(found).__name__}")
    for number, one in enumerate(found):
        where = f"{path}[{number}]"
        if not isinstance(one, dict):
            raise ValueError(f"{where}: expected an object, got {type(one).__name__}")
        yield FileRow(where, {name: _cell(value) for name, value in one.items()})


def _cell(value: Any) -> str:
    return "" if value is None else str(value)
