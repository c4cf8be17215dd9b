"""Declared overheads: money paid besides the GPUs (engineering, rent), in lines of their own.

A line is a percentage of the GPUs' cost while it holds, or USD per month. A window has its share of
each month's hours, by the UTC calendar. A line is never part of a cost, so nobody has to ask which
of two figures includes the rent.

Invariant: before rounding, the lines of a window's parts add up exactly to the window's.
"""

import calendar
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

from vllm_cost_meter.units.calendar import HOURS_PER_DAY
from vllm_cost_meter.units.money import NANOUSD_PER_USD, format_usd
from vllm_cost_meter.units.time import instant_of

SECONDS_PER_HOUR = 3_600
# Why an overhead that is a percentage has no cost.
WHY_UNKNOWN = "the cost it is a part of is null"


@dataclass(frozen=True, slots=True)
class Overhead:
    """One declared overhead: `percent` of the cost, or `usd_per_month`; the other is None.

    It holds in the hours since the epoch [effective_from_hour, effective_until_hour). None means no
    bound. `key` names it in messages.
    """

    key: str
    name: str
    source: str
    percent: Decimal | None = None
    usd_per_month: Decimal | None = None
    effective_from_hour: int | None = None
    effective_until_hour: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the overhead as the command line lists it."""
        return {
            "key": self.key,
            **self.terms(),
            "effective_from": instant_of(self.effective_from_hour),
            "effective_until": instant_of(self.effective_until_hour),
        }

    def terms(self) -> dict[str, Any]:
        """Return the declared terms without their dates."""
        return {
            "name": self.name,
            "percent": _text(self.percent),
            "usd_per_month": _text(self.usd_per_month),
            "source": self.source,
        }


@dataclass(frozen=True, slots=True)
class OverheadLine:
    """An overhead in a window's hours [from_hour, to_hour); `nanousd` is exact.

    `nanousd` is None for a percentage of an unknown cost.
    """

    overhead: Overhead
    from_hour: int
    to_hour: int
    nanousd: Fraction | None

    @property
    def cost_nanousd(self) -> int | None:
        """The amount in nano-USD, rounded half to even."""
        return None if self.nanousd is None else round(self.nanousd)

    def as_dict(self) -> dict[str, Any]:
        """Return the line as a summary shows it."""
        return {
            **self.overhead.terms(),
            "from": instant_of(self.from_hour),
            "to": instant_of(self.to_hour),
            "cost_nanousd": self.cost_nanousd,
            "cost_usd": format_usd(self.cost_nanousd),
            "cost_reason": None if self.nanousd is not None else WHY_UNKNOWN,
        }


def overhead_lines(
    overheads: Iterable[Overhead],
    from_hour: int,
    to_hour: int,
    cost_of: Callable[[int, int], int | Fraction | None],
) -> list[OverheadLine]:
    """Return a line for each overhead that holds in any of the hours [from_hour, to_hour).

    `cost_of(from_hour, to_hour)` is the GPUs' cost in these hours in nano-USD, None if unknown.
    """
    lines = []
    for overhead in overheads:
        low, high = overhead.effective_from_hour, overhead.effective_until_hour
        begin = from_hour if low is None else max(from_hour, low)
        end = to_hour if high is None else min(to_hour, high)
        if begin < end:
            nanousd = _nanousd(overhead, begin, end, cost_of)
            lines.append(OverheadLine(overhead, begin, end, nanousd))
    return lines


def months_between(from_hour: int, to_hour: int) -> Fraction:
    """Return the length of [from_hour, to_hour) in months; each month counts its share of hours."""
    return sum((Fraction(hours, of) for hours, of in _months(from_hour, to_hour)), Fraction(0))


def _nanousd(
    overhead: Overhead,
    from_hour: int,
    to_hour: int,
    cost_of: Callable[[int, int], int | Fraction | None],
) -> Fraction | None:
    if overhead.usd_per_month is not None:
        months = months_between(from_hour, to_hour)
        return Fraction(overhead.usd_per_month) * NANOUSD_PER_USD * months
    cost = cost_of(from_hour, to_hour)
    if cost is None or overhead.percent is None:
        return None
    return Fraction(overhead.percent) / 100 * cost


def _months(from_hour: int, to_hour: int) -> Iterator[tuple[int, int]]:
    """Yield, for each month between two hours, its hours in between and its hours in all."""
    hour = from_hour
    while hour < to_hour:
        day = datetime.fromtimestamp(hour * SECONDS_PER_HOUR, UTC)
        length = calendar.monthrange(day.year, day.month)[1] * HOURS_PER_DAY
        end = min(hour - ((day.day - 1) * HOURS_PER_DAY + day.hour) + length, to_hour)
        yield end - hour, length
        hour = end


def _text(value: Decimal | None) -> str | None:
    return None if value is None else format(value, "f")
