"""The audit: check for each engine run that its books balance at its last snapshot.

These must be equal, or hold, for each run:

- wall time x GPUs, and the sum of all classes;
- the class `requests`, and the sum of bills as the engine counted it;
- that sum, and the sum of bills in the ledger;
- the numbers of the bills have no gap from 1 to the last one of the cut;
- the engine's hours and its totals, class by class;
- the class `in_flight`, and the time of all open requests with the step that ran;
- the energy that was read, and that of all classes and requests, if it is known;
- the time of all bills, and the sums by day that reports read.

A full audit reads every bill, and holds these against one another too:

- each bill, and the sum of its pieces;
- the bills, and what they were when they were written, by a digest;
- the pieces of all bills, and the sums by hour: their time and their KV residency.

Otherwise what the bills add up to is read where it is kept with them (`held.py`): what somebody
else changes in the file is found by a full audit only.

Bills whose rows were dropped count by their numbers and by what they added up to. So do those
whose rows a server keeps to itself (`fleet/rows/rowless.py`), also in a full audit.

The last bills of a dead run are beyond its last snapshot: no engine's count is there to hold
against them, but for their numbers and pieces. Bills are counted first. The query for gaps runs
only if the count is wrong.

Invariant: `balanced` is true if and only if there is a run, all have totals, every one of these
differences is 0, nothing of a journal was lost, and neither a journal nor a damaged file that was
set aside, nor as far as is known a ledger that sends to this one, holds what the ledger lacks.
"""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, cast

from sqlalchemy import select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.auditing.held import (
    NOTHING_HELD,
    HeldBills,
    held_by_rows,
    held_by_sums,
)
from vllm_cost_meter.ledger.damage.setting_aside import is_set_aside, set_aside_files
from vllm_cost_meter.ledger.ends.lost import MAX_LOST, Lost, lost_by_run
from vllm_cost_meter.ledger.fleet.completeness import completeness, rowless_in
from vllm_cost_meter.ledger.queries.answers import Audit, AuditRun, AuditWithoutTotals, JournalLoss
from vllm_cost_meter.ledger.queries.cut import Cut, RunCut, RunWithoutTotals
from vllm_cost_meter.ledger.queries.energy import audited
from vllm_cost_meter.ledger.queries.missing import missing_numbers
from vllm_cost_meter.ledger.queries.tenants import after_cut
from vllm_cost_meter.ledger.schema import journal_losses
from vllm_cost_meter.records.snapshot import CLASSES
from vllm_cost_meter.units.time import instant_of

# At most so many ranges of missing numbers are listed, and then the word "more".
MAX_RANGES = 1000
MORE = "more"
# These columns of a run are 0 in balanced books, and `missing_bills` is empty.
DIFFERENCES = (
    "difference_ns",
    "billed_difference_ns",
    "ledger_difference_ns",
    "hours_difference_ns",
    "in_flight_difference_ns",
    "uneven_bills",
    "changed",
    "sums_difference_ns",
    "sums_difference_block_ms",
    "energy_difference_mj",
)


