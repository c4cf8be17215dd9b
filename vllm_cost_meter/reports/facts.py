"""What a report is made of: facts of the ledger, and exact amounts of GPU time and money.

The ledger hands over GPU time by run and hour; a report prices it and adds it up. Amounts are
fractions, so that nothing is rounded before the end. Core: standard library only.

Invariant: an amount has a cost only if all of its time has a price; otherwise it names a run and an
hour without one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

# The class of a row of usage; the others are in the order they are shown.
REQUESTS = "requests"
# In place of a value that usage does not have: no model was named, no adapter used, no tag given.
UNALLOCATED = "__unallocated__"
COUNTS = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")
NOTHING_RAN = "no engine has run in this window"

Key = tuple[str, ...]
# An hour since the epoch; None is time of no hour, which engines' totals have beyond their hours.
Hour = int | None
# USD per GPU-hour of a run in an hour; None where it has no price.
PriceOf = Callable[[str, Hour], Fraction | Decimal | None]
# Why a run has no price in an hour.
WhyNone = Callable[[str, Hour], str]


class Used(NamedTuple):
    """GPU time of a run in an hour: of usage by the values of the dimensions, of a class."""

    run_id: str
    hour: Hour
    key: Key
    gpu_time_ns: int


class Ended(NamedTuple):
    """Requests that ended in an hour, and their tokens as in `COUNTS`."""

    hour: Hour
    key: Key
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the ledger holds of a window: usage, other time (its key is the class), what ended.

    `wall` are the engines' hours, all classes together, as they say themselves; `wall_gpu_ns` is
    their sum, and without a window wall time x GPUs. Where no question tells hours apart, the first
    of a stretch of hours at one price may stand for all of them. `details` are more columns of rows
    that are by tenant alone, under the tenant; under "" those of one that used nothing.
    """

    used: Sequence[Used]
    other_time: Sequence[Used]
    ended: Sequence[Ended]
    wall: Sequence[Used]
    wall_gpu_ns: int
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def details_of(self, tenant: str) -> Mapping[str, Any]:
        """Return the additional columns of a row by tenant alone."""
        return self.details.get(tenant) or self.details[""]

    @property
    def difference_ns(self) -> int:
        """What usage and other time miss of wall x GPUs: 0 when no bill is missing."""
        return self.wall_gpu_ns - sum(one.gpu_time_ns for one in (*self.used, *self.other_time))


class Unpriced(NamedTuple):
    """A run and an hour in which it has no price. The hour is first: the earliest is named."""

    since: int  # the hour, -1 for time of no hour
    run_id: str

    @property
    def hour(self) -> Hour:
        """Return the hour."""
        return None if self.since < 0 else self.since

    @classmethod
    def of(cls, run_id: str, hour: Hour) -> "Unpriced":
        """Return that of a run in an hour."""
        return cls(-1 if hour is None else hour, run_id)


@dataclass(frozen=True, slots=True)
class Amount:
    """GPU time and what it costs, exact. `unpriced` is the earliest of it without a price."""

    gpu_time_ns: Fraction = Fraction(0)
    nanousd: Fraction = Fraction(0)
    unpriced: Unpriced | None = None

    @classmethod
    def of(cls, spent: Mapping[Fraction | Unpriced, int]) -> "Amount":
        """Return the amount of GPU time at each price, or at none."""
        nanousd = sum(
            (ns * price for price, ns in spent.items() if isinstance(price, Fraction)), Fraction(0)
        )
        return cls(
            Fraction(sum(spent.values())),
            # A GPU-hour is 3600 x 10^9 ns, a USD 10^9 nano-USD.
            nanousd / 3600,
            earliest(price for price, ns in spent.items() if isinstance(price, Unpriced) and ns),
        )

    def plus(self, other: "Amount") -> "Amount":
        """Return the sum."""
        if self is NOTHING or other is NOTHING:
            return self if other is NOTHING else other
        return Amount(
            self.gpu_time_ns + other.gpu_time_ns,
            self.nanousd + other.nanousd,
            earliest((self.unpriced, other.unpriced)),
        )

    def times(self, factor: Fraction) -> "Amount":
        """Return a part, or, times -1, what is taken away."""
        unpriced = self.unpriced if factor else None
        return Amount(self.gpu_time_ns * factor, self.nanousd * factor, unpriced)


NOTHING = Amount()


def earliest(found: Iterable[Unpriced | None]) -> Unpriced | None:
    """Return the earliest of those that are one; None if none is."""
    return min((one for one in found if one is not None), default=None)


def no_price(run_id: str, _hour: Hour) -> str:
    """Return why a run has no price, where nobody knows more."""
    return f"no price for run {run_id}"
