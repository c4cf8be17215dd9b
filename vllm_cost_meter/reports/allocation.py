"""The allocation of GPU time and cost to the rows of a report, with and without idle time.

Input are the ledger's facts: GPU time by run and hour. Output are rows.

1. Usage is kept in cells: one for each combination of values that the question distinguishes.
2. Engine time that the idle policy shares goes into a pool, one for each piece of the report (the
   window, or one step). The pool is divided among tenants, and a tenant's share among its cells, by
   GPU time. A tenant that carries a share but used nothing gets a row for it.
3. Cells are added up to rows.
4. Only now is money rounded: the total to the nano-USD, then the steps by largest remainder, then
   the rows of each step. Accumulated steps are added up exactly and rounded once; such a row may
   differ by some nano-USD from the sum of its rounded steps in another answer.

Core: standard library only.

Invariant: GPU time and money are exact fractions until step 4, which rounds all rows together,
shown or hidden. So rows add up to their step and steps to the whole, with and without idle time,
whatever the aggregation and the policy. A filter of rows changes none.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from vllm_cost_meter.prices.cost import Rates
from vllm_cost_meter.records.owner import OWN
from vllm_cost_meter.records.snapshot import OTHER_ROWS
from vllm_cost_meter.reports.charges import NO_CHARGES, ChargesKnown
from vllm_cost_meter.reports.engine_labels import LabelColumns
from vllm_cost_meter.reports.facts import (
    COUNTS,
    NOTHING,
    NOTHING_RAN,
    REQUESTS,
    UNALLOCATED,
    Amount,
    Facts,
    Hour,
    Key,
    PriceOf,
    Unpriced,
    WhyNone,
    earliest,
    no_price,
)
from vllm_cost_meter.reports.grammar import COVERED, YES, Question
from vllm_cost_meter.reports.idle import SHARED_CLASSES
from vllm_cost_meter.units.calendar import period_name, period_of
from vllm_cost_meter.units.money import format_usd
from vllm_cost_meter.units.rounding import exact_sum, largest_remainder, rounded_known
from vllm_cost_meter.units.time import NS_PER_HOUR, rfc3339


@dataclass(slots=True)
class Row:
    """The sum of some cells: usage, and the share of idle time.

    For a class of engine time the share is negative: the part that tenants carry.
    """

    class_name: str
    key: Key
    used: Amount = NOTHING
    share: Amount = NOTHING
    counts: list[int] = field(default_factory=lambda: [0] * len(COUNTS))
    charges: ChargesKnown = ChargesKnown()
    shown: bool = True

    @property
    def whole(self) -> Amount:
        """Return the sum of usage and share."""
        return self.used.plus(self.share)

    def add(self, cell: "Row") -> None:
        """Add a cell's usage, share, counts and charges."""
        self.used = self.used.plus(cell.used)
        self.share = self.share.plus(cell.share)
        self.counts = [a + b for a, b in zip(self.counts, cell.counts, strict=True)]
        self.charges = self.charges.plus(cell.charges)


@dataclass(frozen=True, slots=True)
class Piece:
    """The rows for a span of hours, exact, in the order in which they are shown; None is open.

    `is_priced` says whether any of its use has a price. If so, a row without use costs 0;
    otherwise its cost is unknown.
    """

    from_hour: int | None
    to_hour: int | None
    rows: tuple[Row, ...]
    is_priced: bool

    def cost(self, amount: Amount) -> Fraction | None:
        """Return an amount's exact cost in nano-USD; None if a price is missing."""
        return amount.nanousd if self.is_priced and amount.unpriced is None else None

    def kv_cost(self, amount: Amount) -> Fraction | None:
        """Return the exact cost of an amount's KV residency; None if a price is missing."""
        return amount.kv_nanousd if self.is_priced and amount.unpriced is None else None

    def why_no_cost(self, amount: Amount, why: WhyNone) -> str | None:
        """Return the reason why an amount has no cost; None if it has one."""
        if self.cost(amount) is not None:
            return None
        missing = amount.unpriced or earliest(row.whole.unpriced for row in self.rows)
        return NOTHING_RAN if missing is None else why(missing.run_id, missing.hour)


