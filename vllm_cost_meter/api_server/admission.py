"""Admission by budgets: decide whether a new request is served, and end running ones if asked.

An API server with budgets has one `Admission`. When the ledger gets a new engine snapshot, at most
one poll after it was taken, a process of its own reads anew how much of each budget is used. That
covers all API servers and the running requests. Until the next reading, new requests are judged in
memory, without waiting. Only after a start, before the first reading, a request that a hard budget
covers waits for it. Nothing is reserved for a request's future use, so an admitted request may run
past the limit. With `stop_running` the engine then ends it, and it gets no further engine requests;
`max_concurrent` bounds how many requests may run on.

Invariant: a failure here refuses only requests of tenants that fail closed and, before the first
reading, requests that a hard budget covers.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

from vllm_cost_meter.api_server.background import Loop
from vllm_cost_meter.api_server.budgets.in_flight import InFlight
from vllm_cost_meter.exchange import Exchange
from vllm_cost_meter.guard import Guard
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.metrics import series
from vllm_cost_meter.prices.book import PriceBook
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.tenants.budgets import Budget, BudgetFigures, Standing, Verdict, decide
from vllm_cost_meter.units.time import NS_PER_SECOND

logger = meter_logger()

# The ledger is asked this many times per snapshot interval for a new snapshot.
ASKS_PER_SNAPSHOT = 4
# Figures are stale if this many snapshots in a row are missing, but not before `FRESH_S_MIN`.
SNAPSHOTS_MISSED_MAX = 3
FRESH_S_MIN = 5.0
# Figures are stale if a bill of this server waits longer for the ledger.
LAG_NS_MAX = 5 * NS_PER_SECOND
# How long a request waits for the first figures after a start.
FIRST_FIGURES_S = 5.0
OTHERS_UNKNOWN = "what other servers have used has not been read yet"
NOT_COUNTED = "since the start of this server its budgets have not been counted yet"


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings that admission needs; they may change while the server runs."""

    budgets: Sequence[Budget]
    fail_closed: Collection[str]
    book: PriceBook


# A `Follow` returns the use of budgets by these prices; None if nothing is new since the last call.
Follow = Callable[[Sequence[Budget], PriceBook], Awaitable[BudgetFigures | None]]
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


def _counted(verdict: Verdict) -> Verdict:
    """Count a verdict in the metrics unless it admits."""
    if verdict.kind != "admitted":
        name = verdict.standing.budget.name if verdict.standing else ""
        series.count_refused(verdict.kind, name)
    return verdict


