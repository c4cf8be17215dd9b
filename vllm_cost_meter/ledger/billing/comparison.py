"""Compare the metered cost with the provider's bills: by day, in a summary, in a statement.

The metered cost is the GPUs' wall time x price. If bills cover a part of an hour, the same part of
its metered cost is compared with them. The covered part is the largest among the GPU resources,
because bills are taken to cover all GPUs. Other billed kinds (disk, network and so on) have no
metered counterpart.

Invariant: money is exact until it is shown. Then the window is rounded once and divided among its
days, so that days add up to the window to the nano-USD in every column, and in every row the
difference is the billed amount less the metered one. The metered amount and its billed part
are rounded together, so on a day that bills cover whole they are the same figure.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple, cast

from sqlalchemy import case, func, or_, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.invoices.timeline import GPU, KINDS
from vllm_cost_meter.ledger.billing.answers import InvoiceDays
from vllm_cost_meter.ledger.queries.costs import CutCosts
from vllm_cost_meter.ledger.queries.cut import Cut, Window
from vllm_cost_meter.ledger.schema import billed_hours
from vllm_cost_meter.reports.answers import Billed, BilledAmounts, BilledResource
from vllm_cost_meter.reports.price_answers import PriceRow
from vllm_cost_meter.reports.statement import OverheadCost
from vllm_cost_meter.units.calendar import HOURS_PER_DAY, period_name
from vllm_cost_meter.units.money import format_usd
from vllm_cost_meter.units.rounding import rounded_alike, rounded_pair
from vllm_cost_meter.units.time import NS_PER_HOUR

DIFFERENCE = "difference to the bill"
SOURCE = "bills of the provider"
OTHERS = tuple(kind for kind in KINDS if kind != GPU)


class _Billed(NamedTuple):
    """The bill for all resources of one kind in one hour; `covered_ns` is the largest of any."""

    nanousd: int
    covered_ns: int
    unobserved_ns: int
    resets: int
    known: int


@dataclass(frozen=True, slots=True)
class MeteredAndBilled:
    """Metered and billed amounts for some hours in nano-USD; None if unknown or nothing was billed.

    `others` has the billed amounts by kind, without GPUs. `unobserved_hours` sums the unobserved
    hours over all resources.
    """

    metered: Fraction | None
    metered_while_billed: Fraction | None
    billed_gpu: int | None
    others: Mapping[str, int | None]
    covered_hours: Fraction
    unobserved_hours: Fraction
    resets: int

    @property
    def difference(self) -> Fraction | None:
        """Billed GPU amount - metered amount; below 0 if more was metered than billed."""
        if self.billed_gpu is None or self.metered_while_billed is None:
            return None
        return self.billed_gpu - self.metered_while_billed

    @property
    def capture_rate(self) -> float | None:
        """Metered / billed; None if either is unknown."""
        # A credit alone gives no meaningful rate.
        if self.metered_while_billed is None or self.billed_gpu is None or self.billed_gpu <= 0:
            return None
        return float(self.metered_while_billed / self.billed_gpu)

    def as_dict(self) -> BilledAmounts:
        """Return the amounts as answers show them, in USD, metered and billed alike."""
        return self.shown(*rounded_pair(self.metered, self.metered_while_billed))

    def shown(self, metered: int | None, metered_while_billed: int | None) -> BilledAmounts:
        """Return the amounts as answers show them, with these rounded ones of the meter."""
        # Bills are whole nano-USD, so the difference of rounded amounts needs no rounding.
        difference = None
        if self.billed_gpu is not None and metered_while_billed is not None:
            difference = self.billed_gpu - metered_while_billed
        row = {
            "metered_usd": format_usd(metered),
            "metered_while_billed_usd": format_usd(metered_while_billed),
            "billed_gpu_usd": format_usd(self.billed_gpu),
            "difference_usd": format_usd(difference),
            "capture_rate": self.capture_rate,
            **{f"billed_{kind}_usd": format_usd(amount) for kind, amount in self.others.items()},
            "covered_hours": float(self.covered_hours),
            "unobserved_hours": float(self.unobserved_hours),
            "resets": self.resets,
        }
        return cast("BilledAmounts", row)


class Bills:
    """The bills in a cut's window, and the metered cost in the same hours."""

    def __init__(self, connection: Connection, cut: Cut) -> None:
        self._cut = cut
        self._billed = _by_hour(connection, cut.window)

    @cached_property
    def _metered(self) -> dict[int, Fraction | None]:
        # Most ledgers have no bills, so their summaries need not wait for this.
        return _metered(self._cut)

    @property
    def is_any(self) -> bool:
        """True if any bill was imported for the window."""
        return bool(self._billed)

    def days(self) -> dict[int, list[int]]:
        """Return the hours in which anything ran or was billed, by UTC day since the epoch."""
        found: dict[int, list[int]] = defaultdict(list)
        for hour in sorted(self._metered.keys() | self._billed.keys()):
            found[hour // HOURS_PER_DAY].append(hour)
        return dict(sorted(found.items()))

    def compared(self, hours: Iterable[int] | None = None) -> MeteredAndBilled:
        """Return the amounts metered and billed in these hours, or in all hours."""
        hours = self._metered.keys() | self._billed.keys() if hours is None else list(hours)
        metered = _Sum()
        matched = _Sum()
        covered_hours = Fraction(0)
        kinds: dict[str, list[_Billed]] = {kind: [] for kind in KINDS}
        for hour in hours:
            billed = self._billed.get(hour, {})
            for kind, of_kind in billed.items():
                kinds[kind].append(of_kind)
            share = Fraction(billed[GPU].covered_ns if GPU in billed else 0, NS_PER_HOUR)
            covered_hours += share
            if hour in self._metered:
                metered.add(self._metered[hour], Fraction(1))
                matched.add(self._metered[hour], share)
        amounts = {
            kind: sum(one.nanousd for one in of) if any(one.known for one in of) else None
            for kind, of in kinds.items()
        }
        seen = [one for of in kinds.values() for one in of]
        return MeteredAndBilled(
            metered.nanousd_if_any,
            None if amounts[GPU] is None else matched.nanousd,
            amounts[GPU],
            {kind: amounts[kind] for kind in OTHERS},
            covered_hours,
            Fraction(sum(one.unobserved_ns for one in seen), NS_PER_HOUR),
            sum(one.resets for one in seen),
        )


class _Sum:
    """A sum of costs, each weighted by a share; unknown if any cost is unknown."""

    def __init__(self) -> None:
        self._known, self._unknown, self._count = Fraction(0), 0, 0

    def add(self, cost: Fraction | None, share: Fraction) -> None:
        if not share:
            return
        self._count += 1
        if cost is None:
            self._unknown += 1
        else:
            self._known += cost * share

    @property
    def nanousd(self) -> Fraction | None:
        """The sum in nano-USD; 0 if nothing was added."""
        return None if self._unknown else self._known

    @property
    def nanousd_if_any(self) -> Fraction | None:
        """The sum in nano-USD; None if nothing was added."""
        return self.nanousd if self._count else None


def billed_summary(connection: Connection, cut: Cut) -> Billed | None:
    """Return a summary's part about bills, ready for JSON; None if the window has no bill."""
    bills = Bills(connection, cut)
    if not bills.is_any:
        return None
    others: list[BilledResource] = [
        {"resource": resource, "kind": kind, "billed_usd": format_usd(nanousd)}
        for kind, resource, nanousd in _others(connection, cut.window)
    ]
    return {**bills.compared().as_dict(), "others": others}


def bill_lines(
    connection: Connection, cut: Cut
) -> tuple[list[OverheadCost], dict[str, Any] | None]:
    """Return the lines that raise a statement from price x time to the billed amount.

    The second value says how many hours the bills cover. It is None if nothing was billed, and then
    there are no lines.
    """
    bills = Bills(connection, cut)
    if not bills.is_any:
        return [], None
    compared = bills.compared()
    lines = [
        OverheadCost(f"{kind} {resource}", SOURCE, Fraction(nanousd))
        for kind, resource, nanousd in _others(connection, cut.window)
    ]
    if compared.billed_gpu is not None:
        lines.insert(0, OverheadCost(DIFFERENCE, SOURCE, compared.difference))
    shown = compared.as_dict()
    return lines, {
        "covered_hours": shown["covered_hours"],
        "unobserved_hours": shown["unobserved_hours"],
        "resets": shown["resets"],
    }


def invoice_days(connection: Connection, cut: Cut) -> InvoiceDays:
    """Return the amounts metered and billed on each UTC day of a cut's window, and their total."""
    bills = Bills(connection, cut)
    hours_by_day = bills.days()
    days = [bills.compared(hours) for hours in hours_by_day.values()]
    total = bills.compared()
    metered, while_billed = rounded_alike(
        [day.metered for day in days],
        [day.metered_while_billed for day in days],
        is_whole_known=total.metered is not None,
    )
    return {
        "window": cut.window.as_dict(),
        "taken_at": cut.at(),
        "prices": cast("list[PriceRow]", CutCosts.of(cut).cost.listed()),
        "days": [
            {"day": period_name(hours[0], "day"), **day.shown(*amounts)}
            for hours, day, *amounts in zip(
                hours_by_day.values(), days, metered, while_billed, strict=True
            )
        ],
        "total": total.as_dict(),
    }


def _metered(cut: Cut) -> dict[int, Fraction | None]:
    """Return the GPU time's exact cost in each hour of the window; None if a price is missing."""
    found: dict[int, Fraction | None] = {}
    for run in cut.all_runs:
        for hour, classes in run.hours.items():
            gpu_time_ns = sum(classes.values())
            if not gpu_time_ns or not cut.window.contains(hour):
                continue
            price, before = run.prices.at(hour), found.get(hour, Fraction(0))
            # A GPU-hour is 3600 x 10^9 ns, a USD 10^9 nano-USD.
            cost = None if price is None else gpu_time_ns * price.usd_per_gpu_hour / 3600
            found[hour] = None if before is None or cost is None else before + cost
    return found


def is_known() -> Any:
    """Return the SQL count of rows in `billed_hours` with known time or money.

    The other rows are unobserved time: an amount over such rows alone is null.
    """
    b = billed_hours.c
    return func.sum(case((or_(b.covered_ns > 0, b.nanousd != 0), 1), else_=0))


def _by_hour(connection: Connection, window: Window) -> dict[int, dict[str, _Billed]]:
    b = billed_hours.c
    asked = (
        select(
            *(b.hour, b.kind, func.sum(b.nanousd), func.max(b.covered_ns)),
            *(func.sum(b.unobserved_ns), func.sum(b.resets), is_known()),
        )
        .where(window.on_hours(b.hour))
        .group_by(b.hour, b.kind)
    )
    found: dict[int, dict[str, _Billed]] = defaultdict(dict)
    for hour, kind, *amounts in connection.execute(asked):
        found[hour][kind] = _Billed(*map(int, amounts))
    return dict(found)


def _others(connection: Connection, window: Window) -> list[tuple[str, str, int]]:
    """Return the billed amounts for other resources than GPUs, as (kind, resource, nano-USD)."""
    b = billed_hours.c
    asked = (
        select(b.kind, b.resource, func.sum(b.nanousd))
        .where(window.on_hours(b.hour), b.kind != GPU)
        .group_by(b.kind, b.resource)
        .having(is_known() > 0)
        .order_by(b.kind, b.resource)
    )
    return [(kind, name, int(nanousd)) for kind, name, nanousd in connection.execute(asked)]
