"""What each tenant owes at a cut, and where the rest of the time went.

GPU time comes from the usage pieces of the bills up to the cut, the overhead rows from the
engines' own totals; so the rows add up to wall x gpus, and the answer says whether they do.
Requests and tokens count every exchange the ledger holds, in a window those that finished in it.
Cost is priced anew, each hour of each run by its price, on sums: one rounding for each row, run and
price. Energy has a cost of its own, and overheads are lines apart: neither is in any other cost.

Invariant: `difference_ns` = wall x gpus - the sum of all rows' GPU time, and is 0 when no bill
misses.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, func, or_, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.queries.cut import Cut, stretch
from vllm_cost_meter.ledger.queries.ended import count_ended
from vllm_cost_meter.ledger.queries.energy import TenantEnergy, by_tenant, class_mj
from vllm_cost_meter.ledger.schema import requests, usage_pieces
from vllm_cost_meter.prices.book import EnergyPrice, GpuHourPrice
from vllm_cost_meter.prices.overheads import OverheadLine, overhead_lines
from vllm_cost_meter.prices.run_prices import Cost, RunPrices, Used, cost_of, energy_cost_of
from vllm_cost_meter.records.snapshot import OVERHEAD_ROWS
from vllm_cost_meter.reports.allocation import COUNTS
from vllm_cost_meter.reports.request_row import PART_SUMS
from vllm_cost_meter.units.money import format_usd


@dataclass(frozen=True, slots=True)
class Totals:
    """The prices of the runs of a cut, and what all its time and all its energy cost."""

    prices: Mapping[str, RunPrices]
    cost: Cost[GpuHourPrice]
    energy_cost: Cost[EnergyPrice]

    @classmethod
    def of(cls, cut: Cut) -> "Totals":
        """Return the costs of everything at the cut."""
        prices = cut.prices_of()
        no_time: Cost[GpuHourPrice] = Cost(None, "no engine has run in this window")
        no_energy: Cost[EnergyPrice] = Cost(None, "no energy is known")
        return cls(
            prices,
            cost_of(cut.used_ns(), prices, no_time),
            energy_cost_of(cut.used_mj(), prices, no_energy),
        )

    def cost_of(self, used_ns: Used) -> Cost[GpuHourPrice]:
        """Return the cost of a row's time."""
        return cost_of(used_ns, self.prices, self.cost.of_nothing())

    def energy_cost_of(self, used_mj: Used) -> Cost[EnergyPrice]:
        """Return the cost of a row's energy."""
        return energy_cost_of(used_mj, self.prices, self.energy_cost.of_nothing())

    def as_dict(self) -> dict[str, Any]:
        """Return what a report says of them, with the prices that are in it."""
        listed = self.cost.listed()
        texts = {price["usd_per_gpu_hour"] for price in listed}
        return {
            **_cost_fields(self.cost),
            "usd_per_gpu_hour": texts.pop() if len(texts) == 1 else None,
            "prices": listed,
            **_energy_cost_fields(self.energy_cost),
            "energy_prices": self.energy_cost.listed(),
        }


def tenant_rows(connection: Connection, cut: Cut, totals: Totals) -> list[dict[str, Any]]:
    """Return one row for each tenant, the most GPU time first, then one for each class."""
    used = _used(connection, cut)
    counted = {key[0]: counts for key, counts in count_ended(connection, cut.window).items()}
    cache_ms = cut.kv_cache_block_ms()
    energies = by_tenant(connection, cut)
    rows = []
    for tenant in used.keys() | counted.keys() | energies.keys():
        by_run = used.get(tenant, {})
        counts = dict(zip(COUNTS, counted.get(tenant, (0, 0, 0, 0)), strict=True))
        spent: Used = {
            run_id: {hour: sums["prefill_ns"] + sums["decode_ns"] for hour, sums in hours.items()}
            for run_id, hours in by_run.items()
        }
        of_all = [sums for hours in by_run.values() for sums in hours.values()]
        cache = {name: sum(sums[name] for sums in of_all) for name in PART_SUMS}
        share = cache["kv_block_ms"] / cache_ms if cache_ms else None
        row = _row(tenant, counts, spent, {**cache, "kv_cache_share": share}, totals)
        energy = energies.get(tenant, TenantEnergy()) if energies else None
        rows.append({**row, **_energy_of(energy, totals)})
    rows.sort(key=lambda row: (-row["gpu_time_ns"], row["tenant"]))
    of_none = dict.fromkeys((*PART_SUMS, "kv_cache_share"))
    for name in OVERHEAD_ROWS:
        no_counts = {**dict.fromkeys(COUNTS), "requests": 0}
        row = _row(f"__{name}__", no_counts, cut.used_ns(name), of_none, totals)
        mj = class_mj(cut, name)
        energy = None if mj is None else TenantEnergy(mj, None, cut.used_mj(name))
        rows.append({**row, **_energy_of(energy, totals)})
    return rows


