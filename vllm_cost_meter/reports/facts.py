"""The input of a report: facts from the ledger, and exact amounts of GPU time and money.

The ledger gives GPU time by run and hour; a report prices it and adds it up. Amounts are fractions,
so nothing is rounded before the end. Core: standard library only.

Invariant: an amount has a cost only if all its time has a price. Otherwise it names a run and an
hour without a price.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

from vllm_cost_meter.units.rounding import sum_of_products

# The class of rows with usage. The other classes are in `records.snapshot.OTHER_ROWS`.
REQUESTS = "requests"
# Stands for a missing value: usage without a model, an adapter or a tag.
UNALLOCATED = "__unallocated__"
COUNTS = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")
NOTHING_RAN = "no engine has run in this window"

Key = tuple[str, ...]
# An hour since the epoch. None is for time in an engine's totals that none of its hours has.
Hour = int | None
# Gives the USD per GPU-hour of a run in an hour; None without a price.
PriceOf = Callable[[str, Hour], Fraction | Decimal | None]
# Gives the reason why a run has no price in an hour.
WhyNone = Callable[[str, Hour], str]


class Used(NamedTuple):
    """GPU time of a run in an hour. `key` has the values of the dimensions, or the class."""

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
    """The ledger's facts for a window: usage, classes of engine time, and requests that ended.

    `other_time` is engine time without a request, by class. `wall` has the engines' own hours over
    all classes. `wall_gpu_ns` is their sum, or wall time x GPUs without a window. If the question
    does not distinguish hours, the first hour may stand for a span of hours at one price.
    `without_totals_ns` is the part of it of runs of which only the bills are known.

    `details` has more columns for rows by tenant alone, under the tenant's name. Its entry "" is
    for a tenant that used nothing.
    """

    used: Sequence[Used]
    other_time: Sequence[Used]
    ended: Sequence[Ended]
    wall: Sequence[Used]
    wall_gpu_ns: int
    without_totals_ns: int = 0
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def details_of(self, tenant: str) -> Mapping[str, Any]:
        """Return the additional columns of a row by tenant alone."""
        return self.details.get(tenant) or self.details[""]

    @property
    def difference_ns(self) -> int:
        """Wall time x GPUs less usage and other time: 0 if no bill is missing."""
        return self.wall_gpu_ns - sum(one.gpu_time_ns for one in (*self.used, *self.other_time))


class Unpriced(NamedTuple):
    """A run and an hour without a price. The hour comes first, so `min` finds the earliest."""

    since: int  # The hour; -1 for time without an hour.
    run_id: str

    @property
    def hour(self) -> Hour:
        """Return the hour; None for time without an hour."""
        return None if self.since < 0 else self.since

    @classmethod
    def of(cls, run_id: str, hour: Hour) -> "Unpriced":
        """Return the value for a run and an hour."""
        return cls(-1 if hour is None else hour, run_id)


@dataclass(frozen=True, slots=True)
class Amount:
    """GPU time and its cost, exact. `unpriced` names the earliest time without a price."""

    gpu_time_ns: Fraction = Fraction(0)
    nanousd: Fraction = Fraction(0)
    unpriced: Unpriced | None = None

    @classmethod
    def of(cls, spent: Mapping[Fraction | Unpriced, int]) -> "Amount":
        """Return the amount for GPU time by price, some of it perhaps without a price."""
        priced = ((ns, price) for price, ns in spent.items() if isinstance(price, Fraction))
        return cls(
            Fraction(sum(spent.values())),
            # A GPU-hour is 3600 x 10^9 ns, a USD 10^9 nano-USD.
            sum_of_products(priced, 3600),
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
        """Return a multiple of the amount: a part of it, or its negative for a factor of -1."""
        unpriced = self.unpriced if factor else None
        return Amount(self.gpu_time_ns * factor, self.nanousd * factor, unpriced)


NOTHING = Amount()


def earliest(found: Iterable[Unpriced | None]) -> Unpriced | None:
    """Return the earliest time without a price; None if all time has one."""
    return min((one for one in found if one is not None), default=None)


def no_price(run_id: str, _hour: Hour) -> str:
    """Return the reason for a missing price if nothing more is known."""
    return f"no price for run {run_id}"
