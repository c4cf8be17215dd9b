"""The journal writer: one thread per process appends records, many in one write.

Serving must never wait for a disk, so callers hand records over (`put`), and the thread appends
them at once. A reply's cost header may leave only after its bill is safe, so `append` returns a
future that resolves when its records are in the journal. While a write runs, the next group
gathers: the busier the server, the larger the groups.

A disk that refuses the journal costs only memory: the group stays and is written again. Beyond
`max_records` the oldest records are dropped and counted. A record that cannot be an entry at all is
dropped alone, counted and named in the log.

Invariant: every record that came in is in exactly one of: journaled, dropped, or waiting
(`queued == journaled + dropped + waiting`), and a future resolves only after its records' write.
"""

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from vllm_cost_meter.errors import LedgerError, in_one_line
from vllm_cost_meter.journal.entries import Record, write_entry
from vllm_cost_meter.journal.frames import frame
from vllm_cost_meter.journal.open_journal import OpenJournal
from vllm_cost_meter.journal.two_places import TRY_FIRST_S, Journal, TwoPlaces
from vllm_cost_meter.logs import Outage, meter_logger
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, OpenRequest
from vllm_cost_meter.records.snapshot import Snapshot
from vllm_cost_meter.units.text import ECHOED_CHARS_MAX, plain

logger = meter_logger()

RETRY_FIRST_S = 0.05
RETRY_MOST_S = 1.0
# A group is made of frames in one piece, and is kept while the disk refuses it.
GROUP_RECORDS_MAX = 2_000
# So many distinct errors are logged; after that only counters show them.
MAX_LOGGED = 20


@dataclass(slots=True, eq=False)
class _Item:
    """Records that were handed over together, and the future that waits for them."""

    records: tuple[Record, ...]
    future: Future[None] | None = None
    error: Exception | None = None

    def resolve(self) -> None:
        if self.future is None or not self.future.set_running_or_notify_cancel():
            return
        if self.error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(self.error)


@dataclass(slots=True)
class _Group:
    """Items on their way into the journal, and what is left of their frames."""

    items: list[_Item]
    frames: list[bytes] = field(default_factory=list)
    # The number of the first frame that is left.
    number: int = 0
    bad: int = 0

    @property
    def records(self) -> int:
        return sum(len(item.records) for item in self.items)


