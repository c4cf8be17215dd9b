"""The runtime of the meter in an API server: makes its parts, and starts and stops them.

Each API server process has one `Runtime`, made at its first use. The first API server also polls
the engines for their books and serves the side endpoint. A part gets what it needs through its
constructor. It gets settings as a function, because some settings change while the server runs.

Invariant: nothing here stops vLLM from serving.
"""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Coroutine
from fractions import Fraction
from typing import Any

from vllm_cost_meter.activation import is_refused
from vllm_cost_meter.api_server.access.start_warnings import start_warnings
from vllm_cost_meter.api_server.admission import Admission, Rules
from vllm_cost_meter.api_server.api_guard import ApiGuard
from vllm_cost_meter.api_server.collector import Collector
from vllm_cost_meter.api_server.open_requests import OpenRequests
from vllm_cost_meter.api_server.poller import Poller
from vllm_cost_meter.api_server.record_making import price_of_run
from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.config.reload import INTERVAL_S, Reloader
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.endpoint.server import serve
from vllm_cost_meter.endpoint.tenant_routes import make_router
from vllm_cost_meter.ledger.database import default_url
from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.writer import LedgerWriter
from vllm_cost_meter.prices.book import PriceBook
from vllm_cost_meter.records.snapshot import EarlierFit, Snapshot
from vllm_cost_meter.tenants.budgets import BudgetFigures
from vllm_cost_meter.vllm_hooks import engines

logger = logging.getLogger("vllm.cost_meter")

# A reader waits at most this long for an engine. After that it gets figures one snapshot old.
REFRESH_TIMEOUT_S = 2.0
STOP_TIMEOUT_S = 10.0


