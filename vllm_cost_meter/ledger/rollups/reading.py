"""Read sums for a window and up to a cut: whole days from the days, the rest from the hours.

A day is read whole only if it lies inside the window, no price changes within it, and the question
does not tell its hours apart. The sums hold every bill in the ledger, and a cut counts those up to
its last ones only. So the few bills of living runs that came after the cut are taken off again.

Invariant: the sums read are those of the bills up to the cut, hour by hour, whatever was written
since the cut was read.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, Subquery, Table, and_, false, or_, select, union_all

from vllm_cost_meter.ledger.coverage import is_shown
from vllm_cost_meter.ledger.queries.cut import Cut, Window, bills_up_to
from vllm_cost_meter.ledger.schema import (
    ENDED_AMOUNTS,
    requests,
    rollup_days,
    rollup_groups,
    rollup_hours,
    usage_pieces,
)
from vllm_cost_meter.ledger.tables.pieces import PIECE_HOUR, PIECES_OF_BILL, summed_amount
from vllm_cost_meter.units.calendar import HOURS_PER_DAY


def usage_at(
    cut: Cut, splits: Sequence[int] | None, names: Sequence[str], amounts: Sequence[str]
) -> Subquery:
    """Return the usage of bills up to a cut in its window, as rows to be added up.

    A row has an `hour`, and of a group and its pieces the columns `names` and `amounts`: each one
    takes time, so a question names what it needs. `splits` are the hours within a day at which rows
    must be kept apart; None keeps all hours apart. The row of a whole day has the first hour with a
    piece in it.
    """
    first, hour = rollup_days.c.first_hour, rollup_hours.c.hour
    meant = _is_meant(cut)
    # Without a first hour nothing was used.
    days = _sums(rollup_days, first, names, amounts, meant).where(
        whole_days(cut.window, splits), first.is_not(None)
    )
    hours = _sums(rollup_hours, hour, names, amounts, meant).where(
        other_hours(cut.window, splits), or_(*(rollup_hours.c[name] != 0 for name in amounts))
    )
    return union_all(days, hours, *_after(cut, names, amounts)).subquery("usage")


def ended_in(cut: Cut, splits: Sequence[int] | None, names: Sequence[str]) -> Subquery:
    """Return the exchanges that ended in a cut's window, as rows to be added up.

    The row of a whole day has that day's first hour; see `usage_at`.
    """
    tables = [
        (rollup_days, rollup_days.c.day * HOURS_PER_DAY, whole_days(cut.window, splits)),
        (rollup_hours, rollup_hours.c.hour, other_hours(cut.window, splits)),
    ]
    meant = _is_meant(cut)
    return union_all(
        *(
            _sums(table, hour, names, ENDED_AMOUNTS, meant).where(
                where, or_(*(table.c[name] != 0 for name in ENDED_AMOUNTS))
            )
            for table, hour, where in tables
        )
    ).subquery("ended")


def _is_meant(cut: Cut) -> ColumnElement[bool]:
    """Return the condition that a group is of the cut's tenant and engines; once for a query."""
    g = rollup_groups.c
    return and_(is_shown(g, cut.whose), cut.has_run(g.run_id))


def _sums(
    table: Table,
    hour: Any,
    names: Sequence[str],
    amounts: Sequence[str],
    meant: ColumnElement[bool],
) -> Select[Any]:
    """Select rows of a table with these columns of their group, of the groups that are meant."""
    g = rollup_groups.c
    return (
        select(
            hour.label("hour"), *(g[name] for name in names), *(table.c[name] for name in amounts)
        )
        .join(rollup_groups, g.group_id == table.c.group_id)
        .where(meant)
    )


def _split_days(splits: Sequence[int]) -> list[int]:
    """Return the days that a split divides."""
    return sorted({hour // HOURS_PER_DAY for hour in splits if hour % HOURS_PER_DAY})


def whole_days(window: Window, splits: Sequence[int] | None) -> ColumnElement[bool]:
    """Return the condition on `rollup_days`: the days that are read whole.

    `splits` are the hours at which rows must be kept apart; None keeps all hours apart.
    """
    if splits is None:
        return false()
    low, high = window.from_hour, window.to_hour
    day = rollup_days.c.day
    inside: list[ColumnElement[bool]] = [day.not_in(_split_days(splits))]
    if low is not None:
        inside.append(day >= -(-low // HOURS_PER_DAY))
    if high is not None:
        inside.append(day < high // HOURS_PER_DAY)
    return and_(*inside)


def other_hours(window: Window, splits: Sequence[int] | None) -> ColumnElement[bool]:
    """Return the condition on `rollup_hours`: the hours in no day that is read whole."""
    hour = rollup_hours.c.hour
    if splits is None:
        return window.on_hours(hour)
    edges = [
        hour.between(day * HOURS_PER_DAY, day * HOURS_PER_DAY + HOURS_PER_DAY - 1)
        for day in dict.fromkeys([*_edge_days(window), *_split_days(splits)])
    ]
    return and_(window.on_hours(hour), or_(*edges)) if edges else false()


def _edge_days(window: Window) -> list[int]:
    return [
        hour // HOURS_PER_DAY
        for hour in (window.from_hour, window.to_hour)
        if hour is not None and hour % HOURS_PER_DAY
    ]


def _after(cut: Cut, names: Sequence[str], amounts: Sequence[str]) -> list[Select[Any]]:
    """Return the pieces of bills after the cut, with negative amounts; none without living runs."""
    last = {run.run_id: run.last_seq for run in cut.runs if run.alive}
    if not last:
        return []
    at, r = bills_up_to(last).c, requests.c
    newer = and_(r.run_id == at.run_id, r.seq > at.last_seq)
    return [
        select(
            PIECE_HOUR.label("hour"),
            *(r[name] for name in names),
            *((-summed_amount(name)).label(name) for name in amounts),
        )
        .join_from(at.run_id.table, requests, newer)
        .join(usage_pieces, PIECES_OF_BILL, isouter=True)
        .where(PIECE_HOUR.is_not(None), cut.window.on_hours(PIECE_HOUR), is_shown(r, cut.whose))
    ]
