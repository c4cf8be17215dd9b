"""What only the API server knows of now, asked from the process of the side endpoint.

The engines' newest figures, the runs that live, where the budgets stand, the metrics: each is a
question over the channel. Threads ask and wait. However many want the engines' newest figures, the
API server is asked for them by one at a time, and not more often than it can do beside serving.

Invariant: where an engine is slow `refresh` and `alive` go on with what is known. Figures that
cannot be known otherwise are an AwayError, and so is a ledger that may lack costs which clients
were told.
"""

import asyncio
import time
from collections.abc import Collection, Coroutine
from typing import Any, TypeVar

from vllm_cost_meter.endpoint.answers import MeterHealth
from vllm_cost_meter.endpoint.handed import ALIVE, BUDGETS, HEALTH, METRICS, REFRESH, Refreshed
from vllm_cost_meter.errors import AwayError, CostMeterError
from vllm_cost_meter.side_process.entry import ToServer
from vllm_cost_meter.side_process.handing import unpacked
from vllm_cost_meter.tenants.budgets import BudgetFigures

T = TypeVar("T")

# The API server gives up on slow engines before that.
ANSWER_TIMEOUT_S = 5.0
# Engines and ledger are asked at most so often, however many want to know.
REFRESH_GAP_S = 0.1
# Which runs live is known for so long; that one has died shows after many times that.
ALIVE_KEPT_S = 1.0


class Live:
    """The API server as the side endpoint's threads see it."""

    def __init__(self, server: ToServer) -> None:
        """Called on the loop of the channel."""
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._alive: frozenset[str] = frozenset()
        self._alive_until_s = 0.0
        self._refreshed_at_s = 0.0
        self._refreshing: asyncio.Task[str | None] | None = None
        self._next: asyncio.Task[str | None] | None = None

    def refresh(self) -> None:
        """Bring the ledger up to now. An engine that is slow means older figures.

        Raises AwayError while the ledger may be behind what clients were told.
        """
        try:
            behind = self._wait(self._shared_refresh())
        except TimeoutError:
            raise AwayError("the API server is busy, ask again") from None
        except CostMeterError:
            return  # It ends, and this process with it.
        if behind is not None:
            raise AwayError(f"the ledger is behind what clients were told, ask again: {behind}")

    def alive(self) -> Collection[str]:
        """Return the runs whose engines are known to live, however silent."""
        if time.monotonic() >= self._alive_until_s:
            try:
                self._know_alive(self._ask(ALIVE, list[str]))
            except AwayError:
                pass
        return self._alive

    def budgets(self) -> BudgetFigures:
        """Return where the budgets stand. Raises AwayError."""
        figures: BudgetFigures = unpacked(self._ask(BUDGETS, bytes))
        return figures

    def health(self) -> MeterHealth:
        """Return whether the meter works. Raises AwayError."""
        return self._ask(HEALTH, MeterHealth)

    def metrics(self) -> bytes:
        """Return the text of the metrics. Raises AwayError."""
        return self._ask(METRICS, bytes)

    def _know_alive(self, runs: Collection[str]) -> None:
        self._alive = frozenset(runs)
        self._alive_until_s = time.monotonic() + ALIVE_KEPT_S

    def _ask(self, name: str, type: type[T]) -> T:
        try:
            return self._wait(self._server.ask(name, None, type, ANSWER_TIMEOUT_S))
        except TimeoutError:
            raise AwayError(
                f"the API server gave no answer within {ANSWER_TIMEOUT_S:g} s"
            ) from None

    def _wait(self, asking: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(asking, self._loop).result()

    async def _shared_refresh(self) -> str | None:
        # One that is under way may have begun before what this caller wants to see.
        if self._next is None:
            self._next = asyncio.create_task(self._refresh_after(self._refreshing))
        return await asyncio.shield(self._next)

    async def _refresh_after(self, earlier: "asyncio.Task[str | None] | None") -> str | None:
        if earlier is not None:
            await asyncio.wait({earlier})
        await asyncio.sleep(self._refreshed_at_s + REFRESH_GAP_S - time.monotonic())
        self._refreshing, self._next = self._next, None
        self._refreshed_at_s = time.monotonic()
        answer = await self._server.ask(REFRESH, None, Refreshed, ANSWER_TIMEOUT_S)
        self._know_alive(answer.alive)
        return answer.behind
