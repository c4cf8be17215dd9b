"""The journal's writer: what a future promises, and disks that are full, failing or gone."""

import errno
import itertools
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.component.ledger.test_reader import http, part, snapshot
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.journal import files, segments
from vllm_cost_meter.journal.entries import write_entry
from vllm_cost_meter.journal.frames import frame
from vllm_cost_meter.journal.open_journal import OpenJournal
from vllm_cost_meter.journal.places import FileLock, journal_ids, take_over
from vllm_cost_meter.journal.reader import JournalReader
from vllm_cost_meter.journal.writer import JournalWriter


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "ledger.db.journal"


def records_of(folder: Path) -> list[object]:
    """All records of all journals in a folder, by another reader than the writer knows of."""
    records = []
    for journal_id in journal_ids(folder):
        reader = JournalReader(folder / journal_id)
        while found := reader.read(is_alive=True).records:
            records += [record for _, record in found]
    return records


class Disk:
    """A journal's files on a disk that can be told to fail."""

    def __init__(self, folder: Path, **words: object) -> None:
        self.journal = OpenJournal(folder, **words)
        self.failing: OSError | None = None
        self.short = 0

    def append(self, first_number: int, frames: list[bytes]) -> int:
        if self.failing is not None:
            raise self.failing
        return self.journal.append(first_number, frames)

    @property
    def reserve_error(self) -> OSError | None:
        return self.journal.reserve_error

    def is_there(self) -> bool:
        return self.journal.is_there()

    def close(self) -> None:
        self.journal.close()


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_future_resolves_when_another_process_could_read_its_records(folder):
    writer = JournalWriter(folder)
    writer.start()
    record, reply = part(1), http()
    writer.put(record)
    writer.append(reply).result(10)
    assert records_of(folder) == [record, reply]
    assert (writer.queued, writer.journaled, writer.dropped, writer.waiting) == (2, 2, 0, 0)
    writer.close()
    assert records_of(folder) == [record, reply]


