"""What an API server and the process that counts its budgets say to each other.

Budgets and prices go there, figures come back. Money may be larger than 64 bits, which MessagePack
does not have, so it comes back as decimal text.

Invariant: what was sent and received again is equal to what it was.
"""

from collections.abc import Sequence
from decimal import Decimal
from typing import Self

import msgspec

from vllm_cost_meter.prices.book import PriceBook
from vllm_cost_meter.records.pending import PendingBill
from vllm_cost_meter.side_process.handing import packed, unpacked
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures, Others, Standing

# The questions and the news, by name.
LOOK, RULES = "look", "rules"


class SentRules(msgspec.Struct, frozen=True, array_like=True):
    """Budgets and prices, packed. `version` grows with each change of either."""

    version: int
    budgets_and_book: bytes

    @classmethod
    def of(cls, version: int, budgets: Sequence[Budget], book: PriceBook) -> Self:
        """Return budgets and prices as they are sent."""
        return cls(version, packed((tuple(budgets), book)))

    def rules(self) -> tuple[tuple[Budget, ...], PriceBook]:
        """Return the budgets and the prices."""
        rules: tuple[tuple[Budget, ...], PriceBook] = unpacked(self.budgets_and_book)
        return rules


class CountedFleet(msgspec.Struct, frozen=True, array_like=True):
    """The fleet whose use budgets count: its database, and how often it is read.

    `kept_at` is the path of the file that keeps its figures.
    """

    url: str
    interval_s: float
    kept_at: str


class CounterHello(msgspec.Struct, frozen=True, array_like=True):
    """What the process is told first: where the ledger is, what holds now, and the fleet if any."""

    url: str
    rules: SentRules
    fleet: CountedFleet | None = None


class SentOthers(msgspec.Struct, frozen=True, array_like=True):
    """An `Others`."""

    used_here: Decimal | None
    age_ns: int | None
    stale: str | None
    is_counted: bool

    @classmethod
    def of(cls, others: Others) -> Self:
        """Return the others' part as it is sent."""
        here = others.used_here
        sent = None if here is None else Decimal(here)
        return cls(sent, others.age_ns, others.stale, others.is_counted)

    def others(self) -> Others:
        """Return the others' part."""
        here = None if self.used_here is None else int(self.used_here)
        return Others(here, self.age_ns, self.stale, self.is_counted)


class SentStanding(msgspec.Struct, frozen=True, array_like=True):
    """A `Standing`; its budget is the one at the same place of the rules."""

    used: dict[int, Decimal] | None
    now_ns: int
    unknown: str | None
    others: SentOthers | None = None

    @classmethod
    def of(cls, standing: Standing) -> Self:
        """Return a standing as it is sent."""
        used, others = standing.used, standing.others
        return cls(
            None if used is None else {hour: Decimal(n) for hour, n in used.items()},
            standing.now_ns,
            standing.unknown,
            None if others is None else SentOthers.of(others),
        )

    def standing(self, budget: Budget) -> Standing:
        """Return the standing of this budget."""
        return Standing(
            budget,
            None if self.used is None else {hour: int(n) for hour, n in self.used.items()},
            self.now_ns,
            self.unknown,
            None if self.others is None else self.others.others(),
        )


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
        standings = tuple(map(SentStanding.of, figures.standings))
        return cls(version, standings, figures.as_of_ns, figures.broken, figures.heard_ns)

    def figures(self, budgets: Sequence[Budget]) -> BudgetFigures:
        """Return the figures; `budgets` are those of this version."""
        standings = [
            one.standing(budget) for budget, one in zip(budgets, self.standings, strict=True)
        ]
        return BudgetFigures(standings, self.as_of_ns, self.broken, self.heard_ns)


class LookQuestion(msgspec.Struct, frozen=True, array_like=True):
    """The question for a look.

    `alive` names the runs that are known to live, `pending` are the bills of this server that its
    figures may lack. If they are `behind`, the look does not wait for a snapshot; if `overdue`, it
    looks whether the journals still have them.
    """

    alive: tuple[str, ...] = ()
    pending: tuple[PendingBill, ...] = ()
    is_behind: bool = False
    is_overdue: bool = False


class Looked(msgspec.Struct, frozen=True, array_like=True):
    """The answer to a look: figures, or None if nothing is new.

    `left` are the pending bills, by run and number, that the ledger lacks and will get.
    """

    figures: SentFigures | None
    left: tuple[tuple[str, int], ...] = ()
