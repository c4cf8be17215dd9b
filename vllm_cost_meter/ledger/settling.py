"""Wait for the bills that a cut counts and that are still on their way to the ledger.

Invariant: no bill is waited for twice, and none of a dead run: nobody writes it any more.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from sqlalchemy import func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.queries.cut import Cut
from vllm_cost_meter.ledger.retention.known import dropped_by_run
from vllm_cost_meter.ledger.schema import requests

POLL_S = 0.02
# So many bills of a run may come late: some seconds of a busy server.
ON_THEIR_WAY_MAX = 20_000


def settle(
    read: Callable[[], AbstractContextManager[Connection]],
    cut: Cut,
    settle_s: float,
    settled: dict[str, int],
) -> None:
    """Wait until each living run has all its bills up to the cut, for at most `settle_s`.

    `settled` is the number of the last bill, by run, up to which earlier calls have waited, in vain
    or not: no call counts those again. Bills that are on their way are among the newest, so of a
    run that is seen for the first time only these are counted.
    """
    last = {run.run_id: run.snapshot_seq for run in cut.runs if run.alive}
    since = {
        run_id: max(settled.get(run_id, 0), seq - ON_THEIR_WAY_MAX) for run_id, seq in last.items()
    }
    ranges = {run_id: (low, last[run_id]) for run_id, low in since.items() if low < last[run_id]}
    if ranges:
        with read() as connection:
            # Those before a bill that was dropped are long there, or never come.
            for run_id, dropped in dropped_by_run(connection, ranges).items():
                low, high = ranges[run_id]
                ranges[run_id] = min(max(low, dropped.last_seq), high), high
    deadline = time.monotonic() + settle_s
    while ranges:
        with read() as connection:
            held = _held(connection, ranges)
        is_whole = all(held[run_id] >= high - low for run_id, (low, high) in ranges.items())
        if is_whole or time.monotonic() >= deadline:
            break
        time.sleep(POLL_S)
    settled.update(last)


def _held(connection: Connection, ranges: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return how many bills of a range of numbers (low, high] the ledger holds, by run."""
    b = requests.c
    held = {}
    for run_id, (low, high) in ranges.items():
        counted = select(func.count()).where(b.run_id == run_id, b.seq > low, b.seq <= high)
        held[run_id] = int(connection.execute(counted).scalar_one())
    return held
