"""Amounts that add up after rounding: largest remainder.

Rounded one by one, the lines of a statement add up to some cents more or less than its total. Here
the total is rounded, each line rounded down, and what is missing goes, a unit each, to the lines
that lost most; of equal ones to the first. Core: standard library only.

Invariant: what is returned adds up to the total, and each line is its amount rounded down or up, so
none moves by a unit or more.
"""

from collections.abc import Sequence
from fractions import Fraction


def half_even(dividend: int, divisor: int) -> int:
    """Return a quotient rounded half to even, as `round` does a fraction; the divisor is > 0."""
    quotient, remainder = divmod(dividend, divisor)
    if 2 * remainder > divisor or (2 * remainder == divisor and quotient % 2):
        quotient += 1
    return quotient


def largest_remainder(amounts: Sequence[Fraction], total: int | None = None) -> list[int]:
    """Return amounts in whole units that add up to `total`, else to their sum, half to even.

    Raises ValueError for a total that no rounding down and up of the amounts adds up to.
    """
    total = round(sum(amounts, Fraction(0))) if total is None else total
    units = [amount.numerator // amount.denominator for amount in amounts]
    # Remainders as integers, which sort fast. Two different fractions are so far apart that at
    # twice the bits of their denominators they are different integers too.
    bits = 2 * max((amount.denominator.bit_length() for amount in amounts), default=0)
    lost = [
        (amount.numerator % amount.denominator << bits) // amount.denominator for amount in amounts
    ]
    missing = total - sum(units)
    fractional = [i for i, remainder in enumerate(lost) if remainder]
    if not 0 <= missing <= len(fractional):
        raise ValueError(f"expected a total near the sum of the amounts, got {total}")
    # Stable: the order of the lines decides between equals.
    for i in sorted(fractional, key=lambda i: -lost[i])[:missing]:
        units[i] += 1
    return units


def rounded_known(amounts: Sequence[Fraction | None], total: int | None = None) -> list[int | None]:
    """Round together those amounts that are known; unknown stays None."""
    units = iter(largest_remainder([a for a in amounts if a is not None], total))
    return [None if amount is None else next(units) for amount in amounts]
