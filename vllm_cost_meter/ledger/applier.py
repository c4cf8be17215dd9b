"""The applier: brings what is in the journals into the ledger, in order, once.

One process at a time applies the journals of a ledger: the one that holds the lock in their folder.
Each batch writes, in its own transaction, how far each journal has come. So whoever goes on after a
crash begins where the ledger's file is, whichever file that is. What was applied before by another
one is written again by key and changes nothing.

A segment is removed when its records are in the ledger by a commit that the disk has. The journal
of a dead process is removed as a whole. Damage is passed over, and is a row of `journal_losses`.

Invariant: a record that was whole in a journal is in the ledger, or still in a segment, or in a row
of `journal_losses`.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vllm_cost_meter.errors import LedgerError, in_one_line
from vllm_cost_meter.journal import places
from vllm_cost_meter.journal.entries import Record
from vllm_cost_meter.journal.places import FileLock
from vllm_cost_meter.journal.reader import START, JournalPart, JournalReader, Position
from vllm_cost_meter.journal.segments import segment_indexes
from vllm_cost_meter.journal.writer import name_of
from vllm_cost_meter.ledger.batches import BadRecord
from vllm_cost_meter.ledger.progress import JournalProgress, Loss
from vllm_cost_meter.logs import meter_logger

logger = meter_logger()

# So many distinct errors are logged; the table of losses has them all.
_LOGGED_MAX = 20
# A dead process's journal is as good as a living one's, only its folder stays a moment longer.
LOOK_FOR_DEAD_S = 1.0


class Batches(Protocol):
    """What the applier needs of a ledger; `BatchWriter` is one."""

    def opened(self) -> object:
        """Return the ledger; it is another object once another file is at its place."""

    def positions(self) -> dict[str, Position]:
        """Return how far the ledger has each journal."""

    def apply(
        self,
        records: Sequence[Record],
        progress: Callable[[Sequence[BadRecord]], JournalProgress],
        *,
        to_disk: bool = False,
    ) -> list[BadRecord]:
        """Write records and the journals' progress in one transaction; return the bad records."""

    def drop(self) -> None:
        """Close the ledger."""


@dataclass(slots=True)
class _Source:
    """A journal that is applied. `lock` is held once its process is dead."""

    reader: JournalReader
    lock: FileLock | None = None
    # When to look next whether its process is dead, on the monotonic clock.
    look_at_s: float = 0.0


