"""The collector joins bills with their HTTP requests, prices them, and journals both.

Bills arrive in vLLM's output stream (`vllm_hooks/output_processor.py`). Here they get a price, a
tenant and a response. A reply waits here, within a bound, until its cost is in the journal. A
request that runs for longer is announced before its bill. Settings are read at each use,
because some change while the server runs.

Invariant: a client is told a cost only once it is in the journal.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from vllm_cost_meter.api_server.api_guard import ApiGuard
from vllm_cost_meter.api_server.breaker import Breaker
from vllm_cost_meter.api_server.open_requests import OpenRequests
from vllm_cost_meter.api_server.record_making import (
    coarse_cost,
    engine_request,
    http_request,
    open_request,
    reply_cost,
    response_id,
)
from vllm_cost_meter.api_server.reply_bytes import ReplyCost
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.exchange import Birth, Exchange, Refusal
from vllm_cost_meter.journal.writer import JournalWriter
from vllm_cost_meter.metrics import owners
from vllm_cost_meter.prices.book import RunFacts
from vllm_cost_meter.records.bill import Bill
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.records.requests import EngineRequest


class Collector:
    """The open requests and the bills of one API server. Used by one event loop only."""

    def __init__(
        self,
        writer: JournalWriter,
        guard: ApiGuard,
        settings: Callable[[], Settings],
        open_requests: OpenRequests | None = None,
        refuses: Callable[[Exchange | None], Refusal | None] = lambda _exchange: None,
        on_bill: Callable[[EngineRequest], None] = lambda _part: None,
    ) -> None:
        """Make it.

        `refuses` tells whether an exchange may have no further engine request. `on_bill` gets each
        bill that is handed to the journal.
        """
        self._on_bill = on_bill
        self.breaker = Breaker(guard)
        # Facts about the engines; empty before the application has started.
        self.run_facts = RunFacts()
        # The half of a request that its router does not say otherwise; None if that is not known.
        self.kv_role: str | None = None
        # Returns the facts of one run, where its snapshots are seen; otherwise None.
        self.facts_of: Callable[[str], RunFacts | None] = lambda _run_id: None
        self._writer = writer
        self._guard = guard
        self._settings = settings
        self._open = OpenRequests() if open_requests is None else open_requests
        self._refuses = refuses

    # -- births and bills -------------------------------------------------------------------

    def refused(self, exchange: Exchange | None) -> Refusal | None:
        """Return the reply to an exchange that may have no further engine request, or None."""
        return self._refuses(exchange)

    def born(self, birth: Birth) -> None:
        """Note a new engine request of this process. A repeated call changes nothing."""
        if birth.kv_role is None and self.kv_role is not None:
            birth = replace(birth, kv_role=self.kv_role)
        if not self._open.add(birth):
            return
        if (exchange := birth.exchange) is not None:
            exchange.part_was_born(response_id(birth))
            if (record := exchange.unrecorded) is not None:
                exchange.unrecorded = None
                self._writer.put(replace(record, response_id=exchange.response_id))

    def billed(self, bill: Bill) -> None:
        """Price a bill, journal it, and add it to its HTTP request."""
        birth, announced = self._open.take(bill.request_id)
        book = self._settings().price_book
        run = self.facts_of(bill.run_id) or self.run_facts
        part = engine_request(bill, birth, run, book, announced=announced)
        if self.breaker.open:
            self._writer.append(part).add_done_callback(self._journaled_while_open)
        else:
            self._writer.put(part)
        self._on_bill(part)
        if birth is not None and birth.exchange is not None:
            birth.exchange.part_was_billed(part)
        owners.count_bill(part)
        self._guard.show_own_time()

    def _journaled_while_open(self, journaled: "Future[None]") -> None:
        if not journaled.cancelled() and journaled.exception() is None:
            self.breaker.bill_came()

    # -- open requests ----------------------------------------------------------------------

    def announce_due(self) -> None:
        """Announce the requests that were open at the last call too."""
        self._announce(self._open.due())

    def announce_all(self) -> None:
        """Announce every open request, so that it can be looked up."""
        self._announce(self._open.unannounced())

    def _announce(self, births: Sequence[Birth]) -> None:
        model = self.run_facts.model
        records, failure = [], None
        for birth in births:
            try:
                records.append(open_request(birth, model))
            except Exception as error:  # noqa: BLE001 - the others are announced all the same
                failure = error
        # Bills go through the same queue later, so a request is never announced after its bill.
        self._writer.put(*records)
        if failure is not None:
            raise failure

    def open_requests_of(self, covers: Callable[[Owner], bool]) -> list[str]:
        """Return the internal ids of the open requests with an owner that `covers` accepts."""
        return [
            birth.request_id
            for birth in self._open
            if birth.exchange is not None and covers(birth.exchange.owner)
        ]

    # -- replies ----------------------------------------------------------------------------

    async def settle(self, exchange: Exchange) -> ReplyCost | None:
        """Return the cost of an HTTP request once it is journaled; None if that took too long."""
        timeout_s = self._settings().bill_timeout_ms / 1000
        return await self.breaker.settle(self._journaled(exchange), timeout_s)

    async def _journaled(self, exchange: Exchange) -> ReplyCost:
        await exchange.all_billed()
        cost = reply_cost(exchange)
        if self._settings().is_coarse:
            cost = coarse_cost(cost)
        record = http_request(exchange, self.run_facts.model, told=True)
        exchange.recorded = True
        try:
            # The write is shielded: the journal keeps the record even if the reply stops waiting.
            await asyncio.shield(asyncio.wrap_future(self._writer.append(record)))
        except Exception as error:  # noqa: BLE001 - whatever its database raises
            raise LedgerError(f"the cost was not journaled: {error}") from error
        return cost

    def ended(self, exchange: Exchange) -> None:
        """Record an HTTP request that the application has finished, unless that was done before."""
        if exchange.recorded:
            return
        exchange.recorded = True
        record = http_request(exchange, self.run_facts.model, told=False)
        if exchange.born:
            self._writer.put(record)
        else:
            exchange.unrecorded = record
