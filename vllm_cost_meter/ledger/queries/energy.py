"""Read the energy of requests, tenants and runs from the ledger.

A snapshot after the bill brings a request's energy, hour by hour. Here it is joined to the bill. An
unknown energy is null with a reason, and never 0. A tenant has many requests, so its sum covers the
known ones, and the number of unknown ones stands beside it. For bills whose rows were dropped, the
sums are on record by hour and group.

Invariant: energies count up to the cut, as bills do. So the energies of all bills and of a run's
classes add up to the energy read from its GPUs.
"""

import json
from collections import Counter
from typing import Any

from sqlalchemy import ColumnElement, Select, Text, and_, case, cast, distinct, func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.coverage import DETAILS_NAME, details_name, is_shown
from vllm_cost_meter.ledger.queries.costs import stretch
from vllm_cost_meter.ledger.queries.cut import Cut, RunCut, bills_up_to
from vllm_cost_meter.ledger.queries.own_bills import bills_of
from vllm_cost_meter.ledger.retention.folding import NO_HOUR
from vllm_cost_meter.ledger.schema import (
    dropped_hours,
    dropped_unknown_energy,
    request_energy,
    requests,
    rollup_groups,
    snapshots,
    usage_pieces,
)
from vllm_cost_meter.ledger.tables.pieces import PROMPT_GROUP
from vllm_cost_meter.ledger.tables.replies import REPLY_COLUMNS
from vllm_cost_meter.prices.run_prices import UsedByRun
from vllm_cost_meter.records.energy import ENERGY_CLASSES
from vllm_cost_meter.reports.grammar import Question
from vllm_cost_meter.reports.tenant_details import RowEnergy

# The reason until a snapshot after the bill brings the energy; none comes if the engine dies.
PENDING = "pending"
_LATENCIES = ("queue", "ttft", "tpot", "e2e")
# What a bill's row says of its request, as it is stored.
_PART_COLUMNS = [
    column.name
    for column in requests.c
    if column.name not in {"prompt_group", *(f"{name}_us" for name in _LATENCIES), *REPLY_COLUMNS}
]


def select_parts() -> Select[Any]:
    """Select engine requests with their energy; it is null, with a reason, if a part is unknown."""
    e, s, r = request_energy.c, snapshots.c, requests.c
    mine = and_(e.run_id == r.run_id, e.seq == r.seq)
    is_known = and_(func.count() > 0, func.count() == func.count(e.energy_mj))
    energy_mj = select(case((is_known, func.sum(e.energy_mj)))).where(mine).scalar_subquery()
    why = select(func.min(e.reason)).where(mine).scalar_subquery()
    never = select(s.energy_reason).where(s.run_id == r.run_id, s.energy_mj.is_(None))
    reason = func.coalesce(why, never.scalar_subquery(), PENDING)
    return select(
        *(r[name] for name in _PART_COLUMNS),
        PROMPT_GROUP.label("prompt_group"),
        *((r[f"{name}_us"] / 1000.0).label(f"{name}_ms") for name in _LATENCIES),
        energy_mj.label("energy_mj"),
        case((energy_mj.is_(None), reason)).label("energy_reason"),
    )


def by_tenant(connection: Connection, cut: Cut, question: Question) -> dict[str, RowEnergy]:
    """Return the energy of each tenant's requests; empty if no engine counts energy.

    The window applies to the hour in which energy was used, not to the end of the request. Requests
    that the question does not mean stand under another name.
    """
    if all(run.energy is None for run in cut.runs):
        return {}
    bills = bills_of(cut.whose)
    at, e, r = bills_up_to(cut.last_bills()), request_energy.c, bills.c
    first = func.min(e.hour)
    name = details_name(r, question)
    known = (
        select(name, r.run_id, first, func.sum(e.energy_mj))
        .select_from(bills)
        .join(request_energy, and_(e.run_id == r.run_id, e.seq == r.seq))
        .join(at, and_(r.run_id == at.c.run_id, r.seq <= at.c.last_seq))
        .where(cut.window.on_hours(e.hour), e.energy_mj.is_not(None))
        .group_by(DETAILS_NAME, r.run_id, *stretch(e.hour, cut.book.energy_price_changes()))
        .order_by(first)
    )
    used: dict[str, dict[str, dict[int | None, int]]] = {}
    for query in (known, _dropped(cut, question)):
        for tenant, run_id, hour, mj in connection.execute(query):
            hours = used.setdefault(tenant, {}).setdefault(run_id, {})
            hours[hour] = hours.get(hour, 0) + int(mj)
    unknown: Counter[str] = Counter()
    for query in (_unknown(cut, question), _dropped_unknown(cut, question)):
        unknown.update({tenant: int(count) for tenant, count in connection.execute(query)})
    return {
        tenant: RowEnergy(_sum(used.get(tenant)), unknown[tenant], used.get(tenant, {}))
        for tenant in used.keys() | (+unknown).keys()
    }


