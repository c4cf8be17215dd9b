"""A tenant's monthly statement: lines by model and day that add up to the cent.

The statements of all tenants are parts of one whole: the month's wall time x price, KV residency
x price, and costs beside these that were declared or billed. KV residency has lines of its own,
beside those of the GPU time of the same model and day. Rounding goes from the top down:

1. The whole is rounded to the cent.
2. It is divided by largest remainder: a total for each tenant, and a rest that nobody carries.
3. Each tenant's total is divided among its lines, and each line into usage and idle share.

If all lines were rounded at once, they would add up too. But a tenant with many small lines could
then be whole cents away from its exact amount. Core: standard library only.

Invariant: all lines, those that nobody carries included, add up to the whole to the cent. Each line
and each tenant's total is less than one cent from its exact amount.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import tzinfo
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple

from vllm_cost_meter.prices.book import described
from vllm_cost_meter.prices.cost import MS_PER_HOUR
from vllm_cost_meter.prices.overheads import WHY_UNKNOWN
from vllm_cost_meter.records.engine import OPERATOR, VICTIM
from vllm_cost_meter.records.owner import OWN, TenantScope
from vllm_cost_meter.records.snapshot import OTHER_ROWS
from vllm_cost_meter.reports.allocation import Piece, Row, kv_cost, pieces, wall_cost
from vllm_cost_meter.reports.charges import NO_CHARGES, ChargesKnown, charges_of_rows
from vllm_cost_meter.reports.engine_labels import ALL_ENGINES, EngineFilter
from vllm_cost_meter.reports.facts import (
    COUNTS,
    NOTHING,
    REQUESTS,
    Amount,
    Facts,
    PriceOf,
    WhyNone,
    no_price,
)
from vllm_cost_meter.reports.grammar import LABEL, Question
from vllm_cost_meter.reports.idle import IdlePolicy
from vllm_cost_meter.units.calendar import month_hours
from vllm_cost_meter.units.money import NANOUSD_PER_USD, decimal_text
from vllm_cost_meter.units.rounding import exact_sum, largest_remainder, rounded_known
from vllm_cost_meter.units.text import quoted
from vllm_cost_meter.units.time import NS_PER_HOUR, NS_PER_SECOND

CURRENCY = "USD"
NANOUSD_PER_CENT = 10_000_000
# The kinds of lines: GPU time of a model on a day, its KV residency, a declared cost, a class of
# engine time.
USAGE, KV, OVERHEAD, CLASS = "usage", "kv", "overhead", "class"
# The amounts of a line: without idle time, the share of idle time, and both together.
AMOUNTS = ("usage", "idle_share", "amount")
# The message about an unknown tenant names at most so many known ones.
SHOWN_MAX = 10


@dataclass(frozen=True, slots=True)
class OverheadCost:
    """A cost beside price x time: declared (power, space, staff), or the rest of a bill.

    `nanousd` is exact. It is negative if a bill is lower than price x time, and None if unknown.
    """

    name: str
    source: str
    nanousd: Fraction | None


@dataclass(slots=True)
class _Line:
    """A line with exact amounts, and its cents once they are rounded.

    A line of a class of engine time has no tenant and no day. A line of KV residency has no time:
    its quantity is `used.kv_block_ms`.
    """

    kind: str
    tenant: str | None
    day: str | None
    item: str
    used: Amount
    share: Amount
    # Nano-USD in all, of usage and of the idle share; None if unknown.
    costs: tuple[Fraction | None, Fraction | None, Fraction | None]
    counts: Sequence[int | None] = (None,) * len(COUNTS)
    charges: ChargesKnown = ChargesKnown()
    source: str | None = None
    # The reason why the cost is unknown.
    reason: str | None = None
    cents: int | None = None
    # Whether the line is of the tenants that the statement is for.
    shown: bool = True

    def order(self) -> tuple[bool, str, str, bool]:
        """Return the sort key within a tenant: by day and model, declared costs last."""
        return self.kind == OVERHEAD, self.day or "", self.item, self.kind == KV

    def as_dict(self, share_ns: int) -> dict[str, Any]:
        """Return the line as answers show it."""
        _, usage, share = self.costs
        if self.cents is not None and usage is not None and share is not None:
            cells: Sequence[int | None] = largest_remainder(
                [usage, share], self.cents, NANOUSD_PER_CENT
            )
        else:
            cells = [None if c is None else round(c / NANOUSD_PER_CENT) for c in (usage, share)]
        is_time = self.kind in (USAGE, CLASS)
        shown = {
            "kind": self.kind,
            "tenant": self.tenant,
            "day": self.day,
            "item": self.item,
            "source": self.source,
            **dict(zip(COUNTS, self.counts, strict=True)),
            "gpu_time_ns": int(self.used.gpu_time_ns) if is_time else None,
            "idle_share_ns": share_ns if is_time else None,
            **(self.charges.as_dict() if self.kind == USAGE else NO_CHARGES),
            **(_blocks(self.used) if self.kind == KV else dict.fromkeys(_BLOCKS)),
            "usage_cents": cells[0],
            "idle_share_cents": cells[1],
            "amount_cents": self.cents,
        }
        covers = None if self.tenant is None else OWN
        return {**_with_usd(shown), "cost_reason": self.reason, "covers": covers}


# The quantity and the price of a line of KV residency; null in others.
_BLOCKS = ("kv_block_ms", "usd_per_kv_block_hour")


def _blocks(used: Amount) -> dict[str, Any]:
    """Return the quantity, and the price: the mean where it changed within the day."""
    mean = used.kv_nanousd * MS_PER_HOUR / (used.kv_block_ms * NANOUSD_PER_USD)
    return dict(zip(_BLOCKS, (int(used.kv_block_ms), decimal_text(mean)), strict=True))


def month_question(
    month: str,
    zone: tzinfo,
    idle: IdlePolicy,
    whose: TenantScope | None = None,
    engines: EngineFilter = ALL_ENGINES,
) -> Question:
    """Return the report question behind a statement, for the tenant that is meant or for all.

    Raises ValueError for an invalid month.
    """
    from_hour, to_hour = month_hours(month, zone)
    chosen = {f"{LABEL}{name}": values for name, values in engines.allowed.items()}
    columns = ("tenant", "model", "day")
    asked = Question(from_hour, to_hour, zone, columns, idle=idle, conditions=chosen)
    if whose is None:
        return asked
    conditions = {"tenant": frozenset([whose.tenant]), **chosen}
    return replace(asked, conditions=conditions, covers=whose.covers)


def _whose(asked: Question) -> TenantScope | None:
    """Return the tenant that a statement is for; None if it is for all."""
    return None if asked.asked is None else asked.asked[0]


def statement(
    facts: Facts,
    asked: Question,
    price_of: PriceOf,
    *,
    overhead: Sequence[OverheadCost] = (),
    why: WhyNone = no_price,
    now_ns: int,
) -> dict[str, Any]:
    """Return one tenant's statement, or that of all tenants with the grand total.

    `asked` comes from `month_question`, and `facts` distinguish what it asks for. `why` explains a
    missing price. Raises ValueError for a tenant without a line.
    """
    (piece,) = pieces(facts, asked, price_of)
    groups = _groups(piece, asked, overhead, why)
    lines = _lines(groups)
    whose = _whose(asked)
    by_tenant: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        if line["tenant"] is not None:
            by_tenant.setdefault(line["tenant"], []).append(line)
    in_flight_ns = sum(one.gpu_time_ns for one in facts.other_time if one.key == ("in_flight",))
    is_over = asked.to_hour is not None and now_ns >= asked.to_hour * NS_PER_HOUR
    answer = {
        "tenant": None if whose is None else whose.tenant,
        "covers": None if whose is None else whose.covers,
        "engines": asked.engines.text,
        "currency": CURRENCY,
        # One tenant's statement must not show the shares that others have reserved.
        "idle": asked.idle.text if whose is None else asked.idle.name,
        "taxes": "none",
        "is_over": is_over,
        "in_flight_ns": in_flight_ns,
        "final": is_over and not in_flight_ns,
        "adds_up": facts.difference_ns == 0,
        "difference_ns": facts.difference_ns,
        "without_totals_ns": facts.without_totals_ns,
    }
    if whose is not None:
        flags = [line.shown for group in groups for line in group]
        lines = [line for line, shown in zip(lines, flags, strict=True) if shown]
        if not lines:
            known = ", ".join(map(repr, islice(by_tenant, SHOWN_MAX))) or "none"
            raise ValueError(
                f"tenant: expected one with lines in it ({known}), got {quoted(whose.tenant)}"
            )
        return {**answer, "lines": lines, "total": _total(lines)}
    return {
        **answer,
        "lines": lines,
        "tenants": [
            {"tenant": name, "covers": OWN, **_total(own)} for name, own in by_tenant.items()
        ],
        "total": _total(lines),
        "whole": _whole(facts, asked, price_of, overhead),
    }


def notes(answer: Mapping[str, Any]) -> list[str]:
    """Return the notes below a statement: method, idle policy, prices, bills and audit.

    `answer` is what `statement` returns, with `window`, `taken_at`, `methods`,
    `preemption_paid_by`, `prices` and `billed`.
    """
    seconds = f"{answer['in_flight_ns'] / NS_PER_SECOND:.6f}"
    methods = ", ".join(answer["methods"]) or "no engine ran"
    found = [
        "GPU time is measured: each engine step's time is split among the requests in it "
        f"({methods}; docs/explanation/attribution.md)",
        f"idle time: {_IDLE_NOTES[answer['idle'].partition(':')[0]]} (policy {answer['idle']})",
        f"days are those of {answer['window']['tz']}; each UTC hour is of the day in which it "
        "begins",
        *(f"price: {described(price)}" for price in answer["prices"]),
        "rounded to the cent by largest remainder; tokens are of requests that ended on the day",
    ]
    if OPERATOR in answer["preemption_paid_by"]:
        some = " in runs that began so" if VICTIM in answer["preemption_paid_by"] else ""
        found.append(
            "time to compute again what preemptions threw away is no tenant's usage"
            f"{some}: it is in the class __recomputed__"
        )
    if any(line["kind"] == KV for line in answer["lines"]):
        found.append(
            "lines of KV cache: blocks x hours, charged on top of GPU time; the price is the mean"
            " where it changed within the day"
        )
    if not answer["prices"]:
        found.append("price: none, so no cost is known")
    if billed := answer.get("billed"):
        found.append(
            f"bills: {billed['covered_hours']:g} hours of the month count at what was billed;"
            f" {billed['unobserved_hours']:g} hours of resources were not observed,"
            f" {billed['resets']} counters reset"
        )
    if not answer["is_over"]:
        found.append(f"preliminary: the month is not over; figures are of {answer['taken_at']}")
    if answer["in_flight_ns"]:
        found.append(f"preliminary: {seconds} GPU-seconds of requests without a bill yet")
    if answer["engines"] is not None:
        found.append(
            f"engines: those of {answer['engines']} alone; declared costs and the provider's bills"
            " are of all engines, and in no line"
        )
    if answer["without_totals_ns"]:
        known = f"{answer['without_totals_ns'] / NS_PER_SECOND:.6f}"
        found.append(
            f"{known} GPU-seconds are of runs of which only the bills are known: their idle time is"
            " in no line"
        )
    balanced = "difference 0 ns: lines and classes are all of wall time x GPUs"
    missing = f"DOES NOT ADD UP: {answer['difference_ns']} ns of wall time x GPUs are missing"
    return [*found, f"audit: {balanced if answer['adds_up'] else missing}"]


_IDLE_NOTES = {
    "none": "not charged to tenants",
    "proportional": "charged in proportion to GPU time used",
    "even": "charged evenly to the tenants that used something",
    "reserved": "charged by reserved shares",
    "owner": "charged to one tenant",
}


def _lines(groups: Sequence[Sequence[_Line]]) -> list[dict[str, Any]]:
    """Return all lines as answers show them, rounded from the whole down."""
    exact = [_sum(line.costs[0] for line in group) for group in groups]
    for group, cents in zip(groups, _round_cents(exact), strict=True):
        costs = [line.costs[0] for line in group]
        for line, own in zip(group, _round_cents(costs, cents), strict=True):
            line.cents = own
    lines = [line for group in groups for line in group]
    shares = largest_remainder([line.share.gpu_time_ns for line in lines])
    return [line.as_dict(share_ns) for line, share_ns in zip(lines, shares, strict=True)]


def _whole(
    facts: Facts, asked: Question, price_of: PriceOf, overhead: Sequence[OverheadCost]
) -> dict[str, Any]:
    """Return what the lines must add up to: wall time and KV residency x price, and overhead."""
    wall, blocks, *others = _round_cents(
        [
            wall_cost(facts, asked, price_of),
            kv_cost(facts, asked, price_of),
            *(cost.nanousd for cost in overhead),
        ]
    )
    cents = _sum_cents([wall, blocks, *others])
    return {
        "wall_gpu_ns": facts.wall_gpu_ns,
        "wall_cents": wall,
        "kv_cents": blocks,
        "overhead": [
            {"name": cost.name, "source": cost.source, "cents": own}
            for cost, own in zip(overhead, others, strict=True)
        ],
        "amount_cents": cents,
        "amount_usd": format_cents(cents),
    }


def _total(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sums over lines; an amount is None if that of one line is unknown."""
    lines = list(lines)
    counts = (*COUNTS, "gpu_time_ns", "idle_share_ns", "kv_block_ms")
    sums: dict[str, Any] = {
        name: sum(line[name] for line in lines if line[name] is not None) for name in counts
    }
    sums |= charges_of_rows(lines)
    for name in AMOUNTS:
        sums[f"{name}_cents"] = _sum_cents(line[f"{name}_cents"] for line in lines)
    return _with_usd(sums)


