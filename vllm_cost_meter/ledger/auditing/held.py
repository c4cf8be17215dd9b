"""What the ledger holds of each run up to the cut: by the sums kept with bills, or by the bills.

The sums (`rollups/bill_sums.py`) are a row for each run, so an audit by them costs the same however
many bills there are. The few bills beyond a run's last snapshot are read and taken off. A full
audit reads every bill: it finds what was changed from outside, which no sum can show. Of a bill
whose rows were dropped only what it added to is known.

Invariant: for a ledger that only the meter wrote both ways give the same figures.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Table, and_, func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.queries.cut import Cut, bills_up_to
from vllm_cost_meter.ledger.rollups.bill_sums import (
    dropped_energy,
    dropped_sums,
    stored_sums,
    sums_of_rows,
)
from vllm_cost_meter.ledger.rollups.rebuilding import residency_differences, time_differences
from vllm_cost_meter.ledger.schema import (
    energy_sums,
    request_energy,
    requests,
    rollup_days,
    rollup_groups,
    usage_pieces,
)
from vllm_cost_meter.ledger.tables.pieces import BILL_AMOUNTS, IS_UNEVEN, PIECES_OF_BILL


class HeldBills(NamedTuple):
    """What the ledger holds of a run.

    `bills` counts those up to the cut, and `ledger_ns` is the GPU time of those that the last
    snapshot counts. `sums_ns` is how far the sums by day and hour are from the bills, and
    `sums_block_ms` likewise in KV residency. `uneven_bills` are not the sum of their pieces, and
    `is_changed` says whether any bill is not as it was written. These three are None where the
    bills were not read.
    """

    bills: int = 0
    ledger_ns: int = 0
    energy_mj: int = 0
    sums_ns: int = 0
    sums_block_ms: int | None = None
    uneven_bills: int | None = None
    is_changed: bool | None = None


NOTHING_HELD = HeldBills()


class _Beyond(NamedTuple):
    """The bills of a run after its last snapshot."""

    bills: int
    gpu_time_ns: int


def held_by_sums(connection: Connection, cut: Cut) -> dict[str, HeldBills]:
    """Return what the ledger holds of each run, by the sums kept with the bills."""
    counted = {run.run_id: run.snapshot_seq for run in cut.runs}
    last = cut.last_bills()
    stored = stored_sums(connection)
    beyond = _beyond(
        connection,
        {
            run_id: seq
            for run_id, seq in counted.items()
            if run_id in stored and stored[run_id].last_seq > seq
        },
    )
    energy_rows = connection.execute(select(energy_sums.c.run_id, energy_sums.c.energy_mj))
    energy = {run_id: int(mj) for run_id, mj in energy_rows}
    in_days = _time_in_days(connection)
    found = {}
    for sums in stored.values():
        after = beyond.get(sums.run_id, _Beyond(0, 0))
        # A dead run's cut is at its last bill, a living one's at its snapshot.
        is_cut_at_snapshot = last.get(sums.run_id) == counted.get(sums.run_id)
        found[sums.run_id] = HeldBills(
            bills=sums.bills - (after.bills if is_cut_at_snapshot else 0),
            ledger_ns=sums.gpu_time_ns - after.gpu_time_ns,
            energy_mj=energy.get(sums.run_id, 0),
            sums_ns=abs(sums.gpu_time_ns - in_days.pop(sums.run_id, 0)),
        )
    # Sums of a run without any bill are too many.
    return found | {run_id: HeldBills(sums_ns=abs(ns)) for run_id, ns in in_days.items() if ns}


def held_by_rows(connection: Connection, cut: Cut) -> dict[str, HeldBills]:
    """Return what the ledger holds of each run, by its bills. Reads them all."""
    counted = {run.run_id: run.snapshot_seq for run in cut.runs}
    bare = {run.run_id: run.last_seq for run in cut.without_totals}
    held = _total_by_run(connection, cut.last_bills(), requests, func.count())
    gpu_time = func.sum(requests.c.gpu_time_ns)
    billed = _total_by_run(connection, counted | bare, requests, gpu_time)
    energy = _total_by_run(
        connection, counted, request_energy, func.sum(request_energy.c.energy_mj)
    )
    for dropped in dropped_sums(connection).values():
        held[dropped.run_id] = held.get(dropped.run_id, 0) + dropped.bills
        billed[dropped.run_id] = billed.get(dropped.run_id, 0) + dropped.gpu_time_ns
    for run_id, mj in dropped_energy(connection).items():
        energy[run_id] = energy.get(run_id, 0) + mj
    uneven = _uneven_bills(connection, cut)
    differences = time_differences(connection)
    residencies = residency_differences(connection)
    stored = stored_sums(connection)
    read = {sums.run_id: sums for sums in sums_of_rows(connection)}
    all_runs = stored.keys() | read.keys() | counted.keys()
    all_runs |= differences.keys() | residencies.keys()
    return {
        run_id: HeldBills(
            bills=held.get(run_id, 0),
            ledger_ns=billed.get(run_id, 0),
            energy_mj=energy.get(run_id, 0),
            sums_ns=differences.get(run_id, 0),
            sums_block_ms=residencies.get(run_id, 0),
            uneven_bills=uneven.get(run_id, 0),
            is_changed=read.get(run_id) != stored.get(run_id),
        )
        for run_id in all_runs
    }


def _time_in_days(connection: Connection) -> dict[str, int]:
    """Return the GPU time of the sums by day, by run."""
    g, d = rollup_groups.c, rollup_days.c
    total = func.sum(d.prefill_ns + d.decode_ns)
    asked = select(g.run_id, total).join(rollup_groups, g.group_id == d.group_id).group_by(g.run_id)
    return {run_id: int(ns) for run_id, ns in connection.execute(asked)}


def _beyond(connection: Connection, counted: Mapping[str, int]) -> dict[str, _Beyond]:
    """Return the bills after these, of those runs that have any."""
    at, r = bills_up_to(counted).c, requests.c
    # The outer join has the newer bills of each run looked up in their key, and no others read.
    newer = and_(r.run_id == at.run_id, r.seq > at.last_seq)
    asked = (
        select(at.run_id, func.count(r.seq), func.sum(r.gpu_time_ns))
        .join_from(at.run_id.table, requests, newer, isouter=True)
        .group_by(at.run_id)
    )
    return {
        run_id: _Beyond(int(count), int(ns))
        for run_id, count, ns in connection.execute(asked)
        if count
    }


def _total_by_run(
    connection: Connection, last: Mapping[str, int], bills: Table, total: ColumnElement[Any]
) -> dict[str, int]:
    """Return a total over the rows of bills up to these, run by run; 0 where all is unknown.

    `bills` has a row, or several, for each bill: `requests`, or what was told of them since.
    """
    at, b = bills_up_to(last), bills.c
    totals = (
        select(b.run_id, total)
        .join(at, and_(b.run_id == at.c.run_id, b.seq <= at.c.last_seq))
        .group_by(b.run_id)
    )
    return {run_id: int(amount or 0) for run_id, amount in connection.execute(totals)}


def _uneven_bills(connection: Connection, cut: Cut) -> dict[str, int]:
    """Count the bills that are not the sum of their pieces, amount by amount."""
    at, r = bills_up_to(cut.last_bills()), requests.c
    uneven = (
        select(r.run_id, r.seq)
        .join(at, and_(r.run_id == at.c.run_id, r.seq <= at.c.last_seq))
        .join(usage_pieces, PIECES_OF_BILL, isouter=True)
        .group_by(r.run_id, r.seq, *BILL_AMOUNTS)
        .having(IS_UNEVEN)
        .subquery()
    )
    counted = select(uneven.c.run_id, func.count()).group_by(uneven.c.run_id)
    return {run_id: int(n) for run_id, n in connection.execute(counted)}
