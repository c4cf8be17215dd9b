"""The processes of a simulated machine, each in a greenlet that may stop at every call.

They run the product's own code: the journal's writer without its thread, the applier, and what a
command does. A process that is killed ends at the call that it was about to make.

Invariant: code of a dead process changes nothing.
"""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from greenlet import greenlet
from sqlalchemy.exc import SQLAlchemyError

from tests.simulation.disk import Call, Killed
from tests.simulation.model import Told, is_bad
from tests.simulation.records import Engine
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.journal import places
from vllm_cost_meter.journal.entries import Record
from vllm_cost_meter.journal.open_journal import OpenJournal
from vllm_cost_meter.journal.places import FileLock
from vllm_cost_meter.journal.writer import JournalWriter
from vllm_cost_meter.ledger.applier import Applier

if TYPE_CHECKING:
    from tests.simulation.world import World

FOLDER = Path("/ledger.db.journal")


class Process:
    """A process: what it does, call by call, until it ends or is killed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.is_dead = False
        self.calls_left = 0
        self.next_call: Call | None = None
        self.descriptors: set[int] = set()
        self._greenlet = greenlet(self._live)

    def _live(self) -> None:
        try:
            self.run()
        except Killed:
            pass
        self.is_dead = True

    def run(self) -> None:
        """Live. Ends when the process does."""
        raise NotImplementedError

    def go_on(self, calls: int) -> None:
        """Make so many calls, or fewer if there is nothing to do."""
        self.calls_left = calls
        self._greenlet.switch()

    def pause(self) -> None:
        """Let others run."""
        self.world.main.switch()
        if self.is_dead:
            raise Killed

    def before(self, call: Call) -> None:
        """Stop here if others are to run; raise what this call meets."""
        if self.is_dead:
            raise Killed
        self.calls_left -= 1
        if self.calls_left < 0:
            self.next_call = call
            self.pause()
            self.next_call = None
        self.world.fail_by_chance(call)

    def kill(self) -> None:
        """End it where it is, perhaps in the middle of a write."""
        call = self.next_call
        if call is not None and call.partly is not None and self.world.random.random() < 0.5:
            call.partly()
        self.is_dead = True
        if self._greenlet:
            self._greenlet.throw(Killed)


class Server(Process):
    """An API server: it journals bills, replies, snapshots and open requests, and tells costs."""

    def __init__(self, world: World, engine: Engine) -> None:
        super().__init__(world)
        self.engine = engine
        self.is_stopping = False
        self.journals: list[str] = []
        self._journal: OpenJournal | None = None
        self._numbers = 0
        self.writer = JournalWriter(
            FOLDER, max_records=world.plan.max_records, open_=self._open_journal
        )

    def _open_journal(self, _folder: Path) -> OpenJournal:
        self._journal = OpenJournal(
            FOLDER, to_disk=self.world.plan.to_disk, segment_bytes=self.world.plan.segment_bytes
        )
        self.journals.append(self._journal.journal_id)
        return self._journal

    def bill(self, count: int) -> None:
        """Let requests end: their records are handed over, and told once they are journaled."""
        for _ in range(count):
            for record in self.engine.next_records(self.world.random):
                self.world.model.make(record)
                self.hand_over(record)

    def hand_over(self, record: Record) -> None:
        future = self.writer.append(record)

        def done(future: Future[None]) -> None:
            if future.exception() is None:
                self._numbers += 1
                told = Told(record, self.journals, self._numbers, is_bad(record))
                self.world.model.told.append(told)
            else:
                self.world.dropped += 1

        future.add_done_callback(done)

    def run(self) -> None:
        self.writer.open_early()
        while True:
            if self.writer.waiting:
                if self.writer.write_a_group():
                    self.pause()
            elif self.is_stopping:
                break
            else:
                self.pause()
        if self._journal is not None:
            with suppress(OSError):
                self._journal.close()

    def complaints(self) -> list[str]:
        w = self.writer
        if w.queued == w.journaled + w.dropped + w.waiting:
            return []
        return [
            f"queued {w.queued}, journaled {w.journaled}, dropped {w.dropped}, {w.waiting} wait"
        ]


class ApplierProcess(Process):
    """Applies the journals for as long as it lives, as the process beside a server does."""

    def __init__(self, world: World, *, is_command: bool = False) -> None:
        super().__init__(world)
        self._is_command = is_command
        batches = world.ledger.batches(self.before)
        self._applier = Applier(batches, FOLDER, look_for_dead_s=0 if is_command else 1.0)
        self.is_stopping = False
        self.is_idle = False

    def run(self) -> None:
        lock: FileLock | None = None
        told = len(self.world.model.told)
        while not self.is_stopping:
            self.is_idle = False
            try:
                if lock is None:
                    places.make_folder_of_journals(FOLDER)
                    lock = FileLock.try_to_take(FOLDER / places.APPLIER_LOCK_NAME)
                if lock is None:
                    if self._is_command:
                        return
                    self.pause()
                    continue
                while self._applier.apply():
                    pass
            except (OSError, LedgerError, SQLAlchemyError):
                if self._is_command:
                    break
                self.pause()
                continue
            if self._is_command:
                # A cost that was told before the question is found by it. Behind damage, which may
                # be a write that is being made, it is found once the process is dead.
                self.world.ledger.look(self.world.model.made)
                before = [] if self.world.model.damaged else self.world.model.told[:told]
                self.world.complaints += self.world.model.missing(self.world.ledger, before)
                break
            self.is_idle = True
            self.pause()
        self._applier.close()
        if lock is not None:
            lock.release()
