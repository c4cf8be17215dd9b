"""Puts the meter together in vLLM's API process, and starts it with vLLM's application.

Invariant: nothing here stops vLLM from serving.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from vllm_cost_meter.api_server.collector import Collector
from vllm_cost_meter.api_server.poller import Poller
from vllm_cost_meter.endpoint.server import serve
from vllm_cost_meter.endpoint.tenant_routes import make_router
from vllm_cost_meter.ledger.reader import LedgerReader

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
                refresher(collector.poller, asyncio.get_running_loop()),
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
    refresh = (lambda: None) if poller is None else refresher(poller, asyncio.get_running_loop())
    reader = LedgerReader(collector.ledger_url, create=True, book=collector.book)
    app.include_router(make_router(reader, refresh, collector.figures))


def refresher(poller: Poller, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
    """Return what brings the ledger up to now from another thread, or gives up in time."""

    def refresh() -> None:
        # A slow or dead engine means older figures, not an error.
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(poller.look(), loop).result(REFRESH_TIMEOUT_S)

    return refresh
