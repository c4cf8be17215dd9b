"""What an API server and the process that counts its budgets say to each other.

Budgets and prices go there, figures come back. Money may be larger than 64 bits, which MessagePack
does not have, so it travels as decimal text.

Invariant: what was sent and received again is equal to what it was.
"""

from collections.abc import Sequence
from decimal import Decimal
from typing import Self
from zoneinfo import ZoneInfo

import msgspec

from vllm_cost_meter.prices.book import PriceBook, PriceEntry
from vllm_cost_meter.tenants.budgets import (
    Budget,
    BudgetFigures,
    BudgetUnit,
    Over,
    Period,
    Standing,
)

# The questions and the news, by name.
LOOK, RULES = "look", "rules"


class SentBudget(msgspec.Struct, frozen=True, array_like=True):
    """A `Budget`."""

    name: str
    limit: Decimal
    unit: BudgetUnit
    period: Period
    zone: str
    tenant: str | None
    above: tuple[str, ...]
    tag: tuple[str, str] | None
    days: int
    soft_limit: Decimal | None
    hard: bool
    over: Over
    stop_running: bool

    @classmethod
    def of(cls, budget: Budget) -> Self:
        """Return a budget as it is sent."""
        soft = budget.soft_limit
        return cls(
            name=budget.name,
            limit=Decimal(budget.limit),
            unit=budget.unit,
            period=budget.period,
            zone=str(budget.zone),
            tenant=budget.tenant,
            above=budget.above,
            tag=budget.tag,
            days=budget.days,
            soft_limit=None if soft is None else Decimal(soft),
            hard=budget.hard,
            over=budget.over,
            stop_running=budget.stop_running,
        )

    def budget(self) -> Budget:
        """Return the budget."""
        return Budget(
            name=self.name,
            limit=int(self.limit),
            unit=self.unit,
            period=self.period,
            zone=ZoneInfo(self.zone),
            tenant=self.tenant,
            above=self.above,
            tag=self.tag,
            days=self.days,
            soft_limit=None if self.soft_limit is None else int(self.soft_limit),
            hard=self.hard,
            over=self.over,
            stop_running=self.stop_running,
        )


class SentRules(msgspec.Struct, frozen=True, array_like=True):
    """Budgets and prices. `version` grows with each change of either."""

    version: int
    budgets: tuple[SentBudget, ...]
    prices: tuple[PriceEntry, ...]

    @classmethod
    def of(cls, version: int, budgets: Sequence[Budget], book: PriceBook) -> Self:
        """Return budgets and prices as they are sent."""
        return cls(version, tuple(map(SentBudget.of, budgets)), tuple(book.entries))


class CounterHello(msgspec.Struct, frozen=True, array_like=True):
    """What the process is told first: where the ledger is, and what holds now."""

    url: str
    rules: SentRules


class SentStanding(msgspec.Struct, frozen=True, array_like=True):
    """A `Standing`; its budget is the one at the same place of the rules."""

    used: dict[int, Decimal] | None
    now_ns: int
    unknown: str | None


class SentFigures(msgspec.Struct, frozen=True, array_like=True):
    """`BudgetFigures` of the budgets of a version."""

    version: int
    standings: tuple[SentStanding, ...]
    as_of_ns: int | None
    broken: str | None
    heard_ns: int | None

    @classmethod
    def of(cls, version: int, figures: BudgetFigures) -> Self:
        """Return figures as they are sent."""
        standings = tuple(
            SentStanding(
                None if one.used is None else {h: Decimal(n) for h, n in one.used.items()},
                one.now_ns,
                one.unknown,
            )
            for one in figures.standings
        )
        return cls(version, standings, figures.as_of_ns, figures.broken, figures.heard_ns)

    def figures(self, budgets: Sequence[Budget]) -> BudgetFigures:
        """Return the figures; `budgets` are those of this version."""
        standings = [
            Standing(
                budget,
                None if one.used is None else {hour: int(n) for hour, n in one.used.items()},
                one.now_ns,
                one.unknown,
            )
            for budget, one in zip(budgets, self.standings, strict=True)
        ]
        return BudgetFigures(standings, self.as_of_ns, self.broken, self.heard_ns)


class Looked(msgspec.Struct, frozen=True, array_like=True):
    """The answer to a look: figures, or None if nothing is new."""

    figures: SentFigures | None