def audit_at(
    connection: Connection, cut: Cut, not_applied: int | None = 0, *, full: bool = False
) -> Audit:
    """Return the audit at a cut; a full one reads every bill.

    `not_applied` is how many records journals hold that the ledger lacks; None if unknown.
    """
    held = _held_by_all(connection, cut) if full else held_by_sums(connection, cut)
    runs = _audit_runs(connection, cut, held)
    bare = [
        _audit_bare(connection, run, held.get(run.run_id, NOTHING_HELD))
        for run in cut.without_totals
    ]
    balanced: bool | None = all(run["balanced"] for run in runs)
    if any(not _is_whole(run) for run in bare):
        balanced = False
    fleet = completeness(connection, runs)
    states = {run["run_id"]: run["state"] for run in fleet["incomplete"]} if fleet else {}
    losses = journal_losses_of(connection)
    aside = set_aside_files(connection)
    if aside or _may_still_come(runs, states):
        balanced = None  # Bills that are missing here may be there.
    if losses:
        balanced = False
    # Nothing was held against anything, or not everything: that is no balance.
    reason = "no_totals" if bare else None if runs else "no_runs"
    reason = reason if not_applied == 0 else "not_applied"
    reason = "not_sent" if states else reason
    reason = "set_aside" if aside else reason
    if balanced and reason is not None:
        balanced = None
    audit = {
        "balanced": balanced,
        "reason": reason if balanced is None else None,
        "full": full,
        "rows_kept_from": instant_of(cut.kept_from),
        "fleet": fleet,
        "runs": runs,
        "without_totals": bare,
        "after_cut": after_cut(connection, cut),
        "not_applied_records": not_applied,
        "set_aside": aside,
        "journal_losses": losses,
    }
    return cast("Audit", audit)


def _held_by_all(connection: Connection, cut: Cut) -> Mapping[str, HeldBills]:
    """Return what the ledger holds by its bills, or by its sums where a fleet has no bills."""
    held = held_by_rows(connection, cut)
    if rowless := rowless_in(connection):
        by_sums = held_by_sums(connection, cut)
        held |= {run_id: by_sums.get(run_id, NOTHING_HELD) for run_id in rowless}
    return held


def _may_still_come(runs: Sequence[AuditRun], states: Mapping[str, str]) -> bool:
    """Return whether all that does not balance are runs of which a server still sends bills."""
    uneven = [run["run_id"] for run in runs if not run["balanced"]]
    return bool(uneven) and all(states.get(run_id) == "arriving" for run_id in uneven)


def journal_losses_of(connection: Connection) -> list[JournalLoss]:
    """Return what was lost of journals, the latest first."""
    c = journal_losses.c
    rows = connection.execute(
        select(c.journal_id, c.after_number, c.records, c.reason, c.noticed_at)
        .where(~is_set_aside())
        .order_by(c.noticed_at.desc(), c.journal_id, c.after_number)
        .limit(MAX_RANGES)
    )
    # Not SQLAlchemy's mappings: their keys are no plain texts, and orjson refuses them.
    return [
        {
            "journal_id": journal_id,
            "after_number": after,
            "records": records,
            "reason": reason,
            "noticed_at": noticed_at,
        }
        for journal_id, after, records, reason, noticed_at in rows
    ]


def _audit_runs(connection: Connection, cut: Cut, held: Mapping[str, HeldBills]) -> list[AuditRun]:
    """Return a row for each run that has a snapshot, with all its differences."""
    lost = lost_by_run(connection, cut)
    found = []
    for run in cut.runs:
        of_run = held.get(run.run_id, NOTHING_HELD)
        is_whole = of_run.bills == run.last_seq
        missing = [] if is_whole else missing_bills(connection, run.run_id, run.last_seq)
        found.append(_audit_run(run, of_run, missing, lost.get(run.run_id, Lost())))
    return found


def _audit_bare(
    connection: Connection, run: RunWithoutTotals, held: HeldBills
) -> AuditWithoutTotals:
    billed = run.billed
    whole = held.bills == billed.last_seq
    return {
        "run_id": run.run_id,
        "started_at": billed.started_at,
        "finished_at": billed.finished_at,
        "bills": held.bills,
        "ledger_ns": held.ledger_ns,
        "last_seq": billed.last_seq,
        "missing_bills": [] if whole else missing_bills(connection, run.run_id, billed.last_seq),
        "uneven_bills": held.uneven_bills,
        "changed": held.is_changed,
        "sums_difference_ns": held.sums_ns,
        "sums_difference_block_ms": held.sums_block_ms,
    }


def _is_whole(run: AuditWithoutTotals) -> bool:
    differs = run["uneven_bills"] or run["changed"]
    sums = run["sums_difference_ns"] or run["sums_difference_block_ms"]
    return not (run["missing_bills"] or differs or sums)


