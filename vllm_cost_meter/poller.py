"""Asks the engines for their books, once a second and whenever somebody wants to read them.

An engine without requests makes no step and would say nothing by itself; asked, it also shows that
it is alive. Runs on the event loop of the first API server only.

Invariant: an hour's totals are sent again until a snapshot that held them is committed.
"""

import asyncio
import logging
from collections.abc import Sequence

from vllm_cost_meter import _vllm, metrics
from vllm_cost_meter.guard import Guard
from vllm_cost_meter.ledger.writer import LedgerWriter
from vllm_cost_meter.records import Snapshot

logger = logging.getLogger("vllm.cost_meter")

# An engine answers between two steps; a step of a large prefill may take seconds.
ANSWER_TIMEOUT_S = 10.0


class Poller:
    """Polls all engines of one server into the ledger."""

    def __init__(
        self, engine_client: object, writer: LedgerWriter, guard: Guard, interval_s: float
    ) -> None:
        self._engine_client = engine_client
        self._writer = writer
        self._guard = guard
        self._interval_s = interval_s
        self._acknowledged: dict[str, int] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self.latest: dict[str, Snapshot] = {}
        self.stopping = False
        self._overdue = False

    async def run(self) -> None:
        """Poll for ever; an error is contained and counted."""
        while True:
            try:
                await self.refresh()
                self._guard.succeeded("poll")
            except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
                self._guard.failed("poll", error)
            await asyncio.sleep(self._interval_s)

    async def refresh(self) -> None:
        """Bring the ledger up to now. Callers that come while one is under way share it."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._poll())
        await asyncio.shield(self._refreshing)

    async def _poll(self) -> None:
        answers = await _vllm.poll_engines(
            self._engine_client, self._acknowledged, ANSWER_TIMEOUT_S
        )
        snapshots = [answer for answer in answers if isinstance(answer, Snapshot)]
        self._note_failures([answer for answer in answers if isinstance(answer, BaseException)])
        for snapshot in snapshots:
            self._note(snapshot)
        if snapshots:
            await asyncio.wrap_future(self._writer.commit(*snapshots))
        for snapshot in snapshots:
            self._acknowledged[snapshot.run_id] = snapshot.number

    def _note_failures(self, failures: Sequence[BaseException]) -> None:
        if self.stopping:
            return  # engines go before we do
        if any(isinstance(failure, TimeoutError) for failure in failures):
            self._note_overdue()
        elif not failures:
            self._overdue = False
            self._guard.succeeded("poll of one engine")
        for failure in failures:
            if not isinstance(failure, TimeoutError):
                self._guard.failed("poll of one engine", failure)

    def _note_overdue(self) -> None:
        """A busy engine is no error of ours: say so once, until it has answered again."""
        if not self._overdue:
            logger.warning(
                "cost meter: an engine did not answer within %g s; asking again until it does. "
                "Until then its figures are old.",
                ANSWER_TIMEOUT_S,
            )
        self._overdue = True

    def _note(self, snapshot: Snapshot) -> None:
        before = self.latest.get(snapshot.run_id)
        if snapshot.state == "off" and (before is None or before.state == "on"):
            logger.error(
                "cost meter: engine %d switched its meter off after %d errors; its time is "
                "booked as lost until the server is restarted",
                snapshot.engine_index,
                snapshot.errors,
            )
        metrics.set_engine(snapshot)
        self.latest[snapshot.run_id] = snapshot
