"""Serves the side endpoint's application without a vLLM server: over a fleet, or any ledger.

The settings say who may ask, what GPUs cost and which budgets there are, as they do beside vLLM.
Those that may change while a server runs are read again when their file changes. Budgets are
counted over all that the ledger has, so over all servers of a fleet.

Invariant: it writes nothing, so any number of them may answer from one database.
"""

import asyncio
import socket
import time

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
from vllm_cost_meter.errors import CostMeterError, LedgerError
from vllm_cost_meter.ledger.catching_up import catch_up
from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.logs import Outage, meter_logger
from vllm_cost_meter.side_process.handing import packed
from vllm_cost_meter.tenants.budgets import BudgetFigures

logger = meter_logger()

BUDGETS_EVERY_S = 2.0


class Standalone:
    """A side endpoint of its own. Used by one event loop."""

    def __init__(self, url: str, settings: Settings) -> None:
        """Nothing is opened before `serve`."""
        self._url = url
        self._settings = settings
        self._handed = Handed.of(settings)
        self._figures = BudgetFigures()
        self._tasks: list[asyncio.Task[None]] = []

    async def serve(self, listening: socket.socket) -> None:
        """Serve until the process is told to end."""
        handed = self._handed
        reader = LedgerReader(self._url, late=True, book=lambda: self._handed.price_book)
        app = make_app(
            reader,
            refresh=self._refresh,
            access=Access(
                handed.admin_sha256,
                lambda: self._handed.tenant_keys,
                lambda: self._handed.is_coarse,
            ),
            metrics=AuditMetrics(reader).text,
            budgets=lambda: self._figures,
            declared=lambda: self._handed.declared,
            public_economics=lambda: self._handed.public_economics,
            health=lambda: NO_METER,
            questions=Questions(handed.questions_at_once, handed.question_timeout_s),
            handed=lambda: packed(self._handed),
        )
        add_probes(app, reader)
        self._tasks = [asyncio.create_task(self._count_budgets())]
        if self._settings.config is not None:
            self._tasks.append(asyncio.create_task(self._reload(Reloader(self._settings.config))))
        try:
            await serve(app, listening)
        finally:
            for task in self._tasks:
                task.cancel()
            reader.close()

    def _refresh(self) -> None:
        # A fleet has no journals; a file may have those of a server that is not up.
        catch_up(self._url)

    async def _reload(self, reloader: Reloader) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
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
