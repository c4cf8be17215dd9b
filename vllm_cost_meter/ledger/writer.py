"""The ledger writer: one thread per process writes records, many in one transaction.

Serving must never wait for a disk, so callers hand records over (`put`), and the thread writes them
a moment later. A reply's cost header may leave only after its bill is safe. So `commit` returns a
future that resolves after COMMIT, and ends the gathering at once. While a transaction runs, the
next group gathers: the busier the server, the larger the groups.

A database that fails (locked, full, gone) costs only memory. The batch stays queued and is tried
again, oldest first. Beyond `max_records` the oldest records are dropped and counted. A record that
can never be written (`faults`) is dropped alone, counted and named in the log.

Invariant: every record that came in is in exactly one of: committed, dropped, or waiting
(`queued == committed + dropped + waiting`), and a future resolves only after its records' COMMIT.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from sqlalchemy import Engine
from sqlalchemy.engine import Connection

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.database import open_database, writing
from vllm_cost_meter.ledger.faults import Fault, fault_of
from vllm_cost_meter.ledger.inserts import (
    FirstPriceOf,
    Record,
    newest_snapshots,
    no_first_price,
    write,
)
from vllm_cost_meter.logs import Outage, meter_logger
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, OpenRequest
from vllm_cost_meter.records.snapshot import Snapshot
from vllm_cost_meter.units.text import ECHOED_CHARS_MAX, plain

logger = meter_logger()

RETRY_FIRST_S = 0.05
RETRY_MOST_S = 1.0
# One attempt waits so long for another process's transaction; then the batch is tried again.
ATTEMPT_S = 1.0
# So many distinct errors are logged; after that only counters show them.
MAX_LOGGED = 20


@dataclass(slots=True, eq=False)
class _Item:
    """Records that were handed over together, and the future that waits for them."""

    records: list[Record]
    future: Future[None] | None = None
    error: Exception | None = None

    def resolve(self) -> None:
        if self.future is None or not self.future.set_running_or_notify_cancel():
            return
        if self.error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(self.error)


class LedgerWriter:
    """Writes records to one ledger from one daemon thread. All methods are thread-safe.

    `queued`, `committed` and `dropped` count records. A snapshot that a newer one replaced while it
    waited counts as committed. `failures` counts failed attempts. `last_error` is the text of the
    last failure, None again after a success. `last_commit_ns` is the length of the last
    transaction. `price_of` gives the price that a run's row records.
    """

    def __init__(
        self,
        url: str,
        *,
        price_of: FirstPriceOf = no_first_price,
        gather_s: float = 0.02,
        max_records: int = 200_000,
        open_: Callable[..., Engine] = open_database,
    ) -> None:
        self.queued = 0
        self.committed = 0
        self.dropped = 0
        self.failures = 0
        self.last_error: str | None = None
        self.last_commit_ns = 0
        self.url = url
        self._price_of = price_of
        self._open = open_
        self._gather_s = gather_s
        self._max_records = max_records
        self._engine: Engine | None = None
        self._changed = threading.Condition()
        self._items: deque[_Item] = deque()
        self._waiting = 0
        self._urgent = False
        self._close_by: float | None = None
        self._thread: threading.Thread | None = None
        self._logged: set[str] = set()
        self._outage = Outage()

    @property
    def waiting(self) -> int:
        """The number of records that are neither committed nor dropped yet."""
        return self._waiting

    def start(self) -> None:
        """Start the thread. It opens the ledger, and keeps trying if that fails."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="cost-meter-ledger", daemon=True
                )
                self._thread.start()

    def put(self, *records: Record) -> None:
        """Hand records over; the thread writes them within `gather_s`. Never blocks or raises."""
        if records:
            self._enqueue(_Item(list(records)))

    def commit(self, *records: Record) -> Future[None]:
        """Hand records over to be written at once, with all before them.

        The future resolves after COMMIT. If a record of this call was dropped, the future fails
        with the cause.
        """
        future: Future[None] = Future()
        self._enqueue(_Item(list(records), future))
        return future

    def close(self, timeout_s: float = 5.0) -> None:
        """Write the waiting records, for at most about `timeout_s`; drop and count the rest."""
        with self._changed:
            if self._close_by is None:
                self._close_by = time.monotonic() + timeout_s
            self._changed.notify_all()
            thread = self._thread
        if thread is None:
            self._abandon()
        else:
            thread.join(timeout_s + ATTEMPT_S)

    # ---- the callers' side of the queue

    def _enqueue(self, item: _Item) -> None:
        with self._changed:
            self.queued += len(item.records)
            if self._close_by is not None:
                item.error = LedgerError("ledger: the writer is closed")
                self.dropped += len(item.records)
                lost = [item]
            else:
                self._items.append(item)
                self._waiting += len(item.records)
                lost = self._trim() if self._waiting > self._max_records else []
                urgent = item.future is not None
                if (urgent and not self._urgent) or len(self._items) == 1:
                    self._urgent = self._urgent or urgent
                    self._changed.notify_all()
        for each in lost:
            each.resolve()

    def _trim(self) -> list[_Item]:
        """Take the oldest items off the queue until it holds `max_records`. Lock held."""
        lost: list[_Item] = []
        while self._items and self._waiting > self._max_records:
            item = self._items.popleft()
            item.error = LedgerError(
                f"ledger: dropped, {self._max_records} records wait (last error: {self.last_error})"
            )
            self._waiting -= len(item.records)
            self.dropped += len(item.records)
            lost.append(item)
        return lost

    def _abandon(self) -> None:
        """Drop everything that waits: the end of `close`."""
        with self._changed:
            items, self._items = list(self._items), deque()
            self.dropped += self._waiting
            self._waiting = 0
        for item in items:
            item.error = LedgerError(f"ledger: closed before it was written ({self.last_error})")
            item.resolve()

    # ---- the thread's side

    def _run(self) -> None:
        pause_s = RETRY_FIRST_S
        while True:
            batch = self._next_batch()
            if batch is None:
                break
            try:
                self._write(batch)
            except Exception as error:  # After any error the batch waits, and serving goes on.
                self._failed(batch, error)
                if not self._sleep(pause_s):
                    break
                pause_s = min(2 * pause_s, RETRY_MOST_S)
            else:
                pause_s = RETRY_FIRST_S
        self._abandon()
        self._drop_engine()

    def _next_batch(self) -> list[_Item] | None:
        """Wait for records, gather for a moment, and take them all; None at the end."""
        with self._changed:
            while not self._items:
                if self._close_by is not None:
                    return None
                self._changed.wait()
            gathered_at = time.monotonic() + self._gather_s
            while not self._urgent and self._close_by is None:
                left_s = gathered_at - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            batch, self._items = list(self._items), deque()
            self._urgent = False
            return batch

    def _write(self, batch: list[_Item]) -> None:
        started_ns = time.perf_counter_ns()
        engine = self._engine
        if engine is None:
            engine = self._engine = self._open(self.url, busy_timeout_s=ATTEMPT_S)
        records = [record for item in batch for record in item.records]
        try:
            # The usual way has no savepoint: each statement gives up the GIL once more.
            with writing(engine).begin() as connection:
                write(connection, records, self._price_of)
            bad: dict[int, Exception] = {}
        except Exception as error:
            if fault_of(error) is Fault.DATABASE:
                raise
            with writing(engine).begin() as connection:
                bad = self._write_what_can_be(connection, records)
                _refuse_to_give_up_all(records, bad)
            self._log_given_up(records, bad)
        self.last_commit_ns = time.perf_counter_ns() - started_ns
        self.last_error = None
        if (ended := self._outage.ended()) is not None:
            logger.warning(
                "cost meter: the ledger can be written again, after %.1f s and %d failures", *ended
            )
        self._settle(batch, bad)

    def _write_what_can_be(
        self, connection: Connection, records: Sequence[Record]
    ) -> dict[int, Exception]:
        """Write all records but the bad ones; return their errors by `id(record)`.

        A group that fails is split in halves until the bad record is alone, whatever the error is
        called. Raises only what is the database's fault.
        """
        try:
            with connection.begin_nested():
                write(connection, records, self._price_of)
        except Exception as error:
            if fault_of(error) is Fault.DATABASE:
                raise
            if len(records) == 1:
                return {id(records[0]): error}
            half = len(records) // 2
            return {
                **self._write_what_can_be(connection, records[:half]),
                **self._write_what_can_be(connection, records[half:]),
            }
        return {}

    def _log_given_up(self, records: Sequence[Record], bad: Mapping[int, Exception]) -> None:
        for record in records:
            if (error := bad.get(id(record))) is not None:
                cause = _first_line(error)
                message = f"the ledger cannot take {_name_of(record)}, dropped: {cause}"
                # Clients may cause very many, and must not use up the log.
                self._log(message, kind=f"{type(record).__name__}: {type(error).__name__}")

    def _settle(self, batch: list[_Item], bad: dict[int, Exception]) -> None:
        """Count a committed batch, then resolve its futures."""
        lost = 0
        for item in batch:
            errors = (
                [bad[id(record)] for record in item.records if id(record) in bad] if bad else []
            )
            lost += len(errors)
            if errors:
                item.error = errors[0]
        total = sum(len(item.records) for item in batch)
        with self._changed:
            self._waiting -= total
            self.committed += total - lost
            self.dropped += lost
        for item in batch:
            item.resolve()

    def _failed(self, batch: list[_Item], error: Exception) -> None:
        """Put a failed batch back at the head of the queue, without superseded snapshots."""
        self.failures += 1
        self.last_error = _first_line(error)
        if self._outage.failed():
            # An error also where nobody has given vLLM's logger a level, and the root's is ERROR.
            logger.error(
                "cost meter: the ledger cannot be written%s, trying again: %s. Records wait.",
                self._outage.so_far,
                self.last_error,
            )
        self._drop_engine()
        before = sum(len(item.records) for item in batch)
        batch = _merge_snapshots_of(batch)
        merged = before - sum(len(item.records) for item in batch)
        with self._changed:
            self._items.extendleft(reversed(batch))
            self._waiting -= merged
            self.committed += merged  # A newer snapshot replaces them.
            lost = self._trim()
        for item in lost:
            item.resolve()

    def _sleep(self, pause_s: float) -> bool:
        """Wait before another attempt; return False if `close` has run out of time."""
        with self._changed:
            wake_at = time.monotonic() + pause_s
            while (left_s := wake_at - time.monotonic()) > 0 and self._close_by is None:
                self._changed.wait(left_s)
            if self._close_by is None:
                return True
            left_s = min(pause_s, self._close_by - time.monotonic())
        if left_s > 0:
            time.sleep(left_s)
        return left_s > 0

    def _drop_engine(self) -> None:
        """Close the connections; the next attempt opens new ones."""
        engine, self._engine = self._engine, None
        if engine is not None:
            try:
                engine.dispose()
            except Exception as error:
                self._log(f"the ledger cannot be closed: {_first_line(error)}")

    def _log(self, message: str, kind: str | None = None) -> None:
        """Warn once of each kind of error; without a kind the message is one."""
        kind = message if kind is None else kind
        if kind not in self._logged and len(self._logged) < MAX_LOGGED:
            self._logged.add(kind)
            logger.warning("cost meter: %s", message)


