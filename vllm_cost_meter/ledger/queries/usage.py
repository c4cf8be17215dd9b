"""Read the facts of a report: usage by run, hour and dimensions, and engine time by class.

One query adds up the usage of all bills up to the cut, and another the requests that ended; both
read sums by hour and day, and no bill (`rollups`). The engines' hours give the classes.

If no column is a time, hours between two changes of price are added up into one span. So a month
has one row per tenant. Prices are not applied here: `reports.allocation` prices each run's hours.

Invariant: usage and engine time by class make up all of wall time x GPUs, hour by hour, if no bill
is missing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC
from functools import lru_cache
from typing import Any

from sqlalchemy import CTE, Text, func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.coverage import COVERED_NAME, HIDDEN, told
from vllm_cost_meter.ledger.ends.run_time import RunTime
from vllm_cost_meter.ledger.queries.costs import CutCosts, stretch
from vllm_cost_meter.ledger.queries.cut import Cut
from vllm_cost_meter.ledger.queries.ended import LABELS, columns_read, count_ended, labels_of
from vllm_cost_meter.ledger.queries.tenants import tenant_facts
from vllm_cost_meter.ledger.rollups.reading import usage_at
from vllm_cost_meter.ledger.tables.given import given_rows
from vllm_cost_meter.ledger.tables.sums import CHARGE_AMOUNTS
from vllm_cost_meter.prices.cost import NO_QUANTITIES, Quantities
from vllm_cost_meter.records.snapshot import OTHER_ROWS
from vllm_cost_meter.reports.charges import ChargesKnown
from vllm_cost_meter.reports.facts import COUNTS, REQUESTS, UNALLOCATED, Ended, Facts, Key, Used
from vllm_cost_meter.reports.grammar import COVERED, LABEL, NO, TAG, YES, Question
from vllm_cost_meter.reports.request_row import PART_SUMS
from vllm_cost_meter.reports.tenant_details import tenant_details

# The name that no tenant has.
NAMELESS = ""
# The column of a dimension, if it has another name.
_COLUMN = {"status": "engine_status"}
# The JSON column that holds the names behind a prefix.
_WITHIN = {TAG: "tags", LABEL: "labels"}


@dataclass(frozen=True, slots=True)
class BilledUsage:
    """The usage of bills up to a cut: what is charged, and for rows by tenant other sums."""

    used: list[Used]
    sums: dict[str, dict[str, int]]


def read_facts(connection: Connection, cut: Cut, question: Question) -> Facts:
    """Return the facts at a cut, with the distinctions that a question needs."""
    dimensions = question.dimensions
    columns = tuple(dict.fromkeys(_column(name) for name in dimensions))
    usage = _usage(connection, cut, question, columns)
    ended = _ended(connection, cut, question, columns)
    labels = {run.run_id: _labels_asked(run, question) for run in cut.all_runs}
    facts = Facts(
        used=usage.used if cut.whose is None else [*usage.used, *_of_others(cut, question)],
        other_time=[
            Used(run.run_id, hour, (name, *labels[run.run_id]), ns)
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


def _labels_asked(run: RunTime, question: Question) -> Key:
    """Return a run's values of the labels that a question tells apart."""
    labels = run.prices.labels
    return tuple(labels.get(name.removeprefix(LABEL), UNALLOCATED) for name in question.labels)


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
    apart = question.tells_hours_apart
    by = ("hour", *columns) if apart else tuple(columns)
    ended = count_ended(connection, cut, by, question, _splits(cut, question))
    key_of = _key_of_values(question.dimensions, columns)
    return [
        Ended(values[0] if apart else None, key_of(values[1:] if apart else values), counts)
        for values, counts in ended.items()
    ]


def _splits(cut: Cut, question: Question) -> Sequence[int] | None:
    """Return the hours within a day at which facts must be kept apart; None means at all hours."""
    if question.tells_hours_apart and (
        "hour" in (question.step, *question.times) or question.zone is not UTC
    ):
        return None
    return cut.book.price_changes()


