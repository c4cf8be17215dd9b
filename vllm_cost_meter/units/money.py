"""Money as text: nano-USD are integers, and people see plain decimals.

Invariant: no amount is written in scientific notation, and an unknown amount stays None.
"""

from fractions import Fraction


def format_nano(amount: int) -> str:
    """Return a count of billionths as a plain decimal with nine places, e.g. "0.000012345"."""
    sign = "-" if amount < 0 else ""
    whole, fraction = divmod(abs(amount), 1_000_000_000)
    return f"{sign}{whole}.{fraction:09d}"


NANOUSD_PER_USD = 1_000_000_000
# A price that has no finite decimal is written with so many places. The error over thirty years'
# GPU time is less than a nano-USD.
PLACES_MAX = 18


def decimal_text(value: Fraction) -> str:
    """Return a fraction as a plain decimal, rounded half to even to at most 18 places."""
    units = round(value * 10**PLACES_MAX)
    sign, digits = "-" if units < 0 else "", str(abs(units)).zfill(PLACES_MAX + 1)
    text = f"{sign}{digits[:-PLACES_MAX]}.{digits[-PLACES_MAX:]}"
    return text.rstrip("0").rstrip(".")


def format_usd(nanousd: int | None) -> str | None:
    """Return nano-USD as a plain decimal string with nine places, e.g. "0.000012345"."""
    return None if nanousd is None else format_nano(nanousd)
