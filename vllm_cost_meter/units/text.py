"""Make text safe for terminals and CSV, round figures for people, and split words at commas.

Invariant: text from `plain` has no control characters, so it cannot move a cursor or hide a line.
No figure uses scientific notation. CSV from `to_csv` has no cell that a spreadsheet would run.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
# An error repeats no more than this of what it was given.
ECHOED_CHARS_MAX = 200


def quoted(value: object) -> str:
    """Return a value for an error message as Python writes it, cut after ECHOED_CHARS_MAX."""
    # Most of a long text is not even escaped.
    shown = repr(value[: ECHOED_CHARS_MAX + 1] if isinstance(value, str) else value)
    return shown if len(shown) <= ECHOED_CHARS_MAX else f"{shown[: ECHOED_CHARS_MAX - 3]}..."


def plain(text: str) -> str:
    """Return the text with every non-printable character written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def rounded(value: object) -> str:
    """Return a figure for people: six digits, or a dash if unknown. JSON has all digits."""
    if value is None:
        return "-"
    return significant(value) if isinstance(value, float) else str(value)


def significant(value: float | Decimal, digits: int = 6) -> str:
    """Return a number as a plain decimal with `digits` significant digits and no trailing zeros.

    Whole numbers keep all digits before the point: 1234567.8 is "1234568".
    """
    exact = Decimal(value)
    if not exact.is_finite():
        return str(value)
    places = max(0, digits - 1 - exact.adjusted()) if exact else 0
    text = f"{abs(exact):.{places}f}"
    sign = "-" if exact < 0 else ""
    return sign + (text.rstrip("0").rstrip(".") if places else text)


def fields(text: str) -> list[str]:
    """Return the words between commas. A comma inside double quotes does not separate.

    Raises ValueError for a text with broken quotes or several lines.
    """
    try:
        return [each.strip() for each in next(csv.reader([text], skipinitialspace=True), [])]
    except csv.Error:
        raise ValueError(
            f"expected words separated by commas, on one line, got {quoted(text)}"
        ) from None


def as_field(word: str) -> str:
    """Return a word as `fields` reads it: in double quotes where it is not a plain one."""
    return word if re.fullmatch(r"[\w.-]+", word) else '"{}"'.format(word.replace('"', '""'))


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a header; empty without rows. The column `parts` is left out.

    A cell that a spreadsheet would run gets an apostrophe in front.
    """
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
    # Spreadsheets run a cell that starts like a formula (OWASP: CSV injection).
    if text.startswith(("=", "+", "-", "@")) and not _NUMBER.fullmatch(text):
        return f"'{text}"
    return text
