"""A ledger in memory for the applier: transactions, a log that a crash may cut, and outages.

It does by key what `vllm_cost_meter.ledger.inserts` does, and what SQLite promises in WAL mode: a
commit survives the death of its process; a crash of the machine may undo the last commits, but none
before a commit that waited for the disk. As in SQLite, a transaction that changes nothing writes
nothing, so it waits for no disk either.

Invariant: after a crash the ledger is as it was after some commit, and not before the last one that
waited.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from tests.simulation.disk import Call
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.journal.entries import Record
from vllm_cost_meter.journal.reader import Position
from vllm_cost_meter.ledger.batches import BadRecord
from vllm_cost_meter.ledger.progress import JournalProgress
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, OpenRequest
from vllm_cost_meter.records.snapshot import Snapshot

Key = tuple[Any, ...]
# What a 64-bit column does not take.
TOO_LARGE = 2**63


def key_of(record: Record) -> Key:
    """Return what a record is there once by."""
    match record:
        case EngineRequest():
            return "bill", record.bill.run_id, record.bill.seq
        case HttpRequest():
            return "http", record.http_request_id
        case OpenRequest():
            return "open", record.request_id, record.started_at_ns
        case Snapshot():
            return "snapshot", record.run_id


def bill_of(record: OpenRequest) -> Key:
    """Return the key of the bill that an open request gets; engines here name it by its number."""
    run_id, _, seq = record.request_id.rpartition("-")
    return "bill", run_id, int(seq, 16)


class MemoryLedger:
    """The file of a ledger, and how much of it the disk has."""

    def __init__(self, random: Random) -> None:
        self.rows: dict[Key, Record] = {}
        self.positions: dict[str, Position] = {}
        self.losses: dict[tuple[str, int], int] = {}
        self.complaints: list[str] = []
        self.is_out = False
        self._random = random
        # How to take back each commit that the disk does not have.
        self._undo: list[list[Callable[[], None]]] = []

    def batches(self, before: Callable[[Call], None]) -> "MemoryBatches":
        """Return what the applier of a process writes to."""
        return MemoryBatches(self, before)

    def look(self, made: dict[Key, list[Record]], *, is_end: bool = False) -> None:
        """Read what is there: it is at hand."""

    def crash(self) -> None:
        for _ in range(self._random.randint(0, len(self._undo))):
            for take_back in reversed(self._undo.pop()):
                take_back()
        self.checkpoint()

    def checkpoint(self) -> None:
        """Have the disk know every commit."""
        self._undo.clear()

    def commit(
        self, records: Sequence[Record], progress: JournalProgress, *, to_disk: bool
    ) -> None:
        undo: list[Callable[[], None]] = []
        for record in records:
            key = key_of(record)
            if isinstance(record, OpenRequest) and bill_of(record) in self.rows:
                continue
            if isinstance(record, EngineRequest) and record.announced:
                opened = "open", record.bill.request_id, record.started_at_ns
                if opened in self.rows:
                    self._set(self.rows, opened, None, undo)
            known = self.rows.get(key)
            if known is None or (
                isinstance(known, Snapshot)
                and isinstance(record, Snapshot)
                and record.number > known.number
            ):
                self._set(self.rows, key, record, undo)
        for loss in progress.losses:
            self._set(self.losses, (loss.journal_id, loss.after), loss.records, undo)
        for journal_id, position in progress.positions.items():
            self._set(self.positions, journal_id, position, undo)
        if progress.gone in self.positions:
            self._set(self.positions, progress.gone, None, undo)
        if undo:
            self._undo.append(undo)
            if to_disk:
                self.checkpoint()

    @staticmethod
    def _set(table: dict[Any, Any], key: Any, value: Any, undo: list[Callable[[], None]]) -> None:
        before = table.get(key)
        if value is None:
            del table[key]
        else:
            table[key] = value

        def take_back() -> None:
            if before is None:
                table.pop(key, None)
            else:
                table[key] = before

        undo.append(take_back)


class MemoryBatches:
    """One process's connection to such a ledger: what the applier uses of `BatchWriter`."""

    def __init__(self, ledger: MemoryLedger, before: Callable[[Call], None]) -> None:
        self._ledger = ledger
        self._before = before
        self._opened: object | None = None

    def opened(self) -> object:
        self._look("open ledger")
        if self._opened is None:
            self._opened = object()
        return self._opened

    def positions(self) -> dict[str, Position]:
        self._look("read ledger")
        return dict(self._ledger.positions)

    def apply(
        self,
        records: Sequence[Record],
        progress: Callable[[Sequence[BadRecord]], JournalProgress],
        *,
        to_disk: bool = False,
    ) -> list[BadRecord]:
        try:
            self._look("begin")
            bad = [
                BadRecord(record, ValueError("too large"))
                for record in records
                if isinstance(record, EngineRequest) and (record.cost_nanousd or 0) >= TOO_LARGE
            ]
            refused = {id(each.record) for each in bad}
            written = [record for record in records if id(record) not in refused]
            made = progress(bad)
            self._look("commit")
            self._ledger.commit(written, made, to_disk=to_disk)
            self._look("committed")
        except Exception:
            self.drop()
            raise
        return bad

    def drop(self) -> None:
        self._opened = None

    def _look(self, name: str) -> None:
        self._before(Call(name))
        if self._ledger.is_out:
            raise LedgerError("the ledger is locked")
