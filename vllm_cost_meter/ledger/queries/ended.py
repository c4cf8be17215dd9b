"""Count the requests that ended and their tokens, by tenant, model, hour and other columns.

What counts as one request, and under which names, is said in `rollups/exchanges.py`: the sums there
are read here.

Invariant: each exchange is in exactly one group. So all groupings have the same totals.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.coverage import COVERED_NAME, told
from vllm_cost_meter.ledger.queries.cut import Cut
from vllm_cost_meter.ledger.rollups.reading import ended_in
from vllm_cost_meter.ledger.schema import ENDED_AMOUNTS, runs
from vllm_cost_meter.reports.grammar import COVERED, Question

# Not a column of a group: the labels of its run.
LABELS = "labels"
# In the order of ENDED_AMOUNTS.
Counts = tuple[int, ...]


def count_ended(
    connection: Connection,
    cut: Cut,
    by: Sequence[str],
    question: Question,
    splits: Sequence[int] | None,
) -> dict[tuple[Any, ...], Counts]:
    """Return the number of requests that ended in a cut's window and their tokens, by group.

    `by` names columns of a group, `labels` for those of the run, `hour` for the UTC hour in which
    a request ended, since the epoch, and `COVERED` for whether it is of the tenants that the
    question means. `splits` says which hours are kept apart; see `rollups.reading`.
    """
    names = columns_read(name for name in by if name != "hour")
    e = ended_in(cut, splits, names).c
    own = {LABELS: labels_of(e.run_id), COVERED: told(e, question)}
    keys = [own[name] if name in own else e[name] for name in by]
    groups = [COVERED_NAME if name == COVERED else key for name, key in zip(by, keys, strict=True)]
    asked = select(*keys, *(func.sum(e[name]) for name in ENDED_AMOUNTS)).group_by(*groups)
    return {
        tuple(row[: len(by)]): tuple(map(int, row[len(by) :])) for row in connection.execute(asked)
    }


def columns_read(by: Iterable[str]) -> tuple[str, ...]:
    """Return the columns of a group that a question by these columns reads."""
    always = ("run_id", "tenant", "tenant_above")
    return tuple(dict.fromkeys((*always, *(name for name in by if name not in (COVERED, LABELS)))))


def labels_of(run_id: ColumnElement[str]) -> ColumnElement[Any]:
    """Return the SQL for the labels of the run in this column."""
    return select(runs.c.labels).where(runs.c.run_id == run_id).scalar_subquery()
