"""Keep a ledger up to its journals: take the lock, apply, say what fails, try again.

Blocks. A pass applies all that the journals hold when it begins. Where another process holds the
lock, that one applies, and a pass waits until it has. Once it is gone, the next one takes the lock.

A ledger whose file is damaged is set aside, and the pass goes on in a new one: the applier owns the
writes. Where that happens again soon, the disk is at fault, and bills wait in the journals.

Between passes that nobody waits for, old rows are dropped, a small step at a time.

Invariant: a pass that returns has applied all records that were journaled before it began; one that
raises has lost none.
"""

import shutil
import time
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Engine

from vllm_cost_meter.errors import LedgerError, in_one_line
from vllm_cost_meter.journal import places
from vllm_cost_meter.journal.places import FileLock
from vllm_cost_meter.journal.segments import SUFFIX
from vllm_cost_meter.ledger.applier import Applier
from vllm_cost_meter.ledger.batches import BatchWriter
from vllm_cost_meter.ledger.catching_up import WAIT_S, wait_until_applied
from vllm_cost_meter.ledger.damage.noticing import damage_in, damage_of_log
from vllm_cost_meter.ledger.damage.setting_aside import (
    finish_setting_aside,
    set_aside_files,
    set_damaged_aside,
    was_a_ledger,
    what_to_do,
)
from vllm_cost_meter.ledger.database import open_to_read, parse_url, sqlite_path
from vllm_cost_meter.ledger.journal_place import journal_folder
from vllm_cost_meter.ledger.retention.keeping import RowKeeper
from vllm_cost_meter.logs import Outage, meter_logger

logger = meter_logger()


# Between two files that are set aside, in seconds.
SET_ASIDE_PAUSE_S = 600.0
# The files that were set aside are counted so often, in seconds: a merge makes them fewer.
COUNT_PAUSE_S = 5.0


class Sizes(NamedTuple):
    """Bytes of the journals' segments and of SQLite's log, and free bytes; None if unknown."""

    journal_bytes: int
    wal_bytes: int
    free_bytes: int | None


class ApplyLoop:
    """The passes of one process over the journals of one ledger. Used by one thread."""

    def __init__(
        self,
        url: str,
        set_aside_pause_s: float = SET_ASIDE_PAUSE_S,
        second: Path | None = None,
        keeper: RowKeeper | None = None,
        sends: bool | None = None,
    ) -> None:
        """The ledger is made if it is not there. `second` is the second folder of journals.

        `keeper` drops old rows; without one none are dropped. `sends` is as `BatchWriter` takes it.
        """
        self._second = second
        self.folder: Path = journal_folder(url)
        self.last_error: str | None = None
        self.failures = 0
        self.applied_at_ns: int | None = None
        # How many damaged files are set aside whose rows the ledger lacks; None before it is known.
        self.set_aside: int | None = None
        self._path = sqlite_path(parse_url(url))
        self._reading: Engine | None = None
        self._url = url
        # What somebody else found damaged, until it is dealt with.
        self._damage: str | None = None
        self._set_aside_at_s: float | None = None
        self._set_aside_pause_s = set_aside_pause_s
        self._count_at_s = 0.0
        self._was_opened = False
        self._batches = BatchWriter(url, sends=sends)
        self._applier = Applier(self._batches, self.folder, second=second)
        self._keeper = keeper
        self._lock: FileLock | None = None
        self._outage = Outage()

    @property
    def path_to_watch(self) -> Path | None:
        """The file whose pages this process is to watch for damage; None if there is none."""
        return self._path if self._was_opened and self.is_ours else None

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
            self._take_lock()
        if self._lock is not None:
            if is_asked:
                self._applier.look_for_dead()
            self._apply_all()
            if self._keeper is not None and not is_asked:
                self._keeper.step(self._batches.opened())
        elif is_asked:
            if self._reading is None:
                self._reading = open_to_read(self._url, wait_s=WAIT_S)
            left = wait_until_applied(self._reading, self.folder, WAIT_S)
            if left:
                raise LedgerError(
                    f"{left} records in journals were not applied within {WAIT_S:g} s"
                )

    def found_damage(self, damage: str) -> None:
        """Have the next pass set the file aside. Any thread may say so."""
        self._damage = damage

    def _apply_all(self) -> None:
        if self._damage is not None:
            self._begin_anew(self._damage)
        try:
            self._apply()
        except Exception as error:
            damage = damage_in(error)
            if damage is None or not self._may_be_a_ledger():
                raise
            self._begin_anew(damage)
            self._apply()

    def _apply(self) -> None:
        while self._applier.apply():
            pass
        self._was_opened = True
        if self._path is not None and time.monotonic() >= self._count_at_s:
            with self._batches.opened().connect() as connection:
                self.set_aside = len(set_aside_files(connection))
            self._count_at_s = time.monotonic() + COUNT_PAUSE_S

    def _take_lock(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = FileLock.try_to_take(self.folder / places.APPLIER_LOCK_NAME)
        if self._lock is not None and self._second is not None:
            places.link_second(self.folder, self._second)
        if self._lock is None or self._path is None:
            return
        finish_setting_aside(self._path)
        if self._path.exists():
            # Before the file is opened: SQLite would write over what it leaves out.
            self._damage = self._damage or damage_of_log(self._path.resolve())

    def _may_be_a_ledger(self) -> bool:
        """Return whether the file at the path is ours to rename, and not one named by mistake."""
        if self._path is None:
            return False
        # What has our tables was opened; only what was not is looked at from outside of SQLite.
        return self._was_opened or self._batches.is_open or was_a_ledger(self._path)

    def _begin_anew(self, damage: str) -> None:
        """Set the file aside, and have the next attempt make a new one. Raises LedgerError."""
        assert self._path is not None  # noqa: S101 - only a file is found damaged
        path, now_s = self._path, time.monotonic()
        self._damage = damage
        before_s = self._set_aside_at_s
        try:
            if before_s is not None and now_s - before_s < self._set_aside_pause_s:
                raise LedgerError(
                    f"ledger {path}: is damaged ({damage}), as was the one that was set aside"
                    f" {now_s - before_s:.0f} s ago: is the disk at fault? This one is set aside"
                    f" {self._set_aside_pause_s:.0f} s after that"
                )
            aside = set_damaged_aside(path, time.time_ns())
        except OSError as error:
            raise LedgerError(
                f"ledger {path}: is damaged ({damage}) and cannot be set aside: {error.strerror}"
            ) from error
        finally:
            # Only now: the last one to close a file by its name moves the log into it.
            self._applier.close()
        self._batches.begin_anew()
        self._damage, self._set_aside_at_s, self._count_at_s = None, now_s, 0.0
        logger.error(
            "cost meter: the ledger %s was damaged (%s): it is set aside as %s, and bills go into a"
            " new file. Costs are told as before. Run %s: servers may go on meanwhile. Until then"
            " reports lack what it holds, and the audit is not balanced.",
            *(path, damage, aside, what_to_do(path, aside)),
        )

    def sizes(self) -> Sizes:
        """Return what the ledger takes on the disk beside its file."""
        wal = self._path.with_name(self._path.name + "-wal") if self._path is not None else None
        folders = places.folders_of(self.folder, self._second)
        segments = (file for folder in folders for file in folder.glob(f"*/*{SUFFIX}"))
        return Sizes(
            sum(map(_size_bytes, segments)),
            _size_bytes(wal) if wal is not None else 0,
            _free_bytes(self.folder),
        )

    def close(self) -> None:
        """Let go of the lock and of the ledger."""
        self._applier.close()
        if self._reading is not None:
            self._reading.dispose()
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
