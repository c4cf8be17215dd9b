"""Rounding that keeps sums: half to even, and largest remainder for lines that must add up.

Lines that are rounded one by one may miss their total by some cents. The largest-remainder method
rounds the total, and rounds each line down. It then gives one missing unit each to the lines that
lost most. Among equals the first line gets it.

Invariant: the lines returned add up to the total. Each line is its amount rounded down or up, so no
line moves by a whole unit.
"""

from collections.abc import Sequence
from fractions import Fraction


def half_even(dividend: int, divisor: int) -> int:
    """Return dividend / divisor, rounded half to even as `round` does. The divisor is above 0."""
    quotient, remainder = divmod(dividend, divisor)
    if 2 * remainder > divisor or (2 * remainder == divisor and quotient % 2):
        quotient += 1
    return quotient


def largest_remainder(amounts: Sequence[Fraction], total: int | None = None) -> list[int]:
    """Return amounts in whole units that add up to `total`.

    Without `total` they add up to their sum, rounded half to even. Raises ValueError for a total
    that the amounts cannot reach by rounding each down or up.
    """
    total = round(sum(amounts, Fraction(0))) if total is None else total
    units = [amount.numerator // amount.denominator for amount in amounts]
    # Integers sort faster than fractions. With twice the bits of the largest denominator, two
    # different remainders stay different integers.
    bits = 2 * max((amount.denominator.bit_length() for amount in amounts), default=0)
    lost = [
        (amount.numerator % amount.denominator << bits) // amount.denominator for amount in amounts
    ]
    missing = total - sum(units)
    fractional = [i for i, remainder in enumerate(lost) if remainder]
    if not 0 <= missing <= len(fractional):
        raise ValueError(f"expected a total near the sum of the amounts, got {total}")
    # The sort is stable, so the order of the lines decides between equals.
    for i in sorted(fractional, key=lambda i: -lost[i])[:missing]:
        units[i] += 1
    return units


def rounded_known(amounts: Sequence[Fraction | None], total: int | None = None) -> list[int | None]:
    """Return the known amounts rounded by `largest_remainder`; an unknown amount stays None."""
    units = iter(largest_remainder([a for a in amounts if a is not None], total))
    return [None if amount is None else next(units) for amount in amounts]