def _groups(
    piece: Piece, asked: Question, overhead: Sequence[OverheadCost], why: WhyNone
) -> list[list[_Line]]:
    """Return the lines of each tenant, by name; then each line that nobody carries by itself."""
    used_ns: Counter[_Group] = Counter()
    tenants: dict[_Group, list[_Line]] = defaultdict(list)
    classes = {name: Row(name, ()) for name in OTHER_ROWS}
    for row in piece.rows:
        if row.class_name != REQUESTS:
            classes[row.class_name].add(row)
            continue
        tenant, model, day = row.key
        group = _Group(tenant, row.shown)
        used_ns[group] += int(row.used.gpu_time_ns)
        tenants[group].append(_line(piece, row, why, USAGE, model, tenant, day))
        if row.used.kv_nanousd:
            tenants[group].append(_kv_line(piece, row, why))
    shares = _shares(used_ns, asked)
    for group, share in shares.items():
        tenants[group] += [_overhead_line(cost, share, group.tenant) for cost in overhead]
    for group, lines in tenants.items():
        for line in lines:
            line.shown = group.shown
    rest = 1 - sum(shares.values(), Fraction(0))
    nobodys = [
        *([_line(piece, row, why, CLASS, f"__{name}__")] for name, row in classes.items()),
        *([_overhead_line(cost, rest, None)] for cost in overhead if rest),
    ]
    for (line,) in nobodys:
        line.shown = _whose(asked) is None
    return [*(sorted(tenants[name], key=_Line.order) for name in sorted(tenants)), *nobodys]


