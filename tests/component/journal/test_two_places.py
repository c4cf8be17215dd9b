"""A journal in two places: the first one full, gone and back, and who reads both."""

import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.component.journal.test_writer import FULL, Disk, records_of
from tests.component.ledger.test_applier import seqs, url_of
from tests.component.ledger.test_reader import part
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.journal.open_journal import OpenJournal
from vllm_cost_meter.journal.places import folder_of_ledger, journal_ids
from vllm_cost_meter.journal.two_places import TwoPlaces
from vllm_cost_meter.journal.writer import JournalWriter
from vllm_cost_meter.ledger.apply_loop import ApplyLoop
from vllm_cost_meter.ledger.catching_up import catch_up, waiting_records
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.opening import open_ledger


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def first(path) -> Path:
    return folder_of_ledger(path)


@pytest.fixture
def second(tmp_path) -> Path:
    return tmp_path / "other-disk" / "ledger.journal"


class Disks:
    """Disks by folder, each of which can be told to fail."""

    def __init__(self) -> None:
        self.failing: dict[Path, OSError] = {}

    def open(self, folder: Path) -> "OnDisk":
        if folder in self.failing:
            raise self.failing[folder]
        return OnDisk(self, folder)


class OnDisk(Disk):
    def __init__(self, disks: Disks, folder: Path) -> None:
        super().__init__(folder)
        self.disks, self.folder = disks, folder

    def append(self, first_number: int, frames: list[bytes]) -> int:
        self.failing = self.disks.failing.get(self.folder)
        return super().append(first_number, frames)


def test_what_the_first_place_refuses_is_in_the_second_at_once_and_the_first_is_used_again(
    path, first, second, caplog
):
    disks = Disks()
    writer = JournalWriter(first, second=second, open_=disks.open, try_first_s=0.05)
    writer.start()
    writer.append(part(1)).result(10)
    assert not writer.is_in_second_place
    disks.failing[first] = FULL
    for seq in range(2, 10):
        writer.append(part(seq)).result(10)
    assert (writer.failures, writer.last_error) == (0, None)
    assert writer.is_in_second_place
    assert len(records_of(second)) == 8
    disks.failing.clear()
    seq = 9
    while writer.is_in_second_place:
        seq += 1
        writer.append(part(seq)).result(10)
        time.sleep(0.01)
    writer.close()
    assert catch_up(url_of(path)) == 0
    assert seqs(path) == list(range(1, seq + 1))
    with closing(open_ledger(path)) as reader:
        assert reader.audit()["journal_losses"] == []
    assert journal_ids(first) == journal_ids(second) == []
    said = [r.message for r in caplog.records]
    assert f"cannot be written in {first}" in said[0]
    assert f"bills are journaled in {second}, and costs are told as before" in said[0]
    assert f"is written in {first} again" in said[-1]


def test_where_both_refuse_bills_wait_in_memory_and_go_to_whichever_takes_them_first(
    path, first, second
):
    disks = Disks()
    writer = JournalWriter(first, second=second, open_=disks.open)
    writer.start()
    writer.append(part(1)).result(10)
    disks.failing = {first: FULL, second: FULL}
    late = writer.append(part(2))
    while writer.failures < 3:
        pass
    assert "No space left" in writer.last_error
    del disks.failing[second]
    late.result(10)
    assert writer.is_in_second_place
    disks.failing = {second: FULL}
    writer.append(part(3)).result(10)
    assert not writer.is_in_second_place
    writer.close()
    assert catch_up(url_of(path)) == 0
    assert seqs(path) == [1, 2, 3]


def test_a_first_place_that_cannot_be_made_leaves_the_journal_in_the_second(path, first, second):
    first.write_text("a file in the place of the folder")
    writer = JournalWriter(first, second=second)
    writer.start()
    writer.append(part(1), part(2)).result(10)
    assert writer.is_in_second_place
    first.unlink()
    loop = ApplyLoop(url_of(path), second=second)
    loop.run_pass(is_asked=True)
    assert seqs(path) == [1, 2]
    loop.close()
    writer.close()
    with closing(open_ledger(path)):  # it finds the second place by the first
        assert journal_ids(second) == []


def test_whoever_asks_is_told_of_what_the_second_place_holds(path, first, second):
    open_database(url_of(path)).dispose()
    TwoPlaces(first, second, OpenJournal).open().close()
    writer = JournalWriter(second)
    writer.start()
    writer.append(part(1)).result(10)
    assert waiting_records(url_of(path), timeout_s=0) == 1
    loop = ApplyLoop(url_of(path))
    loop.run_pass(is_asked=False)
    writer.append(part(2)).result(10)
    assert catch_up(url_of(path), timeout_s=0.05) == 1
    assert loop.sizes().journal_bytes >= 8 << 20
    loop.close()
    writer.close()


def test_a_second_place_that_is_away_is_said_and_the_first_is_applied_all_the_same(
    path, first, second
):
    writer = JournalWriter(first, second=second)
    writer.start()
    writer.append(part(1)).result(10)
    second.parent.rename(second.parent.with_name("unplugged"))
    loop = ApplyLoop(url_of(path))
    with pytest.raises(LedgerError, match="is its disk away"):
        loop.run_pass(is_asked=True)
    assert seqs(path) == [1]
    loop.close()
    with closing(open_ledger(path)) as reader:
        assert reader.audit()["reason"] == "not_applied"
    with pytest.raises(LedgerError, match="remove the link"):
        catch_up(url_of(path))
    for link in first.glob("second-*"):
        link.unlink()
    writer.close()
    assert catch_up(url_of(path)) == 0
