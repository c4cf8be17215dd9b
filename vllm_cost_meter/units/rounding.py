"""Rounding that keeps sums: half to even, and largest remainder for lines that must add up.

Lines that are rounded one by one may miss their total by some cents. The largest-remainder method
rounds the total, and rounds each line down. It then gives one missing unit each to the lines that
lost most. Among equals the first line gets it.

Invariant: the lines returned add up to the total. Each line is its amount rounded down or up, so no
line moves by a whole unit.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from math import ceil, floor


def half_even(dividend: int, divisor: int) -> int:
    """Return dividend / divisor, rounded half to even as `round` does. The divisor is above 0."""
    quotient, remainder = divmod(dividend, divisor)
    if 2 * remainder > divisor or (2 * remainder == divisor and quotient % 2):
        quotient += 1
    return quotient


def exact_sum(amounts: Iterable[Fraction]) -> Fraction:
    """Return the sum."""
    return sum_of_products((1, amount) for amount in amounts)


def sum_of_products(pairs: Iterable[tuple[int, Fraction]], divisor: int = 1) -> Fraction:
    """Return the sum of all products of an integer with a fraction, over a divisor.

    Products of one denominator are added as integers: most lines share a few, and a fraction is
    reduced at each step.
    """
    numerators: dict[int, int] = {}
    for factor, amount in pairs:
        under = amount.denominator
        numerators[under] = numerators.get(under, 0) + factor * amount.numerator
    parts = [Fraction(over, under * divisor) for under, over in numerators.items()]
    return parts[0] if len(parts) == 1 else sum(parts, Fraction(0))


def largest_remainder(
    amounts: Sequence[Fraction], total: int | None = None, unit: int = 1
) -> list[int]:
    """Return amounts in whole units of `unit` that add up to `total` units.

    Without `total` they add up to their sum, rounded half to even. Raises ValueError for a total
    that the amounts cannot reach by rounding each down or up.
    """
    if total is None:
        total = round(exact_sum(amounts) / unit)
    # As integers: fractions would be reduced at each step.
    divisors = [amount.denominator * unit for amount in amounts]
    units, lost = [], []
    for amount, divisor in zip(amounts, divisors, strict=True):
        quotient, remainder = divmod(amount.numerator, divisor)
        units.append(quotient)
        lost.append(remainder)
    missing = total - sum(units)
    fractional = [i for i, remainder in enumerate(lost) if remainder]
    if not 0 <= missing <= len(fractional):
        raise ValueError(f"expected a total near the sum of the amounts, got {total}")
    if missing == len(fractional):
        most = fractional
    elif missing:
        # Integers sort faster than fractions. With twice the bits of the largest divisor, two
        # different remainders stay different integers.
        bits = 2 * max(divisors).bit_length()
        # The sort is stable, so the order of the lines decides between equals.
        most = sorted(fractional, key=lambda i: -((lost[i] << bits) // divisors[i]))[:missing]
    else:
        most = []
    for i in most:
        units[i] += 1
    return units


def rounded_pair(whole: Fraction | None, part: Fraction | None) -> tuple[int | None, int | None]:
    """Return a whole and a part of it, each rounded half to even; unknown amounts stay None.

    Where they differ by whole units, both halves go the way of the whole's: otherwise a whole and a
    part that differ by 1 could be shown to differ by 2.
    """
    shown = None if whole is None else round(whole)
    if whole is not None and part is not None and (whole - part).denominator == 1:
        return shown, round(whole) - int(whole - part)
    return shown, None if part is None else round(part)


def rounded_alike(
    wholes: Sequence[Fraction | None],
    parts: Sequence[Fraction | None],
    *,
    is_whole_known: bool = True,
) -> tuple[list[int | None], list[int | None]]:
    """Return wholes and a part of each, rounded so that both columns add up to their rounded sums.

    Where a part is its whole, both are rounded to the same. Unknown amounts stay None. The sums are
    rounded as `rounded_pair` does; if nobody is shown that of the wholes, that of the parts leads.
    """
    alike = [whole if whole == part else None for whole, part in zip(wholes, parts, strict=True)]
    if is_whole_known:
        whole_sum, part_sum = rounded_pair(_sum(wholes), _sum(parts))
    else:
        part_sum, whole_sum = rounded_pair(_sum(parts), _sum(wholes))
    rests = [
        [None if same is not None else amount for amount, same in zip(column, alike, strict=True)]
        for column in (wholes, parts)
    ]
    totals = [total or 0 for total in (whole_sum, part_sum)]
    # What is alike must leave to the rest of each column what that can reach, up or down.
    least, most = _reach(alike)
    for rest, total in zip(rests, totals, strict=True):
        lowest, highest = _reach(rest)
        least, most = max(least, total - highest), min(most, total - lowest)
    units = min(max(round(_sum(alike)), least), most)
    shared = rounded_known(alike, units)
    columns = [
        [own if same is None else same for own, same in zip(column, shared, strict=True)]
        for column in (
            rounded_known(rest, total - units) for rest, total in zip(rests, totals, strict=True)
        )
    ]
    return columns[0], columns[1]


def _sum(amounts: Sequence[Fraction | None]) -> Fraction:
    return exact_sum(amount for amount in amounts if amount is not None)


def _reach(amounts: Sequence[Fraction | None]) -> tuple[int, int]:
    """Return the least and the greatest sum of amounts that are rounded down or up."""
    known = [amount for amount in amounts if amount is not None]
    return sum(map(floor, known)), sum(map(ceil, known))


def rounded_known(
    amounts: Sequence[Fraction | None], total: int | None = None, unit: int = 1
) -> list[int | None]:
    """Return the known amounts rounded by `largest_remainder`; an unknown amount stays None."""
    units = iter(largest_remainder([a for a in amounts if a is not None], total, unit))
    return [None if amount is None else next(units) for amount in amounts]