class Applier:
    """Applies the journals of a folder to a ledger. Used by one thread of the lock's holder."""

    def __init__(
        self,
        batches: Batches,
        folder: Path,
        look_for_dead_s: float = LOOK_FOR_DEAD_S,
        second: Path | None = None,
    ) -> None:
        """The journals' processes are looked at once in `look_for_dead_s`.

        `second` is where journals go that `folder` refuses; what that links to is read anyway.
        """
        self.folder = folder
        self._second = second
        self._look_for_dead_s = look_for_dead_s
        self._batches = batches
        self._sources: dict[str, _Source] = {}
        # Where the ledger has each journal; None before that is read.
        self._positions: dict[str, Position] | None = None
        self._ledger: object = None
        # Whether the disk has all that the ledger has of the journals, as far as we know.
        self._is_on_disk = False
        self._logged: set[str] = set()

    def apply(self) -> bool:
        """Apply a batch; return True if there may be more. Raises whatever the ledger raises.

        After an error the next call begins where the ledger is.
        """
        try:
            with _without_collections():
                return self._apply()
        except BaseException:
            self.forget()
            raise

    def look_for_dead(self) -> None:
        """Have the next call look whether the journals' processes are dead."""
        for source in self._sources.values():
            source.look_at_s = 0.0

    def forget(self) -> None:
        """Let go of all journals; the next call reads from the ledger how far they are."""
        for source in self._sources.values():
            if source.lock is not None:
                source.lock.release()
        self._sources = {}
        self._positions = None
        self._is_on_disk = False

    def close(self) -> None:
        """Let go of all journals and close the ledger."""
        self.forget()
        self._batches.drop()

    def _apply(self) -> bool:
        ledger = self._batches.opened()
        if ledger is not self._ledger:  # The file at the path may be another one.
            self.forget()
            self._ledger = ledger
        if self._positions is None:
            self._positions = self._batches.positions()
            for folder in places.folders_of(self.folder, self._second):
                places.remove_remains(folder)
        parts, failure = self._read_all(self._positions)
        moved = {key: part for key, part in parts.items() if part.position != self._position(key)}
        if moved:
            self._write(moved)
        dead = {key for key in parts if self._sources[key].lock is not None}
        self._remove_what_is_done({key: parts[key] for key in parts if key in moved or key in dead})
        if failure is not None:
            raise failure
        return any(not part.is_all for part in parts.values())

    def _position(self, journal_id: str) -> Position:
        return (self._positions or {}).get(journal_id, START)

    def _read_all(
        self, positions: dict[str, Position]
    ) -> tuple[dict[str, JournalPart], LedgerError | None]:
        """Read on in all journals; also return why one of them cannot be read."""
        parts: dict[str, JournalPart] = {}
        failure: LedgerError | None = None
        for folder in places.folders_of(self.folder, self._second):
            try:
                places.require_folders(self.folder, [folder])
                journal_ids = places.journal_ids(folder)
            except (LedgerError, OSError) as error:  # The others are applied all the same.
                failure = _failure_in(folder, error)
                continue
            for journal_id in journal_ids:
                source = self._source(folder, journal_id, positions)
                try:
                    parts[journal_id] = source.reader.read(is_alive=source.lock is None)
                except LedgerError as error:
                    failure = error
        return parts, failure

    def _source(self, folder: Path, journal_id: str, positions: dict[str, Position]) -> _Source:
        source = self._sources.get(journal_id)
        if source is None:
            reader = JournalReader(folder / journal_id, positions.get(journal_id, START))
            source = self._sources[journal_id] = _Source(reader)
        if source.lock is None and time.monotonic() >= source.look_at_s:
            source.lock = places.take_over(folder, journal_id)
            source.look_at_s = time.monotonic() + self._look_for_dead_s
        return source

    def _write(self, parts: dict[str, JournalPart]) -> None:
        found = [
            (key, number, record) for key, part in parts.items() for number, record in part.records
        ]
        records = [record for _, _, record in found]
        # What a segment held may go only once the disk has it.
        to_disk = any(
            part.position.segment > self._position(key).segment
            or self._sources[key].lock is not None
            for key, part in parts.items()
        )

        def progress(bad: Sequence[BadRecord]) -> JournalProgress:
            bad_ids = {id(each.record): each.error for each in bad}
            losses = [
                Loss(key, number - 1, 1, f"{name_of(record)}: {in_one_line(bad_ids[id(record)])}")
                for key, number, record in found
                if id(record) in bad_ids
            ]
            losses += [
                Loss(key, gap.after, gap.frames, gap.reason)
                for key, part in parts.items()
                for gap in part.gaps
            ]
            return JournalProgress({key: part.position for key, part in parts.items()}, losses)

        bad = self._batches.apply(records, progress, to_disk=to_disk)
        self._is_on_disk = to_disk
        if self._positions is not None:
            self._positions.update({key: part.position for key, part in parts.items()})
        self._say_what_is_lost(parts, bad)

    def _say_what_is_lost(self, parts: dict[str, JournalPart], bad: Sequence[BadRecord]) -> None:
        for each in bad:
            # Clients may cause very many, and must not use up the log.
            kind = f"{type(each.record).__name__}: {type(each.error).__name__}"
            self._log(
                kind,
                f"the ledger cannot take {name_of(each.record)}, dropped:"
                f" {in_one_line(each.error)}",
            )
        for key, part in parts.items():
            for gap in part.gaps:
                self._log(
                    f"{key} {gap.after}",
                    f"journal {self._sources[key].reader.place}: {gap.frames} records after record"
                    f" {gap.after} cannot be read ({gap.reason}) and are lost; the audit has them",
                )

    def _log(self, kind: str, message: str) -> None:
        if kind not in self._logged and len(self._logged) < _LOGGED_MAX:
            self._logged.add(kind)
            logger.error("cost meter: %s", message)

    def _remove_what_is_done(self, parts: dict[str, JournalPart]) -> None:
        if parts and not self._is_on_disk and self._can_remove(parts):
            # What came with earlier commits, or by another applier, may not be on the disk yet.
            positions = {key: part.position for key, part in parts.items()}
            self._batches.apply([], lambda _bad: JournalProgress(positions), to_disk=True)
            self._is_on_disk = True
        for journal_id, part in parts.items():
            source = self._sources[journal_id]
            place = source.reader.place
            if source.lock is not None and part.is_all:
                places.remove_journal(place.parent, journal_id)
                source.lock.release()
                del self._sources[journal_id]
                self._forget_row(journal_id)
                continue
            places.remove_segments(place.parent, journal_id, part.position.segment)

    def _can_remove(self, parts: dict[str, JournalPart]) -> bool:
        return any(
            (self._sources[key].lock is not None and part.is_all)
            or any(
                index < part.position.segment
                for index in segment_indexes(self._sources[key].reader.place)
            )
            for key, part in parts.items()
        )

    def _forget_row(self, journal_id: str) -> None:
        """Delete the row of a journal that is gone; one that stays says nothing wrong."""
        if self._positions is not None and self._positions.pop(journal_id, None) is not None:
            self._batches.apply([], lambda _bad: JournalProgress({}, gone=journal_id))


@contextmanager
def _without_collections() -> Iterator[None]:
    """Let the garbage collector rest: a batch makes very many objects, and no cycles of them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _failure_in(folder: Path, error: LedgerError | OSError) -> LedgerError:
    if isinstance(error, LedgerError):
        return error
    return LedgerError(f"journals {folder}: cannot be read: {error.strerror}")
