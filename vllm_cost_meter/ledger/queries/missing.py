"""The numbers of a run's bills that the ledger never had.

Invariant: a number from 1 to the last one is in a range if and only if no bill has it, neither a
row nor one that was dropped.
"""

from sqlalchemy import func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.retention.known import NONE_DROPPED, dropped_by_run
from vllm_cost_meter.ledger.retention.ranges import Ranges, joined, without
from vllm_cost_meter.ledger.schema import requests


def missing_numbers(
    connection: Connection, run_id: str, last_seq: int, ranges_max: int | None = None
) -> Ranges:
    """Return the numbers from 1 to `last_seq` that no bill of a run has, at most so many ranges.

    This reads the numbers of all rows of the run.
    """
    return missing_among(connection, run_id, ((1, last_seq),), ranges_max)


def missing_among(
    connection: Connection, run_id: str, among: Ranges, ranges_max: int | None = None
) -> Ranges:
    """Return those of some numbers that no bill of a run has, at most so many ranges."""
    dropped = dropped_by_run(connection, [run_id]).get(run_id, NONE_DROPPED)
    found: list[tuple[int, int]] = []
    for first, last in without(among, dropped.ranges()):
        found += _gaps(connection, run_id, first, last, ranges_max)
        if ranges_max is not None and len(found) >= ranges_max:
            break
    return joined(found)[:ranges_max]


def _gaps(
    connection: Connection, run_id: str, first: int, last: int, ranges_max: int | None
) -> list[tuple[int, int]]:
    """Return the ranges of numbers from `first` to `last` of which there is no row."""
    r = requests.c
    mine = r.run_id == run_id, r.seq.between(first, last)
    steps = (
        select(r.seq, func.lag(r.seq, 1, first - 1).over(order_by=r.seq).label("before"))
        .where(*mine)
        .subquery()
    )
    gaps = (
        select(steps.c.before + 1, steps.c.seq - 1)
        .where(steps.c.seq > steps.c.before + 1)
        .order_by(steps.c.seq)
        .limit(ranges_max)
    )
    ranges = [(int(low), int(high)) for low, high in connection.execute(gaps)]
    highest = connection.execute(select(func.max(r.seq)).where(*mine)).scalar() or first - 1
    if highest < last:
        ranges.append((highest + 1, last))
    return ranges
