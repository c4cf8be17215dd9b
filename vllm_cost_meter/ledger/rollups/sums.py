"""Write sums by hour and group into the ledger: add amounts to the hours, and to their UTC days.

Invariant: a day is the sum of its hours, group by group.
"""

from typing import NamedTuple

from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.rollups.groups import Group, group_id_of
from vllm_cost_meter.ledger.rollups.upserts import add_to, insert_new
from vllm_cost_meter.ledger.schema import (
    ENDED_AMOUNTS,
    SUMMED_AMOUNTS,
    rollup_days,
    rollup_groups,
    rollup_hours,
)
from vllm_cost_meter.units.calendar import HOURS_PER_DAY

AMOUNTS = (*SUMMED_AMOUNTS, *ENDED_AMOUNTS)


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
    groups: dict[int, Group] = {}
    hours: dict[tuple[int, int], list[int]] = {}
    days: dict[tuple[int, int], list[int]] = {}
    first_hours: dict[tuple[int, int], int] = {}
    for (hour, group), amounts in sums.items():
        id = group_id_of(group)
        groups[id] = group  # even without amounts: by its groups a tenant's bills are found
        if not any(amounts):
            continue
        hours[hour, id] = amounts
        key = hour // HOURS_PER_DAY, id
        known = days.get(key)
        days[key] = (
            amounts if known is None else [a + b for a, b in zip(known, amounts, strict=True)]
        )
        if any(amounts[: len(SUMMED_AMOUNTS)]):
            first_hours[key] = min(hour, first_hours.get(key, hour))
    insert_new(connection, rollup_groups, [(id, *group) for id, group in sorted(groups.items())])
    add_to(connection, rollup_hours, [(*key, *amounts) for key, amounts in sorted(hours.items())])
    add_to(
        connection,
        rollup_days,
        [(*key, first_hours.get(key), *amounts) for key, amounts in sorted(days.items())],
    )