def _usage(
    connection: Connection, cut: Cut, question: Question, columns: Sequence[str]
) -> BilledUsage:
    more = PART_SUMS if question.is_by_tenant else ()
    amounts = dict.fromkeys(("prefill_ns", "decode_ns", "kv_block_ms", *CHARGE_AMOUNTS, *more))
    u = usage_at(cut, _splits(cut, question), columns_read(columns), [*amounts]).c
    known = {LABELS: labels_of(u.run_id), COVERED: told(u, question)}
    keys = [known[name] if name in known else u[name] for name in columns]
    groups = [
        COVERED_NAME if name == COVERED else key for name, key in zip(columns, keys, strict=True)
    ]
    apart = question.tells_hours_apart
    hours = [u.hour] if apart else stretch(u.hour, cut.book.price_changes())
    # Without a run there is no bill.
    if not (runs_by_price := cut.runs_by_price()):
        return BilledUsage([], {})
    stands = _standing(runs_by_price)
    asked = (
        select(
            *(stands.c.stands_for, u.hour if apart else func.min(u.hour)),
            *(func.sum(u.prefill_ns + u.decode_ns), func.sum(u.kv_block_ms)),
            *(*(func.sum(u[name]) for name in CHARGE_AMOUNTS), *keys),
            *(func.sum(u[name]) for name in more),
        )
        .join(stands, stands.c.run_id == u.run_id)
        .group_by(stands.c.stands_for, *hours, *groups)
    )
    # Different JSON texts of tags or labels may agree in the names that are asked for.
    spent: dict[tuple[str, int, Key], tuple[Quantities, ChargesKnown]] = {}
    sums: dict[str, dict[str, int]] = {}
    key_of = _key_of_values(question.dimensions, columns)
    for run_id, hour, gpu_time_ns, block_ms, known_ns, error_ns, *values in connection.execute(
        asked
    ):
        key = key_of(values)
        used, charges = spent.get((run_id, hour, key), (NO_QUANTITIES, ChargesKnown()))
        spent[run_id, hour, key] = (
            used + Quantities(int(gpu_time_ns), int(block_ms)),
            charges.plus(ChargesKnown(int(known_ns), int(error_ns))),
        )
        if more:
            details = sums.setdefault(_details_name_of(key, question), dict.fromkeys(more, 0))
            for name, amount in zip(more, values[len(columns) :], strict=True):
                details[name] += int(amount)
    return BilledUsage(
        [
            Used(*key, used.gpu_time_ns, used.kv_block_ms, charges)
            for key, (used, charges) in spent.items()
        ],
        sums,
    )


def _standing(runs_by_price: Mapping[str, str]) -> CTE:
    """Return a table of the run that stands for each run."""
    columns = [("run_id", Text()), ("stands_for", Text())]
    return given_rows("standing", columns, runs_by_price.items())


def _column(dimension: str) -> str:
    for kind, name in _WITHIN.items():
        if dimension.startswith(kind):
            return name
    return _COLUMN.get(dimension, dimension)


def _key_of_values(
    dimensions: Sequence[str], columns: Sequence[str]
) -> Callable[[Sequence[Any]], Key]:
    """Return a function from the values of a row's columns to those of the dimensions."""
    places = [columns.index(_column(dimension)) for dimension in dimensions]
    names = [
        name if kind + colon in _WITHIN else None
        for kind, colon, name in (dimension.partition(":") for dimension in dimensions)
    ]
    wanted = list(zip(places, names, strict=True))

    def key_of(values: Sequence[Any]) -> Key:
        found = (
            values[place] if name is None else _texts(values[place]).get(name)
            for place, name in wanted
        )
        return tuple(UNALLOCATED if value is None else str(value) for value in found)

    return key_of


# Rows repeat the tags of a few tenants and the labels of a few runs.
@lru_cache(1_000)
def _texts(text: str | None) -> Mapping[str, Any]:
    texts: Mapping[str, Any] = json.loads(text) if text else {}
    return texts
