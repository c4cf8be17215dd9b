"""The numbers of a run's bills that the ledger lacks.

Invariant: a number from 1 to the last one is in a range if and only if no bill has it.
"""

from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.schema import requests


class NumberRange(NamedTuple):
    """Numbers of bills, both ends included."""

    first: int
    last: int


def missing_numbers(
    connection: Connection, run_id: str, last_seq: int, ranges_max: int | None = None
) -> list[NumberRange]:
    """Return the numbers from 1 to `last_seq` that no bill of a run has, at most so many ranges.

    This reads the numbers of all bills of the run.
    """
    r = requests.c
    steps = (
        select(r.seq, func.lag(r.seq, 1, 0).over(order_by=r.seq).label("before"))
        .where(r.run_id == run_id, r.seq <= last_seq)
        .subquery()
    )
    gaps = (
        select(steps.c.before + 1, steps.c.seq - 1)
        .where(steps.c.seq > steps.c.before + 1)
        .order_by(steps.c.seq)
        .limit(ranges_max)
    )
    ranges = [NumberRange(int(first), int(last)) for first, last in connection.execute(gaps)]
    asked = select(func.max(r.seq)).where(r.run_id == run_id, r.seq <= last_seq)
    highest = connection.execute(asked).scalar() or 0
    if highest < last_seq:
        ranges.append(NumberRange(highest + 1, last_seq))
    return ranges[:ranges_max]
