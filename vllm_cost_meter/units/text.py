"""Text that came from outside: taken apart, and made safe to show on a terminal or in CSV.

Invariant: what `plain` returns has no control characters, so it cannot move a cursor or hide a
line; what `to_csv` returns holds no cell that a spreadsheet would run.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


def plain(text: str) -> str:
    """Return text with every non-printable character but spaces written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def rounded(value: object) -> str:
    """Return a figure for people: six digits, a dash for what is unknown; JSON has all digits."""
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def fields(text: str) -> list[str]:
    """Return what commas separate; a comma inside double quotes does not. Raises ValueError."""
    try:
        return [each.strip() for each in next(csv.reader([text], skipinitialspace=True), [])]
    except csv.Error:
        raise ValueError(f"expected words separated by commas, on one line, got {text!r}") from None


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a header. Text that a spreadsheet would run is made text."""
    if not rows:
        return ""
    names = [name for name in rows[0] if name != "parts"]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([_csv_cell(name) for name in names])
    for row in rows:
        writer.writerow([_csv_cell(row.get(name)) for name in names])
    return out.getvalue()


def _csv_cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = plain(value)
    # A cell that starts like a formula is run by spreadsheets (OWASP: CSV injection).
    if text.startswith(("=", "+", "-", "@")) and not _NUMBER.fullmatch(text):
        return f"'{text}"
    return text
