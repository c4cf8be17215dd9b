"""Admission by budgets: decide whether a new request is served, and end running ones if asked.

An API server with budgets has one `Admission`. When the ledger gets a new engine snapshot, at most
one poll after it was taken, a thread reads anew how much of each budget is used. That covers all
API servers and the running requests. Until the next reading, new requests are judged in memory,
without waiting. Nothing is reserved for a request's future use, so an admitted request may run past
the limit. With `stop_running` the engine then ends it.

Invariant: a failure here refuses only requests of tenants that fail closed.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

from vllm_cost_meter import metrics
from vllm_cost_meter.guard import Guard
from vllm_cost_meter.ledger.queries.spending import PriceAt, Spending
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures, Standing, Verdict, decide
from vllm_cost_meter.units.time import NS_PER_SECOND

# The ledger is asked this many times per snapshot interval for a new snapshot.
ASKS_PER_SNAPSHOT = 4
# Figures are stale if this many snapshots in a row are missing, but not before `FRESH_S_MIN`.
SNAPSHOTS_MISSED_MAX = 3
FRESH_S_MIN = 5.0


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings that admission needs; they may change while the server runs."""

    budgets: Sequence[Budget]
    fail_closed: Collection[str]
    price_of: PriceAt


# A `Stop` ends requests by their internal ids.
Stop = Callable[[Sequence[str]], Awaitable[None]]
# A `RunningOf` returns the internal ids of this server's running requests with matching owners.
RunningOf = Callable[[Callable[[Owner], bool]], Sequence[str]]


def fails_closed(owner: Owner, tenants: Collection[str]) -> bool:
    """Return whether an owner is, or may be, one of the tenants that fail closed, or its child."""
    # The parent is checked too, because a child that a client chose is declared nowhere.
    if owner.tenant in tenants or owner.parent in tenants:
        return True
    return any(map(owner.may_be, tenants))


class Admission:
    """Judges new requests by the budgets that cover them."""

    def __init__(
        self,
        spending: Spending,
        rules: Callable[[], Rules],
        guard: Guard,
        interval_s: float,
        *,
        running_of: RunningOf = lambda _covers: (),
        stop: Stop | None = None,
    ) -> None:
        """Judge by `rules` and the use in `spending`; snapshots come every `interval_s`."""
        self._spending = spending
        self._rules = rules
        self._guard = guard
        self._interval_s = interval_s
        self._running_of = running_of
        self._stop = stop
        self._max_age_ns = int(max(interval_s * SNAPSHOTS_MISSED_MAX, FRESH_S_MIN) * NS_PER_SECOND)
        self._latest: object = None
        self.figures = BudgetFigures()

    def verdict(self, owner: Owner, now_ns: int | None = None) -> Verdict:
        """Decide about a new request of an owner, without any I/O."""
        now_ns = time.time_ns() if now_ns is None else now_ns
        stale = self.figures.stale(now_ns, self._max_age_ns)
        if stale is None and self._guard.off:
            stale = "the meter switched itself off after errors"
        closed = fails_closed(owner, self._rules().fail_closed)
        verdict = decide(self.standings_of(owner), stale, closed)
        if verdict.kind != "admitted":
            name = verdict.standing.budget.name if verdict.standing else ""
            metrics.count_refused(verdict.kind, name)
        return verdict

    def standings_of(self, owner: Owner) -> list[Standing]:
        """Return the standings of the budgets that cover an owner."""
        return [standing for standing in self.figures.standings if standing.budget.covers(owner)]

    async def run(self) -> None:
        """Follow the ledger for ever. Errors are contained and counted."""
        while True:
            try:
                await self.follow()
                self._guard.succeeded("budgets")
            except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
                self._guard.failed("budgets", error)
            await asyncio.sleep(self._interval_s / ASKS_PER_SNAPSHOT)

    async def follow(self) -> None:
        """If there is a new snapshot, read the figures anew and end requests of spent budgets."""
        rules = self._rules()
        latest = (await asyncio.to_thread(self._spending.latest_snapshots), rules.budgets)
        if latest == self._latest:
            return
        self.figures = await asyncio.to_thread(
            self._spending.look, rules.budgets, rules.price_of, time.time_ns()
        )
        self._latest = latest
        metrics.set_budgets(self.figures.standings)
        await self._stop_running()

    async def _stop_running(self) -> None:
        spent = [
            standing.budget
            for standing in self.figures.standings
            if standing.budget.hard and standing.budget.stop_running and standing.is_spent
        ]
        if not spent or self._stop is None:
            return

        def is_covered(owner: Owner) -> bool:
            return any(budget.covers(owner) for budget in spent)

        if ids := self._running_of(is_covered):
            await self._stop(ids)
