"""The applier against real journals and SQLite files: killed, locked, damaged, moved away."""

import gc
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.component.ledger.test_reader import http, part, snapshot
from tests.support.ledger_writer import LedgerWriter
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.journal import segments
from vllm_cost_meter.journal.entries import write_entry
from vllm_cost_meter.journal.frames import frame
from vllm_cost_meter.journal.open_journal import OpenJournal
from vllm_cost_meter.journal.places import (
    LEDGER_MARK_NAME,
    FileLock,
    folder_of_ledger,
    journal_ids,
)
from vllm_cost_meter.journal.reader import Position
from vllm_cost_meter.ledger.applier import Applier
from vllm_cost_meter.ledger.apply_loop import ApplyLoop
from vllm_cost_meter.ledger.batches import BatchWriter
from vllm_cost_meter.ledger.catching_up import catch_up
from vllm_cost_meter.ledger.progress import JournalProgress


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "ledger.db"


def url_of(path: Path) -> str:
    return f"sqlite:///{path}"


class Process:
    """A process that bills, as far as its journal shows it."""

    def __init__(self, path: Path, run_id: str = "run", segment_bytes: int = 1 << 12) -> None:
        self.journal = OpenJournal(folder_of_ledger(path), segment_bytes=segment_bytes)
        self.run_id = run_id
        self.bills = []
        self.number = 0

    def append(self, *records) -> None:
        for record in records:
            self.number += 1
            self.journal.append(self.number, [frame(self.number, write_entry(record))])

    def bill(self, count: int = 1) -> None:
        for _ in range(count):
            seq = len(self.bills) + 1
            self.bills.append(part(seq, f"{self.run_id}-{seq}", run_id=self.run_id))
            self.append(self.bills[-1], http(f"{self.run_id}-{seq}"))
        self.append(snapshot(self.bills, len(self.bills), self.run_id))

    def die(self) -> None:
        self.journal.close()


def applier_of(path: Path) -> Applier:
    return Applier(BatchWriter(url_of(path)), folder_of_ledger(path), look_for_dead_s=0)


def apply_all(applier: Applier) -> None:
    while applier.apply():
        pass


def rows(path: Path, query: str) -> list[tuple]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def seqs(path: Path, run_id: str = "run") -> list[int]:
    return [
        s for (s,) in rows(path, f"SELECT seq FROM requests WHERE run_id='{run_id}' ORDER BY 1")
    ]


def dump(path: Path) -> dict[str, list[tuple]]:
    """All that the meter has in a ledger but where its journals are."""
    names = [n for (n,) in rows(path, "SELECT name FROM sqlite_master WHERE type='table'")]
    return {
        n: sorted(rows(path, f"SELECT * FROM {n}"), key=repr) for n in names if "journal" not in n
    }


def test_all_that_is_journaled_is_in_the_ledger_as_if_it_were_written_at_once(path, tmp_path):
    process = Process(path)
    process.bill(40)
    applier = applier_of(path)
    apply_all(applier)
    applier.close()
    direct = LedgerWriter(url_of(tmp_path / "direct.db"))
    for bill in process.bills:
        direct.commit(bill, http(f"run-{bill.bill.seq}"))
    direct.commit(snapshot(process.bills, 40))
    direct.close()
    assert dump(path) == dump(tmp_path / "direct.db")
    process.die()


def test_whoever_begins_again_goes_on_where_the_ledger_is(path):
    process = Process(path)
    for _ in range(10):
        process.bill(7)
        applier = applier_of(path)
        apply_all(applier)
        applier.close()
    assert seqs(path) == list(range(1, 71))
    process.die()


