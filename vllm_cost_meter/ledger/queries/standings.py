"""Where a budget stands, of what bills are charged for: sums, and money as reports compute it.

Money is priced by `RunPrices` and rounded once, at the end, as a row of a report is. Hours between
two dates of the price book are added up before they are priced, so that a year costs little work.

Invariant: what a budget has used is what a report of its tenants over its period costs.
"""

from bisect import bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from vllm_cost_meter.ledger.queries.bill_count import Spent, added
from vllm_cost_meter.prices.book import GpuHourPrice, PriceBook
from vllm_cost_meter.prices.cost import NO_QUANTITIES, Quantities
from vllm_cost_meter.prices.run_prices import Cost, RunPrices, charge_of
from vllm_cost_meter.tenants.budgets import Budget, Others, Standing
from vllm_cost_meter.units.rounding import largest_remainder
from vllm_cost_meter.units.time import NS_PER_HOUR

_NOTHING: Cost[GpuHourPrice] = Cost(Fraction(0))


@dataclass(frozen=True)
class Priced:
    """The prices of all runs at one instant, and which runs live."""

    runs: Mapping[str, RunPrices]
    book: PriceBook
    living: Collection[str]
    now_ns: int

    @cached_property
    def changes(self) -> list[int]:
        """The hours at which a price may change."""
        return self.book.price_changes()

    @cached_property
    def unpriced_now(self) -> str | None:
        """Why a living run has no price in the present hour; None if all have one."""
        hour = self.now_ns // NS_PER_HOUR
        without = (self.runs[id] for id in self.living if self.runs[id].at(hour) is None)
        return next((run.why_none(hour) for run in without), None)

    def cost(self, used: Spent) -> Cost[GpuHourPrice]:
        """Return the cost of use by run and hour; the hours of one price are added up."""
        sums: dict[str, dict[int | None, Quantities]] = {}
        for run_id, hours in used.items():
            firsts: dict[int, int] = {}
            of_run = sums[run_id] = {}
            for hour in sorted(hours):
                first = firsts.setdefault(bisect_right(self.changes, hour), hour)
                of_run[first] = of_run.get(first, NO_QUANTITIES) + hours[hour]
        return charge_of(sums, {id: self.runs[id] for id in used}, _NOTHING)


@dataclass(frozen=True)
class OwnUse:
    """What a server's own ledger has: bills, and what each run's requests without a bill used."""

    billed: Spent
    running: Mapping[str, Quantities]


@dataclass(frozen=True)
class FleetPart:
    """What counts by the fleet for a budget in its period, and how reliable that is.

    Hours of one price are summed under the first of them; a rolling period has them apart, too.
    `age_ns` is how long ago it was read; None if it never was.
    """

    used: Spent
    by_hour: Spent
    age_ns: int | None
    stale: str | None
    is_counted: bool


def standing_of(
    budget: Budget, own: OwnUse, priced: Priced, fleet: FleetPart | None = None
) -> Standing:
    """Return where a budget stands, over the whole fleet if it counts that."""
    now_ns = priced.now_ns
    this_hour = now_ns // NS_PER_HOUR
    used = _of_period(own.billed, budget, now_ns)
    for run_id, quantities in own.running.items():
        of_run = used.setdefault(run_id, {})
        of_run[this_hour] = of_run.get(this_hour, NO_QUANTITIES) + quantities
    others = None
    if fleet is not None:
        here, _ = _total(budget, used, priced)
        others = Others(here, fleet.age_ns, fleet.stale, is_counted=fleet.is_counted)
        apart = added(used, _of_period(fleet.by_hour, budget, now_ns))
        used = added(used, _of_period(fleet.used, budget, now_ns))
    total, reason = _total(budget, used, priced)
    if total is None:
        return Standing(budget, None, now_ns, reason, others)
    by_hour = {this_hour: total}
    is_money = budget.unit == "usd"
    if budget.period == "rolling" and total >= budget.limit:
        by_hour = _by_hour(used if fleet is None else apart, priced if is_money else None)
    return Standing(budget, by_hour, now_ns, priced.unpriced_now if is_money else None, others)


def _total(budget: Budget, used: Spent, priced: Priced) -> tuple[int | None, str | None]:
    """Return what was used, in the budget's unit, or None and why it is unknown."""
    if budget.unit == "usd":
        cost = priced.cost(used)
        return cost.nanousd, cost.reason
    return sum(each.gpu_time_ns for hours in used.values() for each in hours.values()), None


def _of_period(spent: Spent, budget: Budget, now_ns: int) -> Spent:
    return {run_id: _inside(hours, budget, now_ns) for run_id, hours in spent.items()}


def _inside(hours: Mapping[int, Quantities], budget: Budget, now_ns: int) -> dict[int, Quantities]:
    """Return what was used in each hour of a budget's period.

    A rolling period ends now. What was used later, on a machine whose clock is ahead, was used too:
    it counts in the present hour.
    """
    first, after = budget.hours(now_ns)
    inside = {hour: used for hour, used in hours.items() if first <= hour < after}
    if budget.period == "rolling":
        ahead = sum((used for hour, used in hours.items() if hour >= after), NO_QUANTITIES)
        if ahead:
            inside[after - 1] = inside.get(after - 1, NO_QUANTITIES) + ahead
    return inside


def _by_hour(used: Spent, priced: Priced | None) -> dict[int, int]:
    """Return what was used in each hour: GPU time, or money whose hours add up to its total."""
    hours = sorted({hour for of_run in used.values() for hour in of_run})
    by_hour = {
        hour: {run_id: {hour: of_run[hour]} for run_id, of_run in used.items() if hour in of_run}
        for hour in hours
    }
    if priced is None:
        return {
            hour: sum(each[hour].gpu_time_ns for each in by_hour[hour].values()) for hour in hours
        }
    exact = [priced.cost(by_hour[hour]).exact or Fraction(0) for hour in hours]
    return dict(zip(hours, largest_remainder(exact), strict=True))
