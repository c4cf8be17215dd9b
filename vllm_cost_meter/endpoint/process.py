"""The process of the side endpoint: `python -m vllm_cost_meter.endpoint.process`.

Reports are SQL and Python over many rows; in vLLM's process they would hold up tokens, on a thread
of their own too, as threads share one interpreter. So the API server starts this process, at the
lowest priority. It reads the ledger by itself and asks the API server only what the ledger does not
know. It answers on the side endpoint's port, and over the channel what tenants ask on vLLM's.

Invariant: it writes nothing, and reads no setting but those that it is handed.
"""

import asyncio
import os
from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import FastAPI

from vllm_cost_meter.endpoint.access import Access
from vllm_cost_meter.endpoint.app import make_app
from vllm_cost_meter.endpoint.handed import (
    OWN_FIGURES,
    SETTINGS,
    EndpointHello,
    Handed,
    Listening,
    OwnQuestion,
)
from vllm_cost_meter.endpoint.live import Live
from vllm_cost_meter.endpoint.own_figures import OwnFiguresOf
from vllm_cost_meter.endpoint.questions import Questions
from vllm_cost_meter.endpoint.server import (
    SHARED_METRICS,
    address_of,
    bind,
    metrics_text,
    serve,
)
from vllm_cost_meter.errors import AwayError
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.side_process.channel import decoded
from vllm_cost_meter.side_process.entry import ToServer, run
from vllm_cost_meter.side_process.handing import unpacked

logger = meter_logger()


class Endpoint:
    """What this process has, once it was told what to serve."""

    def __init__(self) -> None:
        # As they came, and what they are; `main` has them first of all.
        self._handed_bytes = b""
        self._handed: Handed
        self._own_figures: OwnFiguresOf | None = None

    async def main(self, server: ToServer, hello: EndpointHello) -> None:
        """Serve for ever."""
        self._take_settings(hello.settings)
        handed = self._handed
        live = Live(server)
        questions = Questions(handed.questions_at_once, handed.question_timeout_s)
        reader = LedgerReader(
            hello.ledger_url,
            late=True,
            book=lambda: self._handed.price_book,
            alive=live.alive,
        )
        refresh = _refresh_of(live, reader)
        self._own_figures = OwnFiguresOf(
            reader, refresh, live.budgets, questions, lambda: self._handed.is_coarse
        )
        listening = None if hello.port is None else bind(handed.host, hello.port)
        if listening is None:
            server.ready(Listening(None))
            await asyncio.Event().wait()
            return
        logger.info("cost meter: side endpoint at %s/cost/summary", address_of(listening))
        server.ready(Listening(listening.getsockname()[1]))
        await serve(self._application(reader, live, refresh, questions), listening)

    def _application(
        self,
        reader: LedgerReader,
        live: Live,
        refresh: Callable[[], None],
        questions: Questions,
    ) -> FastAPI:
        return make_app(
            reader,
            refresh=refresh,
            access=Access(
                self._handed.admin_sha256,
                lambda: self._handed.tenant_keys,
                lambda: self._handed.is_coarse,
            ),
            # With several API servers their metrics are in files, which this process reads too.
            metrics=metrics_text if SHARED_METRICS in os.environ else live.metrics,
            budgets=live.budgets,
            declared=lambda: self._handed.declared,
            public_economics=lambda: self._handed.public_economics,
            health=live.health,
            questions=questions,
            handed=lambda: self._handed_bytes,
        )

    async def answer(self, name: str, given: msgspec.Raw) -> Any:
        """Answer the API server."""
        if name != OWN_FIGURES or self._own_figures is None:
            raise ValueError(f"no answer to {name!r}")
        return await self._own_figures.answer(decoded(given, OwnQuestion))

    def take(self, name: str, value: msgspec.Raw) -> None:
        """Take up news of the API server."""
        if name == SETTINGS:
            self._take_settings(decoded(value, bytes))

    def _take_settings(self, handed: bytes) -> None:
        self._handed_bytes, self._handed = handed, unpacked(handed)


def _refresh_of(live: Live, reader: LedgerReader) -> Callable[[], None]:
    """Return what brings the ledger up to now, and says why it cannot where the ledger shows that.

    While its rows are being changed for a newer version, the process that does it gives no answer.
    """

    def refresh() -> None:
        try:
            live.refresh()
        except AwayError:
            reader.require_ledger()
            raise

    return refresh


if __name__ == "__main__":
    endpoint = Endpoint()
    run(EndpointHello, endpoint.main, endpoint.answer, endpoint.take)