def test_segments_go_once_their_records_are_in_the_ledger_and_a_dead_journal_goes_as_a_whole(path):
    process = Process(path)
    process.bill(60)
    place = process.journal.place
    assert len(segments.segment_indexes(place)) > 5
    applier = applier_of(path)
    apply_all(applier)
    apply_all(applier)
    assert len(segments.segment_indexes(place)) == 1
    process.bill(3)
    process.die()
    apply_all(applier)
    apply_all(applier)
    assert not place.exists()
    assert seqs(path) == list(range(1, 64))
    assert rows(path, "SELECT count(*) FROM journals") == [(0,)]
    applier.close()


def test_records_that_were_applied_before_are_there_once(path):
    """As where another file has the ledger's place, with other positions."""
    process = Process(path, segment_bytes=1 << 20)
    process.bill(20)
    applier = applier_of(path)
    apply_all(applier)
    before = dump(path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM journals")
    applier.forget()
    apply_all(applier)
    applier.close()
    assert dump(path) == before
    process.die()


def test_a_locked_ledger_keeps_everything_in_the_journal(path):
    process = Process(path)
    process.bill(2)
    applier = applier_of(path)
    apply_all(applier)
    with closing(sqlite3.connect(path, isolation_level=None)) as blocker:
        blocker.execute("BEGIN EXCLUSIVE")
        process.bill(30)
        with pytest.raises(Exception, match="locked"):
            applier.apply()
        assert len(segments.segment_indexes(process.journal.place)) > 2
    apply_all(applier)
    applier.close()
    assert seqs(path) == list(range(1, 33))
    process.die()


def test_a_ledger_that_was_moved_away_is_waited_for_and_no_new_one_is_made(path, tmp_path):
    process = Process(path)
    process.bill(2)
    applier = applier_of(path)
    apply_all(applier)
    for file in tmp_path.glob("ledger.db*"):
        if file.is_file():
            file.rename(file.with_name("away" + file.name))
    process.bill(3)
    with pytest.raises(LedgerError, match="There was one, so no other is begun"):
        apply_all(applier)
    assert not path.exists()
    for file in tmp_path.glob("awayledger.db*"):
        file.rename(file.with_name(file.name.removeprefix("away")))
    apply_all(applier)
    applier.close()
    assert seqs(path) == [1, 2, 3, 4, 5]
    process.die()


def test_a_process_that_starts_while_the_ledger_is_away_waits_for_it_and_begins_no_other(
    path, tmp_path
):
    dead, alive = Process(path), Process(path, run_id="alive")
    dead.bill(2)
    apply_all(applier_of(path))
    dead.bill(3)
    dead.die()
    alive.bill(1)
    away = tmp_path / "away"
    away.mkdir()
    for file in tmp_path.glob("ledger.db*"):
        if file.is_file():
            file.rename(away / file.name)
    for _ in range(2):
        with pytest.raises(LedgerError, match="There was one, so no other is begun"):
            apply_all(applier_of(path))
    assert not path.exists()
    # Over whatever is there.
    for file in away.iterdir():
        file.rename(tmp_path / file.name)
    apply_all(applier_of(path))
    assert (seqs(path), seqs(path, "alive")) == ([1, 2, 3, 4, 5], [1])
    alive.die()


def test_a_new_ledger_is_begun_once_the_mark_of_the_old_one_is_removed(path):
    process = Process(path)
    process.bill(2)
    apply_all(applier_of(path))
    path.unlink()
    with pytest.raises(LedgerError) as refused:
        applier_of(path).apply()
    mark = folder_of_ledger(path) / LEDGER_MARK_NAME
    assert f"remove {mark}, and a new one is begun" in str(refused.value)
    mark.unlink()
    process.bill(1)
    apply_all(applier_of(path))
    assert seqs(path) == [1, 2, 3]
    process.die()


def test_a_ledger_that_is_replaced_by_an_older_copy_gets_what_the_journal_still_has(path, tmp_path):
    process = Process(path, segment_bytes=1 << 20)
    process.bill(2)
    applier = applier_of(path)
    apply_all(applier)
    applier.close()
    shutil.copy(path, tmp_path / "old.db")
    applier = applier_of(path)
    process.bill(5)
    apply_all(applier)
    (tmp_path / "old.db").rename(path)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    process.bill(1)
    apply_all(applier)
    applier.close()
    assert seqs(path) == list(range(1, 9))
    process.die()


def test_damage_in_a_journal_is_a_row_of_losses_and_the_rest_is_applied(path):
    process = Process(path, segment_bytes=1 << 20)
    process.bill(20)
    process.die()
    (file,) = process.journal.place.glob("*.segment")
    content = bytearray(file.read_bytes())
    at = content.index(b"internal-9")
    content[at] ^= 255
    file.write_bytes(content)
    apply_all(applier := applier_of(path))
    applier.close()
    assert seqs(path) == [n for n in range(1, 21) if n != 9]
    assert rows(path, "SELECT records, reason FROM journal_losses") == [(1, "frames are damaged")]


def test_a_record_that_no_ledger_can_take_is_a_row_of_losses_and_the_rest_is_applied(path, caplog):
    process = Process(path)
    process.bill(1)
    process.append(part(2, tenant="\x00bad", cost_nanousd=2**63))
    process.append(part(3))
    apply_all(applier := applier_of(path))
    applier.close()
    assert seqs(path) == [1, 3]
    ((after, records, reason),) = rows(
        path, "SELECT after_number, records, reason FROM journal_losses"
    )
    assert (after, records) == (3, 1)
    assert "internal-2" in reason
    assert "cannot take the EngineRequest internal-2" in caplog.text
    process.die()


def test_one_journal_of_a_newer_version_does_not_hold_up_the_others(path):
    newer, plain = Process(path, "newer"), Process(path, "plain")
    newer.bill(1)
    newer.journal.append(newer.number + 1, [frame(newer.number + 1, b"\x63what?")])
    plain.bill(4)
    applier = applier_of(path)
    for _ in range(2):
        with pytest.raises(LedgerError, match="upgrade this one"):
            apply_all(applier)
        plain.bill(1)
    newer.die()
    with pytest.raises(LedgerError, match="upgrade this one"):
        apply_all(applier)
    applier.close()
    assert seqs(path, "plain") == [1, 2, 3, 4, 5, 6]
    assert seqs(path, "newer") == [1]
    assert newer.journal.place.exists(), "a version that can read it finds it"
    plain.die()


def test_a_command_applies_what_dead_servers_left_behind(path):
    one, other = Process(path, "one"), Process(path, "other")
    one.bill(3)
    other.bill(4)
    one.die()
    other.die()
    assert catch_up(url_of(path)) == 0
    assert (seqs(path, "one"), seqs(path, "other")) == ([1, 2, 3], [1, 2, 3, 4])
    assert journal_ids(folder_of_ledger(path)) == []
    assert catch_up(url_of(path)) == 0


def test_a_command_beside_a_server_waits_for_its_applier_and_says_what_is_left(path):
    process = Process(path)
    process.bill(1)
    loop = ApplyLoop(url_of(path))
    loop.run_pass(is_asked=False)
    assert loop.is_ours
    assert catch_up(url_of(path)) == 0
    process.bill(2)
    assert catch_up(url_of(path), timeout_s=0.1) == 5
    loop.run_pass(is_asked=True)
    assert catch_up(url_of(path)) == 0
    loop.close()
    process.die()


def test_a_second_server_takes_over_when_the_first_one_is_gone(path):
    process = Process(path)
    first, second = ApplyLoop(url_of(path)), ApplyLoop(url_of(path))
    first.run_pass(is_asked=False)
    second.run_pass(is_asked=False)
    assert (first.is_ours, second.is_ours) == (True, False)
    process.bill(2)
    with pytest.raises(LedgerError, match="5 records in journals were not applied within 1 s"):
        second.run_pass(is_asked=True)
    first.close()
    second.run_pass(is_asked=True)
    assert second.is_ours
    assert seqs(path) == [1, 2]
    second.close()
    process.die()


KILLED = """
import sys
from tests.component.ledger.test_applier import *
loop = ApplyLoop(url_of(Path(sys.argv[1])))
while True:
    loop.run_pass(is_asked=True)
    print(flush=True)
"""


def test_an_applier_that_is_killed_again_and_again_loses_and_doubles_nothing(path):
    process = Process(path)
    for round in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE
        ) as applier:
            applier.stdout.readline()
            process.bill(40 + round)
            applier.send_signal(signal.SIGKILL)
    process.die()
    assert catch_up(url_of(path)) == 0
    assert seqs(path) == list(range(1, len(process.bills) + 1))
    told = sum(bill.bill.gpu_time_ns for bill in process.bills)
    assert rows(path, "SELECT sum(gpu_time_ns) FROM requests") == [(told,)]
    assert rows(path, "SELECT count(*) FROM replies") == [(len(process.bills),)]


