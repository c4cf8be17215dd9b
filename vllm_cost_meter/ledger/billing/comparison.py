"""What was metered beside what was billed: by day, for a summary, and for a statement.

Metered is wall time x price of the GPUs; of an hour that bills cover in part, the same part of it
stands against them. What is covered is the largest part that any GPU resource is: bills are taken
to be of all GPUs. All else that was billed (disks, network and so on) has nothing beside it.

Invariant: money is exact until it is shown; the days of a window add up to the window.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

from sqlalchemy import case, func, or_, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.invoices.timeline import GPU, KINDS
from vllm_cost_meter.ledger.queries.cut import Cut, Window
from vllm_cost_meter.ledger.schema import billed_hours
from vllm_cost_meter.reports.statement import OverheadCost
from vllm_cost_meter.units.calendar import HOURS_PER_DAY
from vllm_cost_meter.units.money import format_usd
from vllm_cost_meter.units.time import NS_PER_HOUR

DIFFERENCE = "difference to the bill"
SOURCE = "bills of the provider"
OTHERS = tuple(kind for kind in KINDS if kind != GPU)


class _Billed(NamedTuple):
    """What all resources of a kind were billed in an hour; `covered_ns` is the most of any."""

    nanousd: int
    covered_ns: int
    unobserved_ns: int
    resets: int
    known: int


@dataclass(frozen=True, slots=True)
class Compared:
    """Metered and billed of some hours, in nano-USD; None is not known, or nothing was billed.

    `others` are those of kinds but GPUs; hours that nobody observed are of all resources together.
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
        """What was billed of GPUs and not metered; less than 0, what was metered and not billed."""
        if self.billed_gpu is None or self.metered_while_billed is None:
            return None
        return self.billed_gpu - self.metered_while_billed

    @property
    def capture_rate(self) -> float | None:
        """Metered / billed."""
        # Of a credit by itself it would say nothing.
        if self.metered_while_billed is None or self.billed_gpu is None or self.billed_gpu <= 0:
            return None
        return float(self.metered_while_billed / self.billed_gpu)

    def as_dict(self) -> dict[str, Any]:
        """Return it as answers show it."""
        return {
            "metered_usd": _usd(self.metered),
            "metered_while_billed_usd": _usd(self.metered_while_billed),
            "billed_gpu_usd": _usd(self.billed_gpu),
            "difference_usd": _usd(self.difference),
            "capture_rate": self.capture_rate,
            **{f"billed_{kind}_usd": _usd(nanousd) for kind, nanousd in self.others.items()},
            "covered_hours": float(self.covered_hours),
            "unobserved_hours": float(self.unobserved_hours),
            "resets": self.resets,
        }


class Bills:
    """What a ledger knows of the bills of a cut's window, and what was metered in its hours."""

    def __init__(self, connection: Connection, cut: Cut) -> None:
        self._cut = cut
        self._billed = _by_hour(connection, cut.window)

    @cached_property
    def _metered(self) -> dict[int, Fraction | None]:
        # Most ledgers have no bills: a summary of theirs does not wait for this.
        return _metered(self._cut)

    @property
    def is_any(self) -> bool:
        """Whether anything at all was imported of the window."""
        return bool(self._billed)

    def days(self) -> dict[int, list[int]]:
        """Return the hours in which anything ran or was billed, by UTC day since the epoch."""
        found: dict[int, list[int]] = defaultdict(list)
        for hour in sorted(self._metered.keys() | self._billed.keys()):
            found[hour // HOURS_PER_DAY].append(hour)
        return dict(sorted(found.items()))

    def compared(self, hours: Iterable[int] | None = None) -> Compared:
        """Return metered and billed of these hours, or of all."""
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
        return Compared(
            metered.nanousd_if_any,
            None if amounts[GPU] is None else matched.nanousd,
            amounts[GPU],
            {kind: amounts[kind] for kind in OTHERS},
            covered_hours,
            Fraction(sum(one.unobserved_ns for one in seen), NS_PER_HOUR),
            sum(one.resets for one in seen),
        )


class _Sum:
    """A sum of costs, each with its part that counts; unknown if one of them is."""

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
        """The sum: 0 of nothing."""
        return None if self._unknown else self._known

    @property
    def nanousd_if_any(self) -> Fraction | None:
        """The sum: None of nothing."""
        return self.nanousd if self._count else None


def billed_summary(connection: Connection, cut: Cut) -> dict[str, Any] | None:
    """Return what a summary says of the bills of a window; None if there is none."""
    bills = Bills(connection, cut)
    if not bills.is_any:
        return None
    others = [
        {"resource": resource, "kind": kind, "billed_usd": format_usd(nanousd)}
        for kind, resource, nanousd in _others(connection, cut.window)
    ]
    return {**bills.compared().as_dict(), "others": others}


def bill_lines(
    connection: Connection, cut: Cut
) -> tuple[list[OverheadCost], dict[str, Any] | None]:
    """Return what a statement has beside price x time so that it is what was billed.

    And how much of the month that is: None where nothing was billed.
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
    told = compared.as_dict()
    return lines, {name: told[name] for name in ("covered_hours", "unobserved_hours", "resets")}


def _usd(nanousd: Fraction | int | None) -> str | None:
    return None if nanousd is None else format_usd(round(nanousd))


def _metered(cut: Cut) -> dict[int, Fraction | None]:
    """Return what GPU time cost in each hour of the window; None where a price misses."""
    found: dict[int, Fraction | None] = {}
    for run in cut.runs:
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
    """Return the SQL sum of the rows of `billed_hours` of which time or money is known.

    The others are of time that nobody observed: of them alone an amount is null.
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
    """Return kind, resource and nano-USD of what was billed besides GPUs."""
    b = billed_hours.c
    asked = (
        select(b.kind, b.resource, func.sum(b.nanousd))
        .where(window.on_hours(b.hour), b.kind != GPU)
        .group_by(b.kind, b.resource)
        .having(is_known() > 0)
        .order_by(b.kind, b.resource)
    )
    return [(kind, name, int(nanousd)) for kind, name, nanousd in connection.execute(asked)]
