"""Keep a ledger up to its journals: take the lock, apply, say what fails, try again.

Blocks. A pass applies all that the journals hold when it begins. Where another process holds the
lock, that one applies, and a pass waits until it has. Once it is gone, the next one takes the lock.

Invariant: a pass that returns has applied all records that were journaled before it began; one that
raises has lost none.
"""

import shutil
import time
from pathlib import Path
from typing import NamedTuple

from vllm_cost_meter.errors import LedgerError, in_one_line
from vllm_cost_meter.journal import places
from vllm_cost_meter.journal.places import FileLock
from vllm_cost_meter.journal.segments import SUFFIX
from vllm_cost_meter.ledger.applier import Applier
from vllm_cost_meter.ledger.batches import BatchWriter
from vllm_cost_meter.ledger.catching_up import WAIT_S, wait_until_applied
from vllm_cost_meter.ledger.database import parse_url, sqlite_path
from vllm_cost_meter.ledger.journal_place import journal_folder
from vllm_cost_meter.logs import Outage, meter_logger

logger = meter_logger()


class Sizes(NamedTuple):
    """Bytes of the journals' segments and of SQLite's log, and free bytes; None if unknown."""

    journal_bytes: int
    wal_bytes: int
    free_bytes: int | None


class ApplyLoop:
    """The passes of one process over the journals of one ledger. Used by one thread."""

    def __init__(self, url: str) -> None:
        """The ledger is made if it is not there."""
        self.folder: Path = journal_folder(url)
        self.last_error: str | None = None
        self.failures = 0
        self.applied_at_ns: int | None = None
        self._path = sqlite_path(parse_url(url))
        self._batches = BatchWriter(url)
        self._applier = Applier(self._batches, self.folder)
        self._lock: FileLock | None = None
        self._outage = Outage()

    @property
    def is_ours(self) -> bool:
        """Whether this process applies the journals."""
        return self._lock is not None

    def run_pass(self, *, is_asked: bool) -> None:
        """Apply what there is. Without a question nobody waits for another process.

        Raises LedgerError, after a line in the log.
        """
        try:
            self._run_pass(is_asked=is_asked)
        except Exception as error:
            self.last_error = in_one_line(error)
            self.failures += 1
            if self._outage.failed():
                logger.error(
                    "cost meter: the ledger cannot be written%s, trying again: %s. Costs are told"
                    " as before, and their bills wait in the journal %s.",
                    *(self._outage.so_far, self.last_error, self.folder),
                )
            raise LedgerError(f"the ledger cannot be written: {self.last_error}") from error
        self.last_error = None
        self.applied_at_ns = time.time_ns()
        if (ended := self._outage.ended()) is not None:
            logger.warning(
                "cost meter: the ledger can be written again, after %.1f s and %d failures", *ended
            )

    def _run_pass(self, *, is_asked: bool) -> None:
        if self._lock is None:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = FileLock.try_to_take(self.folder / places.APPLIER_LOCK_NAME)
        if self._lock is not None:
            if is_asked:
                self._applier.look_for_dead()
            while self._applier.apply():
                pass
        elif is_asked:
            left = wait_until_applied(self._batches.opened(), self.folder, WAIT_S)
            if left:
                raise LedgerError(
                    f"{left} records in journals were not applied within {WAIT_S:g} s"
                )

    def sizes(self) -> Sizes:
        """Return what the ledger takes on the disk beside its file."""
        wal = self._path.with_name(self._path.name + "-wal") if self._path is not None else None
        segments = self.folder.glob(f"*/*{SUFFIX}")
        return Sizes(
            sum(map(_size_bytes, segments)),
            _size_bytes(wal) if wal is not None else 0,
            _free_bytes(self.folder),
        )

    def close(self) -> None:
        """Let go of the lock and of the ledger."""
        self._applier.close()
        if self._lock is not None:
            self._lock.release()


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # It is not there any more.
        return 0


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
