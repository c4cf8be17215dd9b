"""Sets of bills' numbers as ranges, such as ((1, 5), (9, 9)): in order, apart from each other.

Bills are numbered without a gap, so a set of many is a few ranges.

Invariant: two sets are equal if and only if their ranges are.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

# Both ends of a range are in it.
Ranges = tuple[tuple[int, int], ...]


def ranges_of(numbers: Iterable[int]) -> Ranges:
    """Return the ranges of these numbers, which may be in any order and come twice."""
    return joined((number, number) for number in numbers)


def joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return the ranges of all numbers that any of these has."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if last < first:
            continue
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return tuple(found)


def without(ranges: Ranges, gone: Ranges) -> Ranges:
    """Return the numbers of `ranges` that are not in `gone`."""
    found: list[tuple[int, int]] = []
    holes = iter(gone)
    hole = next(holes, None)
    for first, last in ranges:
        while hole is not None and hole[1] < first:
            hole = next(holes, None)
        while hole is not None and hole[0] <= last:
            if first < hole[0]:
                found.append((first, hole[0] - 1))
            first = hole[1] + 1
            if hole[1] > last:
                break
            hole = next(holes, None)
        if first <= last:
            found.append((first, last))
    return tuple(found)


def has(ranges: Ranges, number: int) -> bool:
    """Return whether a number is in one of the ranges."""
    at = bisect_right(ranges, number, key=lambda one: one[0]) - 1
    return at >= 0 and number <= ranges[at][1]


class DroppedNumbers(NamedTuple):
    """Which bills of a run were dropped: those up to a number, but for the `rest`."""

    last_seq: int = 0
    rest: Ranges = ()

    @classmethod
    def stored(cls, last_seq: int, rest: str) -> "DroppedNumbers":
        """Return what a row of `dropped_bills` says."""
        return cls(int(last_seq), tuple((first, last) for first, last in json.loads(rest)))

    def rest_text(self) -> str:
        return json.dumps(self.rest, separators=(",", ":"))

    def has(self, seq: int) -> bool:
        return 1 <= seq <= self.last_seq and not has(self.rest, seq)

    def ranges(self) -> Ranges:
        """Return the numbers that were dropped."""
        return without(((1, self.last_seq),) if self.last_seq else (), self.rest)

    def and_also(self, seqs: Iterable[int]) -> "DroppedNumbers":
        """Return this with more numbers dropped."""
        more = ranges_of(seqs)
        if not more:
            return self
        last_seq = max(self.last_seq, more[-1][1])
        open_ = joined([*self.rest, (self.last_seq + 1, last_seq)])
        return DroppedNumbers(last_seq, without(open_, more))