def declared_overheads(cut: Cut) -> list[OverheadLine]:
    """Return the declared overheads of the window; where it is open, of the hours in the ledger."""
    prices = cut.prices_of()

    def cost(begin: int, end: int) -> int | None:
        spent: Used = {
            run.run_id: {
                hour: sum(classes.values())
                for hour, classes in run.hours.items()
                if begin <= hour < end
            }
            for run in cut.runs
        }
        return cost_of(spent, prices, Cost(0)).nanousd

    return overheads_of(cut, cost)


def overheads_of(cut: Cut, cost: Callable[[int, int], int | None]) -> list[OverheadLine]:
    """Return the declared overheads of the window, by what its hours [begin, end) cost."""
    hours = {hour for run in cut.runs for hour in run.hours}
    low, high = cut.window.from_hour, cut.window.to_hour
    first = min(hours, default=None) if low is None else low
    last = max(hours) + 1 if high is None and hours else high
    if first is None or last is None:
        return []
    return overhead_lines(cut.book.overheads, first, last, cost)


def after_cut(connection: Connection, cut: Cut) -> dict[str, int]:
    """Return the bills that no snapshot counts yet: they wait for the next one."""
    billed = select(func.count(), func.sum(requests.c.gpu_time_ns))
    if cut.runs:
        at = cut.cte()
        billed = billed.join_from(
            requests, at, requests.c.run_id == at.c.run_id, isouter=True
        ).where(or_(at.c.run_id.is_(None), requests.c.seq > at.c.last_seq))
    count, gpu_time_ns = connection.execute(billed).one()
    return {"bills": int(count), "gpu_time_ns": int(gpu_time_ns or 0)}


def _row(
    tenant: str,
    counts: Mapping[str, int | None],
    spent: Used,
    sums: Mapping[str, float | None],
    totals: Totals,
) -> dict[str, Any]:
    return {
        "tenant": tenant,
        **counts,
        "gpu_time_ns": sum(ns for hours in spent.values() for ns in hours.values()),
        **sums,
        **_cost_fields(totals.cost_of(spent)),
    }


def _cost_fields(cost: Cost[GpuHourPrice]) -> dict[str, Any]:
    return {
        "cost_nanousd": cost.nanousd,
        "cost_usd": format_usd(cost.nanousd),
        "cost_reason": cost.reason,
    }


def _energy_cost_fields(cost: Cost[EnergyPrice]) -> dict[str, Any]:
    return {"energy_cost_nanousd": cost.nanousd, "energy_cost_reason": cost.reason}


def _energy_of(energy: TenantEnergy | None, totals: Totals) -> dict[str, Any]:
    """Return what a row says of its energy; None is of no engine that counts any."""
    if energy is None or energy.energy_mj is None:
        cost: Cost[EnergyPrice] = Cost(None, "no energy is known")
    else:
        cost = totals.energy_cost_of(energy.used_mj)
    return {
        "energy_mj": energy.energy_mj if energy else None,
        "energy_unknown_requests": energy.unknown_requests if energy else None,
        **_energy_cost_fields(cost),
    }


def _used(connection: Connection, cut: Cut) -> dict[str, dict[str, dict[int, dict[str, int]]]]:
    """Return what the bills up to the cut used, by tenant, run and the first hour of a stretch."""
    if not cut.runs:
        return {}
    at, p = cut.cte(), usage_pieces.c
    first = func.min(p.hour)
    used = (
        select(p.tenant, p.run_id, first, *(func.sum(p[name]) for name in PART_SUMS))
        .join(at, and_(p.run_id == at.c.run_id, p.seq <= at.c.last_seq))
        .where(cut.window.on_hours(p.hour))
        .group_by(p.tenant, p.run_id, *stretch(p.hour, cut.book.price_changes()))
        .order_by(first)
    )
    found: dict[str, dict[str, dict[int, dict[str, int]]]] = {}
    for tenant, run_id, hour, *sums in connection.execute(used):
        amounts = dict(zip(PART_SUMS, map(int, sums), strict=True))
        found.setdefault(tenant, {}).setdefault(run_id, {})[hour] = amounts
    return found
