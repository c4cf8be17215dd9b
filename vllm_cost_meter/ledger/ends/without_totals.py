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

from vllm_cost_meter.ledger.schema import requests, usage_pieces

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
    r, p = requests.c, usage_pieces.c
    found: dict[str, BilledRun] = {}
    left = iter(sorted(run_ids))
    while some := list(islice(left, _RUNS_AT_ONCE)):
        bills = (
            select(
                *(r.run_id, func.count(), func.sum(r.gpu_time_ns), func.max(r.seq)),
                *(func.min(r.method), func.min(r.started_at), func.max(r.finished_at)),
            )
            .where(r.run_id.in_(some))
            .group_by(r.run_id)
        )
        for run_id, count, ns, seq, method, began, ended in connection.execute(bills):
            sums = int(count), int(ns), int(seq)
            found[run_id] = BilledRun(run_id, *sums, method, began, ended, {})
        used = select(p.run_id, p.hour, func.sum(p.prefill_ns + p.decode_ns))
        used = used.where(p.run_id.in_(some)).group_by(p.run_id, p.hour)
        for run_id, hour, ns in connection.execute(used):
            if run_id in found:
                found[run_id].hours[int(hour)] = int(ns)
    return sorted(found.values(), key=lambda run: (run.started_at, run.run_id))