class _Costs(NamedTuple):
    """The rounded costs of a piece's rows: of usage, of its KV residency alone, and with idle."""

    usage: Sequence[int | None]
    kv: Sequence[int | None]
    whole: Sequence[int | None]


class _Prices:
    """A cache of the price for each run and hour.

    Use is added up by price, so money is computed once per price and not once per hour. A price
    that the question supposes is that of the GPU-hour alone: KV blocks keep theirs.
    """

    def __init__(self, question: Question, price_of: PriceOf) -> None:
        self._what_if = question.price
        self._price_of = price_of
        self._known: dict[tuple[str, Hour], Rates | Unpriced] = {}

    def of(self, run_id: str, hour: Hour) -> Rates | Unpriced:
        price = self._known.get((run_id, hour))
        if price is None:
            found = self._price_of(run_id, hour)
            if self._what_if is not None:
                of_blocks = Fraction(0) if found is None else found.usd_per_kv_block_hour
                found = Rates(Fraction(self._what_if), of_blocks)
            price = Unpriced.of(run_id, hour) if found is None else found
            self._known[run_id, hour] = price
        return price


class _Cell(NamedTuple):
    """The key of a cell: its class, and its values for all columns that the question names."""

    class_name: str
    dimensions: Key
    times: Key


class _Cells:
    """The cells of one piece: use by price, and counts of requests and tokens."""

    def __init__(self) -> None:
        # GPU-ns, and KV cache blocks x ms.
        self.spent: dict[_Cell, Counter[Rates | Unpriced]] = defaultdict(Counter)
        self.held: dict[_Cell, Counter[Rates | Unpriced]] = defaultdict(Counter)
        self.counts: dict[_Cell, list[int]] = {}
        self.charges: dict[_Cell, ChargesKnown] = defaultdict(ChargesKnown)

    @property
    def is_priced(self) -> bool:
        """Whether any use in the cells has a price."""
        return any(
            amount and isinstance(price, Rates)
            for used in (*self.spent.values(), *self.held.values())
            for price, amount in used.items()
        )

    def rows(self) -> dict[_Cell, Row]:
        """Return the cells with their cost, before any idle time is shared."""
        found = {}
        for cell in self.spent.keys() | self.counts.keys():
            counts = self.counts.get(cell, [0] * len(COUNTS))
            used = (
                Amount.of(self.spent[cell], self.held.get(cell)) if cell in self.spent else NOTHING
            )
            found[cell] = Row(cell.class_name, (), used, NOTHING, counts, self.charges[cell])
        return dict(sorted(found.items()))


def report(
    facts: Facts, question: Question, price_of: PriceOf, why: WhyNone = no_price
) -> dict[str, Any]:
    """Return the answer to a question, ready for JSON; `why` explains a missing price."""
    found = pieces(facts, question, price_of)
    usage_costs = _rounded_costs(found, lambda piece, row: piece.cost(row.used))
    kv_costs = _rounded_costs(found, lambda piece, row: piece.kv_cost(row.used))
    costs = _rounded_costs(found, lambda piece, row: piece.cost(row.whole))
    series = [
        _series(piece, facts, question, why, _Costs(usage, blocks, whole))
        for piece, usage, blocks, whole in zip(found, usage_costs, kv_costs, costs, strict=True)
    ]
    if question.only is not None:
        # An empty piece would show a tenant that others used something at that time.
        series = [piece for piece in series if piece["rows"]]
    return {
        "aggregate": list(question.aggregate),
        "covers": question.covers if question.names_tenants else None,
        "engines": question.engines.text,
        "idle": question.idle.text,
        "what_if_usd_per_gpu_hour": None if question.price is None else f"{question.price:f}",
        **({} if question.only is not None else _whole(facts, question, price_of)),
        "series": series,
    }


