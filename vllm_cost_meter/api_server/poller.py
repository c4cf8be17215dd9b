"""Poll the engines for their books, at each interval and whenever a reader wants fresh figures.

An engine without requests makes no step, so it would report nothing by itself. The poll also shows
that it is alive. The poller runs on the event loop of the first API server only.

Invariant: an engine sends an hour's totals again until a snapshot that had them is journaled.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from vllm_cost_meter.api_server.background import Loops
from vllm_cost_meter.api_server.record_making import facts_of_run
from vllm_cost_meter.errors import AwayError, LedgerError
from vllm_cost_meter.journal.writer import JournalWriter
from vllm_cost_meter.logs import Outage, meter_logger
from vllm_cost_meter.metrics import series
from vllm_cost_meter.prices.book import RunFacts
from vllm_cost_meter.records.requests import Price
from vllm_cost_meter.records.snapshot import EarlierFit, Snapshot
from vllm_cost_meter.vllm_hooks import engines

logger = meter_logger()

# An engine answers between two steps, and a step with a large prefill may take seconds.
ANSWER_TIMEOUT_S = 10.0


async def _no_fit(_snapshot: Snapshot) -> None:
    """Know of no earlier cost model."""


class Poller:
    """Polls all engines of one server into the journal."""

    def __init__(
        self,
        engine_client: object,
        writer: JournalWriter,
        loops: Loops,
        interval_s: float,
        earlier_fit: Callable[[Snapshot], Awaitable[EarlierFit | None]] = _no_fit,
        price_of: Callable[[Snapshot], Price | None] = lambda _: None,
        announce: Callable[[], None] = lambda: None,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        """Make a poller.

        `earlier_fit` looks up an earlier cost model for a new engine, and `price_of` gives the
        price that a run begins with. `announce` journals this process's running requests and their
        owners.
        """
        self._engine_client = engine_client
        self._writer = writer
        self._loop = loops["poll"]
        self._engines_loop = loops["engines"]
        self._interval_s = interval_s
        self._answer_timeout_s = answer_timeout_s
        self._acknowledged: dict[str, int] = {}
        self._earlier_fit = earlier_fit
        self._price_of = price_of
        self._announce = announce
        # The earlier fits, by run, that the next poll will send.
        self._fits: dict[str, EarlierFit] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self.latest: dict[str, Snapshot] = {}
        self.stopping = False
        self._overdue = Outage()
        # The run that answered last, by its engine's place. A failing engine is removed.
        self._runs: dict[int, str] = {}

    def facts_of(self, run_id: str) -> RunFacts | None:
        """Return what the price of a run depends on; None for a run that never answered."""
        snapshot = self.latest.get(run_id)
        return None if snapshot is None else facts_of_run(snapshot)

    async def run(self) -> None:
        """Poll for ever. Errors are contained and counted."""
        await self._loop.run(self._refresh_and_send_fits, self._interval_s)

    async def _refresh_and_send_fits(self) -> None:
        await self.refresh()
        if self._fits:  # Send them before the first requests come, if possible.
            await self.refresh()

    async def refresh(self) -> None:
        """Journal the engines' books of now. Callers during a refresh share it."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._poll())
        await asyncio.shield(self._refreshing)

    async def look(self) -> None:
        """Journal the books of now for a reader, with the owners of the youngest requests too."""
        self._announce()
        await self.refresh()
        # A refresh that was already under way may have come before the announcements.
        await asyncio.wrap_future(self._writer.append())

    def alive(self) -> frozenset[str]:
        """Return the runs of engines that have not failed, even if they are slow to answer."""
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
            priced = [replace(each, first_price=self._price_of(each)) for each in snapshots]
            await asyncio.wrap_future(self._writer.append(*priced))
        for snapshot in snapshots:
            self._acknowledged[snapshot.run_id] = snapshot.number

    async def _look_for_a_fit(self, snapshot: Snapshot) -> None:
        """Look up what an equal engine learnt before; the next poll sends it to the new engine."""
        try:
            fit = await self._earlier_fit(snapshot)
        except (AwayError, LedgerError) as error:
            logger.warning("cost meter: the earlier cost model could not be looked up: %s", error)
            return
        if fit is not None:
            self._fits[snapshot.run_id] = fit

    def _note_runs(self, answers: Sequence[Snapshot | BaseException | None]) -> None:
        """Note which runs are alive; a timeout does not count as dead, as long steps cause it."""
        runs = dict(self._runs)
        for place, answer in enumerate(answers):
            if isinstance(answer, Snapshot):
                runs[place] = answer.run_id
            elif not isinstance(answer, TimeoutError):
                runs.pop(place, None)
        # The dict is replaced, never changed: readers in other threads see the old or the new one.
        self._runs = runs

    def _note_failures(self, failures: Sequence[BaseException]) -> None:
        if self.stopping:
            return  # Engines stop before we do, so failures are expected now.
        if any(isinstance(failure, TimeoutError) for failure in failures):
            self._note_overdue()
        elif not failures:
            self._note_in_time()
            self._engines_loop.succeeded()
        for failure in failures:
            if not isinstance(failure, TimeoutError):
                self._engines_loop.failed(failure)

    def _note_overdue(self) -> None:
        """Log that an engine is overdue, until it answers again. This is not our error."""
        if self._overdue.failed():
            logger.warning(
                "cost meter: an engine did not answer within %g s%s; asking again until it does. "
                "Until then its figures are old.",
                *(self._answer_timeout_s, self._overdue.so_far),
            )

    def _note_in_time(self) -> None:
        if (ended := self._overdue.ended()) is not None:
            logger.warning("cost meter: all engines answer in time again, after %.1f s", ended[0])

    def _note(self, snapshot: Snapshot) -> None:
        before = self.latest.get(snapshot.run_id)
        if snapshot.state == "off" and (before is None or before.state == "on"):
            logger.error(
                "cost meter: engine %d switched its meter off after %d errors; its time is "
                "booked as lost until the server is restarted",
                snapshot.engine.engine_index,
                snapshot.errors,
            )
        series.set_engine(snapshot)
        series.count_engine(snapshot)
        self.latest[snapshot.run_id] = snapshot
