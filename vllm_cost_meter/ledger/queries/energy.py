"""The energy of requests, tenants and runs, as the ledger has it.

A request's energy is told by a snapshot after its bill, hour by hour; here it is joined to the bill
again. Unknown is null with a reason, never 0; for a tenant, whose requests are many, the sum is of
those that are known, and how many are not stands beside it.

Invariant: energies count up to the cut, as bills do; so the energies of all bills and the classes
of a run add up to what was read of its GPUs.
"""

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Select, Text, and_, case, cast, distinct, func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.queries.cut import Cut, RunCut, stretch
from vllm_cost_meter.ledger.schema import (
    request_energy,
    requests,
    snapshots,
    usage_pieces,
)
from vllm_cost_meter.prices.run_prices import Used
from vllm_cost_meter.records.energy import ENERGY_CLASSES
from vllm_cost_meter.reports.tenant_details import RowEnergy

# Of a request whose energy no snapshot has told: it will, if its engine lives so long.
PENDING = "pending"


def select_parts() -> Select[Any]:
    """Select engine requests with their energy: null where any of it is unknown, and why."""
    e, s, r = request_energy.c, snapshots.c, requests.c
    mine = and_(e.run_id == r.run_id, e.seq == r.seq)
    is_known = and_(func.count() > 0, func.count() == func.count(e.energy_mj))
    energy_mj = select(case((is_known, func.sum(e.energy_mj)))).where(mine).scalar_subquery()
    told = select(func.min(e.reason)).where(mine).scalar_subquery()
    never = select(s.energy_reason).where(s.run_id == r.run_id, s.energy_mj.is_(None))
    reason = func.coalesce(told, never.scalar_subquery(), PENDING)
    return select(
        requests,
        energy_mj.label("energy_mj"),
        case((energy_mj.is_(None), reason)).label("energy_reason"),
    )


def by_tenant(connection: Connection, cut: Cut) -> dict[str, RowEnergy]:
    """Return the energy of each tenant's requests.

    Empty where no engine counts energy. Energy goes by the hour it was used in, requests by theirs.
    """
    if all(run.energy is None for run in cut.runs):
        return {}
    at, e, r = cut.cte(), request_energy.c, requests.c
    first = func.min(e.hour)
    known = (
        select(r.tenant, r.run_id, first, func.sum(e.energy_mj))
        .join(request_energy, and_(e.run_id == r.run_id, e.seq == r.seq))
        .join(at, and_(r.run_id == at.c.run_id, r.seq <= at.c.last_seq))
        .where(cut.window.on_hours(e.hour), e.energy_mj.is_not(None))
        .group_by(r.tenant, r.run_id, *stretch(e.hour, cut.book.energy_price_changes()))
        .order_by(first)
    )
    used: dict[str, dict[str, dict[int | None, int]]] = {}
    for tenant, run_id, hour, mj in connection.execute(known):
        used.setdefault(tenant, {}).setdefault(run_id, {})[hour] = int(mj)
    unknown = {tenant: int(count) for tenant, count in connection.execute(_unknown(cut))}
    return {
        tenant: RowEnergy(_sum(used.get(tenant)), unknown.get(tenant, 0), used.get(tenant, {}))
        for tenant in used.keys() | unknown.keys()
    }


def _sum(used_mj: Used | None) -> int | None:
    return None if used_mj is None else sum(mj for run in used_mj.values() for mj in run.values())


def _unknown(cut: Cut) -> Select[Any]:
    """Count the engine requests of each tenant whose energy is unknown, or not told yet."""
    at, e, r, p = cut.cte(), request_energy.c, requests.c, usage_pieces.c
    told = and_(e.run_id == r.run_id, e.seq == r.seq)
    bills = (
        select(r.tenant, func.count(distinct(r.run_id + "/" + cast(r.seq, Text))))
        .join(at, and_(r.run_id == at.c.run_id, r.seq <= at.c.last_seq))
        .join(request_energy, told, isouter=True)
        .where(e.energy_mj.is_(None))
        .group_by(r.tenant)
    )
    if cut.window.is_all:
        return bills
    # In the hour whose energy is unknown; what was not told yet, in the hours of its time.
    pieces = bills.join(usage_pieces, and_(p.run_id == r.run_id, p.seq == r.seq))
    return pieces.where(cut.window.on_hours(func.coalesce(e.hour, p.hour)))


def class_mj(cut: Cut, name: str) -> int | None:
    """Return the energy of a class over all runs that count it; None if none does."""
    amounts = [
        run.energy[name] for run in cut.runs if run.energy is not None and name in run.energy
    ]
    return sum(amounts) if amounts else None


def class_energy(cut: Cut, name: str) -> RowEnergy | None:
    """Return the energy of a class and when it was used; None where no run counts it."""
    mj = class_mj(cut, name)
    return None if mj is None else RowEnergy(mj, None, cut.used_mj(name))


def total_mj(cut: Cut) -> int | None:
    """Return the energy of everything over all runs that count it; None if none does."""
    amounts = [class_mj(cut, name) for name in ENERGY_CLASSES]
    return None if None in amounts else sum(mj for mj in amounts if mj is not None)


def energy_state(run: RunCut) -> dict[str, Any]:
    """Return what a summary says of a run's GPUs and their energy."""
    devices = run.row["devices"]
    return {
        "devices": None if devices is None else json.loads(devices),
        "energy_mj": run.row["energy_mj"],
        "energy_unknown_ns": run.row["energy_unknown_ns"],
        "energy_reason": run.row["energy_reason"],
    }


def audited(run: RunCut, told: Mapping[str, int]) -> dict[str, int | None]:
    """Return the energy read of a run, and how far that is from the sum of all who used it."""
    energy_mj = run.row["energy_mj"]
    if energy_mj is None:
        return {"energy_mj": None, "energy_difference_mj": None}
    others = sum(int(run.row[f"{name}_mj"]) for name in ENERGY_CLASSES if name != "requests")
    used_mj = others + told.get(run.run_id, 0)
    return {"energy_mj": int(energy_mj), "energy_difference_mj": int(energy_mj) - used_mj}
