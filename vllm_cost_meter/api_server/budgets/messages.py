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
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures, Standing

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
