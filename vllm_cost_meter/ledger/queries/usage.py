"""The facts of a report: usage by run, hour and whatever a question tells apart; overhead by class.

One query over the usage pieces of the bills up to the cut, joined with their requests where a
dimension is a column of those; the engines' hours for the classes; and the counts of what ended.
What it costs is not asked here: the core prices each run's hours.

Invariant: usage and overhead are all of wall x GPUs, hour by hour, when no bill misses.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import and_, func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.queries.cut import Cut
from vllm_cost_meter.ledger.queries.ended import count_ended
from vllm_cost_meter.ledger.schema import requests, usage_pieces
from vllm_cost_meter.records.snapshot import OVERHEAD_ROWS
from vllm_cost_meter.reports.allocation import UNALLOCATED, Ended, Facts, Key, Used
from vllm_cost_meter.reports.grammar import TAG
from vllm_cost_meter.units.time import NS_PER_HOUR, unix_ns_of

# Dimensions whose column has another name.
_COLUMN = {"status": "engine_status"}


def read_facts(connection: Connection, cut: Cut, dimensions: Sequence[str]) -> Facts:
    """Return what the ledger holds at a cut, told apart by these dimensions."""
    columns = tuple(dict.fromkeys(_column(name) for name in dimensions))
    hours = [
        (run.run_id, hour, run.classes_in(hour))
        for run in cut.runs
        for hour in run.hours
        if cut.window.contains(hour)
    ]
    return Facts(
        used=_used(connection, cut, dimensions, columns),
        overhead=[
            Used(run_id, hour, (name,), classes[name])
            for run_id, hour, classes in hours
            for name in OVERHEAD_ROWS
            if classes[name]
        ],
        ended=[
            Ended(unix_ns_of(f"{hour}:00Z") // NS_PER_HOUR, _key(dimensions, columns, values), n)
            for (hour, *values), n in count_ended(
                connection, cut.window, ("hour", *columns)
            ).items()
        ],
        wall=[Used(run_id, hour, (), sum(classes.values())) for run_id, hour, classes in hours],
        wall_gpu_ns=cut.wall_gpu_ns(),
    )


def _used(
    connection: Connection, cut: Cut, dimensions: Sequence[str], columns: Sequence[str]
) -> list[Used]:
    if not cut.runs:
        return []
    at, p, r = cut.cte(), usage_pieces.c, requests.c
    # Pieces have the tenant themselves: with that alone, no request is read.
    keys = [p.tenant if name == "tenant" else r[name] for name in columns]
    joined = usage_pieces.join(at, and_(p.run_id == at.c.run_id, p.seq <= at.c.last_seq))
    if set(columns) - {"tenant"}:
        joined = joined.join(requests, and_(r.run_id == p.run_id, r.seq == p.seq))
    used = (
        select(p.run_id, p.hour, func.sum(p.prefill_ns + p.decode_ns), *keys)
        .select_from(joined)
        .where(cut.window.on_hours(p.hour))
        .group_by(p.run_id, p.hour, *keys)
    )
    # Two texts of tags may have the same values for what is asked.
    spent: Counter[tuple[str, int, Key]] = Counter()
    for run_id, hour, gpu_time_ns, *values in connection.execute(used):
        spent[run_id, hour, _key(dimensions, columns, values)] += int(gpu_time_ns)
    return [Used(*key, ns) for key, ns in spent.items()]


def _column(dimension: str) -> str:
    return "tags" if dimension.startswith(TAG) else _COLUMN.get(dimension, dimension)


def _key(dimensions: Sequence[str], columns: Sequence[str], values: Sequence[Any]) -> Key:
    """Return the values of the dimensions, of a row's columns."""
    row = dict(zip(columns, values, strict=True))
    tags = json.loads(row["tags"]) if row.get("tags") else {}
    found = (
        tags.get(name.removeprefix(TAG)) if name.startswith(TAG) else row[_column(name)]
        for name in dimensions
    )
    return tuple(UNALLOCATED if value is None else str(value) for value in found)
