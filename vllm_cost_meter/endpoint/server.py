"""Start the side endpoint's HTTP server in the first API server process, on its own thread.

The thread has its own event loop, because a report's SQL may take a while and would hold up tokens
on vLLM's. The port is bound before the thread starts, so a port in use causes one warning and
nothing else.

Invariant: nothing here stops vLLM from serving.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Collection, Mapping

import prometheus_client
import prometheus_client.multiprocess
import uvicorn
from fastapi import FastAPI

from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.economics import Declared
from vllm_cost_meter.endpoint.access import Access
from vllm_cost_meter.endpoint.app import make_app
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import PriceBook
from vllm_cost_meter.tenants.budgets import BudgetFigures

logger = logging.getLogger("vllm.cost_meter")


def serve(
    settings: Settings,
    ledger_url: str,
    refresh: Callable[[], None],
    budgets: Callable[[], BudgetFigures] = BudgetFigures,
    keys: Callable[[], Mapping[str, str]] = dict,
    book: Callable[[], PriceBook] | None = None,
    declared: Callable[[], Declared] = Declared,
    public_economics: Callable[[], bool] = lambda: False,
    alive: Callable[[], Collection[str]] = tuple,
    is_coarse: Callable[[], bool] = lambda: False,
) -> None:
    """Serve the side endpoint from a daemon thread, unless it is switched off or its port in use.

    `refresh` brings the ledger up to date. `alive` returns the runs that are known to live. The
    other functions return settings that may change while the server runs.
    """
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
        reader = LedgerReader(
            ledger_url, create=True, book=book or settings.price_book, alive=alive
        )
    except LedgerError:
        listening.close()  # Otherwise clients would connect and wait for ever.
        raise
    app = make_app(
        reader,
        refresh=refresh,
        access=Access(settings.admin_sha256(), keys, is_coarse),
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


def _run(app: FastAPI, listening: socket.socket) -> None:
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except Exception as error:  # noqa: BLE001 - the thread's last word
        logger.error("cost meter: the side endpoint stopped: %r", error)
