"""A ledger that is damaged while servers use it: noticed, set aside, repaired, merged, balanced."""

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.component.ledger.test_applier import Process, seqs, url_of
from tests.component.ledger.test_reader import NOW as NOW_NS
from tests.support.upkeep import noise
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.apply_loop import ApplyLoop
from vllm_cost_meter.ledger.catching_up import catch_up
from vllm_cost_meter.ledger.damage.noticing import PageWatch, damage_of_log
from vllm_cost_meter.ledger.damage.setting_aside import set_damaged_aside
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.upkeep.copies import back_up
from vllm_cost_meter.ledger.upkeep.merging import merge
from vllm_cost_meter.ledger.upkeep.repairing import repair
from vllm_cost_meter.prices.book import NO_PRICES

PAGE = 4096
FRAME = PAGE + 24
BEFORE, AFTER = 300, 20
NOW = AsOf(NOW_NS, 0)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def process(path) -> Iterator[Process]:
    process = Process(path)
    yield process
    process.die()


@contextmanager
def applying(path: Path, **options: float) -> Iterator[ApplyLoop]:
    loop = ApplyLoop(url_of(path), **options)
    try:
        yield loop
    finally:
        loop.close()


def query(path: Path, text: str, *values: object) -> list[int]:
    with closing(sqlite3.connect(path)) as connection:
        return [value for (value,) in connection.execute(text, values)]


