"""Runs the side endpoint in the first API server, on a thread and an event loop of its own.

Reports are SQL and may take a while; on vLLM's event loop they would hold up tokens. The port is
bound before the thread starts, so that a taken port is one warning here and nothing else.

Invariant: nothing here stops vLLM from serving.
"""

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

import prometheus_client
import prometheus_client.multiprocess
import uvicorn
from fastapi import FastAPI

from vllm_cost_meter.access import Access
from vllm_cost_meter.api import make_app
from vllm_cost_meter.budgets import Figures
from vllm_cost_meter.collector import Collector
from vllm_cost_meter.config import Settings
from vllm_cost_meter.economics import Declared
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.own_figures import make_router
from vllm_cost_meter.poller import Poller
from vllm_cost_meter.price_book import PriceBook

logger = logging.getLogger("vllm.cost_meter")

# A reader gets figures up to one snapshot old rather than wait longer for an engine.
REFRESH_TIMEOUT_S = 2.0


async def start_side(collector: Collector, app: Any) -> None:
    """Start the collector with vLLM's application and, in the first API server, the endpoint."""
    engine_client = getattr(getattr(app, "state", None), "engine_client", None)
    if engine_client is None:
        return  # a render server has no engine
    try:
        polls = await collector.start(engine_client, app.state)
        if polls and collector.poller is not None:
            serve(
                collector.settings,
                collector.ledger_url,
                collector.poller,
                collector.figures,
                lambda: collector.settings.tenant_keys,
                collector.book,
                lambda: collector.settings.declared,
                lambda: collector.settings.public_economics,
            )
        _add_own_figures(collector, app)
    except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
        collector.guard.failed("start", error)


def _add_own_figures(collector: Collector, app: Any) -> None:
    """Put tenants' own figures on vLLM's port; those of other API servers are a snapshot old."""
    poller = collector.poller
    loop = asyncio.get_running_loop()
    refresh = (lambda: None) if poller is None else _refresher(poller, loop)
    reader = LedgerReader(collector.ledger_url, create=True, book=collector.book)
    app.include_router(make_router(reader, refresh, collector.figures))


def serve(
    settings: Settings,
    ledger_url: str,
    poller: Poller,
    budgets: Callable[[], Figures] = Figures,
    keys: Callable[[], Mapping[str, str]] = dict,
    book: Callable[[], PriceBook] | None = None,
    declared: Callable[[], Declared] = Declared,
    public_economics: Callable[[], bool] = lambda: False,
) -> None:
    """Serve the side endpoint from a daemon thread, unless it is switched off or the port taken."""
    if settings.port is None:
        return
    try:
        listening = _bind(settings.host, settings.port)
    except OSError as error:
        logger.warning(
            "cost meter: the side endpoint could not listen on %s port %s (%s); serving goes on "
            "without it. Set COST_METER_PORT to another port, 0 for any, or off.",
            settings.host,
            settings.port,
            error.strerror,
        )
        return
    try:
        reader = LedgerReader(ledger_url, create=True, book=book or settings.price_book)
    except LedgerError:
        listening.close()  # or clients would connect and wait for ever
        raise
    app = make_app(
        reader,
        refresh=_refresher(poller, asyncio.get_running_loop()),
        access=Access(settings.admin_sha256(), keys),
        registry=metrics_registry,
        budgets=budgets,
        declared=declared,
        public_economics=public_economics,
    )
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    threading.Thread(
        target=_run, args=(app, listening), name="cost-meter-endpoint", daemon=True
    ).start()
    logger.info("cost meter: side endpoint at http://%s:%d/cost/summary", shown, port)


def metrics_registry() -> prometheus_client.CollectorRegistry:
    """Return the registry that covers all processes of this server."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return prometheus_client.REGISTRY
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()
    except OSError:
        listening.close()
        raise
    return listening


def _refresher(poller: Poller, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
    def refresh() -> None:
        # A slow or dead engine means older figures, not an error.
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(poller.look(), loop).result(REFRESH_TIMEOUT_S)

    return refresh


def _run(app: FastAPI, listening: socket.socket) -> None:
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except Exception as error:  # noqa: BLE001 - the thread's last word
        logger.error("cost meter: the side endpoint stopped: %r", error)