def is_balanced(run: Mapping[str, Any]) -> bool:
    """Return whether a run's row has no difference and no missing bill."""
    return not (run["missing_bills"] or any(run[name] for name in DIFFERENCES))


def _audit_run(run: RunCut, held: HeldBills, missing: list[str], lost: Lost) -> AuditRun:
    row = run.row
    totals = {name: int(row[f"{name}_ns"]) for name in CLASSES}
    billed_ns = int(row["billed_ns"])
    audit = {
        "run_id": run.run_id,
        "engine_index": row["engine_index"],
        "model": row["model"],
        "host": row["host"],
        "started_at": row["started_at"],
        "state": row["state"],
        "alive": run.alive,
        "taken_at": row["taken_at"],
        "heard_at": run.heard_at(),
        "wall_ns": int(row["wall_ns"]),
        "gpus": int(row["gpus"]),
        **{f"{name}_ns": run.classes[name] for name in CLASSES},
        "difference_ns": int(row["wall_ns"]) * int(row["gpus"]) - sum(totals.values()),
        "billed_ns": billed_ns,
        "billed_difference_ns": totals["requests"] - billed_ns,
        "ledger_ns": held.ledger_ns,
        "ledger_difference_ns": billed_ns - held.ledger_ns,
        "snapshot_seq": run.snapshot_seq,
        "last_seq": run.last_seq,
        "last_bills": run.last_bills.count,
        "last_bills_ns": run.last_bills.billed_ns,
        "last_bills_in_flight_ns": run.last_bills.in_flight_ns,
        "missing_bills": missing,
        "uneven_bills": held.uneven_bills,
        "changed": held.is_changed,
        "sums_difference_ns": held.sums_ns,
        "sums_difference_block_ms": held.sums_block_ms,
        "hours_difference_ns": _hours_difference(run, totals),
        **audited(run, held.energy_mj),
        "in_flight_difference_ns": _in_flight_difference(run, totals),
        "running": row["running"],
        "waiting": row["waiting"],
        **_lost(run, lost),
    }
    return cast("AuditRun", {**audit, "balanced": is_balanced(audit)})


def _hours_difference(run: RunCut, totals: Mapping[str, int]) -> int:
    """Return how far the hours are from the totals; differences of classes do not cancel out."""
    hours = run.engine_hours.values()
    return sum(abs(totals[name] - sum(map(itemgetter(name), hours))) for name in CLASSES)


def _in_flight_difference(run: RunCut, totals: Mapping[str, int]) -> int:
    """Return the class `in_flight` less the time of open requests and the step; 0 if unknown."""
    if run.row["live_ns"] is None:
        return 0
    return totals["in_flight"] - int(run.row["live_ns"]) - int(run.row["step_ns"])


def _lost(run: RunCut, lost: Lost) -> dict[str, Any]:
    """Return the requests that a dead run had in flight, and their time; null if unknown."""
    unknown = run.row["live_ns"] is None
    step_ns = 0 if run.alive else int(run.row["step_ns"] or 0) - run.last_bills.step_ns
    return {
        "lost_requests": list(lost.requests[:MAX_LOST]),
        "lost_requests_ns": None
        if unknown
        else sum(one["gpu_time_ns"] or 0 for one in lost.requests),
        "lost_step_ns": None if unknown else step_ns,
        "unbilled_replies": list(lost.replies[:MAX_LOST]),
    }


def missing_bills(connection: Connection, run_id: str, last_seq: int) -> list[str]:
    """Return the numbers of bills missing from 1 to `last_seq`, consecutive ones as "5-9"."""
    ranges = missing_numbers(connection, run_id, last_seq, MAX_RANGES + 1)
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in ranges[:MAX_RANGES]]
    return [*shown, MORE] if len(ranges) > MAX_RANGES else shown
