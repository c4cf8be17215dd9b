"""Runs without totals: the ledger has bills of them, and no snapshot.

An engine tells its totals to a server's first API process. Where there is none (`vllm run-batch`),
or where it died before it asked, the bills are all that is known of a run: what its requests used,
and neither its idle time nor its GPUs. Its price is known only if it depends on nothing of that.

Invariant: a run with a snapshot is never here, and every other run with a bill is.
"""

from collections.abc import Collection
from itertools import islice
from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.schema import bill_sums, rollup_groups, rollup_hours

_RUNS_AT_ONCE = 1_000


class BilledRun(NamedTuple):
    """What the bills of a run add up to; `hours` has the GPU-ns of their pieces by UTC hour."""

    run_id: str
    bills: int
    gpu_time_ns: int
    last_seq: int
    method: str
    started_at: str
    finished_at: str
    hours: dict[int, int]


def read_billed_runs(connection: Connection, run_ids: Collection[str]) -> list[BilledRun]:
    """Return what the bills of these runs add up to, the earliest run first."""
    s, g, h = bill_sums.c, rollup_groups.c, rollup_hours.c
    found: dict[str, BilledRun] = {}
    left = iter(sorted(run_ids))
    while some := list(islice(left, _RUNS_AT_ONCE)):
        sums = select(
            *(s.run_id, s.bills, s.gpu_time_ns, s.last_seq),
            *(s.method, s.started_at, s.finished_at),
        ).where(s.run_id.in_(some))
        for row in connection.execute(sums):
            found[row.run_id] = BilledRun(*row, {})
        used = select(g.run_id, h.hour, func.sum(h.prefill_ns + h.decode_ns))
        used = used.join_from(rollup_groups, rollup_hours, h.group_id == g.group_id)
        used = used.where(g.run_id.in_(some)).group_by(g.run_id, h.hour)
        for run_id, hour, ns in connection.execute(used):
            if run_id in found and ns:
                found[run_id].hours[int(hour)] = int(ns)
    return sorted(found.values(), key=lambda run: (run.started_at, run.run_id))