class _Group(NamedTuple):
    """The lines of a tenant, as far as they are of the tenants that the statement is for.

    A tenant that got another parent within the month may have lines of both kinds.
    """

    tenant: str
    shown: bool


def _shares(used_ns: Mapping[_Group, int], asked: Question) -> dict[_Group, Fraction]:
    """Return each group's part of shared costs; a tenant's part is divided by GPU time."""
    of_tenants: Counter[str] = Counter()
    by_tenant: dict[str, list[_Group]] = defaultdict(list)
    for group, ns in used_ns.items():
        of_tenants[group.tenant] += ns
        by_tenant[group.tenant].append(group)
    found: dict[_Group, Fraction] = {}
    for tenant, share in asked.idle.shares(of_tenants).items():
        groups = by_tenant.get(tenant, [])
        if not of_tenants[tenant]:
            found[groups[0] if groups else _Group(tenant, asked.includes(tenant))] = share
            continue
        for group in groups:
            found[group] = share * Fraction(used_ns[group], of_tenants[tenant])
    return found


def _line(
    piece: Piece,
    row: Row,
    why: WhyNone,
    kind: str,
    item: str,
    tenant: str | None = None,
    day: str | None = None,
) -> _Line:
    amounts = (row.whole.time, row.used.time, row.share)
    cost, usage, share = (piece.cost(amount) for amount in amounts)
    counts: Sequence[int | None] = row.counts if kind == USAGE else (None,) * len(COUNTS)
    reason = piece.why_no_cost(row.whole, why)
    costs = (cost, usage, share)
    return _Line(
        *(kind, tenant, day, item, row.used, row.share, costs, counts, row.charges), reason=reason
    )