class Admission:
    """Judges new requests by the budgets that cover them."""

    def __init__(
        self,
        follow: Follow,
        rules: Callable[[], Rules],
        guard: Guard,
        interval_s: float,
        *,
        running_of: RunningOf = lambda _covers: (),
        stop: Stop | None = None,
        first_figures_s: float = FIRST_FIGURES_S,
        loop: Loop | None = None,
        lag_ns: Callable[[], int] = lambda: 0,
    ) -> None:
        """Judge by `rules` and the figures that `follow` brings; snapshots come every `interval_s`.

        `guard` is the error account of the hooks, `loop` that of `run`. `lag_ns` is
        the age of this server's oldest bill that the figures were not seen to have.
        """
        self._lag_ns = lag_ns
        self._follow = follow
        self._rules = rules
        self._guard = guard
        self._interval_s = interval_s
        self._running_of = running_of
        self._stop = stop
        self._first_figures_s = first_figures_s
        self._loop = loop or Loop("budgets")
        self._max_age_ns = int(max(interval_s * SNAPSHOTS_MISSED_MAX, FRESH_S_MIN) * NS_PER_SECOND)
        self._is_counted = False
        # Set when there are new figures, and then there is another one.
        self._news = asyncio.Event()
        # Why budgets are unknown, as the log was told.
        self._unknown: dict[str, str] = {}
        self._figures = BudgetFigures()
        # The hard budgets that are used up and end what runs.
        self._stopping: Sequence[Standing] = ()
        self.in_flight = InFlight()

    @property
    def figures(self) -> BudgetFigures:
        """Where the budgets stand, by the latest reading."""
        return self._figures

    @figures.setter
    def figures(self, figures: BudgetFigures) -> None:
        self._figures = figures
        self._stopping = [
            standing
            for standing in figures.standings
            if standing.budget.hard and standing.budget.stop_running and standing.is_spent
        ]
        # Before an engine was heard of nobody knows what runs, and a long first count ends with
        # figures that are stale: the next ones come at once.
        is_fresh = figures.stale(time.monotonic_ns(), self._max_age_ns) is None
        if is_fresh or figures.broken is not None:
            self._is_counted = True
        # Whoever waits looks whether what it waits for has come.
        news, self._news = self._news, asyncio.Event()
        news.set()

    def admit(self, exchange: Exchange) -> Verdict:
        """Decide about a new request, which has its place if it is admitted.

        In one step, without an await: what asks next finds the place taken. No I/O.
        """
        verdict = self._verdict(exchange.owner)
        if verdict.kind in ("admitted", "throttled"):
            verdict = self._place(exchange, served=True) or verdict
        return _counted(verdict)

    def refused_birth(self, exchange: Exchange) -> Verdict | None:
        """Return why an admitted request may have no further engine request, or None.

        No I/O. Each engine request of a socket is a new request.
        """
        owner = exchange.owner
        if exchange.is_socket:
            verdict = self._verdict(owner)
            if verdict.kind in ("blocked", "unavailable"):
                return _counted(verdict)
        if self._stopping and self._stale() is None:
            for standing in self._stopping:
                if standing.budget.covers(owner):
                    return _counted(Verdict("blocked", standing))
        if exchange in self.in_flight:
            return None
        # It was over, as a background response is before it begins.
        full = self._place(exchange, served=False)
        return None if full is None else _counted(full)

    def _place(self, exchange: Exchange, *, served: bool) -> Verdict | None:
        """Give a request its place; return the verdict if there is none left."""
        owner = exchange.owner
        budgets = [
            budget
            for budget in self._rules().budgets
            if budget.max_concurrent is not None and budget.covers(owner)
        ]
        if not budgets:
            return None
        full = self.in_flight.full(budgets, bills_come=self._stale() is None)
        if full is not None:
            return Verdict("full", Standing(full, None, time.time_ns()))
        self.in_flight.enter(exchange, budgets, served=served)
        return None

    def _stale(self) -> str | None:
        stale = self.figures.stale(time.monotonic_ns(), self._max_age_ns)
        if stale is None and (lag_ns := self._lag_ns()) > LAG_NS_MAX:
            stale = f"bills of the last {lag_ns / NS_PER_SECOND:.0f} s are not in the ledger yet"
        if stale is None and self._guard.off:
            stale = "the meter switched itself off after errors"
        return stale

    def _verdict(self, owner: Owner) -> Verdict:
        stale = self._stale()
        closed = fails_closed(owner, self._rules().fail_closed)
        if self._waits(owner):
            stale, closed = OTHERS_UNKNOWN if self._is_counted else NOT_COUNTED, True
        return decide(self.standings_of(owner), stale, closed)

    async def first_figures(self, owner: Owner) -> None:
        """Wait for the first figures after a start, if a hard budget covers this owner."""
        try:
            waits = self._waits(owner)
        except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
            self._guard.failed("first figures", error)
            return
        if not waits:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._first_figures_s):
                while self._waits(owner):
                    await self._news.wait()

    def _waits(self, owner: Owner) -> bool:
        """Return whether a hard budget covers an owner of which nothing is known yet."""
        if self._guard.off:
            return False
        if not self._is_counted:
            return any(budget.hard and budget.covers(owner) for budget in self._rules().budgets)
        return any(
            standing.budget.hard and standing.others is not None and not standing.others.is_counted
            for standing in self.standings_of(owner)
        )

    def standings_of(self, owner: Owner) -> list[Standing]:
        """Return the standings of the budgets that cover an owner."""
        return [standing for standing in self.figures.standings if standing.budget.covers(owner)]

    async def run(self) -> None:
        """Follow the ledger for ever. Errors are contained and counted."""
        await self._loop.run(self.follow, self._interval_s / ASKS_PER_SNAPSHOT)

    async def follow(self) -> None:
        """If there are new figures, take them and end requests of spent budgets."""
        rules = self._rules()
        figures = await self._follow(rules.budgets, rules.book)
        if figures is None:
            return
        self.figures = figures
        series.set_budgets(figures.standings)
        series.set_fleet_figures(figures.standings)
        self._say_what_is_unknown()
        await self._stop_running()

    def _say_what_is_unknown(self) -> None:
        """Warn of each budget that cannot be relied on, once for each reason."""
        unknown = {
            standing.budget.name: standing.unknown
            for standing in self.figures.standings
            if standing.unknown is not None
        }
        for name in unknown.keys() - self._unknown.keys():
            logger.warning(
                "cost meter: budget %r cannot be relied on: %s. Until then it refuses nobody but "
                "tenants that fail closed.",
                *(name, unknown[name]),
            )
        for name in self._unknown.keys() - unknown.keys():
            logger.info("cost meter: budget %r can be relied on again", name)
        self._unknown = unknown

    async def _stop_running(self) -> None:
        if not self._stopping or self._stop is None:
            return

        def is_covered(owner: Owner) -> bool:
            return any(standing.budget.covers(owner) for standing in self._stopping)

        if ids := self._running_of(is_covered):
            await self._stop(ids)
