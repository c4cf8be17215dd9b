"""The input of a report: facts from the ledger, and exact amounts of use and money.

The ledger gives GPU time and KV residency by run and hour; a report prices them and adds them up.
Amounts are fractions, so nothing is rounded before the end. Core: standard library only.

Invariant: an amount has a cost only if all its time has a price. Otherwise it names a run and an
hour without a price.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

from vllm_cost_meter.prices.cost import MS_PER_HOUR, Rates
from vllm_cost_meter.reports.charges import ChargesKnown
from vllm_cost_meter.units.money import NANOUSD_PER_USD
from vllm_cost_meter.units.rounding import sum_of_products

# The class of rows with usage. The other classes are in `records.snapshot.OTHER_ROWS`.
REQUESTS = "requests"
# Stands for a missing value: usage without a model, an adapter or a tag.
UNALLOCATED = "__unallocated__"
# What tables for people show of requests that ended.
MAIN_COUNTS = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")
COUNTS = (*MAIN_COUNTS, "external_tokens", "external_known_tokens")
NOTHING_RAN = "no engine has run in this window"

Key = tuple[str, ...]
# An hour since the epoch. None is for time in an engine's totals that none of its hours has.
Hour = int | None
# Gives what use costs in a run and an hour; None without a price.
PriceOf = Callable[[str, Hour], Rates | None]
# Gives the reason why a run has no price in an hour.
WhyNone = Callable[[str, Hour], str]


class Used(NamedTuple):
    """Use of a run in an hour.

    `key` has the values of the dimensions, or the class and after it those that are labels.

    Only requests have KV residency: `kv_block_ms` is KV cache blocks x ms. Only they are charged by
    a split, and `charges` says how well it is known.
    """

    run_id: str
    hour: Hour
    key: Key
    gpu_time_ns: int
    kv_block_ms: int = 0
    charges: ChargesKnown = ChargesKnown()


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
    """Use and its cost, exact. `unpriced` names the earliest use without a price.

    `nanousd` is the cost of GPU time and KV residency together, and `kv_nanousd` that of the KV
    residency alone. `kv_block_ms` are the blocks x ms that have a price above 0: what is charged.
    """

    gpu_time_ns: Fraction = Fraction(0)
    nanousd: Fraction = Fraction(0)
    unpriced: Unpriced | None = None
    kv_nanousd: Fraction = Fraction(0)
    kv_block_ms: Fraction = Fraction(0)

    @classmethod
    def of(
        cls,
        spent: Mapping[Rates | Unpriced, int],
        held: Mapping[Rates | Unpriced, int] | None = None,
    ) -> "Amount":
        """Return the amount for GPU time and KV residency (blocks x ms) by price.

        Some of both may have no price.
        """
        held = held or {}
        times = (
            (ns, price.usd_per_gpu_hour) for price, ns in spent.items() if isinstance(price, Rates)
        )
        blocks = [
            (block_ms, price.usd_per_kv_block_hour)
            for price, block_ms in held.items()
            if isinstance(price, Rates) and price.usd_per_kv_block_hour
        ]
        # A GPU-hour is 3600 x 10^9 ns, a USD 10^9 nano-USD.
        of_time = sum_of_products(times, 3600)
        of_blocks = NANOUSD_PER_USD * sum_of_products(blocks, MS_PER_HOUR)
        used = (*spent.items(), *held.items())
        return cls(
            Fraction(sum(spent.values())),
            of_time + of_blocks if blocks else of_time,
            earliest(price for price, amount in used if isinstance(price, Unpriced) and amount),
            of_blocks,
            Fraction(sum(block_ms for block_ms, _ in blocks)),
        )

    @property
    def time(self) -> "Amount":
        """Return the GPU time alone."""
        return Amount(self.gpu_time_ns, self.nanousd - self.kv_nanousd, self.unpriced)

    def plus(self, other: "Amount") -> "Amount":
        """Return the sum."""
        if self is NOTHING or other is NOTHING:
            return self if other is NOTHING else other
        return Amount(
            self.gpu_time_ns + other.gpu_time_ns,
            self.nanousd + other.nanousd,
            earliest((self.unpriced, other.unpriced)),
            self.kv_nanousd + other.kv_nanousd,
            self.kv_block_ms + other.kv_block_ms,
        )

    def times(self, factor: Fraction) -> "Amount":
        """Return a multiple of the amount: a part of it, or its negative for a factor of -1."""
        unpriced = self.unpriced if factor else None
        return Amount(
            self.gpu_time_ns * factor,
            self.nanousd * factor,
            unpriced,
            self.kv_nanousd * factor,
            self.kv_block_ms * factor,
        )


NOTHING = Amount()


def earliest(found: Iterable[Unpriced | None]) -> Unpriced | None:
    """Return the earliest time without a price; None if all time has one."""
    return min((one for one in found if one is not None), default=None)


def no_price(run_id: str, _hour: Hour) -> str:
    """Return the reason for a missing price if nothing more is known."""
    return f"no price for run {run_id}"