def test_the_lock_of_the_applier_keeps_commands_that_replace_the_file_away(path):
    loop = ApplyLoop(url_of(path))
    loop.run_pass(is_asked=False)
    assert FileLock.try_to_take(folder_of_ledger(path) / "applier.lock") is None
    loop.close()
    lock = FileLock.try_to_take(folder_of_ledger(path) / "applier.lock")
    assert lock is not None
    lock.release()


class Watched(BatchWriter):
    """Notes what each commit has, and whether it waits for the disk."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.commits: list[tuple[int, bool]] = []

    def apply(self, records, progress, *, to_disk=False):
        self.commits.append((len(records), to_disk))
        return super().apply(records, progress, to_disk=to_disk)


def test_a_dead_journal_goes_only_after_a_commit_that_waited_for_the_disk(path):
    process = Process(path, segment_bytes=1 << 20)
    process.bill(3)
    batches = Watched(url_of(path))
    applier = Applier(batches, folder_of_ledger(path), look_for_dead_s=0)
    apply_all(applier)
    process.bill(1)
    apply_all(applier)
    assert batches.commits == [(7, True), (3, False)]
    process.die()
    apply_all(applier)
    assert not process.journal.place.exists()
    assert batches.commits[2] == (0, True)
    applier.close()


def test_a_position_without_records_is_written_because_a_commit_without_changes_syncs_nothing(path):
    batches = BatchWriter(url_of(path))
    for position in (Position(1, 900, 5), Position(2, 20, 5)):
        batches.apply(
            [], lambda _, position=position: JournalProgress({"j": position}), to_disk=True
        )
    assert batches.positions() == {"j": Position(2, 20, 5)}
    batches.drop()


def test_what_processes_left_behind_that_died_while_a_journal_was_made_or_removed_goes(path):
    folder = folder_of_ledger(path)
    made, begun, removed = Process(path), Process(path), Process(path)
    made.bill(1)
    for process in (made, begun, removed):
        process.die()
    begun.journal.place.rename(folder / f"new-{begun.journal.journal_id}")
    made.journal.place.rename(folder / f"gone-{made.journal.journal_id}")
    for file in removed.journal.place.iterdir():
        file.unlink()
    applier = applier_of(path)
    apply_all(applier)
    applier.close()
    assert [each.name for each in folder.iterdir()] == [LEDGER_MARK_NAME]


def test_the_garbage_collector_rests_during_a_batch_and_no_longer(path):
    process = Process(path)
    process.bill()

    class Watched(BatchWriter):
        def apply(self, records, progress, *, to_disk=False):
            seen.append(gc.isenabled())
            if len(seen) == 1:
                raise LedgerError("away")
            return super().apply(records, progress, to_disk=to_disk)

    seen: list[bool] = []
    applier = Applier(Watched(url_of(path)), folder_of_ledger(path))
    with pytest.raises(LedgerError, match="away"):
        applier.apply()
    assert gc.isenabled()
    applier.apply()
    assert gc.isenabled()
    assert not any(seen)
    applier.close()