class JournalWriter:
    """Appends records to one journal from one daemon thread. All methods are thread-safe.

    `queued`, `journaled` and `dropped` count records. `failures` counts failed attempts.
    `last_error` is the text of the last failure, None again after a success.
    """

    def __init__(
        self,
        folder: Path,
        *,
        second: Path | None = None,
        to_disk: bool = False,
        max_records: int = 200_000,
        open_: Callable[[Path], Journal] | None = None,
        try_first_s: float = TRY_FIRST_S,
    ) -> None:
        """Write a journal in a ledger's folder of journals, or the second one if that refuses.

        With `to_disk` a record counts as journaled only once the disk has it. `open_` makes a
        journal in a folder. While the second place is used, the first is tried each `try_first_s`.
        """
        self.folder = folder
        # Why there is no room in reserve for when the disk is full; None while there is.
        self.reserve_error: str | None = None
        self.queued = 0
        self.journaled = 0
        self.dropped = 0
        self.failures = 0
        self.last_error: str | None = None
        open_ = open_ or functools.partial(OpenJournal, to_disk=to_disk)
        self._places = None if second is None else TwoPlaces(folder, second, open_, try_first_s)
        self._open: Callable[[], Journal] = (
            functools.partial(open_, folder) if self._places is None else self._places.open
        )
        self._max_records = max_records
        self._journal: Journal | None = None
        self._next_number = 1
        self._changed = threading.Condition()
        self._items: deque[_Item] = deque()
        self._waiting = 0
        # What was taken and is not written yet, and the pause after its next failure.
        self._group: _Group | None = None
        self._pause_s = RETRY_FIRST_S
        self._close_by: float | None = None
        self._thread: threading.Thread | None = None
        self._logged: set[str] = set()
        self._outage = Outage()

    @property
    def is_in_second_place(self) -> bool:
        """Whether the journal is in the second place, because the first refuses it."""
        return self._places is not None and self._places.is_in_second

    @property
    def waiting(self) -> int:
        """The number of records that are neither journaled nor dropped yet."""
        return self._waiting

    def start(self) -> None:
        """Start the thread. It makes the journal, and keeps trying if that fails."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="cost-meter-journal", daemon=True
                )
                self._thread.start()

    def put(self, *records: Record) -> None:
        """Hand records over; the thread appends them soon. Never blocks or raises."""
        if records:
            self._enqueue(_Item(records))

    def append(self, *records: Record) -> Future[None]:
        """Hand records over; the future resolves once they, and all before them, are journaled.

        If a record of this call was dropped, the future fails with the cause.
        """
        future: Future[None] = Future()
        self._enqueue(_Item(records, future))
        return future

    def close(self, timeout_s: float = 5.0) -> None:
        """Append the waiting records, for at most about `timeout_s`; drop and name the rest."""
        with self._changed:
            if self._close_by is None:
                self._close_by = time.monotonic() + timeout_s
            self._changed.notify_all()
            thread = self._thread
        if thread is None:
            self._abandon([])
        else:
            thread.join(timeout_s + 1.0)

    # ---- the callers' side of the queue

    def _enqueue(self, item: _Item) -> None:
        with self._changed:
            self.queued += len(item.records)
            if self._close_by is not None:
                item.error = LedgerError("ledger: its journal is closed")
                self.dropped += len(item.records)
                lost = [item]
            else:
                self._items.append(item)
                self._waiting += len(item.records)
                lost = self._trim() if self._waiting > self._max_records else []
                if len(self._items) == 1:
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

    def _abandon(self, begun: Iterable[_Item]) -> None:
        """Drop everything that waits, and say what: the end of `close`."""
        with self._changed:
            items, self._items = [*begun, *self._items], deque()
            dropped, self._waiting = self._waiting, 0
            self.dropped += dropped
        for item in items:
            item.error = LedgerError(f"ledger: closed before it was written ({self.last_error})")
            item.resolve()
        if dropped:
            logger.error("cost meter: %s", _loss(items, dropped, self.last_error))

    # ---- the thread's side

    def _run(self) -> None:
        self.open_early()
        while self._has_records():
            pause_s = self.write_a_group()
            if pause_s and not self._sleep(pause_s):
                break
        self._abandon(self._group.items if self._group is not None else ())
        self._close_journal()

    def write_a_group(self) -> float:
        """Write the group that failed, or the next one; return when to try again, 0 if it is there.

        Only the thread calls it, or who does the thread's work instead. Something has to wait.
        """
        group = self._group = self._group or self._next_group()
        try:
            self._write(group)
        except Exception as error:  # noqa: BLE001 - the group waits, and serving goes on
            self._failed(error)
            pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, RETRY_MOST_S)
            return pause_s
        self._settle(group)
        self._group, self._pause_s = None, RETRY_FIRST_S
        return 0.0

    def open_early(self) -> None:
        """Make the journal now, so that the first reply need not wait for it."""
        try:
            self._journal = self._open()
        except Exception as error:  # noqa: BLE001 - the first group tries again
            self._failed(error)

    def _has_records(self) -> bool:
        """Wait for records; return False at the end."""
        with self._changed:
            while not self._items and self._group is None:
                if self._close_by is not None:
                    return False
                self._changed.wait()
        return True

    def _next_group(self) -> _Group:
        """Take the records that wait."""
        with self._changed:
            group, records = _Group([]), 0
            while self._items and records < GROUP_RECORDS_MAX:
                item = self._items.popleft()
                group.items.append(item)
                records += len(item.records)
        group.number = self._next_number
        for item in group.items:
            self._encode(item, group)
        self._next_number += len(group.frames)
        return group

    def _encode(self, item: _Item, group: _Group) -> None:
        for record in item.records:
            try:
                group.frames.append(frame(group.number + len(group.frames), write_entry(record)))
            except Exception as error:  # noqa: BLE001 - whatever a record holds, the others count
                item.error = error
                group.bad += 1
                message = (
                    f"the journal cannot take {name_of(record)}, dropped: {in_one_line(error)}"
                )
                # Clients may cause very many, and must not use up the log.
                self._log(message, kind=f"{type(record).__name__}: {type(error).__name__}")

    def _write(self, group: _Group) -> None:
        journal = self._journal
        if journal is not None and not journal.is_there():
            # Somebody removed or renamed it: a write would succeed, and nobody would find it.
            self._close_journal()
            journal = None
        if journal is None:
            journal = self._journal = self._open()
        while group.frames:
            count = journal.append(group.number, group.frames)
            del group.frames[:count]
            group.number += count
        self.last_error = None
        self._note_reserve(journal.reserve_error)
        if (ended := self._outage.ended()) is not None:
            logger.warning(
                "cost meter: the journal can be written again, after %.1f s and %d failures", *ended
            )

    def _note_reserve(self, error: OSError | None) -> None:
        """Say when the room in reserve is gone: bills are safe until the segment is full."""
        before = self.reserve_error
        self.reserve_error = None if error is None else in_one_line(error)
        if error is not None and before is None:
            logger.error(
                "cost meter: the journal %s has no room in reserve (%s): free some before its"
                " segment is full, or bills %s",
                *(self.folder, self.reserve_error),
                "wait in memory" if self._places is None else "go to the second place",
            )
        elif error is None and before is not None:
            logger.warning("cost meter: the journal %s has room in reserve again", self.folder)

    def _settle(self, group: _Group) -> None:
        records = group.records
        with self._changed:
            self._waiting -= records
            self.journaled += records - group.bad
            self.dropped += group.bad
        for item in group.items:
            item.resolve()

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self.last_error = in_one_line(error)
        if self._outage.failed():
            logger.error(
                "cost meter: the journal %s cannot be written%s, trying again: %s. Bills wait in"
                " memory, and replies leave without their cost.",
                *(self.folder, self._outage.so_far, self.last_error),
            )

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

    def _close_journal(self) -> None:
        journal, self._journal = self._journal, None
        if journal is not None:
            try:
                journal.close()
            except Exception as error:  # noqa: BLE001 - nothing more is written to it
                self._log(f"the journal cannot be closed: {in_one_line(error)}")

    def _log(self, message: str, kind: str | None = None) -> None:
        """Warn once of each kind of error; without a kind the message is one."""
        kind = message if kind is None else kind
        if kind not in self._logged and len(self._logged) < MAX_LOGGED:
            self._logged.add(kind)
            logger.warning("cost meter: %s", message)


def name_of(record: object) -> str:
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


def _loss(items: Iterable[_Item], dropped: int, last_error: str | None) -> str:
    """Return what is lost at a stop: how many records, and the bills by run with their time."""
    runs: dict[str, list[int]] = {}
    for item in items:
        for record in item.records:
            if isinstance(record, EngineRequest):
                runs.setdefault(record.bill.run_id, []).append(record.bill.gpu_time_ns)
    bills = "; ".join(
        f"{len(times)} bills of run {run} with {sum(times) / 1e9:.9f} GPU-s"
        for run, times in runs.items()
    )
    return (
        f"stopped while the journal could not be written ({last_error}): {dropped} records are"
        f" lost, {bills or 'no bill among them'}"
    )
