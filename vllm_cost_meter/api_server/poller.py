"""Asks the engines for their books, once a second and whenever somebody wants to read them.

An engine without requests makes no step and would say nothing by itself; asked, it also shows that
it is alive. Runs on the event loop of the first API server only.

Invariant: an hour's totals are sent again until a snapshot that held them is committed.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

from vllm_cost_meter import metrics
from vllm_cost_meter.api_server.background import Loops, in_own_thread
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.writer import LedgerWriter
from vllm_cost_meter.records.snapshot import EarlierFit, Snapshot
from vllm_cost_meter.vllm_hooks import engines

logger = logging.getLogger("vllm.cost_meter")

# An engine answers between two steps; a step of a large prefill may take seconds.
ANSWER_TIMEOUT_S = 10.0


class Poller:
    """Polls all engines of one server into the ledger."""

    def __init__(
        self,
        engine_client: object,
        writer: LedgerWriter,
        loops: Loops,
        interval_s: float,
        earlier_fit: Callable[[Snapshot], EarlierFit | None] = lambda _: None,
        announce: Callable[[], None] = lambda: None,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        """`earlier_fit` looks up, in a thread, what a new engine may begin with.

        `announce` tells the ledger whose the requests are that run in this process.
        """
        self._engine_client = engine_client
        self._writer = writer
        self._loop = loops["poll"]
        self._engines_loop = loops["engines"]
        self._interval_s = interval_s
        self._answer_timeout_s = answer_timeout_s
        self._acknowledged: dict[str, int] = {}
        self._earlier_fit = earlier_fit
        self._announce = announce
        # By run, until the engine was told.
        self._fits: dict[str, EarlierFit] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self.latest: dict[str, Snapshot] = {}
        self.stopping = False
        self._overdue = False
        # By the place of its engine: the run that answered last, until its engine fails.
        self._runs: dict[int, str] = {}

    async def run(self) -> None:
        """Poll for ever."""
        await self._loop.run(self._refresh_and_hand_fits_over, self._interval_s)

    async def _refresh_and_hand_fits_over(self) -> None:
        await self.refresh()
        if self._fits:  # before the first requests, if possible
            await self.refresh()

    async def refresh(self) -> None:
        """Bring the ledger up to now. Callers that come while one is under way share it."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._poll())
        await asyncio.shield(self._refreshing)

    async def look(self) -> None:
        """Bring the ledger up to now for a reader, with the names of the youngest requests too."""
        self._announce()
        await self.refresh()
        # The refresh may have been under way, and its commit come before what was announced.
        await asyncio.wrap_future(self._writer.commit())

    def alive(self) -> frozenset[str]:
        """Return the runs whose engines have not failed, however long they take to answer."""
        return frozenset(self._runs.values())

    async def _poll(self) -> None:
        fits, self._fits = self._fits, {}
        answers = await engines.poll_engines(
            self._engine_client, self._acknowledged, fits, self._answer_timeout_s
        )
        self._note_runs(answers)
        snapshots = [answer for answer in answers if isinstance(answer, Snapshot)]
        self._note_failures([answer for answer in answers if isinstance(answer, BaseException)])
        for snapshot in snapshots:
            if snapshot.run_id not in self.latest:
                await self._look_for_a_fit(snapshot)
            self._note(snapshot)
        if snapshots:
            await asyncio.wrap_future(self._writer.commit(*snapshots))
        for snapshot in snapshots:
            self._acknowledged[snapshot.run_id] = snapshot.number

    async def _look_for_a_fit(self, snapshot: Snapshot) -> None:
        """Have a new engine told, with the next poll, what one like it had learnt before."""
        try:
            fit = await in_own_thread(self._earlier_fit, snapshot)
        except LedgerError as error:
            logger.warning("cost meter: no earlier fit could be looked up: %s", error)
            return
        if fit is not None:
            self._fits[snapshot.run_id] = fit

    def _note_runs(self, answers: Sequence[Snapshot | BaseException | None]) -> None:
        """An engine in a long step does not answer in time: it lives. One that fails may not."""
        runs = dict(self._runs)
        for place, answer in enumerate(answers):
            if isinstance(answer, Snapshot):
                runs[place] = answer.run_id
            elif not isinstance(answer, TimeoutError):
                runs.pop(place, None)
        # Readers are in other threads: they see the old runs or the new ones.
        self._runs = runs

    def _note_failures(self, failures: Sequence[BaseException]) -> None:
        if self.stopping:
            return  # engines go before we do
        if any(isinstance(failure, TimeoutError) for failure in failures):
            self._note_overdue()
        elif not failures:
            self._overdue = False
            self._engines_loop.succeeded()
        for failure in failures:
            if not isinstance(failure, TimeoutError):
                self._engines_loop.failed(failure)

    def _note_overdue(self) -> None:
        """A busy engine is no error of ours: say so once, until it has answered again."""
        if not self._overdue:
            logger.warning(
                "cost meter: an engine did not answer within %g s; asking again until it does. "
                "Until then its figures are old.",
                self._answer_timeout_s,
            )
        self._overdue = True

    def _note(self, snapshot: Snapshot) -> None:
        before = self.latest.get(snapshot.run_id)
        if snapshot.state == "off" and (before is None or before.state == "on"):
            logger.error(
                "cost meter: engine %d switched its meter off after %d errors; its time is "
                "booked as lost until the server is restarted",
                snapshot.engine.engine_index,
                snapshot.errors,
            )
        metrics.set_engine(snapshot)
        self.latest[snapshot.run_id] = snapshot
