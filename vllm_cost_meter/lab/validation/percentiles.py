"""Median, 95th percentile and maximum of values."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Fractions: 0.05 is 5 %. All are None without values."""

    median: float | None
    p95: float | None
    max: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Return the percentiles of values, with linear interpolation between two values."""
        ordered = sorted(float(value) for value in values)
        if not ordered:
            return cls(None, None, None)
        return cls(_percentile(ordered, 0.5), _percentile(ordered, 0.95), ordered[-1])


def _percentile(ordered: list[float], part: float) -> float:
    place = part * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
