"""Catch up: have all in a ledger that its journals held at the moment of the question.

Whoever finds no other process that applies the journals does it. Else the other one is waited for,
for a short time: it applies what comes all the time.

Invariant: after `catch_up` returned 0, every cost that a client was told before the call is in the
ledger, or in a row of `journal_losses`.
"""

import time
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.journal import places
from vllm_cost_meter.journal.places import FileLock
from vllm_cost_meter.journal.reader import START, JournalReader
from vllm_cost_meter.ledger.applier import Applier
from vllm_cost_meter.ledger.batches import BatchWriter
from vllm_cost_meter.ledger.database import open_to_read
from vllm_cost_meter.ledger.journal_place import journal_folder
from vllm_cost_meter.ledger.progress import read_positions

WAIT_S = 1.0
_LOOK_AGAIN_S = 0.02


def catch_up(url: str, timeout_s: float = WAIT_S) -> int:
    """Apply all journals of a ledger; return how many records could not be, 0 if all are there.

    Raises LedgerError if the ledger or a journal cannot be read or written.
    """
    folder = journal_folder(url)
    if not _journals(folder):
        return 0
    # An older ledger is not migrated by whoever wants to read it.
    batches = BatchWriter(url, upgrade=False)
    try:
        lock = FileLock.try_to_take(folder / places.APPLIER_LOCK_NAME)
        if lock is None:
            return _wait_for_the_other(url, folder, timeout_s)
        try:
            applier = Applier(batches, folder)
            while applier.apply():
                pass
            applier.forget()
        finally:
            lock.release()
        return 0
    except (OSError, SQLAlchemyError) as error:
        raise LedgerError(f"journals {folder}: cannot be applied: {error}") from error
    finally:
        batches.drop()


def _wait_for_the_other(url: str, folder: Path, timeout_s: float) -> int:
    engine = open_to_read(url, wait_s=timeout_s)
    try:
        return wait_until_applied(engine, folder, timeout_s)
    finally:
        engine.dispose()


def waiting_records(url: str, timeout_s: float = WAIT_S) -> int:
    """Return how many records journals have for a ledger that it lacks, and write nothing.

    A server that applies them is waited for. Raises LedgerError if the ledger or a journal cannot
    be read.
    """
    folder = journal_folder(url)
    if not _journals(folder):
        return 0
    engine = open_to_read(url)
    try:
        return wait_until_applied(engine, folder, timeout_s)
    except (OSError, SQLAlchemyError) as error:
        raise LedgerError(f"journals {folder}: cannot be read: {error}") from error
    finally:
        engine.dispose()


def is_all_applied(url: str) -> bool:
    """Return whether the ledger has what its journals hold now; False if that cannot be told."""
    try:
        return waiting_records(url) == 0
    except LedgerError:
        return False


def wait_until_applied(engine: Engine, folder: Path, timeout_s: float) -> int:
    """Wait until another process has applied what the journals hold now; return what is left."""
    until = time.monotonic() + timeout_s
    wanted = _waiting(engine, folder)
    while wanted and time.monotonic() < until:
        time.sleep(_LOOK_AGAIN_S)
        wanted = _still_waiting(engine, folder, wanted)
    return sum(last - before for before, last in wanted.values())


def _journals(folder: Path) -> list[Path]:
    """Return the journals in all places. Raises LedgerError if a place is away."""
    folders = places.folders_of(folder)
    places.require_folders(folder, folders)
    return [each / journal_id for each in folders for journal_id in places.journal_ids(each)]


def _waiting(engine: Engine, folder: Path) -> dict[str, tuple[int, int]]:
    """Return for each journal with news the last applied record's number, and the last one's."""
    with engine.connect() as connection:
        positions = read_positions(connection)
    waiting = {}
    for place in _journals(folder):
        journal_id = place.name
        reader = JournalReader(place, positions.get(journal_id, START))
        before = reader.position.number
        try:
            while not reader.read(is_alive=True).is_all:
                pass
        except FileNotFoundError:  # It was applied meanwhile, and removed.
            continue
        if reader.position.number > before:
            waiting[journal_id] = before, reader.position.number
    return waiting


def _still_waiting(
    engine: Engine, folder: Path, wanted: dict[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    with engine.connect() as connection:
        positions = read_positions(connection)
    there = {place.name for place in _journals(folder)}
    return {
        journal_id: (number, last)
        for journal_id, (_, last) in wanted.items()
        if journal_id in there and (number := positions.get(journal_id, START).number) < last
    }
