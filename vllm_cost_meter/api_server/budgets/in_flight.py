"""The requests that budgets with `max_concurrent` have running on one API server.

A request is in flight while the application serves it and, beyond that, until its engine requests
are billed: a client that left, or a background response, still uses the GPU. Used by one event loop
only. To ask and to enter is one step without an await, so no burst comes in between.

Invariant: no more requests of a budget are in flight than its `max_concurrent`; and each one leaves
when it is over, or an hour after its application at the latest, whatever becomes of its bills.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_cost_meter.exchange import Exchange
from vllm_cost_meter.tenants.budgets import Budget
from vllm_cost_meter.units.time import NS_PER_SECOND

# A bill that an engine lost must not hold a place for ever.
DETACHED_S_MAX = 3_600


@dataclass(slots=True, eq=False)
class _Place:
    """A request in flight, and the budgets by name in which it has a place."""

    exchange: Exchange
    budgets: tuple[str, ...]
    # When its application was done with it, by the monotonic clock; None while it is served.
    served_at_ns: int | None = None


class InFlight:
    """The places of requests in their budgets."""

    def __init__(self, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._now_ns = now_ns
        self._places: dict[str, _Place] = {}
        # Those whose application is done, the oldest first.
        self._detached: dict[str, _Place] = {}
        self._running: Counter[str] = Counter()

    def __contains__(self, exchange: Exchange) -> bool:
        return exchange.http_request_id in self._places

    def full(self, budgets: Sequence[Budget], bills_come: bool) -> Budget | None:
        """Return the first of these budgets that has no place left, None if all have.

        Where bills do not come, because the meter is broken, who was served is over.
        """
        if self._first_full(budgets) is None:
            return None
        self._let_go(bills_come)
        return self._first_full(budgets)

    def _first_full(self, budgets: Sequence[Budget]) -> Budget | None:
        for budget in budgets:
            most = budget.max_concurrent
            if most is not None and self._running[budget.name] >= most:
                return budget
        return None

    def enter(self, exchange: Exchange, budgets: Sequence[Budget], *, served: bool) -> None:
        """Give a request its place; `served` tells whether its application still serves it."""
        key, names = exchange.http_request_id, tuple(budget.name for budget in budgets)
        place = _Place(exchange, names, None if served else self._now_ns())
        self._places[key] = place
        if not served:
            self._detached[key] = place
        self._running.update(names)

    def served(self, exchange: Exchange) -> None:
        """The application is done with a request, which may still use an engine."""
        place = self._places.get(exchange.http_request_id)
        if place is None:
            return
        place.served_at_ns = self._now_ns()
        if exchange.unbilled:
            self._detached[exchange.http_request_id] = place
        else:
            self._leave(place)

    def _let_go(self, bills_come: bool) -> None:
        oldest_ns = self._now_ns() - DETACHED_S_MAX * NS_PER_SECOND
        for place in list(self._detached.values()):
            is_old = place.served_at_ns is not None and place.served_at_ns < oldest_ns
            if is_old or not place.exchange.unbilled or not bills_come:
                self._leave(place)

    def _leave(self, place: _Place) -> None:
        key = place.exchange.http_request_id
        self._places.pop(key, None)
        self._detached.pop(key, None)
        self._running.subtract(place.budgets)
        for name in place.budgets:
            if self._running[name] <= 0:
                del self._running[name]
