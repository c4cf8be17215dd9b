"""Serves the side endpoint's application without a vLLM server: over a fleet, or any ledger.

The settings say who may ask, what GPUs cost and which budgets there are, as they do beside vLLM.
Those that may change while a server runs are read again when their file changes, or what the fleet
shares. Budgets are counted over all that the ledger has, so over all servers of a fleet.

Invariant: it writes nothing but changes of the fleet's settings that an operator asks for, so any
number of them may answer from one database.
"""

import asyncio
import functools
import os
import socket
import time
from collections.abc import Mapping
from typing import Protocol

from vllm_cost_meter.config.loading import load_settings, settings_with
from vllm_cost_meter.config.reload import INTERVAL_S, Reloader
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.endpoint.access import Access
from vllm_cost_meter.endpoint.answers import NO_METER
from vllm_cost_meter.endpoint.app import make_app
from vllm_cost_meter.endpoint.handed import Handed
from vllm_cost_meter.endpoint.questions import Questions
from vllm_cost_meter.endpoint.server import serve
from vllm_cost_meter.endpoint.standalone.audit_metrics import AuditMetrics
from vllm_cost_meter.endpoint.standalone.probes import add_probes
from vllm_cost_meter.endpoint.standalone.settings_routes import add_settings_routes
from vllm_cost_meter.errors import CostMeterError, LedgerError
from vllm_cost_meter.ledger.catching_up import catch_up
from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.logs import Outage, meter_logger
from vllm_cost_meter.records.shared_settings import SharedSettings
from vllm_cost_meter.side_process.handing import packed
from vllm_cost_meter.tenants.budgets import BudgetFigures

logger = meter_logger()

BUDGETS_EVERY_S = 2.0


class FollowsFleet(Protocol):
    """What knows the settings that a fleet shares, and looks whether there are newer ones."""

    now: SharedSettings

    def look(self) -> None:
        """Ask the fleet's database. Blocks, and never raises."""


class Standalone:
    """A side endpoint of its own. Used by one event loop."""

    def __init__(
        self,
        url: str,
        settings: Settings,
        fleet: FollowsFleet | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Nothing is opened before `serve`.

        `fleet` has the shared settings, if they are used. `environ` is where the others are from.
        """
        self._environ = environ
        self._url = url
        self._settings = settings
        self._fleet = fleet
        self._handed = Handed.of(settings)
        self._figures = BudgetFigures()
        self._tasks: list[asyncio.Task[None]] = []

    async def serve(self, listening: socket.socket) -> None:
        """Serve until the process is told to end."""
        handed = self._handed
        reader = LedgerReader(self._url, late=True, book=lambda: self._handed.price_book)
        access = Access(
            handed.admin_sha256,
            lambda: self._handed.tenant_keys,
            lambda: self._handed.is_coarse,
        )
        app = make_app(
            reader,
            refresh=self._refresh,
            access=access,
            metrics=AuditMetrics(reader, version=lambda: self._settings.shared_version).text,
            budgets=lambda: self._figures,
            declared=lambda: self._handed.declared,
            public_economics=lambda: self._handed.public_economics,
            health=lambda: NO_METER,
            questions=Questions(handed.questions_at_once, handed.question_timeout_s),
            handed=lambda: packed(self._handed),
        )
        if self._url.startswith("postgresql"):
            add_settings_routes(
                app,
                self._url,
                access,
                functools.partial(
                    settings_with, environ=self._environ, config=self._settings.config
                ),
            )
        add_probes(app, reader)
        self._tasks = [asyncio.create_task(self._count_budgets())]
        if self._settings.config is not None or self._fleet is not None:
            self._tasks.append(asyncio.create_task(self._reload(self._reloader())))
        try:
            await serve(app, listening)
        finally:
            for task in self._tasks:
                task.cancel()
            reader.close()

    def _refresh(self) -> None:
        # A fleet has no journals; a file may have those of a server that is not up.
        catch_up(self._url)

    def _reloader(self) -> Reloader:
        if (fleet := self._fleet) is None:
            return Reloader(self._settings.config, functools.partial(load_settings, self._environ))
        load = functools.partial(load_settings, self._environ, shared=lambda _place: fleet.now)
        return Reloader(self._settings.config, load, shared=lambda: fleet.now.version)

    async def _reload(self, reloader: Reloader) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            if self._fleet is not None:
                await asyncio.to_thread(self._fleet.look)
            try:
                new = await asyncio.to_thread(reloader.look, self._settings)
            except (CostMeterError, TimeoutError) as error:
                logger.warning("cost meter: the settings cannot be read: %s", error)
                continue
            if new is not None:
                self._settings, self._handed = new, Handed.of(new)

    async def _count_budgets(self) -> None:
        spending = Spending(self._url)
        outage = Outage()
        while True:
            settings = self._settings
            try:
                if settings.declared_budgets:
                    self._figures = await asyncio.to_thread(
                        spending.look,
                        settings.declared_budgets,
                        settings.price_book,
                        time.time_ns(),
                    )
                outage.ended()
            except LedgerError as error:
                if outage.failed():
                    logger.warning("cost meter: budgets: %s%s", error, outage.so_far)
            await asyncio.sleep(BUDGETS_EVERY_S)