class Runtime:
    """The meter of one API-server process."""

    def __init__(
        self,
        settings: Settings,
        *,
        open_requests: OpenRequests | None = None,
        reload_interval_s: float = INTERVAL_S,
    ) -> None:
        self.settings = settings
        self.guard = ApiGuard()
        self.ledger_url = settings.ledger or default_url()
        self.writer = LedgerWriter(
            self.ledger_url, price_of=lambda snapshot: price_of_run(self.book(), snapshot)
        )
        self.writer.start()
        # This opens or creates the ledger now, so that the first reply need not wait for it.
        self.writer.commit()
        self.collector = Collector(
            self.writer, self.guard, lambda: self.settings, open_requests=open_requests
        )
        # Served model names; empty until `start`.
        self.served: frozenset[str] = frozenset()
        self.poller: Poller | None = None
        self.admission: Admission | None = None
        self._reload_interval_s = reload_interval_s
        # Background tasks by name.
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def run(self, hook: str, body: Callable[..., Any], *args: Any) -> Any:
        """Call `body(collector, *args)` for a hook of vLLM. Never raises; None after an error."""
        return self.guard.run(hook, body, self.collector, *args)

    def book(self) -> PriceBook:
        """Return the price book as it is declared now."""
        return self.settings.price_book

    def figures(self) -> BudgetFigures:
        """Return how much of each budget is used."""
        return self.admission.figures if self.admission is not None else BudgetFigures()

    # -- life -------------------------------------------------------------------------------

    async def start(self, app: Any) -> None:
        """Start with vLLM's application and, in the first API server, serve the side endpoint."""
        engine_client = getattr(getattr(app, "state", None), "engine_client", None)
        if engine_client is None:
            return  # A render server has no engine.
        try:
            polls = await self.start_work(engine_client, app.state)
            if polls:
                for line in start_warnings(app, self.settings):
                    logger.warning("cost meter: %s", line)
                self._serve_endpoint()
            self._add_tenant_routes(app)
        except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
            self.guard.failed("start", error)

    async def start_work(self, engine_client: Any, state: Any = None) -> bool:
        """Start the background tasks of this API server; `state` is its application's state.

        Returns True if this API server is the one that polls the engines.
        """
        self.collector.run_facts = engines.run_facts(engine_client)
        self.served = frozenset(engines.served_names(engine_client, state))
        self._start_task("announce", self._announce_loop)
        await self._hold_to_budgets(engine_client)
        if (config := self.settings.config) is not None:
            reloader = Reloader(config)
            self._start_task("reload", lambda: self._reload_loop(reloader, engine_client))
        if engines.api_server_index(engine_client) != 0 or self.poller is not None:
            return False
        self.poller = Poller(
            engine_client,
            self.writer,
            self.guard,
            self.settings.snapshot_interval_s,
            self._earlier_fit,
            announce=self._announce_all,
        )
        self._start_task("poll", self.poller.run)
        return True

    async def stop(self) -> None:
        """Stop the tasks, poll the engines a last time, and write everything that waits."""
        for task in self._tasks.values():
            task.cancel()
        self._announce_all()
        if self.poller is not None:
            self.poller.stopping = True
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self.poller.refresh(), timeout=1.0)
        await asyncio.to_thread(self.writer.close, 2.0)

    def _start_task(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start a task, unless it runs already."""
        if name not in self._tasks:
            self._tasks[name] = asyncio.create_task(work())

    # -- open requests and settings ---------------------------------------------------------

    def _announce_all(self) -> None:
        self.guard.run("announce", self.collector.announce_all)

    async def _announce_loop(self) -> None:
        while True:
            await asyncio.sleep(self.settings.snapshot_interval_s)
            # Budgets count running requests by owner, so the ledger must know the owners at once.
            if self.admission is not None:
                self._announce_all()
            else:
                self.guard.run("announce", self.collector.announce_due)

    async def _reload_loop(self, reloader: Reloader, engine_client: Any) -> None:
        while True:
            await asyncio.sleep(self._reload_interval_s)
            try:
                # Reading a file may be slow, so a thread does it: vLLM's tokens must not wait.
                new = await asyncio.to_thread(reloader.look, self.settings)
                self.settings = new or self.settings
                await self._hold_to_budgets(engine_client)
                self.guard.succeeded("reload")
            except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
                self.guard.failed("reload", error)

    # -- budgets ----------------------------------------------------------------------------

    async def _hold_to_budgets(self, engine_client: Any) -> None:
        has_rules = self.settings.budgets or self.settings.failing_closed
        if not has_rules or self.admission is not None:
            return
        # `alive` is passed as a function because the poller starts later.
        spending = await asyncio.to_thread(Spending, self.writer.url, alive=self.alive)
        self.admission = Admission(
            spending,
            self.budget_rules,
            self.guard,
            self.settings.snapshot_interval_s,
            running_of=self.collector.open_requests_of,
            stop=lambda ids: engines.stop_requests(engine_client, ids, STOP_TIMEOUT_S),
        )
        self._start_task("budgets", self.admission.run)

    def budget_rules(self) -> Rules:
        """Return the present settings for budgets."""
        return Rules(
            budgets=self.settings.declared_budgets,
            fail_closed=self.settings.failing_closed,
            price_of=self._price_at,
        )

    def _price_at(self, _run_id: str, hour: int) -> Fraction | None:
        """Return this deployment's price in an hour; budgets use it for all runs."""
        price = self.book().price_at(self.collector.run_facts, hour)
        return None if price is None else price.usd_per_gpu_hour

    # -- figures ----------------------------------------------------------------------------

    def _earlier_fit(self, snapshot: Snapshot) -> EarlierFit | None:
        reader = LedgerReader(self.writer.url)
        try:
            return reader.earlier_fit(snapshot)
        finally:
            reader.close()

    def _refresh(self) -> Callable[[], None]:
        """Return a function that brings the ledger up to now.

        Only the polling API server can do that. In others the function does nothing, and their
        figures are up to one snapshot old.
        """
        if self.poller is None:
            return lambda: None
        return refresher(self.poller, asyncio.get_running_loop())

    def alive(self) -> Collection[str]:
        """Return the runs with an engine that is known to be alive, even if it is silent.

        Only the poller of the first API server knows them. To the other API servers an engine that
        is silent for too long is dead, until its next snapshot.
        """
        return () if self.poller is None else self.poller.alive()

    def _serve_endpoint(self) -> None:
        serve(
            self.settings,
            self.ledger_url,
            self._refresh(),
            self.figures,
            lambda: self.settings.tenant_keys,
            self.book,
            lambda: self.settings.declared,
            lambda: self.settings.public_economics,
            self.alive,
            self._is_coarse,
        )

    def _add_tenant_routes(self, app: Any) -> None:
        reader = LedgerReader(self.ledger_url, create=True, book=self.book, alive=self.alive)
        router = make_router(reader, self._refresh(), self.figures, self._is_coarse)
        app.include_router(router)

    def _is_coarse(self) -> bool:
        return self.settings.is_coarse


def refresher(poller: Poller, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
    """Return a function that brings the ledger up to now from another thread, within a timeout."""

    def refresh() -> None:
        # If an engine is slow or dead, the reader gets older figures, not an error.
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(poller.look(), loop).result(REFRESH_TIMEOUT_S)

    return refresh


class NoRuntime:
    """The stand-in for a runtime that could not be made: every hook passes through.

    `settings` name the tenants that fail closed. They are None if they could not be read.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings

    def run(self, hook: str, body: object, *args: object) -> None:
        """Do nothing."""


def make_runtime() -> Runtime | NoRuntime:
    """Make a runtime from this process's settings, or a stand-in if that fails. Never raises."""
    settings = None
    try:
        settings = load_settings()
        # `--middleware` also brings us here in a vLLM that the meter does not understand.
        return NoRuntime(settings) if is_refused() else Runtime(settings)
    except Exception:
        logger.exception("cost meter: could not start in the API server; it runs unmetered")
        return NoRuntime(settings)


@functools.cache
def get_runtime() -> Runtime | NoRuntime:
    """Return this process's runtime, made at the first call. Never raises."""
    return make_runtime()
