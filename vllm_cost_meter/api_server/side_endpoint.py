"""The side endpoint as the API server has it: a side process, and answers to what it asks.

The first API server starts it with the application, to listen on its port. Another one, or any
without a port, starts one of its own when a tenant asks for its figures on vLLM's port, and keeps
it: an API server cannot reach the process of another one, and most never need it.

Invariant: vLLM's event loop does no more for a question than to pass it on.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection

import msgspec

from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.endpoint.answers import MeterHealth, SideProcessHealth
from vllm_cost_meter.endpoint.handed import (
    ALIVE,
    BUDGETS,
    HEALTH,
    METRICS,
    OWN_FIGURES,
    REFRESH,
    SETTINGS,
    EndpointHello,
    Handed,
    Listening,
    OwnAnswer,
    OwnQuestion,
    Refreshed,
)
from vllm_cost_meter.endpoint.server import metrics_text
from vllm_cost_meter.errors import CostMeterError
from vllm_cost_meter.side_process.channel import decoded
from vllm_cost_meter.side_process.handing import packed
from vllm_cost_meter.side_process.supervisor import Pauses, SideProcess
from vllm_cost_meter.tenants.budgets import BudgetFigures

MODULE = "vllm_cost_meter.endpoint.process"
# A reader gets figures up to one snapshot old rather than wait longer for an engine.
REFRESH_TIMEOUT_S = 2.0
# It takes half a second to start; a server that is ready finds it so if that is possible.
START_TIMEOUT_S = 5.0
# A tenant's question on vLLM's port may take the time of any other, and a new process to start.
ANSWER_SLACK_S = 5.0


class SideEndpoint:
    """The side endpoint's process, and what this API server tells it."""

    def __init__(
        self,
        settings: Callable[[], Settings],
        ledger_url: str,
        *,
        refresh: Callable[[], Awaitable[None]],
        catch_up: Callable[[], Awaitable[None]],
        alive: Callable[[], Collection[str]],
        figures: Callable[[], BudgetFigures],
        health: Callable[[], MeterHealth],
        pauses: Pauses = Pauses(),  # noqa: B008 - it never changes
    ) -> None:
        """Make it.

        `refresh` journals the engines' books of now, and `catch_up` brings all that is journaled
        into the ledger. `alive` names the runs that are known to live.
        """
        self.process = SideProcess(
            "the side endpoint's process",
            MODULE,
            hello=self._hello,
            answer=self._answer,
            ready=self._is_ready,
            pauses=pauses,
        )
        self.start_timeout_s = START_TIMEOUT_S
        self.answer_slack_s = ANSWER_SLACK_S
        self._settings = settings
        self._ledger_url = ledger_url
        self._refresh = refresh
        self._catch_up = catch_up
        self._alive = alive
        self._figures = figures
        self._health = health
        # Where it listens; after a restart it listens there again, also if any port would do.
        self.port: int | None = None
        self._refreshing: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Start it, to listen on its port, unless that is off; wait for it, but not for long."""
        self.port = self._settings().port
        if self.port is not None:
            self.process.start()
            await self.process.wait(self.start_timeout_s)

    async def stop(self) -> None:
        """End it for good."""
        await self.process.stop()

    def settings_changed(self) -> None:
        """Hand over the settings, which have changed."""
        self.process.tell(SETTINGS, packed(Handed.of(self._settings())))

    async def ask(self, question: OwnQuestion) -> OwnAnswer:
        """Return the answer to a tenant. Raises AwayError where there is none in time."""
        self.process.start()
        timeout_s = self._settings().question_timeout_s + self.answer_slack_s
        return await self.process.ask(OWN_FIGURES, question, OwnAnswer, timeout_s)

    def _hello(self) -> EndpointHello:
        return EndpointHello(packed(Handed.of(self._settings())), self._ledger_url, self.port)

    def _is_ready(self, about: msgspec.Raw) -> None:
        port = decoded(about, Listening).port
        self.port = self.port if port is None else port

    async def _answer(self, name: str, _given: msgspec.Raw) -> object:
        """Answer what the process asks."""
        if name == REFRESH:
            await self._refresh_in_time()
            return Refreshed(list(self._alive()), await self._behind())
        if name == ALIVE:
            return list(self._alive())
        if name == BUDGETS:
            return packed(self._figures())
        if name == HEALTH:
            return self._health()
        if name == METRICS:
            return await asyncio.to_thread(metrics_text)
        raise ValueError(f"no answer to {name!r}")

    async def _refresh_in_time(self) -> None:
        """Journal the books of now. A slow or dead engine means older figures, not an error."""
        task: asyncio.Task[None] = asyncio.ensure_future(self._refreshed())
        self._refreshing.add(task)
        task.add_done_callback(self._refreshing.discard)
        # It may go on: whoever comes next profits from it.
        await asyncio.wait({task}, timeout=REFRESH_TIMEOUT_S)

    async def _behind(self) -> str | None:
        """Have the ledger catch up with the journals; return why it did not."""
        try:
            await self._catch_up()
        except CostMeterError as error:
            return str(error)
        return None

    async def _refreshed(self) -> None:
        try:
            await self._refresh()
        except Exception:  # noqa: BLE001, S110 - the poller's own loop says what is wrong
            pass


def health_of(name: str, process: SideProcess) -> SideProcessHealth:
    """Return how a side process does, as `/cost/health` has it."""
    return {
        "process": name,
        "state": process.state,
        "pid": process.pid,
        "restarts": process.restarts,
        "last_end": process.last_end,
    }
