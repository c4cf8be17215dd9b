"""Write sums by hour and group into the ledger: add amounts to the hours, and to their UTC days.

A sum that falls to 0 is deleted, so that the tables do not depend on the order in which rows came.

Invariant: a day is the sum of its hours, group by group.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Table, and_, case, delete, func, or_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.rollups.groups import Group, group_id_of
from vllm_cost_meter.ledger.schema import (
    ENDED_AMOUNTS,
    PIECE_AMOUNTS,
    rollup_days,
    rollup_groups,
    rollup_hours,
)
from vllm_cost_meter.units.calendar import HOURS_PER_DAY

AMOUNTS = (*PIECE_AMOUNTS, *ENDED_AMOUNTS)
_ROWS_AT_ONCE = 400


class SumKey(NamedTuple):
    """Where an amount belongs: a UTC hour, since the epoch, and a group."""

    hour: int
    group: Group


# Amounts in the order of AMOUNTS.
SumsByKey = dict[SumKey, list[int]]


def nothing() -> list[int]:
    """Return amounts of 0, in the order of AMOUNTS."""
    return [0] * len(AMOUNTS)


def write(connection: Connection, sums: SumsByKey) -> None:
    """Add amounts by hour and group to the hours and to their days."""
    sums = {key: amounts for key, amounts in sums.items() if any(amounts)}
    if not sums:
        return
    groups = {group_id_of(place.group): place.group for place in sums}
    _insert_groups(connection, groups)
    by_day: dict[tuple[int, int], list[int]] = {}
    first_hours: dict[tuple[int, int], int] = {}
    by_hour = []
    for (hour, group), amounts in sums.items():
        id = group_id_of(group)
        by_hour.append({"hour": hour, "group_id": id, **dict(zip(AMOUNTS, amounts, strict=True))})
        key = hour // HOURS_PER_DAY, id
        known = by_day.get(key)
        by_day[key] = (
            amounts if known is None else [a + b for a, b in zip(known, amounts, strict=True)]
        )
        if any(amounts[: len(PIECE_AMOUNTS)]):
            first_hours[key] = min(hour, first_hours.get(key, hour))
    days = [
        {
            "day": day,
            "group_id": id,
            "first_hour": first_hours.get((day, id)),
            **dict(zip(AMOUNTS, amounts, strict=True)),
        }
        for (day, id), amounts in by_day.items()
    ]
    _upsert(connection, rollup_hours, by_hour)
    _upsert(connection, rollup_days, days)


def _insert_groups(connection: Connection, groups: Mapping[int, Group]) -> None:
    rows = [{"group_id": id, **group._asdict()} for id, group in sorted(groups.items())]
    connection.execute(insert_into(connection, rollup_groups).on_conflict_do_nothing(), rows)


def _upsert(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    """Add amounts to rows; one in which nothing is left is deleted."""
    statement = insert_into(connection, table)
    changed = {name: table.c[name] + statement.excluded[name] for name in AMOUNTS}
    if "first_hour" in table.c:
        changed["first_hour"] = _earlier(table, statement.excluded.first_hour)
    keys = list(table.primary_key)
    # In the order of the key, as PostgreSQL's writers must not wait for one another in a ring.
    rows.sort(key=lambda row: tuple(row[key.name] for key in keys))
    connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=changed), rows)
    lowered = [row for row in rows if any(row[name] < 0 for name in AMOUNTS)]
    if lowered:
        span = keys[0]
        is_zero = and_(*(table.c[name] == 0 for name in AMOUNTS))
        for some in in_chunks(lowered):
            same = or_(*(and_(span == row[span.name], keys[1] == row["group_id"]) for row in some))
            connection.execute(delete(table).where(same, is_zero))


def _earlier(table: Table, other: ColumnElement[int]) -> ColumnElement[int]:
    """Return the earlier one of two hours, either of which may be NULL."""
    own = table.c.first_hour
    return case((own <= other, own), else_=func.coalesce(other, own))


def insert_into(connection: Connection, table: Table) -> Any:
    """Return an insert of the connection's dialect, which can have ON CONFLICT."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(table)


def in_chunks(of: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yield parts of a sequence that fit into one statement."""
    for at in range(0, len(of), _ROWS_AT_ONCE):
        yield of[at : at + _ROWS_AT_ONCE]
