"""Prices of engine runs hour by hour, and the cost of what they used: time, KV cache, energy.

Where the book has no price for a run, the price in the run's own record counts, and its source says
so. So a report made without the settings has costs too. No price changes between two dates of the
book, so the hours between them may be summed as a *stretch*, which its first hour represents.

Invariant: a cost is null unless everything that was used has a price. Then the reason names a run
and an hour without one.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from operator import itemgetter
from typing import Any, Generic, TypeVar

from vllm_cost_meter.prices.book import (
    EnergyPrice,
    GpuHourPrice,
    PriceBook,
    PriceEntry,
    RunFacts,
    label_pairs,
)
from vllm_cost_meter.prices.cost import (
    Quantities,
    exact_cost_nanousd,
    exact_energy_nanousd,
    exact_nanousd,
    parse_price,
)
from vllm_cost_meter.units.time import hour_text

# Amounts that runs used, by run and hour (or a stretch's first hour). None holds time of no hour.
UsedByRun = Mapping[str, Mapping[int | None, int]]
# What requests are charged for, likewise.
ChargedByRun = Mapping[str, Mapping[int | None, Quantities]]


@dataclass(frozen=True, slots=True)
class RunPrices:
    """The prices of one run, hour by hour."""

    run_id: str
    facts: RunFacts
    book: PriceBook
    recorded: GpuHourPrice | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any], book: PriceBook) -> "RunPrices":
        """Return the prices for the run in a ledger row, which has its RUN_COLUMNS."""
        labels = label_pairs(labels_of_run(row["labels"]))
        facts = RunFacts(row["gpus"], row["model"], row["hardware"], row["host"], labels)
        return cls(row["run_id"], facts, book, _recorded(row))

    @property
    def labels(self) -> Mapping[str, str]:
        """Return the run's labels; none where they are not known."""
        return dict(self.facts.labels or ())

    def at(self, hour: int | None) -> GpuHourPrice | None:
        """Return the price at an hour since the epoch; None if there is none."""
        if hour is None:
            return None
        price = self.book.certain_price_at(self.facts, hour)
        return self.recorded if price is None else price

    def energy_at(self, hour: int | None) -> EnergyPrice | None:
        """Return the energy price at an hour; None if there is none."""
        return None if hour is None else self.book.energy_price_at(self.facts, hour)

    def why_none(self, hour: int | None) -> str:
        """Return the reason why an hour has no price."""
        if hour is None:
            return self._no_hour()
        why = self.book.why_no_price(self.facts, hour)
        return f"no price for run {self.run_id} at {hour_text(hour)}: {why}"

    def why_no_energy(self, hour: int | None) -> str:
        """Return the reason why an hour has no energy price."""
        if hour is None:
            return self._no_hour()
        why = self.book.why_no_energy_price(self.facts, hour)
        return f"no energy price for run {self.run_id} at {hour_text(hour)}: {why}"

    def _no_hour(self) -> str:
        return f"the hours of run {self.run_id} do not add up to its totals: see the audit"


P = TypeVar("P", GpuHourPrice, EnergyPrice)
A = TypeVar("A", int, Quantities)


@dataclass(frozen=True, slots=True)
class Cost(Generic[P]):
    """A cost in nano-USD, exact, or None and why; and the prices that were found for it."""

    exact: Fraction | None
    reason: str | None = None
    prices: tuple[P, ...] = ()

    @property
    def nanousd(self) -> int | None:
        """Return it rounded half to even, by itself."""
        return None if self.exact is None else round(self.exact)

    def of_nothing(self) -> "Cost[P]":
        """Return what nothing costs, beside this cost of all: 0, if any price is known."""
        return Cost(Fraction(0)) if self.prices else Cost(None, self.reason)

    def listed(self) -> list[dict[str, Any]]:
        """Return the prices as an answer lists them, each once, the earliest first."""
        shown = [price.as_dict() for price in self.prices]
        once = [row for place, row in enumerate(shown) if row not in shown[:place]]
        return sorted(once, key=lambda row: str(row["effective_from"] or ""))