def _rounded_costs(
    found: Sequence[Piece], cost_of: Callable[[Piece, Row], Fraction | None]
) -> list[list[int | None]]:
    """Round all costs from the total down, so that rows and pieces add up to it."""
    exact = [[cost_of(piece, row) for row in piece.rows] for piece in found]
    totals = largest_remainder(
        [exact_sum(cost for cost in costs if cost is not None) for costs in exact]
    )
    return [rounded_known(costs, total) for costs, total in zip(exact, totals, strict=True)]


def _whole(facts: Facts, question: Question, price_of: PriceOf) -> dict[str, Any]:
    exact = wall_cost(facts, question, price_of)
    cost = None if exact is None else round(exact)
    of_blocks = kv_cost(facts, question, price_of)
    kv = None if of_blocks is None else round(of_blocks)
    return {
        "wall_gpu_ns": facts.wall_gpu_ns,
        "wall_cost_nanousd": cost,
        "wall_cost_usd": format_usd(cost),
        "kv_cost_nanousd": kv,
        "kv_cost_usd": format_usd(kv),
        "adds_up": facts.difference_ns == 0,
        "difference_ns": facts.difference_ns,
        "without_totals_ns": facts.without_totals_ns,
    }


def pieces(facts: Facts, question: Question, price_of: PriceOf) -> list[Piece]:
    """Return the rows for the window, or for each step that has any usage or engine time."""
    by_piece = _cells(facts, question, price_of) or {
        (question.from_hour, question.to_hour): _Cells()
    }
    found = []
    for (low, high), cells in sorted(by_piece.items(), key=lambda item: item[0][0] or 0):
        shared = _shared(cells.rows(), question)
        found.append(Piece(low, high, tuple(_rows(shared, question)), cells.is_priced))
    if question.accumulate and question.step is not None:
        together: dict[tuple[str, Key, bool], Row] = {}
        for row in (row for piece in found for row in piece.rows):
            key = (row.class_name, row.key, row.shown)
            together.setdefault(key, Row(row.class_name, row.key, shown=row.shown)).add(row)
        rows = sorted(together.values(), key=_order(question))
        is_priced = any(piece.is_priced for piece in found)
        return [Piece(question.from_hour, question.to_hour, tuple(rows), is_priced)]
    return found


def wall_cost(facts: Facts, question: Question, price_of: PriceOf) -> Fraction | None:
    """Return the exact cost of the engines' hours in nano-USD; None if a price is missing."""
    prices = _Prices(question, price_of)
    spent: Counter[Rates | Unpriced] = Counter()
    for one in facts.wall:
        spent[prices.of(one.run_id, one.hour)] += one.gpu_time_ns
    amount = Amount.of(spent)
    return None if amount.unpriced or not amount.gpu_time_ns else amount.nanousd


def kv_cost(facts: Facts, question: Question, price_of: PriceOf) -> Fraction | None:
    """Return the exact cost of all KV residency in nano-USD; None if a price is missing.

    It is no part of `wall_cost`: blocks are charged on top of the engines' hours.
    """
    prices = _Prices(question, price_of)
    held: Counter[Rates | Unpriced] = Counter()
    for one in facts.used:
        held[prices.of(one.run_id, one.hour)] += one.kv_block_ms
    amount = Amount.of({}, held)
    return None if amount.unpriced else amount.kv_nanousd


