"""Writes records to a ledger at once, for tests of what reads them."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from vllm_cost_meter.journal.entries import Record
from vllm_cost_meter.ledger.batches import BatchWriter
from vllm_cost_meter.records.requests import Price
from vllm_cost_meter.records.snapshot import Snapshot


class LedgerWriter:
    """Each call is one transaction, and is over when it returns."""

    def __init__(
        self, url: str, *, price_of: Callable[[Snapshot], Price | None] = lambda _: None
    ) -> None:
        self.url = url
        self._price_of = price_of
        self._batches = BatchWriter(url)

    def start(self) -> None:
        self._batches.opened()

    def commit(self, *records: Record) -> Future[None]:
        priced = [
            replace(one, first_price=self._price_of(one)) if isinstance(one, Snapshot) else one
            for one in records
        ]
        done: Future[None] = Future()
        bad = self._batches.write(priced)
        if bad:
            done.set_exception(bad[0].error)
        else:
            done.set_result(None)
        return done

    append = commit

    def put(self, *records: Record) -> None:
        self.commit(*records)

    def close(self, timeout_s: float = 5.0) -> None:
        self._batches.drop()