def cost_of(
    used_ns: UsedByRun, runs: Mapping[str, RunPrices], nothing: Cost[Any]
) -> Cost[GpuHourPrice]:
    """Return the cost of GPU time alone; `nothing` if there is none."""
    return _cost(
        used_ns,
        runs,
        RunPrices.at,
        RunPrices.why_none,
        lambda ns, price: exact_nanousd(ns, price.usd_per_gpu_hour),
        nothing,
    )


def charge_of(
    used: ChargedByRun, runs: Mapping[str, RunPrices], nothing: Cost[Any]
) -> Cost[GpuHourPrice]:
    """Return the cost of what requests used: GPU time and KV residency; `nothing` if no use."""
    return _cost(
        used,
        runs,
        RunPrices.at,
        RunPrices.why_none,
        lambda quantities, price: exact_cost_nanousd(quantities, price.rates),
        nothing,
    )


def energy_cost_of(
    used_mj: UsedByRun, runs: Mapping[str, RunPrices], nothing: Cost[Any]
) -> Cost[EnergyPrice]:
    """Return the cost of energy; `nothing` if there is none."""
    return _cost(
        used_mj,
        runs,
        RunPrices.energy_at,
        RunPrices.why_no_energy,
        lambda mj, price: exact_energy_nanousd(mj, price.usd_per_kwh),
        nothing,
    )


def _cost(
    used: Mapping[str, Mapping[int | None, A]],
    runs: Mapping[str, RunPrices],
    at: Callable[[RunPrices, int | None], P | None],
    why_none: Callable[[RunPrices, int | None], str],
    cost: Callable[[A, P], Fraction],
    nothing: Cost[P],
) -> Cost[P]:
    amounts: dict[P, A] = {}
    # This finds the earliest time without a price; time without an hour comes first.
    missing: tuple[int, str] | None = None
    for run_id, run in runs.items():
        for hour, amount in used.get(run_id, {}).items():
            if not amount:
                continue
            price = at(run, hour)
            if price is None:
                here = (-1 if hour is None else hour, run_id)
                missing = here if missing is None else min(missing, here)
            else:
                amounts[price] = amounts[price] + amount if price in amounts else amount
    if not amounts and missing is None:
        return nothing
    found = tuple(amounts)
    if missing is not None:
        hour, run_id = missing
        return Cost(None, why_none(runs[run_id], None if hour < 0 else hour), found)
    exact = sum((cost(amount, price) for price, amount in amounts.items()), Fraction(0))
    return Cost(exact, None, found)


def by_stretch(
    hours: Mapping[int, Mapping[str, int]], changes: Sequence[int]
) -> dict[int, dict[str, int]]:
    """Return the amounts summed by stretch, each under the stretch's first hour with an amount.

    `changes` are the sorted hours at which prices may change.
    """
    firsts: dict[int, int] = {}
    amounts: dict[int, list[Mapping[str, int]]] = {}
    for hour in sorted(hours):
        first = firsts.setdefault(bisect_right(changes, hour), hour)
        amounts.setdefault(first, []).append(hours[hour])
    return {
        first: {name: sum(map(itemgetter(name), some)) for name in some[0]}
        for first, some in amounts.items()
    }


# Many runs of one pool have the same labels.
@lru_cache(1_000)
def labels_of_run(text: str | None) -> Mapping[str, str]:
    """Return a run's labels from the ledger's JSON. A run from before there were any has none."""
    labels: Mapping[str, str] = json.loads(text) if text else {}
    return labels


def _recorded(row: Mapping[str, Any]) -> GpuHourPrice | None:
    if row["usd_per_gpu_hour"] is None:
        return None
    source = f"{row['price_source']} (recorded when the run began)"
    amount = parse_price(row["usd_per_gpu_hour"])
    of_blocks = row["usd_per_kv_block_hour"]
    return GpuHourPrice.of(
        PriceEntry(
            "prices of the ledger",
            amount,
            source,
            None,
            usd_per_kv_block_hour=None if of_blocks is None else parse_price(of_blocks),
        )
    )
