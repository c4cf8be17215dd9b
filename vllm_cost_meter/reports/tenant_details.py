"""More columns for rows by tenant alone: phases, waste, KV cache, energy and its cost.

Invariant: the energy costs of all rows and of unattributed energy are rounded together, so they
add up to the cost of all energy.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_cost_meter.prices.book import EnergyPrice
from vllm_cost_meter.prices.run_prices import Cost, UsedByRun
from vllm_cost_meter.records.snapshot import OTHER_ROWS
from vllm_cost_meter.reports.charges import charges_of_rows
from vllm_cost_meter.reports.facts import COUNTS
from vllm_cost_meter.reports.request_row import PART_SUMS
from vllm_cost_meter.units.money import format_usd
from vllm_cost_meter.units.rounding import rounded_known

WHY_NO_ENERGY = "no energy is known"
_CLASS_ROWS = frozenset(f"__{name}__" for name in OTHER_ROWS)


@dataclass(frozen=True, slots=True)
class RowEnergy:
    """The energy of a row in mJ, and in which hours it was used.

    `energy_mj` is None if the energy of no request is known. `unknown_requests` is the number of
    engine requests that it lacks; None for a class.
    """

    energy_mj: int | None = 0
    unknown_requests: int | None = 0
    used_mj: UsedByRun = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TenantFacts:
    """Facts about tenants and classes besides their GPU time, by name.

    `sums` has the columns in PART_SUMS by tenant. `cache_ms` is the KV cache of all engines in
    blocks x ms. `energies` is empty if no engine counts energy. `unattributed_mj` is energy of
    requests whose own energy is partly unknown.
    """

    sums: Mapping[str, Mapping[str, int]]
    cache_ms: float | None
    energies: Mapping[str, RowEnergy]
    class_energies: Mapping[str, RowEnergy | None]
    unattributed_mj: UsedByRun = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Return the tenants that have any of these facts."""
        return {*self.sums, *self.energies}


def tenant_details(
    facts: TenantFacts, cost_of: Callable[[UsedByRun], Cost[EnergyPrice]]
) -> dict[str, dict[str, Any]]:
    """Return the columns of each row by name; "" has those for a tenant that used nothing."""
    names = sorted(facts.names)
    nothing = RowEnergy() if facts.energies else None
    energies = {name: facts.energies.get(name, nothing) for name in (*names, "")}
    energies |= {f"__{name}__": facts.class_energies.get(name) for name in OTHER_ROWS}
    costs: dict[str, Cost[EnergyPrice]] = {
        name: Cost(None, WHY_NO_ENERGY)
        if energy is None or energy.energy_mj is None
        else cost_of(energy.used_mj)
        for name, energy in energies.items()
    }
    of_nobody = cost_of(facts.unattributed_mj)
    rounded = rounded_known([cost.exact for cost in (*costs.values(), of_nobody)])
    return {
        name: {**_sums(facts, name), **_energy(energies[name], cost, nanousd)}
        for (name, cost), nanousd in zip(costs.items(), rounded, strict=False)
    }


def _sums(facts: TenantFacts, name: str) -> dict[str, float | None]:
    if name in _CLASS_ROWS:
        return dict.fromkeys((*PART_SUMS, "kv_cache_share"))
    sums = facts.sums.get(name) or dict.fromkeys(PART_SUMS, 0)
    share = sums["kv_block_ms"] / facts.cache_ms if facts.cache_ms else None
    return {**sums, "kv_cache_share": share}


def _energy(
    energy: RowEnergy | None, cost: Cost[EnergyPrice], nanousd: int | None
) -> dict[str, Any]:
    return {
        "energy_mj": energy.energy_mj if energy else None,
        "energy_unknown_requests": energy.unknown_requests if energy else None,
        "energy_cost_nanousd": nanousd,
        "energy_cost_reason": cost.reason,
    }


def sum_of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sum of rows by tenant alone, which has the columns of one.

    A cost is unknown if that of one row is. Energy adds up what is known: its cost lacks only
    requests that `energy_unknown_requests` counts.
    """
    first = rows[0]
    if len(rows) == 1:
        return dict(first)
    known = [row for row in rows if row["energy_mj"] is not None]
    energy_cost = _sum_or_none(row["energy_cost_nanousd"] for row in known) if known else None
    sums = {
        **first,
        **{name: sum(row[name] for row in rows) for name in _SUMMED},
        **{name: _sum_or_none(row[name] for row in rows) for name in _SUMMED_IF_KNOWN},
        **charges_of_rows(rows),
        "energy_mj": sum(row["energy_mj"] for row in known) if known else None,
        "energy_cost_nanousd": energy_cost,
    }
    for name, of in (("cost_reason", rows), ("energy_cost_reason", known or rows)):
        sums[name] = next((row[name] for row in of if row[name] is not None), None)
    for name in ("usage_cost", "kv_cost", "cost"):
        sums[f"{name}_usd"] = format_usd(sums[f"{name}_nanousd"])
    return sums


_SUMMED = (*COUNTS, "gpu_time_ns", "idle_share_ns", *PART_SUMS)
_SUMMED_IF_KNOWN = (
    "usage_cost_nanousd",
    "kv_cost_nanousd",
    "cost_nanousd",
    "kv_cache_share",
    "energy_unknown_requests",
)


def _sum_or_none(amounts: Iterable[Any]) -> Any:
    """Return the sum; None if one amount is unknown."""
    amounts = list(amounts)
    return None if None in amounts else sum(amounts)
