"""Some thousand schedules of the simulated machine, and that the simulation finds what is broken.

`make simulate-ledger` runs a hundred thousand. Each of the faults below is put into the product's
code on purpose: a simulation that does not see it would prove nothing.
"""

from collections.abc import Callable

import pytest

from tests.simulation.ledgers import MemoryBatches
from tests.simulation.sqlite_disk import Cursor
from tests.simulation.world import run
from vllm_cost_meter.journal import files, places
from vllm_cost_meter.journal.open_journal import OpenJournal
from vllm_cost_meter.journal.reader import JournalReader
from vllm_cost_meter.journal.segments import Segment
from vllm_cost_meter.ledger.applier import Applier
from vllm_cost_meter.ledger.batches import BatchWriter

SCHEDULES, PARTS = 2_400, 8
SQLITE_SCHEDULES = 60
# A fault that is put in shows within so many; most do within a hundred.
UNTIL_FOUND = 3_000


@pytest.mark.parametrize("part", range(PARTS))
def test_what_was_told_is_in_the_books_once_or_named_as_lost(part: int) -> None:
    size = SCHEDULES // PARTS
    for seed in range(part * size, (part + 1) * size):
        outcome = run(seed)
        assert not outcome.complaints, f"make simulate-ledger SEED={seed}"


@pytest.mark.parametrize("part", range(2))
def test_it_is_so_on_a_real_sqlite_by_its_own_audit_too(part: int) -> None:
    size = SQLITE_SCHEDULES // 2
    for seed in range(part * size, (part + 1) * size):
        outcome = run(seed, is_sqlite=True)
        assert not outcome.complaints, f"make simulate-ledger SEED={seed} ON=sqlite"


def test_a_seed_gives_the_same_schedule_each_time() -> None:
    for seed in range(20):
        for is_sqlite in (False, seed < 3):
            first, again = run(seed, is_sqlite=is_sqlite), run(seed, is_sqlite=is_sqlite)
            assert (first.trace, first.counts) == (again.trace, again.counts)


def no_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Segment, "sync", lambda self: None)


def no_sync_of_names(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("tests.simulation.disk.Disk.sync_folder", lambda self, folder: None)


def told_before_it_is_written(patch: pytest.MonkeyPatch) -> None:
    real = Segment.append

    def late(self: Segment, data: bytes) -> None:
        kept = getattr(self, "kept", b"")
        if kept:
            real(self, kept)
        self.kept = data  # type: ignore[attr-defined]

    patch.setattr(Segment, "append", late)


def a_torn_write_stays_where_it_is(patch: pytest.MonkeyPatch) -> None:
    def append(self: Segment, data: bytes) -> None:
        self.end += files.pwrite(self._descriptor, data, self.end)

    patch.setattr(Segment, "append", append)


def on_in_the_same_segment_after_a_failed_sync(patch: pytest.MonkeyPatch) -> None:
    def sync(self: OpenJournal, segment: Segment) -> None:
        try:
            segment.sync()
        except OSError:
            segment.sync()

    patch.setattr(OpenJournal, "_sync", sync)


def further_than_what_was_committed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Applier, "forget", lambda self: None)


def segments_go_before_the_disk_has_the_commit(patch: pytest.MonkeyPatch) -> None:
    real = MemoryBatches.apply

    def apply(self: MemoryBatches, records, progress, *, to_disk: bool = False):
        return real(self, records, progress)

    patch.setattr(MemoryBatches, "apply", apply)


def segments_go_before_they_are_applied(patch: pytest.MonkeyPatch) -> None:
    real = places.remove_segments

    def remove(folder, journal_id: str, before: int) -> None:
        real(folder, journal_id, before + 1)

    patch.setattr(places, "remove_segments", remove)


def journals_of_living_processes_are_removed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("tests.simulation.disk.Disk.try_to_lock", lambda self, descriptor: True)


def damage_that_nobody_hears_of(patch: pytest.MonkeyPatch) -> None:
    real = JournalReader._note_gap

    def note(self: JournalReader, number: int, reason: str, reading) -> None:
        real(self, number, reason, reading)
        reading.gaps.clear()

    patch.setattr(JournalReader, "_note_gap", note)


@pytest.mark.parametrize(
    "fault",
    [
        no_sync,
        no_sync_of_names,
        told_before_it_is_written,
        a_torn_write_stays_where_it_is,
        on_in_the_same_segment_after_a_failed_sync,
        further_than_what_was_committed,
        segments_go_before_the_disk_has_the_commit,
        segments_go_before_they_are_applied,
        journals_of_living_processes_are_removed,
        damage_that_nobody_hears_of,
    ],
    ids=lambda fault: fault.__name__,
)
def test_a_fault_in_the_code_is_found(fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    assert any(run(seed).complaints for seed in range(UNTIL_FOUND))


def statements_changed(patch: pytest.MonkeyPatch, change: Callable[[str], str]) -> None:
    real = Cursor.execute
    patch.setattr(Cursor, "execute", lambda self, text, values=(): real(self, change(text), values))


def commits_never_wait(patch: pytest.MonkeyPatch) -> None:
    statements_changed(patch, lambda text: text.replace("synchronous=FULL", "synchronous=NORMAL"))


def a_record_that_is_there_is_an_error(patch: pytest.MonkeyPatch) -> None:
    statements_changed(patch, lambda text: text.replace("ON CONFLICT DO NOTHING", ""))


def positions_are_committed_before_their_records(patch: pytest.MonkeyPatch) -> None:
    real = BatchWriter.apply

    def apply(self: BatchWriter, records, progress, *, to_disk: bool = False):
        real(self, [], progress, to_disk=to_disk)
        return real(self, records, progress, to_disk=to_disk)

    patch.setattr(BatchWriter, "apply", apply)


# A schedule on SQLite takes 0.1 s, so the search begins not far before one that finds the fault.
@pytest.mark.parametrize(
    ("fault", "first"),
    [
        (commits_never_wait, 450),
        (a_record_that_is_there_is_an_error, 0),
        (positions_are_committed_before_their_records, 0),
    ],
    ids=["commits_never_wait", "a_record_is_an_error", "positions_before_records"],
)
def test_a_fault_in_what_sqlite_gets_is_found(
    fault, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    seeds = range(first, first + UNTIL_FOUND)
    assert any(run(seed, is_sqlite=True).complaints for seed in seeds)