def _kv_line(piece: Piece, row: Row, why: WhyNone) -> _Line:
    tenant, model, day = row.key
    cost, reason = piece.kv_cost(row.used), piece.why_no_cost(row.used, why)
    # Nobody carries another's blocks, so there is no idle share.
    costs = (cost, cost, None if cost is None else Fraction(0))
    return _Line(KV, tenant, day, model, row.used, NOTHING, costs, reason=reason)


def _overhead_line(cost: OverheadCost, share: Fraction, tenant: str | None) -> _Line:
    nanousd = None if cost.nanousd is None else cost.nanousd * share
    return _Line(
        OVERHEAD,
        tenant,
        None,
        cost.name,
        NOTHING,
        NOTHING,
        (nanousd, nanousd, Fraction(0)),
        source=cost.source,
        reason=WHY_UNKNOWN if nanousd is None else None,
    )


def _sum(costs: Iterable[Fraction | None]) -> Fraction | None:
    """Return the sum; None if one part is unknown."""
    costs = list(costs)
    return None if None in costs else exact_sum(c for c in costs if c is not None)


def _sum_cents(cents: Iterable[int | None]) -> int | None:
    cents = list(cents)
    return None if None in cents else sum(c for c in cents if c is not None)


def _round_cents(costs: Sequence[Fraction | None], cents: int | None = None) -> list[int | None]:
    return rounded_known(costs, cents, NANOUSD_PER_CENT)


def _with_usd(cents: Mapping[str, Any]) -> dict[str, Any]:
    """Return the amounts in cents, and the same in USD."""
    usd = {f"{name}_usd": format_cents(cents[f"{name}_cents"]) for name in AMOUNTS}
    return {**cents, **usd}


def format_cents(cents: int | None) -> str | None:
    """Return cents as USD with two places, e.g. "12.30"."""
    if cents is None:
        return None
    dollars, rest = divmod(abs(cents), 100)
    return f"{'-' if cents < 0 else ''}{dollars}.{rest:02d}"
