"""The cost of all engines at a cut: their time, their energy, and declared overheads.

The price book prices each hour of each run. Costs stay exact until an answer rounds them.

Invariant: a cost is null unless all time or energy in it has a price.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sqlalchemy import ColumnElement, case

from vllm_cost_meter.ledger.queries.cut import Cut
from vllm_cost_meter.ledger.schema import prices, runs
from vllm_cost_meter.prices.book import EnergyPrice, GpuHourPrice
from vllm_cost_meter.prices.cost import Rates
from vllm_cost_meter.prices.overheads import OverheadLine, overhead_lines
from vllm_cost_meter.prices.run_prices import Cost, RunPrices, UsedByRun, cost_of, energy_cost_of
from vllm_cost_meter.reports.facts import NOTHING_RAN
from vllm_cost_meter.reports.tenant_details import WHY_NO_ENERGY


@dataclass(frozen=True, slots=True)
class CutCosts:
    """The prices of all runs at a cut, and the cost of all their time and energy."""

    prices: Mapping[str, RunPrices]
    cost: Cost[GpuHourPrice]
    energy_cost: Cost[EnergyPrice]

    @classmethod
    def of(cls, cut: Cut) -> "CutCosts":
        """Return the costs of everything at the cut."""
        prices = cut.prices_of()
        no_time: Cost[GpuHourPrice] = Cost(None, NOTHING_RAN)
        no_energy: Cost[EnergyPrice] = Cost(None, WHY_NO_ENERGY)
        return cls(
            prices,
            cost_of(cut.used_ns(), prices, no_time),
            energy_cost_of(cut.used_mj(), prices, no_energy),
        )

    def energy_cost_of(self, used_mj: UsedByRun) -> Cost[EnergyPrice]:
        """Return the cost of a row's energy."""
        return energy_cost_of(used_mj, self.prices, self.energy_cost.of_nothing())

    def price_of(self, run_id: str, hour: int | None) -> Rates | None:
        """Return what use costs in a run and an hour; None without a price."""
        price = self.prices[run_id].at(hour)
        return None if price is None else price.rates

    def why_none(self, run_id: str, hour: int | None) -> str:
        """Return the reason why a run has no price in an hour."""
        return self.prices[run_id].why_none(hour)

    def energy_fields(self) -> dict[str, Any]:
        """Return the fields of a summary about the cost of all energy."""
        return {
            "energy_cost_nanousd": self.energy_cost.nanousd,
            "energy_cost_reason": self.energy_cost.reason,
            "energy_prices": self.energy_cost.listed(),
        }


def declared_overheads(cut: Cut) -> list[OverheadLine]:
    """Return the declared overheads in the window, or in all the ledger's hours if it is open."""
    prices = cut.prices_of()

    def cost(begin: int, end: int) -> Fraction | None:
        spent: UsedByRun = {
            run.run_id: {
                hour: sum(classes.values())
                for hour, classes in run.hours.items()
                if begin <= hour < end
            }
            for run in cut.all_runs
        }
        return cost_of(spent, prices, Cost(Fraction(0))).exact

    return overheads_of(cut, cost)


def overheads_of(cut: Cut, cost: Callable[[int, int], int | Fraction | None]) -> list[OverheadLine]:
    """Return the declared overheads; `cost` gives the nano-USD of the hours [begin, end)."""
    hours = {hour for run in cut.all_runs for hour in run.hours}
    low, high = cut.window.from_hour, cut.window.to_hour
    first = min(hours, default=None) if low is None else low
    last = max(hours) + 1 if high is None and hours else high
    if first is None or last is None:
        return []
    return overhead_lines(cut.book.overheads, first, last, cost)


# The columns that the price of a run depends on, in `runs` joined with `prices`.
RUN_COLUMNS = (
    runs.c.run_id,
    runs.c.gpus,
    runs.c.model,
    runs.c.hardware,
    runs.c.host,
    runs.c.labels,
    prices.c.usd_per_gpu_hour,
    prices.c.usd_per_kv_block_hour,
    prices.c.source.label("price_source"),
)


def stretch(hour: ColumnElement[int], changes: Sequence[int]) -> list[ColumnElement[Any]]:
    """Return the SQL terms to group by, so that all hours in a group have one price."""
    if not changes:
        return []
    return [case(*((hour < at, place) for place, at in enumerate(changes)), else_=len(changes))]