def spoil(file: Path, at: int, count: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(noise(count))


def spoil_page(path: Path, page: int) -> None:
    spoil(path, (page - 1) * PAGE, PAGE)


def spoil_leaf(path: Path) -> None:
    """Spoil a page of bills that are long written: nobody touches it but who reads all."""
    leaves = "SELECT pageno FROM dbstat WHERE name = 'requests' AND pagetype = 'leaf' ORDER BY path"
    spoil_page(path, query(path, leaves)[1])


def spoil_table_root(path: Path) -> None:
    spoil_page(path, query(path, "SELECT rootpage FROM sqlite_master WHERE name = 'requests'")[0])


def spoil_index_root(path: Path) -> None:
    indexes = "SELECT rootpage FROM sqlite_master WHERE tbl_name = ? AND type = 'index'"
    spoil_page(path, query(path, indexes, "requests")[0])


def spoil_header(path: Path) -> None:
    spoil(path, 0, 16)


def spoil_first_page(path: Path) -> None:
    spoil(path, 100, PAGE - 100)


def asides(path: Path) -> list[Path]:
    return [f for f in path.parent.iterdir() if re.search(r"\.damaged-[0-9T]+Z(-\d+)?$", f.name)]


def watched(path: Path) -> str | None:
    """Read the whole file as the background does; return what is damaged."""
    pages = PageWatch(path)
    while (damage := pages.look()) is None and not pages.is_at_end:
        pass
    return damage


def audit(path: Path) -> dict:
    with LedgerReader(url_of(path)) as reader:
        return reader.audit(as_of=NOW)


def repaired_and_merged(path: Path) -> dict:
    """Do what the log says, and return the audit."""
    (aside,) = asides(path)
    repair(url_of(aside), 1_800_000_000 * 10**9)
    merge(url_of(path), [aside], 0)
    return audit(path)


SPOILT: list[Callable[[Path], None]] = [
    spoil_leaf,
    spoil_table_root,
    spoil_index_root,
    spoil_header,
    spoil_first_page,
]


@pytest.fixture
def served(path, process) -> Iterator[ApplyLoop]:
    """An applier that is at work on a ledger with bills, all of them in its file."""
    process.bill(BEFORE)
    with applying(path) as loop:
        loop.run_pass(is_asked=True)
        assert audit(path)["balanced"]
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint")
        yield loop


def assert_set_aside(path: Path, said: str) -> None:
    (aside,) = asides(path)
    lines = [line for line in said.splitlines() if "it is set aside as" in line]
    assert len(lines) == 1
    assert f"`vllm-cost-meter ledger repair --ledger {aside}`" in lines[0]
    assert f"`vllm-cost-meter ledger merge --ledger {path} {aside}`" in lines[0]
    assert seqs(path)[-1] == BEFORE + AFTER
    told = audit(path)
    assert (told["balanced"], told["reason"]) == (None, "set_aside")
    assert [each["file"] for each in told["set_aside"]] == [aside.name]
    assert told["journal_losses"] == []


def assert_comes_back(path: Path, spoilt: Callable[[Path], None]) -> None:
    told = repaired_and_merged(path)
    assert told["set_aside"] == []
    missing = set(range(1, BEFORE + AFTER + 1)) - set(seqs(path))
    if spoilt in (spoil_leaf, spoil_table_root) and missing:  # its rows are gone, and named
        assert told["balanced"] is False
        assert told["runs"][0]["missing_bills"]
        assert len(missing) < 30  # a page of rows
    else:
        assert not missing
        assert told["balanced"] is True


@pytest.mark.parametrize("spoilt", SPOILT)
def test_damage_under_a_server_at_work_is_found_and_all_that_can_be_read_comes_back(
    path, process, served, spoilt, caplog
):
    spoilt(path)
    damage = watched(path)
    assert damage is not None
    served.found_damage(damage)
    process.bill(AFTER)
    served.run_pass(is_asked=True)
    assert_set_aside(path, caplog.text)
    assert_comes_back(path, spoilt)


@pytest.mark.parametrize("spoilt", SPOILT)
def test_damage_is_noticed_by_the_next_server_and_all_that_can_be_read_comes_back(
    path, process, served, spoilt, caplog
):
    served.close()
    spoilt(path)
    process.bill(AFTER - 1)
    with applying(path) as loop:
        loop.run_pass(is_asked=True)
        if spoilt is spoil_leaf:  # Only who reads all meets it.
            assert asides(path) == []
            loop.found_damage(watched(path))
        process.bill(1)
        loop.run_pass(is_asked=True)
        assert_set_aside(path, caplog.text)
    assert_comes_back(path, spoilt)


def test_a_ledger_without_damage_is_read_to_its_end_and_left_alone(path, process):
    process.bill(BEFORE)
    with applying(path) as loop:
        loop.run_pass(is_asked=True)
        assert watched(path) is None
        process.bill(1)
        loop.run_pass(is_asked=True)
        assert watched(path) is None
    assert asides(path) == []


def flip_in_log(path: Path) -> None:
    """Flip a byte in a page of the log that commits came after."""
    wal = path.with_name(path.name + "-wal")
    at = 32 + FRAME * (wal.stat().st_size // FRAME // 2) + 500
    with wal.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_log_is_noticed_while_a_server_writes_to_it(path, process):
    with applying(path) as loop:
        for _ in range(20):
            process.bill(2)
            loop.run_pass(is_asked=True)
        assert watched(path) is None
        flip_in_log(path)
        damage = watched(path)
        assert "damaged frames in its log" in damage
        loop.found_damage(damage)
        loop.run_pass(is_asked=True)
        (aside,) = asides(path)
        assert aside.with_name(aside.name + "-wal").stat().st_size > 20 * FRAME
    repaired_and_merged(path)
    assert seqs(path) == list(range(1, 41))


def test_a_damaged_log_is_noticed_by_the_next_server_before_it_writes_over_the_rest(path, process):
    process.bill(2)
    with applying(path) as loop, closing(sqlite3.connect(path)) as held:
        loop.run_pass(is_asked=True)
        held.execute("SELECT count(*) FROM runs").fetchall()  # it keeps the log
        for _ in range(20):
            process.bill(2)
            loop.run_pass(is_asked=True)
        loop.close()
        files = [path, path.with_name(path.name + "-wal")]
        killed = {file: file.read_bytes() for file in files}
    for file, content in killed.items():
        file.write_bytes(content)
    flip_in_log(path)
    assert "committed ones are left out" in damage_of_log(path)
    process.bill(1)
    with applying(path) as loop:
        loop.run_pass(is_asked=True)
    repaired_and_merged(path)
    assert seqs(path) == list(range(1, 44))


def test_a_damaged_log_is_neither_copied_nor_merged(path, process, tmp_path):
    with applying(path) as loop:
        for _ in range(20):
            process.bill(2)
            loop.run_pass(is_asked=True)
        flip_in_log(path)
        with pytest.raises(LedgerError, match="its log has . damaged frames; run .*ledger repair"):
            back_up(url_of(path), tmp_path / "copy.db")
        assert not (tmp_path / "copy.db").exists()


def test_readers_of_a_server_come_to_the_new_file(path, process, served):
    with (
        LedgerReader(url_of(path), late=True) as reader,
        closing(Spending(url_of(path))) as spending,
    ):
        assert reader.summary(as_of=NOW)["requests"] == BEFORE
        spending.look((), NO_PRICES, NOW_NS)
        served.found_damage("as the test says")
        served.run_pass(is_asked=True)
        process.bill(AFTER)
        served.run_pass(is_asked=True)
        assert len(reader.requests(limit=1000)["requests"]) < BEFORE + AFTER
        assert reader.find(f"run-{BEFORE + AFTER}")
        assert reader.find("run-1") == [], "its bill is in the file that was set aside"
        assert spending.latest_snapshots() == [("run", BEFORE + AFTER)]


def test_whoever_still_has_the_old_file_open_leaves_the_new_ones_log_alone(path, process, served):
    """As a program of somebody else, which keeps its connection, and is the last to close it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("CREATE TABLE theirs (word TEXT)")
        served.found_damage("as the test says")
        process.bill(AFTER)
        served.run_pass(is_asked=True)
        log = path.with_name(path.name + "-wal")
        before = log.stat().st_ino
        other.execute("INSERT INTO theirs VALUES ('written to the old file')")
    assert log.stat().st_ino == before
    assert log.stat().st_size > 0
    served.close()
    assert seqs(path)[-1] == BEFORE + AFTER
    (aside,) = asides(path)
    assert query(aside, "SELECT word FROM theirs") == ["written to the old file"]
    assert seqs(aside) == list(range(1, BEFORE + 1))


def test_a_server_that_was_killed_between_the_names_is_followed_up_by_the_next(path, process):
    process.bill(2)
    with applying(path) as loop, closing(sqlite3.connect(path)) as held:
        loop.run_pass(is_asked=True)
        held.execute("SELECT count(*) FROM runs").fetchall()
        loop.close()
        log = path.with_name(path.name + "-wal")
        content = log.read_bytes()
        aside = set_damaged_aside(path, NOW_NS)
    for suffix in ("-wal", "-shm"):
        aside.with_name(aside.name + suffix).unlink(missing_ok=True)
    log.write_bytes(content)  # the name that it did not come to any more
    process.bill(1)
    with applying(path) as loop:
        loop.run_pass(is_asked=True)
    assert aside.with_name(aside.name + "-wal").read_bytes() == content
    assert [each["file"] for each in audit(path)["set_aside"]] == [aside.name]
    repaired = repair(url_of(aside), NOW_NS, force=True)
    assert repaired is not None
    merge(url_of(path), [aside], 0)
    assert seqs(path) == [1, 2, 3]


def test_a_disk_that_damages_the_next_file_too_has_bills_wait_in_the_journal(path, process, served):
    served.found_damage("once")
    served.run_pass(is_asked=True)
    served.found_damage("twice")
    process.bill(AFTER)
    for _ in range(2):
        with pytest.raises(LedgerError, match="is the disk at fault"):
            served.run_pass(is_asked=True)
    assert len(asides(path)) == 1
    assert seqs(path) == []
    with applying(path, set_aside_pause_s=0.0) as later:
        served.close()
        for word in ("once", "twice"):
            later.found_damage(word)
            later.run_pass(is_asked=True)
    assert len(asides(path)) == 3
    assert len(audit(path)["set_aside"]) == 3


def test_files_that_were_set_aside_one_after_the_other_may_be_merged_in_any_order(path, process):
    with applying(path, set_aside_pause_s=0.0) as loop:
        for _ in range(3):
            process.bill(4)
            loop.run_pass(is_asked=True)
            loop.found_damage("as the test says")
            loop.run_pass(is_asked=True)
        assert loop.set_aside == 3
    for aside in sorted(asides(path)):
        merge(url_of(path), [aside], 0)
    assert seqs(path) == list(range(1, 13))
    assert audit(path)["set_aside"] == []
    assert audit(path)["balanced"] is True


def test_a_file_that_never_was_a_ledger_is_left_where_it_is(path, process):
    path.write_text("a text that somebody named by mistake" * 1000)
    process.bill(1)
    with applying(path) as loop, pytest.raises(LedgerError, match="file is not a database"):
        loop.run_pass(is_asked=True)
    assert asides(path) == []
    assert path.read_text().startswith("a text")


def test_a_command_sets_nothing_aside(path, process, served):
    served.close()
    spoil_first_page(path)
    process.bill(1)
    with pytest.raises(LedgerError, match="malformed"):
        catch_up(url_of(path))
    assert asides(path) == []


def test_a_lock_a_missing_file_and_a_check_that_takes_too_long_are_no_damage(path, process, served):
    with closing(sqlite3.connect(path, isolation_level=None)) as blocker:
        blocker.execute("BEGIN EXCLUSIVE")
        assert watched(path) is None
    impatient = PageWatch(path, table_s_max=0.0)
    while impatient.look() is None and not impatient.is_at_end:
        pass
    assert impatient.is_at_end
    assert watched(path.with_name("none.db")) is None