def _merge_snapshots_of(batch: list[_Item]) -> list[_Item]:
    """Keep only the newest snapshot of each run, in an item at the end of the batch.

    A batch is one transaction, so a future still resolves only after its snapshot is written, even
    if the snapshot moved to another item.
    """
    snapshots = [r for item in batch for r in item.records if isinstance(r, Snapshot)]
    for item in batch:
        item.records = [r for r in item.records if not isinstance(r, Snapshot)]
    merged = _Item(list(newest_snapshots(snapshots).values()))
    return [item for item in (*batch, merged) if item.records or item.future]


def _refuse_to_give_up_all(records: Sequence[Record], bad: Mapping[int, Exception]) -> None:
    """Raise if none of the records could be written, and no error says that they are at fault.

    Then the cause may be the database. A record that is bad is found once another one comes that
    can be written beside it.
    """
    if len(bad) < len(records):
        return
    for error in bad.values():
        if fault_of(error) is Fault.UNKNOWN:
            raise error


def _name_of(record: object) -> str:
    """Return the kind and the key of a record, to find its request in other logs."""
    match record:
        case EngineRequest():
            key = f"{record.bill.request_id} (run {record.bill.run_id}, bill {record.bill.seq})"
        case HttpRequest():
            key = record.http_request_id
        case OpenRequest():
            key = record.request_id
        case Snapshot():
            key = f"number {record.number} of run {record.run_id}"
        case _:
            return f"a {type(record).__name__}"
    return f"the {type(record).__name__} {plain(key)[:ECHOED_CHARS_MAX]}"


def _first_line(error: Exception) -> str:
    cause = getattr(error, "orig", None) or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"
