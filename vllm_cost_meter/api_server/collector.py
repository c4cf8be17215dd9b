"""The API side of the meter: joins bills with the exchanges they belong to, and keeps them.

One `Collector` per API-server process, made at its first use. Bills come in through vLLM's output
stream (`vllm_hooks/output_processor.py`), are priced, given their tenant and response, and put into
the ledger.
Replies wait here, within a bound, until what they will say is committed. Whose a request is that
runs for longer is announced to the ledger before its bill. The first API server also polls the
engines for their books.

Invariant: a cost is told to a client only after the ledger has committed it; and no reply waits
longer than `bill_timeout_ms`, or at all once `MISSES_IN_A_ROW_MAX` waits in a row were in vain.
Settings are read from `settings` at each use, never kept: some change while the server runs.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

from vllm_cost_meter import metrics
from vllm_cost_meter.activation import is_refused
from vllm_cost_meter.api_server.admission import Admission, Rules
from vllm_cost_meter.api_server.open_requests import Births
from vllm_cost_meter.api_server.poller import Poller
from vllm_cost_meter.api_server.routes import response_id_of
from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.config.reload import INTERVAL_S, Reloader
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.exchange import Birth, Exchange, RequestTimes
from vllm_cost_meter.guard import Guard
from vllm_cost_meter.ledger.database import default_url
from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.writer import LedgerWriter
from vllm_cost_meter.prices.book import PriceBook, RunFacts, by_price, terms, total_nanousd
from vllm_cost_meter.records.bill import Bill, UsagePiece
from vllm_cost_meter.records.owner import NOBODY, Owner
from vllm_cost_meter.records.requests import (
    EngineRequest,
    HttpRequest,
    Latencies,
    OpenRequest,
    Price,
)
from vllm_cost_meter.records.snapshot import EarlierFit, Snapshot
from vllm_cost_meter.tenants.budgets import Figures
from vllm_cost_meter.units.time import NS_PER_HOUR, rfc3339
from vllm_cost_meter.vllm_hooks import engines

logger = logging.getLogger("vllm.cost_meter")

P = ParamSpec("P")
R = TypeVar("R")

# Replies that waited in vain, in a row, before nobody waits any more.
MISSES_IN_A_ROW_MAX = 5
STOP_TIMEOUT_S = 10.0


class Breaker:
    """Stops replies from waiting while bills do not come."""

    def __init__(self) -> None:
        self.misses = 0
        self._in_a_row = 0

    @property
    def open(self) -> bool:
        """True while nobody should wait."""
        return self._in_a_row >= MISSES_IN_A_ROW_MAX

    def missed(self) -> None:
        """A reply waited in vain, or would have."""
        self.misses += 1
        self._in_a_row += 1

    def bill_came(self) -> None:
        """A bill came and was committed."""
        self._in_a_row = 0


class Collector:
    """The meter of one API-server process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.guard = Guard("API server")
        self.breaker = Breaker()
        # Wall time of the hooks on this side that the metrics do not show yet.
        self.own_ns = 0
        self.ledger_url = settings.ledger or default_url()
        self.writer = LedgerWriter(self.ledger_url, price_of=self._told_price)
        self.writer.start()
        # Opens the ledger, or makes it, now: the first reply must not wait for that.
        self.writer.commit()
        self.poller: Poller | None = None
        self._births = Births()
        # The names of the server's model, none as long as they are unknown.
        self.served: frozenset[str] = frozenset()
        self._facts = RunFacts()
        self._polling: asyncio.Task[None] | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._reloading: asyncio.Task[None] | None = None
        self.admission: Admission | None = None
        self._admitting: asyncio.Task[None] | None = None

    def run(
        self,
        hook: str,
        body: Callable[Concatenate["Collector", P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R | None:
        """Call `body(self, ...)` for `hook`. Never raises; None after an error."""
        if self.guard.off:
            return None
        start_ns = time.perf_counter_ns()
        try:
            result = body(self, *args, **kwargs)
            self.guard.succeeded(hook)
        except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
            self.guard.failed(hook, error)
            metrics.count_error("api")
            return None
        finally:
            self.own_ns += time.perf_counter_ns() - start_ns
        return result

    # -- life -------------------------------------------------------------------------------

    async def start(self, engine_client: Any, state: Any = None) -> bool:
        """Begin to serve this API server, whose application has this state.

        Returns True if it is the one that polls the engines.
        """
        self._facts = engines.run_facts(engine_client)
        self.served = frozenset(engines.served_names(engine_client, state))
        if self._sweeping is None:
            self._sweeping = asyncio.create_task(self._sweep())
            await self._hold_to_budgets(engine_client)
        if self._reloading is None and self.settings.config is not None:
            reloader = Reloader(self.settings.config)
            self._reloading = asyncio.create_task(self._reload(reloader, engine_client))
        if engines.api_server_index(engine_client) != 0 or self.poller is not None:
            return False
        self.poller = Poller(
            engine_client,
            self.writer,
            self.guard,
            self.settings.snapshot_interval_s,
            self._earlier_fit,
            announce=lambda: self.run("announce", Collector.announce_all),
        )
        self._polling = asyncio.create_task(self.poller.run())
        return True

    async def _hold_to_budgets(self, engine_client: Any) -> None:
        settings = self.settings
        has_rules = settings.budgets or settings.failing_closed
        if not has_rules or self.admission is not None:
            return
        spending = await asyncio.to_thread(Spending, self.writer.url)
        self.admission = Admission(
            spending,
            self._budget_rules,
            self.guard,
            settings.snapshot_interval_s,
            running_of=self._running_of,
            stop=lambda ids: engines.stop_requests(engine_client, ids, STOP_TIMEOUT_S),
        )
        self._admitting = asyncio.create_task(self.admission.run())

    def figures(self) -> Figures:
        """Return where the budgets stand."""
        return self.admission.figures if self.admission is not None else Figures()

    def _budget_rules(self) -> Rules:
        settings = self.settings
        return Rules(
            budgets=settings.declared_budgets,
            fail_closed=settings.failing_closed,
            price_of=self._price_at,
        )

    def _price_at(self, _run_id: str, hour: int) -> Fraction | None:
        """Return the price of an hour of this deployment, which budgets take for all runs."""
        price = self.book().price_at(self._facts, hour)
        return None if price is None else price.usd_per_gpu_hour

    def _running_of(self, covers: Callable[[Owner], bool]) -> list[str]:
        return [
            birth.request_id
            for birth in self._births
            if birth.exchange is not None and covers(birth.exchange.owner)
        ]

    def _earlier_fit(self, snapshot: Snapshot) -> EarlierFit | None:
        reader = LedgerReader(self.writer.url)
        try:
            return reader.earlier_fit(snapshot)
        finally:
            reader.close()

    async def stop(self) -> None:
        """Take a last look at the engines, and flush the ledger with the names of what runs."""
        for task in (self._sweeping, self._reloading, self._admitting):
            if task is not None:
                task.cancel()
        self.run("announce", Collector.announce_all)
        if self._polling is not None and self.poller is not None:
            self._polling.cancel()
            self.poller.stopping = True
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self.poller.refresh(), timeout=1.0)
        await asyncio.to_thread(self.writer.close, 2.0)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self.settings.snapshot_interval_s)
            # A budget counts what runs by who it is for, so that must be known at once.
            if self.admission is not None:
                self.run("announce", Collector.announce_all)
            else:
                self.run("announce", lambda _: self._announce(self._births.due()))

    async def _reload(self, reloader: Reloader, engine_client: Any) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                # Reading a file takes its time, and vLLM's tokens must not wait for it.
                new = await asyncio.to_thread(reloader.look, self.settings)
                self.settings = new or self.settings
                await self._hold_to_budgets(engine_client)
                self.guard.succeeded("reload")
            except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
                self.guard.failed("reload", error)

    # -- bills ------------------------------------------------------------------------------

    def born(self, birth: Birth) -> None:
        """An engine request was born in this process. Idempotent."""
        if not self._births.add(birth):
            return
        if (exchange := birth.exchange) is not None:
            exchange.part_was_born(_response_id(birth))
            if (record := exchange.unrecorded) is not None:
                exchange.unrecorded = None
                self.writer.put(replace(record, response_id=exchange.response_id))

    def billed(self, bill: Bill) -> None:
        """A bill came: keep it, and tell the exchange it belongs to."""
        birth, announced = self._births.take(bill.request_id)
        part = self._part(bill, birth, announced)
        if self.breaker.open:
            self.writer.commit(part).add_done_callback(self._committed_while_open)
        else:
            self.writer.put(part)
        if birth is not None and birth.exchange is not None:
            birth.exchange.part_was_billed(part)
        metrics.count_bill(part)
        metrics.count_own_time(self.own_ns)
        self.own_ns = 0

    def _committed_while_open(self, committed: "Future[None]") -> None:
        if not committed.cancelled() and committed.exception() is None:
            self.breaker.bill_came()

    def announce_all(self) -> None:
        """Tell the ledger whose every request without a bill is, so that it can be looked up."""
        self._announce(self._births.unannounced())

    def _announce(self, births: Sequence[Birth]) -> None:
        # Bills go the same way, later: a request cannot be announced after its bill.
        self.writer.put(*(self._open_request(birth) for birth in births))

    def _open_request(self, birth: Birth) -> OpenRequest:
        exchange = birth.exchange
        return OpenRequest(
            request_id=birth.request_id,
            external_id=birth.external_id,
            response_id=_response_id(birth),
            http_request_id=exchange.http_request_id if exchange else None,
            x_request_id=exchange.x_request_id if exchange else None,
            prompt_group=birth.prompt_group,
            owner=exchange.owner if exchange else NOBODY,
            model=self._facts.model,
            lora=birth.lora,
            route=exchange.route if exchange else None,
            started_at_ns=birth.arrived_at_ns,
        )

    def _part(self, bill: Bill, birth: Birth | None, announced: bool) -> EngineRequest:
        finished_at_ns = time.time_ns()
        exchange = birth.exchange if birth is not None else None
        return EngineRequest(
            bill=bill,
            http_request_id=exchange.http_request_id if exchange else None,
            response_id=_response_id(birth) if birth else None,
            external_id=birth.external_id if birth else None,
            prompt_group=birth.prompt_group if birth else bill.request_id,
            owner=exchange.owner if exchange else NOBODY,
            model=self._facts.model,
            lora=birth.lora if birth else None,
            route=exchange.route if exchange else None,
            cost_nanousd=self._cost_nanousd(bill, lambda piece: piece.gpu_time_ns),
            marginal_cost_nanousd=self._cost_nanousd(bill, lambda piece: piece.marginal_ns),
            started_at_ns=birth.arrived_at_ns if birth else finished_at_ns,
            finished_at_ns=finished_at_ns,
            latencies=self._latencies(birth, bill, finished_at_ns),
            announced=announced,
        )

    def book(self) -> PriceBook:
        """Return the prices as they are declared now."""
        return self.settings.price_book

    def _told_price(self, snapshot: Snapshot) -> Price | None:
        return told_price(self.book(), snapshot)

    def _cost_nanousd(self, bill: Bill, ns_of: Callable[[UsagePiece], int]) -> int | None:
        """Return what time of a bill costs, each hour at its own price; None if one has none."""
        # What has used nothing has no hour of its own, and costs nothing if now has a price.
        now = time.time_ns() // NS_PER_HOUR
        spent = [(piece.hour, ns_of(piece)) for piece in bill.pieces] or [(now, 0)]
        at = by_price(spent, partial(self.book().price_at, self._facts))
        return None if at is None else total_nanousd(at)

    def _latencies(self, birth: Birth | None, bill: Bill, finished_at_ns: int) -> Latencies:
        if birth is None or birth.times is None:
            return Latencies()
        try:
            return latencies(birth.times, bill.output_tokens, finished_at_ns)
        except (AttributeError, TypeError):  # another vLLM's: unknown, and no reason to lose a bill
            metrics.count_error("api")
            return Latencies()

    # -- replies ----------------------------------------------------------------------------

    async def settle(self, exchange: Exchange, record: Callable[[], HttpRequest]) -> bool:
        """Wait until all of an exchange is billed and committed; False if it took too long.

        `record` is called once the bills are here. With False, nothing may be told.
        """
        if self.breaker.open:
            self.breaker.missed()
            metrics.count_miss()
            return False
        try:
            async with asyncio.timeout(self.settings.bill_timeout_ms / 1000):
                await exchange.all_billed()
                # Shielded: the ledger keeps the record though the reply may not wait for it.
                await asyncio.shield(asyncio.wrap_future(self.writer.commit(record())))
        except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
            if not isinstance(error, TimeoutError):
                self.guard.failed("settle", error)
                metrics.count_error("api")
            self.breaker.missed()
            metrics.count_miss()
            return False
        self.breaker.bill_came()
        self.guard.succeeded("settle")
        return True

    def http_record(
        self, exchange: Exchange, status: int, streamed: bool, usage: Any, told: bool
    ) -> HttpRequest:
        """Return the ledger's record of an exchange as it stands now."""
        return HttpRequest(
            http_request_id=exchange.http_request_id,
            response_id=exchange.response_id,
            x_request_id=exchange.x_request_id,
            owner=exchange.owner,
            model=self._facts.model,
            route=exchange.route,
            status=status,
            streamed=streamed,
            usage=usage,
            gpu_time_ns=exchange.gpu_time_ns if told else None,
            cost_nanousd=exchange.cost_nanousd if told else None,
            started_at_ns=exchange.started_at_ns,
            finished_at_ns=time.time_ns(),
        )


class NoCollector:
    """Stands in where no collector could be made: every hook passes through.

    `settings` say who is to fail closed; None if they are what could not be read.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings

    def run(self, hook: str, body: object, *args: object) -> None:
        """Do nothing."""


_collector: Collector | NoCollector | None = None


def get_collector() -> Collector | NoCollector:
    """Return this process's collector, made at the first call. Never raises."""
    global _collector
    if _collector is None:
        settings = None
        try:
            settings = load_settings()
            # `--middleware` brings it into a vLLM that was refused, too.
            _collector = NoCollector(settings) if is_refused() else Collector(settings)
        except Exception:
            logger.exception("cost meter: could not start in the API server; it runs unmetered")
            _collector = NoCollector(settings)
    return _collector


def told_price(book: PriceBook, snapshot: Snapshot) -> Price | None:
    """Return the price of a run in the hour it began, as the ledger keeps it; None without one."""
    engine = snapshot.engine
    run = RunFacts(engine.gpus, engine.model, engine.hardware, engine.host)
    price = book.price_at(run, snapshot.started_at_ns // NS_PER_HOUR)
    if price is None:
        return None
    entry, agreed = price.entry, terms(price.as_dict())
    source = entry.source if agreed == "gpu" else f"{entry.source}: {agreed}"
    if entry.effective_from_hour is None:
        since_ns, price_id = snapshot.started_at_ns, f"settings:{price.text}"
    else:
        since_ns = entry.effective_from_hour * NS_PER_HOUR
        # A fact is written once: what is in it is in its key.
        price_id = f"book:{price.text}:{rfc3339(since_ns)}:{source}"
    return Price(price_id, price.text, source, since_ns)


def latencies(times: RequestTimes, output_tokens: int, finished_at_ns: int) -> Latencies:
    """Return a request's latencies from vLLM's per-request statistics; 0 there means not yet."""
    first, last = times.first_token_ts, times.last_token_ts
    return Latencies(
        queue_ms=(times.scheduled_ts - times.queued_ts) * 1e3 if times.scheduled_ts else None,
        ttft_ms=times.first_token_latency * 1e3 if first else None,
        tpot_ms=(last - first) / (output_tokens - 1) * 1e3 if output_tokens > 1 and last else None,
        e2e_ms=finished_at_ns / 1e6 - times.arrival_time * 1e3 if times.arrival_time else None,
    )


def _response_id(birth: Birth) -> str | None:
    if birth.exchange is None or birth.external_id is None:
        return None
    return response_id_of(birth.exchange.route, birth.external_id)
