"""Format money as text: nano-USD are integers in the code and plain decimals on the screen.

Invariant: no amount is written in scientific notation, and an unknown amount stays None.
"""

from decimal import Decimal
from fractions import Fraction

from vllm_cost_meter.units.text import rounded, significant


def format_nano(amount: int) -> str:
    """Return a count of billionths as a plain decimal with nine places, e.g. "0.000012345"."""
    sign = "-" if amount < 0 else ""
    whole, fraction = divmod(abs(amount), 1_000_000_000)
    return f"{sign}{whole}.{fraction:09d}"


NANOUSD_PER_USD = 1_000_000_000
# A price without a finite decimal is rounded to this many places. Over thirty years of GPU time
# the error stays below one nano-USD.
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


def format_amount(usd: float | str | Decimal | None) -> str:
    """Return an amount for people: cents from one USD on, below that up to nine places.

    For example 12.3456 becomes "12.35", and 0.0000123 keeps its digits. None becomes "-". JSON
    shows all digits.
    """
    if usd is None:
        return "-"
    exact = Decimal(usd)
    if not exact.is_finite():
        return str(usd)
    text = f"{abs(exact):.{2 if abs(exact) >= 1 else 9}f}"
    whole, _, places = text.partition(".")
    text = f"{whole}.{places.rstrip('0'):0<2}"
    return f"-{text}" if exact < 0 and text != "0.00" else text


def format_rate(usd: float | str | Decimal | None) -> str:
    """Return a rate (e.g. USD per million tokens) with six digits; "-" for None."""
    return "-" if usd is None else significant(Decimal(usd))


def figure_text(name: str, value: object) -> str:
    """Format a table figure for people; the figure's name shows whether it is money."""
    is_amount = name == "usd" or name.endswith(("_usd", "usd_per_month"))
    if is_amount and isinstance(value, float | Decimal):
        return format_amount(value)
    return rounded(value)