def _cells(
    facts: Facts, question: Question, price_of: PriceOf
) -> dict[tuple[int | None, int | None], _Cells]:
    by_piece: dict[tuple[int | None, int | None], _Cells] = defaultdict(_Cells)
    prices = _Prices(question, price_of)
    labels = LabelColumns(question.dimensions, question.labels)
    where: dict[Hour, tuple[_Cells, Key]] = {}

    def place(hour: Hour) -> tuple[_Cells, Key]:
        if hour not in where:
            # Time without an hour occurs only if no column is a time.
            times = tuple(period_name(hour, unit, question.zone) for unit in question.times if hour)
            where[hour] = (by_piece[_piece(hour, question)], times)
        return where[hour]

    for is_usage, spent in ((True, facts.used), (False, facts.other_time)):
        for run_id, hour, key, gpu_time_ns, kv_block_ms, charges in spent:
            cells, times = place(hour)
            name = REQUESTS if is_usage else key[0]
            dimensions = key if is_usage else labels.of_class(name, key[1:])
            cell, price = _Cell(name, dimensions, times), prices.of(run_id, hour)
            cells.spent[cell][price] += gpu_time_ns
            if kv_block_ms:
                cells.held[cell][price] += kv_block_ms
            if is_usage:
                cells.charges[cell] = cells.charges[cell].plus(charges)
    for hour, key, counts in facts.ended:
        cells, times = place(hour)
        known = cells.counts.setdefault(_Cell(REQUESTS, key, times), [0] * len(COUNTS))
        known[:] = (a + b for a, b in zip(known, counts, strict=True))
    return by_piece


def _piece(hour: Hour, question: Question) -> tuple[int | None, int | None]:
    if question.step is None or hour is None:
        return question.from_hour, question.to_hour
    low, high = period_of(hour, question.step, question.zone)
    return (
        low if question.from_hour is None else max(low, question.from_hour),
        high if question.to_hour is None else min(high, question.to_hour),
    )


def _shared(cells: dict[_Cell, Row], question: Question) -> dict[_Cell, Row]:
    """Divide the pool of shared time among the cells, by the idle policy."""
    used_ns: Counter[str] = Counter()
    # By the time and the labels of the engines that were idle.
    pools: dict[tuple[Key, Key], Amount] = defaultdict(Amount)
    columns = LabelColumns(question.dimensions, question.labels)
    for cell, row in cells.items():
        if cell.class_name == REQUESTS:
            used_ns[cell.dimensions[0]] += int(row.used.gpu_time_ns)
        elif cell.class_name in SHARED_CLASSES:
            place = cell.times, columns.of(cell.dimensions)
            pools[place] = pools[place].plus(row.used)
    shares = question.idle.shares(used_ns)
    pool = NOTHING
    for amount in pools.values():
        pool = pool.plus(amount)
    taken = -sum(shares.values(), Fraction(0))
    for cell, row in cells.items():
        tenant = cell.dimensions[0]
        if cell.class_name in SHARED_CLASSES:
            row.share = row.used.times(taken)
        elif cell.class_name == REQUESTS and used_ns[tenant] and tenant in shares:
            part = row.used.gpu_time_ns / used_ns[tenant]
            row.share = pool.times(shares[tenant] * part)
    for tenant, share in shares.items():
        if used_ns[tenant]:
            continue
        others = (UNALLOCATED,) * (len(question.dimensions) - 1)
        for (times, labels), amount in pools.items():
            # The tenant may already have a cell here, for requests that took no time.
            dimensions = columns.put_into((tenant, *others), labels)
            cell = _Cell(REQUESTS, dimensions, times)
            cells.setdefault(cell, Row(REQUESTS, ())).share = amount.times(share)
    return cells


def _rows(cells: Mapping[_Cell, Row], question: Question) -> list[Row]:
    """Add cells up to rows, shown and hidden ones apart; each class has a row, even if it is 0."""
    place = {name: i for i, name in enumerate((*question.dimensions, *question.times))}
    found: dict[tuple[str, Key, bool], Row] = {}

    others = {name: any_of for name, any_of in question.row_conditions.items() if name != "tenant"}

    def is_meant(class_name: str, values: Key) -> bool:
        covered = values[place[COVERED]] if question.tells_coverage else UNALLOCATED
        if class_name != REQUESTS:
            named = question.conditions.get("tenant", (values[0],))
            return question.only is None and values[0] in named
        # Of a tenant that used nothing, the name alone can say it.
        return covered == YES or (covered == UNALLOCATED and question.includes(values[0]))

    def row_of(class_name: str, values: Key) -> Row:
        shown = is_meant(class_name, values) and all(
            values[place[name]] in any_of for name, any_of in others.items()
        )
        key = tuple(values[place[name]] for name in question.aggregate)
        return found.setdefault((class_name, key, shown), Row(class_name, key, shown=shown))

    for cell, row in cells.items():
        row_of(cell.class_name, (*cell.dimensions, *cell.times)).add(row)
    if not question.times:
        columns = LabelColumns(question.dimensions, question.labels)
        for labels in {columns.of(cell.dimensions) for cell in cells} or {columns.unlabelled()}:
            for name in OTHER_ROWS:
                row_of(name, columns.of_class(name, labels))
    return sorted(found.values(), key=_order(question))


