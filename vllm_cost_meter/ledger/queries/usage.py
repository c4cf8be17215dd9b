"""Read the facts of a report: usage by run, hour and dimensions, and engine time by class.

One query adds up the usage pieces of all bills up to the cut; it joins their requests only if a
dimension is a column of `requests`. The engines' hours give the classes. A third query counts the
requests that ended.

If no column is a time, hours between two changes of price are added up into one span. So a month
has one row per tenant. Prices are not applied here: `reports.allocation` prices each run's hours.

Invariant: usage and engine time by class make up all of wall time x GPUs, hour by hour, if no bill
is missing.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import and_, func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.coverage import COVERED_NAME, HIDDEN, told
from vllm_cost_meter.ledger.ends.run_time import RunTime
from vllm_cost_meter.ledger.queries.costs import CutCosts
from vllm_cost_meter.ledger.queries.cut import Cut, bills_up_to, stretch
from vllm_cost_meter.ledger.queries.ended import count_ended, labels_of
from vllm_cost_meter.ledger.queries.own_bills import bills_of, pieces_of
from vllm_cost_meter.ledger.queries.tenants import tenant_facts
from vllm_cost_meter.records.snapshot import OTHER_ROWS
from vllm_cost_meter.reports.facts import COUNTS, REQUESTS, UNALLOCATED, Ended, Facts, Key, Used
from vllm_cost_meter.reports.grammar import COVERED, LABEL, NO, TAG, YES, Question
from vllm_cost_meter.reports.request_row import PART_SUMS
from vllm_cost_meter.reports.tenant_details import tenant_details
from vllm_cost_meter.units.time import NS_PER_HOUR, unix_ns_of

# The name that no tenant has.
NAMELESS = ""
# The column of a dimension, if it has another name.
_COLUMN = {"status": "engine_status"}
# The JSON column that holds the names behind a prefix.
_WITHIN = {TAG: "tags", LABEL: "labels"}


@dataclass(frozen=True, slots=True)
class BilledUsage:
    """The usage of bills up to a cut: GPU time, and for rows by tenant alone other sums."""

    used: list[Used]
    sums: dict[str, dict[str, int]]


def read_facts(connection: Connection, cut: Cut, question: Question) -> Facts:
    """Return the facts at a cut, with the distinctions that a question needs."""
    dimensions = question.dimensions
    columns = tuple(dict.fromkeys(_column(name) for name in dimensions))
    usage = _usage(connection, cut, question, columns)
    ended = _ended(connection, cut, question, columns)
    facts = Facts(
        used=usage.used if cut.whose is None else [*usage.used, *_of_others(cut, question)],
        other_time=[
            Used(run.run_id, hour, (name,), ns)
            for run in cut.all_runs
            for name in OTHER_ROWS
            for hour, ns in _hours_of(cut, run, question, name).items()
            if ns
        ],
        ended=ended,
        wall=[
            Used(run.run_id, hour, (), ns)
            for run in cut.all_runs
            for hour, ns in _hours_of(cut, run, question).items()
        ],
        wall_gpu_ns=cut.wall_gpu_ns(),
        without_totals_ns=cut.without_totals_ns(),
    )
    if not question.is_by_tenant:
        return facts
    return _with_details(connection, cut, facts, question, usage.sums)


def _of_others(cut: Cut, question: Question) -> list[Used]:
    """Return all requests' time as the engines say it, as that of a nameless tenant.

    Where one tenant's bills are read only, it tells whether the window has prices, and which miss.
    """
    key = (NAMELESS, NO) if question.tells_coverage else (NAMELESS,)
    return [
        Used(run.run_id, hour, key, ns)
        for run in cut.all_runs
        for hour, ns in _hours_of(cut, run, question, REQUESTS).items()
        if ns
    ]


def _with_details(
    connection: Connection,
    cut: Cut,
    facts: Facts,
    question: Question,
    sums: Mapping[str, Mapping[str, int]],
) -> Facts:
    """Return facts with more columns by tenant; a tenant that has only these gets a row too."""
    used = tenant_facts(connection, cut, sums, question)
    costs = CutCosts.of(cut)
    none = Ended(None, (), (0,) * len(COUNTS))
    keys = (_key_of(name, question) for name in sorted(used.names))
    ended = [*facts.ended, *(none._replace(key=key) for key in keys)]
    return replace(facts, ended=ended, details=tenant_details(used, costs.energy_cost_of))


def _key_of(name: str, question: Question) -> Key:
    """Return the key of the row by tenant alone to which the details under a name belong."""
    if not question.tells_coverage:
        return (name,)
    return (name.removesuffix(HIDDEN), NO if name.endswith(HIDDEN) else YES)


def _details_name_of(key: Key, question: Question) -> str:
    """Return the name under which the details of the row with this key stand."""
    return key[0] + HIDDEN if question.tells_coverage and key[1] == NO else key[0]


def _hours_of(
    cut: Cut, run: RunTime, question: Question, name: str | None = None
) -> Mapping[int | None, int]:
    """Return the GPU time of a class, or of all, by hour; or by span at one price if that does."""
    if not question.tells_hours_apart:
        return run.used_ns(name)
    classes = {hour: of for hour, of in run.hours.items() if cut.window.contains(hour)}
    return {hour: sum(of.values()) if name is None else of[name] for hour, of in classes.items()}


def _ended(
    connection: Connection, cut: Cut, question: Question, columns: Sequence[str]
) -> list[Ended]:
    by = ("hour", *columns) if question.tells_hours_apart else tuple(columns)
    found = []
    ended = count_ended(connection, cut.window, by, question, cut.whose)
    for values, counts in ended.items():
        hour = None
        if question.tells_hours_apart:
            hour = unix_ns_of(f"{values[0]}:00Z") // NS_PER_HOUR
            values = values[1:]
        found.append(Ended(hour, _key(question.dimensions, columns, values), counts))
    return found


def _usage(
    connection: Connection, cut: Cut, question: Question, columns: Sequence[str]
) -> BilledUsage:
    last = cut.last_bills()
    if not last:
        return BilledUsage([], {})
    pieces = pieces_of(cut.whose)
    bills = bills_of(cut.whose)
    at, p, r = bills_up_to(last), pieces.c, bills.c
    # Pieces have a column for the tenant, so a report by tenant alone reads no request.
    own = {"tenant": p.tenant, "labels": labels_of(p.run_id)}
    known = {**own, COVERED: told(r, question)}
    keys = [known[name] if name in known else r[name] for name in columns]
    groups = [
        COVERED_NAME if name == COVERED else key for name, key in zip(columns, keys, strict=True)
    ]
    joined = pieces.join(at, and_(p.run_id == at.c.run_id, p.seq <= at.c.last_seq))
    if set(columns) - own.keys():
        joined = joined.join(bills, and_(r.run_id == p.run_id, r.seq == p.seq))
    more = PART_SUMS if question.is_by_tenant else ()
    apart = question.tells_hours_apart
    hours = [p.hour] if apart else stretch(p.hour, cut.book.price_changes())
    asked = (
        select(
            *(p.run_id, p.hour if apart else func.min(p.hour)),
            *(func.sum(p.prefill_ns + p.decode_ns), *keys),
            *(func.sum(p[name]) for name in more),
        )
        .select_from(joined)
        .where(cut.window.on_hours(p.hour))
        .group_by(p.run_id, *hours, *groups)
    )
    # Different JSON texts of tags or labels may agree in the names that are asked for.
    spent: Counter[tuple[str, int, Key]] = Counter()
    sums: dict[str, dict[str, int]] = {}
    for run_id, hour, gpu_time_ns, *values in connection.execute(asked):
        key = _key(question.dimensions, columns, values[: len(columns)])
        spent[run_id, hour, key] += int(gpu_time_ns)
        if more:
            details = sums.setdefault(_details_name_of(key, question), dict.fromkeys(more, 0))
            for name, amount in zip(more, values[len(columns) :], strict=True):
                details[name] += int(amount)
    return BilledUsage([Used(*key, ns) for key, ns in spent.items()], sums)


def _column(dimension: str) -> str:
    for kind, column in _WITHIN.items():
        if dimension.startswith(kind):
            return column
    return _COLUMN.get(dimension, dimension)


def _key(dimensions: Sequence[str], columns: Sequence[str], values: Sequence[Any]) -> Key:
    """Return the values of the dimensions from a row's columns."""
    row = dict(zip(columns, values, strict=True))
    texts = {name: json.loads(row[name]) for name in _WITHIN.values() if row.get(name)}

    def value_of(dimension: str) -> Any:
        kind, colon, name = dimension.partition(":")
        within = _WITHIN.get(kind + colon)
        return row[_column(dimension)] if within is None else texts.get(within, {}).get(name)

    found = map(value_of, dimensions)
    return tuple(UNALLOCATED if value is None else str(value) for value in found)