def _sum(used_mj: UsedByRun | None) -> int | None:
    return None if used_mj is None else sum(mj for run in used_mj.values() for mj in run.values())


def _unknown(cut: Cut, question: Question) -> Select[Any]:
    """Select the number of engine requests without a known energy, by tenant."""
    own = bills_of(cut.whose)
    at, e, r, p = bills_up_to(cut.last_bills()), request_energy.c, own.c, usage_pieces.c
    hour = func.coalesce(e.hour, p.hour, r.hour)
    same = and_(e.run_id == r.run_id, e.seq == r.seq)
    name: ColumnElement[Any] = details_name(r, question)
    bills: Select[Any] = (
        select(name, func.count(distinct(r.run_id + "/" + cast(r.seq, Text))))
        .select_from(own)
        .join(at, and_(r.run_id == at.c.run_id, r.seq <= at.c.last_seq))
        .join(request_energy, same, isouter=True)
        .where(e.energy_mj.is_(None))
        .group_by(DETAILS_NAME)
    )
    if cut.window.is_all:
        return bills
    # The hour is that of the unknown energy. While no snapshot has brought it, the hours of the
    # GPU time stand in.
    pieces = bills.join(usage_pieces, and_(p.run_id == r.run_id, p.seq == r.seq), isouter=True)
    return pieces.where(hour.is_not(None), cut.window.on_hours(hour))


def _dropped(cut: Cut, question: Question) -> Select[Any]:
    """Select the energy of dropped bills, by tenant, run and stretch, as that of rows."""
    d, g = dropped_hours.c, rollup_groups.c
    first = func.min(d.hour)
    return (
        select(details_name(g, question), g.run_id, first, func.sum(d.energy_mj))
        .join_from(dropped_hours, rollup_groups, g.group_id == d.group_id)
        .where(cut.window.on_hours(d.hour), d.energies > 0)
        .where(is_shown(g, cut.whose), cut.has_run(g.run_id))
        .group_by(DETAILS_NAME, g.run_id, *stretch(d.hour, cut.book.energy_price_changes()))
        .order_by(first)
    )


def _dropped_unknown(cut: Cut, question: Question) -> Select[Any]:
    """Select the number of dropped bills without a known energy, by tenant."""
    d, g = dropped_unknown_energy.c, rollup_groups.c
    name: ColumnElement[Any] = details_name(g, question)
    bills: Select[Any] = select(name, func.sum(d.bills)).join_from(
        dropped_unknown_energy, rollup_groups, g.group_id == d.group_id
    )
    bills = bills.where(is_shown(g, cut.whose), cut.has_run(g.run_id)).group_by(DETAILS_NAME)
    if cut.window.is_all:
        return bills
    inside = cut.window.on_hours(d.hour), cut.window.on_hours(d.later_hour)
    return bills.where(*inside, d.hour > NO_HOUR)


def class_mj(cut: Cut, name: str) -> int | None:
    """Return the energy of a class over all runs; None if no run counts it."""
    amounts = [
        run.energy[name] for run in cut.runs if run.energy is not None and name in run.energy
    ]
    return sum(amounts) if amounts else None


def class_energy(cut: Cut, name: str) -> RowEnergy | None:
    """Return the energy of a class by hours; None if no run counts it."""
    mj = class_mj(cut, name)
    return None if mj is None else RowEnergy(mj, None, cut.used_mj(name))


def total_mj(cut: Cut) -> int | None:
    """Return the energy of all runs and classes; None if no run counts it."""
    amounts = [class_mj(cut, name) for name in ENERGY_CLASSES]
    return None if None in amounts else sum(mj for mj in amounts if mj is not None)


def energy_state(run: RunCut) -> dict[str, Any]:
    """Return the fields of a summary about a run's GPUs and their energy."""
    devices = run.row["devices"]
    return {
        "devices": None if devices is None else json.loads(devices),
        "energy_mj": run.row["energy_mj"],
        "energy_unknown_ns": run.row["energy_unknown_ns"],
        "energy_reason": run.row["energy_reason"],
    }


def audited(run: RunCut, requests_mj: int) -> dict[str, int | None]:
    """Return a run's energy, and its difference to the sum over classes and requests, in mJ."""
    energy_mj = run.row["energy_mj"]
    if energy_mj is None:
        return {"energy_mj": None, "energy_difference_mj": None}
    others = sum(int(run.row[f"{name}_mj"]) for name in ENERGY_CLASSES if name != "requests")
    used_mj = others + requests_mj
    return {"energy_mj": int(energy_mj), "energy_difference_mj": int(energy_mj) - used_mj}
