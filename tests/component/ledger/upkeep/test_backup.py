"""Back up a ledger: consistent and complete beside a writer, private, and never half there."""

import os
import sqlite3
import stat
import time
from contextlib import closing

import pytest

from tests.support.upkeep import fill, noise, rows_of, server, sql, url_of
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION
from vllm_cost_meter.ledger.upkeep.checking import check_ledger
from vllm_cost_meter.ledger.upkeep.copies import back_up


@pytest.fixture
def ledger(tmp_path):
    fill(tmp_path / "ledger.db")
    return tmp_path / "ledger.db"


def files_in(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("ledger.db"))


def test_a_backup_has_every_row_and_is_for_its_owner_only(ledger, tmp_path):
    before = os.umask(0)
    try:
        copy = back_up(url_of(ledger), tmp_path / "copy.db")
    finally:
        os.umask(before)
    assert files_in(tmp_path) == ["copy.db"]
    assert stat.S_IMODE((tmp_path / "copy.db").stat().st_mode) == 0o600
    assert rows_of(tmp_path / "copy.db") == rows_of(ledger)
    total = sum(map(len, rows_of(ledger).values()))
    assert (copy.file, copy.rows, copy.version) == (tmp_path / "copy.db", total, SCHEMA_VERSION)
    assert copy.bytes == (tmp_path / "copy.db").stat().st_size


def test_a_backup_ends_while_a_server_commits_50_times_a_second(tmp_path):
    ledger = tmp_path / "ledger.db"
    fill(ledger, bills=3000)
    with server(ledger, commits_per_s=50) as running:
        copies = []
        for number in range(3):
            time.sleep(0.2)
            target = tmp_path / f"copy-{number}.db"
            back_up(url_of(ledger), target)
            copies.append(sql(target, "SELECT count(*) FROM requests WHERE run_id='live'")[0][0])
            findings = check_ledger(url_of(target), full=True)
            assert [one for one in findings if not one.ok] == []
        committed = running.stop()
    # Each is of one instant: later ones have more, and no bill without its pieces.
    assert 1 <= copies[0] < copies[1] < copies[2] <= committed
    for number in range(3):
        target = tmp_path / f"copy-{number}.db"
        assert rows_of(target)["requests"] <= rows_of(ledger)["requests"]
        with closing(LedgerReader(url_of(target))) as reader:
            assert reader.audit()["balanced"]
    # The server's own log was left alone: all that it committed is there.
    assert sql(ledger, "SELECT count(*) FROM requests WHERE run_id='live'") == [(committed,)]


def test_what_is_only_in_the_log_is_in_the_backup(ledger, tmp_path):
    with server(ledger) as running:
        assert ledger.with_name("ledger.db-wal").stat().st_size > 0
        back_up(url_of(ledger), tmp_path / "copy.db")
        running.stop()
    assert sql(tmp_path / "copy.db", "SELECT count(*) FROM requests WHERE run_id='live'") == [(1,)]


def test_an_existing_file_is_overwritten_only_by_force(ledger, tmp_path):
    (tmp_path / "copy.db").write_text("mine")
    with pytest.raises(LedgerError, match=r"copy.db: is there already; .* --force"):
        back_up(url_of(ledger), tmp_path / "copy.db")
    assert (tmp_path / "copy.db").read_text() == "mine"
    back_up(url_of(ledger), tmp_path / "copy.db", force=True)
    assert rows_of(tmp_path / "copy.db") == rows_of(ledger)
    assert files_in(tmp_path) == ["copy.db"]


def test_a_log_that_was_left_beside_the_name_is_never_taken_for_the_copys(ledger, tmp_path):
    other = tmp_path / "copy.db"
    fill(other, "another")
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint=0")
        connection.execute("UPDATE prices SET source='x'")
        connection.execute("DELETE FROM requests")
        connection.commit()
        stale = (tmp_path / "copy.db-wal").read_bytes()
    other.unlink()
    (tmp_path / "copy.db-wal").write_bytes(stale)
    with pytest.raises(LedgerError, match="copy.db-wal: is there already"):
        back_up(url_of(ledger), other)
    back_up(url_of(ledger), other, force=True)
    assert rows_of(other) == rows_of(ledger)


@pytest.mark.parametrize("force", [False, True])
def test_a_symlink_is_not_followed(ledger, tmp_path, force):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "copy.db").symlink_to(tmp_path / "precious")
    with pytest.raises(LedgerError, match="expected no symlink"):
        back_up(url_of(ledger), tmp_path / "copy.db", force=force)
    assert (tmp_path / "precious").read_text() == "mine"


def test_the_ledger_is_not_overwritten_by_its_own_backup(ledger):
    rows = rows_of(ledger)
    with pytest.raises(LedgerError, match="is the ledger itself"):
        back_up(url_of(ledger), ledger, force=True)
    assert rows_of(ledger) == rows


def test_a_ledger_that_a_server_uses_is_not_overwritten_even_by_force(ledger, tmp_path):
    fill(tmp_path / "live.db")
    with server(tmp_path / "live.db") as running:
        with pytest.raises(LedgerError, match="live.db: is in use"):
            back_up(url_of(ledger), tmp_path / "live.db", force=True)
        running.stop()
    assert sql(tmp_path / "live.db", "SELECT count(*) FROM requests") == [(31,)]
    assert list(tmp_path.glob(".*")) == []


def test_without_room_nothing_is_written(ledger, tmp_path):
    with pytest.raises(LedgerError, match=r"expected [\d,]+ free bytes to copy .* got 1,000"):
        back_up(url_of(ledger), tmp_path / "copy.db", free=lambda _: 1000)
    assert files_in(tmp_path) == []


def test_a_damaged_ledger_gives_no_backup(ledger, tmp_path):
    with ledger.open("r+b") as file:
        file.seek(4096 * 5)
        file.write(noise(4096 * 3))
    with pytest.raises(LedgerError, match="ledger repair"):
        back_up(url_of(ledger), tmp_path / "copy.db")
    assert files_in(tmp_path) == []


def test_a_folder_that_is_not_there_and_a_ledger_that_is_not_there_are_named(ledger, tmp_path):
    with pytest.raises(LedgerError, match="does not exist"):
        back_up(url_of(ledger), tmp_path / "nowhere" / "copy.db")
    with pytest.raises(LedgerError, match="no such file"):
        back_up(url_of(tmp_path / "none.db"), tmp_path / "copy.db")
    assert not (tmp_path / "none.db").exists()