def _order(question: Question) -> Callable[[Row], tuple[Any, ...]]:
    """Return the sort key of rows: usage by time and GPU time, largest first; then the classes."""
    times = [i for i, name in enumerate(question.aggregate) if name in question.times]

    def order(row: Row) -> tuple[Any, ...]:
        rank = 0 if row.class_name == REQUESTS else 1 + OTHER_ROWS.index(row.class_name)
        return (
            min(rank, 1),
            [_instant(row.key[i]) for i in times],
            rank,
            -int(row.used.gpu_time_ns),  # used time is whole
            row.key,
            row.shown,
        )

    return order


# Rows repeat the same few periods.
@lru_cache(1_000)
def _instant(period: str) -> datetime:
    """Return the instant at which a period begins; as text, hours with two offsets sort wrongly."""
    instant = datetime.fromisoformat(f"{period}-01" if len(period) == len("2026-11") else period)
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)


def _series(
    piece: Piece,
    facts: Facts,
    question: Question,
    why: WhyNone,
    costs: _Costs,
) -> dict[str, Any]:
    """Return a piece as answers show it; `costs` are those of all its rows."""
    shares = largest_remainder([row.share.gpu_time_ns for row in piece.rows])
    # Totals cover hidden rows too, except for a tenant, who sees its own rows only.
    counted = [
        (int(row.used.gpu_time_ns), cost)
        for row, cost in zip(piece.rows, costs.whole, strict=True)
        if question.only is None or row.shown
    ]
    known = [cost for _, cost in counted if cost is not None]
    total = sum(known) if len(known) == len(counted) else None
    return {
        **{
            name: None if hour is None else rfc3339(hour * NS_PER_HOUR)
            for name, hour in (("from", piece.from_hour), ("to", piece.to_hour))
        },
        "gpu_time_ns": sum(gpu_time_ns for gpu_time_ns, _ in counted),
        "cost_nanousd": total,
        "cost_usd": format_usd(total),
        "rows": [
            {
                **_shown(row, question, share_ns),
                "usage_cost_nanousd": usage_cost,
                "usage_cost_usd": format_usd(usage_cost),
                "kv_cost_nanousd": kv_cost,
                "kv_cost_usd": format_usd(kv_cost),
                "cost_nanousd": cost,
                "cost_usd": format_usd(cost),
                "cost_reason": None if cost is not None else piece.why_no_cost(row.whole, why),
                **_covers(row, question),
                **(facts.details_of(row.key[0]) if facts.details else {}),
            }
            for row, share_ns, usage_cost, kv_cost, cost in zip(
                piece.rows, shares, *costs, strict=True
            )
            if row.shown
        ],
    }


def _covers(row: Row, question: Question) -> dict[str, str | None]:
    """Return what a row's tenant covers: itself alone, so that rows add up."""
    if "tenant" not in question.aggregate:
        return {}
    return {"covers": OWN if row.class_name == REQUESTS else None}


def _shown(row: Row, question: Question, share_ns: int) -> dict[str, Any]:
    counts: Sequence[int | None] = row.counts
    charges: Mapping[str, Any] = row.charges.as_dict()
    if row.class_name != REQUESTS:
        counts, charges = (0, *(None for _ in COUNTS[1:])), NO_CHARGES
    return {
        "class": row.class_name,
        **dict(zip(question.aggregate, row.key, strict=True)),
        **dict(zip(COUNTS, counts, strict=True)),
        "gpu_time_ns": int(row.used.gpu_time_ns),
        "idle_share_ns": share_ns,
        **charges,
    }