def test_records_of_many_threads_are_there_once_each_in_the_order_of_each_thread(folder):
    writer = JournalWriter(folder)
    writer.start()

    def work(run: str) -> None:
        for seq in range(1, 101):
            writer.append(part(seq, run_id=run)).result(10)

    threads = [threading.Thread(target=work, args=(f"run-{n}",)) for n in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    writer.close()
    keys = [(record.bill.run_id, record.bill.seq) for record in records_of(folder)]
    assert len(keys) == 800
    for n in range(8):
        assert [seq for run, seq in keys if run == f"run-{n}"] == list(range(1, 101))


def test_a_full_disk_costs_memory_only_and_is_said_once_and_at_its_end(folder, caplog):
    disk = Disk(folder)
    writer = JournalWriter(folder, open_=lambda _: disk)
    writer.start()
    writer.append(part(1)).result(10)
    disk.failing = FULL
    late = [writer.append(part(seq)) for seq in range(2, 50)]
    with caplog.at_level(logging.WARNING):
        while writer.failures < 3:
            pass
        assert not any(future.done() for future in late)
        assert "No space left on device" in writer.last_error
        disk.failing = None
        for future in late:
            future.result(10)
    assert writer.last_error is None
    writer.close()
    assert [record.bill.seq for record in records_of(folder)] == list(range(1, 50))
    said = [r.message for r in caplog.records]
    assert len(said) == 2
    assert "cannot be written" in said[0]
    assert "can be written again" in said[1]


def test_a_write_that_was_short_or_failed_in_its_middle_is_made_again(folder, monkeypatch):
    real, calls = files.pwrite, []

    def short(descriptor, data, offset):
        calls.append(len(data))
        if len(calls) % 5 == 0:
            real(descriptor, bytes(data)[: len(data) // 2], offset)
            raise FULL
        length = max(len(data) // 2, 1) if len(calls) % 2 else len(data)
        return real(descriptor, bytes(data)[:length], offset)

    writer = JournalWriter(folder)
    monkeypatch.setattr(files, "pwrite", short)
    writer.start()
    for seq in range(1, 20):
        writer.append(part(seq)).result(60)
    writer.close(60)
    assert [record.bill.seq for record in records_of(folder)] == list(range(1, 20))
    assert writer.failures > 0


def test_what_a_failed_sync_covered_is_written_anew_in_another_segment(folder, monkeypatch):
    real, fails = files.sync_data, iter([False, False, True, False, True])

    def sync(descriptor):
        if next(fails, False):
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(files, "sync_data", sync)
    writer = JournalWriter(folder, to_disk=True)
    writer.start()
    for seq in range(1, 10):
        writer.append(part(seq)).result(10)
    writer.close()
    assert [record.bill.seq for record in records_of(folder)] == list(range(1, 10))
    (journal_id,) = journal_ids(folder)
    assert len(segments.segment_indexes(folder / journal_id)) == 3


def test_a_segment_is_in_reserve_so_that_a_full_disk_is_met_before_it_hurts(folder, monkeypatch):
    journal = OpenJournal(folder, segment_bytes=1 << 12)
    journal.append(1, [b"x" * 100])
    assert (journal.place / segments.RESERVE_NAME).stat().st_size == 1 << 12

    def full(*_):
        raise FULL

    monkeypatch.setattr(files, "allocate", full)
    frames = 1

    def fill() -> None:
        nonlocal frames
        while True:
            journal.append(frames + 1, [b"x" * 100])
            frames += 1

    with pytest.raises(OSError, match="No space"):
        fill()
    assert frames > 70, "the reserve was there to be written to"
    assert journal.reserve_error is FULL


def test_that_no_room_is_in_reserve_is_said_when_it_begins_and_ends(folder, monkeypatch, caplog):
    real, is_full = files.allocate, []

    def allocate(*given):
        # The present segment was in reserve; what is full is the disk behind it.
        if is_full and next(is_full[0]):
            raise FULL
        real(*given)

    monkeypatch.setattr(files, "allocate", allocate)
    writer = JournalWriter(folder, open_=lambda at: OpenJournal(at, segment_bytes=1 << 12))
    writer.start()
    writer.append(part(1)).result(10)
    assert writer.reserve_error is None
    is_full.append(itertools.chain([True], itertools.repeat(False)))
    seq = 1
    while writer.reserve_error is None:
        seq += 1
        writer.append(part(seq)).result(10)
    assert "No space left" in writer.reserve_error
    while writer.reserve_error is not None:
        seq += 1
        writer.append(part(seq)).result(10)
    writer.close()
    assert [record.bill.seq for record in records_of(folder)] == list(range(1, seq + 1))
    said = [r.message for r in caplog.records]
    assert len(said) == 2
    assert "has no room in reserve" in said[0]
    assert "or bills wait in memory" in said[0]
    assert "has room in reserve again" in said[1]


def test_a_journal_whose_folder_went_away_is_made_anew(folder):
    writer = JournalWriter(folder)
    writer.start()
    writer.append(part(1)).result(10)
    folder.rename(folder.with_name("elsewhere"))
    writer.append(part(2)).result(10)
    writer.close()
    assert [record.bill.seq for record in records_of(folder)] == [2]


def test_beyond_the_bound_the_oldest_are_dropped_counted_and_their_futures_say_why(folder):
    disk = Disk(folder)
    disk.failing = FULL
    writer = JournalWriter(folder, max_records=10, open_=lambda _: disk)
    writer.start()
    first = writer.append(part(1))
    while not writer.failures:
        pass
    futures = [writer.append(part(seq)) for seq in range(2, 30)]
    with pytest.raises(LedgerError, match="dropped, 10 records wait"):
        futures[0].result(10)
    assert writer.queued == 29
    assert writer.dropped + writer.waiting == 29
    disk.failing = None
    first.result(10)
    futures[-1].result(10)
    writer.close()
    assert writer.queued == writer.journaled + writer.dropped


def test_what_is_lost_at_a_stop_is_named_with_count_run_and_time(folder, caplog):
    disk = Disk(folder)
    disk.failing = FULL
    writer = JournalWriter(folder, open_=lambda _: disk)
    writer.start()
    future = writer.append(part(1), part(2), http())
    writer.close(timeout_s=0.2)
    with pytest.raises(LedgerError, match="closed before it was written"):
        future.result(10)
    (said,) = [r.message for r in caplog.records if "stopped while" in r.message]
    assert "3 records are lost, 2 bills of run run with 0.000000600 GPU-s" in said


def test_a_record_that_cannot_be_written_is_dropped_alone_and_named(folder, caplog):
    writer = JournalWriter(folder)
    writer.start()
    bad = part(2, cost_nanousd=2**70)
    with pytest.raises(ValueError, match="(?i)int"):
        writer.append(bad).result(10)
    writer.append(part(3)).result(10)
    writer.close()
    assert [record.bill.seq for record in records_of(folder)] == [3]
    assert writer.dropped == 1
    assert any("cannot take the EngineRequest internal-2" in r.message for r in caplog.records)


def test_a_journal_is_alive_while_its_process_is_and_dead_once_that_is_killed(folder):
    code = f"""
import sys, pathlib
from vllm_cost_meter.journal.entries import write_entry
from vllm_cost_meter.journal.frames import frame
from vllm_cost_meter.journal.open_journal import OpenJournal
journal = OpenJournal(pathlib.Path({str(folder)!r}))
print(journal.journal_id, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        journal_id = process.stdout.readline().strip()
        assert take_over(folder, journal_id) is None
        process.kill()
        process.wait()
    lock = take_over(folder, journal_id)
    assert lock is not None
    lock.release()


def test_a_forked_child_that_outlives_its_parent_does_not_keep_the_journal_alive(folder):
    code = f"""
import os, pathlib
from vllm_cost_meter.journal.entries import write_entry
from vllm_cost_meter.journal.frames import frame
from vllm_cost_meter.journal.open_journal import OpenJournal
journal = OpenJournal(pathlib.Path({str(folder)!r}))
if os.fork() == 0:
    print(os.getpid(), flush=True)
    os.read(0, 1)  # it lives until the test ends
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as process:
        assert process.stdout.readline().strip().isdigit()
        process.wait()
        (journal_id,) = journal_ids(folder)
        lock = take_over(folder, journal_id)
        assert lock is not None, "the orphan holds a dead process's lock"
        lock.release()


def test_two_processes_have_journals_of_their_own(folder):
    one, other = OpenJournal(folder), OpenJournal(folder)
    assert one.journal_id != other.journal_id
    assert take_over(folder, one.journal_id) is None
    one.close()
    lock = take_over(folder, one.journal_id)
    assert lock is not None
    assert FileLock.try_to_take(folder / one.journal_id / "lock") is None
    lock.release()
    other.close()


def test_snapshots_come_back_as_they_were(folder):
    writer = JournalWriter(folder)
    writer.start()
    taken = snapshot([part(1)])
    writer.append(taken).result(10)
    writer.close()
    assert records_of(folder) == [taken]


def fails_once(monkeypatch, name: str, at: int) -> None:
    """Let one call of a function fail: the `at`-th from now."""
    real, calls = getattr(files, name), []

    def function(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(files, name, function)


@pytest.mark.parametrize("name", ["open_file", "allocate", "pwrite", "sync_data", "sync_folder"])
@pytest.mark.parametrize("at", range(1, 9))
def test_one_failure_of_the_disk_at_any_call_costs_nothing(folder, monkeypatch, name, at):
    writer = JournalWriter(
        folder, open_=lambda at: OpenJournal(at, to_disk=True, segment_bytes=1 << 12)
    )
    fails_once(monkeypatch, name, at)
    writer.start()
    for seq in range(1, 12):
        writer.append(part(seq)).result(10)
    writer.close()
    monkeypatch.undo()
    assert [record.bill.seq for record in records_of(folder)] == list(range(1, 12))


def test_a_reserve_that_somebody_removed_is_set_aside_again(folder):
    journal = OpenJournal(folder, segment_bytes=1 << 12)
    first, second, third = (frame(number, b"x" * 3000) for number in (1, 2, 3))
    journal.append(1, [first])
    (journal.place / segments.RESERVE_NAME).unlink()
    with pytest.raises(FileNotFoundError):
        journal.append(2, [second])
    assert [journal.append(2, [second]), journal.append(3, [third])] == [1, 1]
    assert len(segments.segment_indexes(journal.place)) == 3
    journal.close()


def test_a_journal_that_cannot_be_closed_is_dead_all_the_same(folder, monkeypatch):
    journal = OpenJournal(folder)
    journal.append(1, [frame(1, write_entry(part(1)))])
    fails_once(monkeypatch, "remove_file", 1)
    with pytest.raises(OSError, match="Input/output"):
        journal.close()
    lock = take_over(folder, journal.journal_id)
    assert lock is not None
    lock.release()


def test_the_disk_knows_the_name_of_the_folder_of_journals(folder, monkeypatch):
    real, synced = files.sync_folder, []
    monkeypatch.setattr(files, "sync_folder", lambda path: (synced.append(path), real(path)))
    OpenJournal(folder).close()
    assert {folder, folder.parent} <= set(synced)
