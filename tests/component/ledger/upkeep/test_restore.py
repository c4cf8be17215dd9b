"""Restore a ledger from a copy: only when nobody uses it, and without losing the one before."""

import sqlite3
import stat
from contextlib import closing

import pytest

from tests.support.upkeep import fill, noise, rows_of, server, sql, url_of
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.upkeep.copies import back_up
from vllm_cost_meter.ledger.upkeep.restoring import restore

NOW_NS = 1_800_000_000 * 10**9
ASIDE = "ledger.db.replaced-20270115T080000Z"


@pytest.fixture
def ledger(tmp_path):
    fill(tmp_path / "ledger.db")
    return tmp_path / "ledger.db"


@pytest.fixture
def copy(ledger, tmp_path):
    back_up(url_of(ledger), tmp_path / "copy.db")
    fill(ledger, "later")
    return tmp_path / "copy.db"


def test_the_copy_takes_the_place_and_the_ledger_before_stays(ledger, copy, tmp_path):
    before = rows_of(ledger)
    done = restore(url_of(ledger), copy, NOW_NS)
    assert done.aside == tmp_path / ASIDE
    assert rows_of(ledger) == rows_of(copy)
    assert rows_of(done.aside) == before
    assert done.rows == sum(map(len, rows_of(copy).values()))
    assert stat.S_IMODE(ledger.stat().st_mode) == 0o600
    fill(ledger, "after")
    assert list(tmp_path.glob(".*")) == []


def test_what_was_only_in_the_log_of_the_ledger_before_stays_with_it(ledger, copy):
    with server(ledger) as running:
        running.process.kill()
        running.process.wait()
    assert ledger.with_name("ledger.db-wal").stat().st_size > 0
    done = restore(url_of(ledger), copy, NOW_NS)
    assert sql(done.aside, "SELECT count(*) FROM requests WHERE run_id='live'") == [(1,)]
    assert sql(ledger, "SELECT count(*) FROM requests WHERE run_id='live'") == [(0,)]


def test_a_restore_is_refused_while_a_server_uses_the_ledger(ledger, copy, tmp_path):
    with server(ledger) as running:
        with pytest.raises(LedgerError, match="in use by process"):
            restore(url_of(ledger), copy, NOW_NS)
        running.stop()
    assert sql(ledger, "SELECT count(*) FROM requests WHERE run_id='live'") == [(1,)]
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"ledger.db", "copy.db"}


def test_a_second_restore_on_the_same_second_overwrites_nothing(ledger, copy, tmp_path):
    first = restore(url_of(ledger), copy, NOW_NS)
    second = restore(url_of(ledger), copy, NOW_NS)
    assert (first.aside, second.aside) == (tmp_path / ASIDE, tmp_path / f"{ASIDE}-2")


def test_a_damaged_ledger_is_replaced_too(ledger, copy):
    with ledger.open("r+b") as file:
        file.write(noise(5 * 4096))
    damaged = ledger.read_bytes()
    done = restore(url_of(ledger), copy, NOW_NS)
    assert rows_of(ledger) == rows_of(copy)
    assert done.aside.read_bytes() == damaged


def test_a_damaged_copy_a_newer_one_and_no_ledger_are_refused_with_nothing_changed(
    ledger, copy, tmp_path
):
    before = rows_of(ledger)
    sql(copy, "UPDATE schema_version SET version=99")
    with pytest.raises(LedgerError, match="schema version 99"):
        restore(url_of(ledger), copy, NOW_NS)
    sql(copy, "UPDATE schema_version SET version=9")
    with copy.open("r+b") as file:
        file.seek(4096 * 6)
        file.write(noise(4096 * 2))
    with pytest.raises(LedgerError, match="ledger repair"):
        restore(url_of(ledger), copy, NOW_NS)
    (tmp_path / "text").write_text("no ledger " * 1000)
    with pytest.raises(LedgerError, match="not a database"):
        restore(url_of(ledger), tmp_path / "text", NOW_NS)
    with pytest.raises(LedgerError, match="expected a ledger's file"):
        restore(url_of(ledger), tmp_path / "none", NOW_NS)
    with pytest.raises(LedgerError, match="is the ledger itself"):
        restore(url_of(ledger), ledger, NOW_NS)
    assert rows_of(ledger) == before
    assert not (tmp_path / ASIDE).exists()


def test_an_older_copy_is_restored_as_it_is(ledger, copy):
    sql(copy, "UPDATE schema_version SET version=8")
    assert restore(url_of(ledger), copy, NOW_NS).version == 8
    assert sql(ledger, "SELECT version FROM schema_version") == [(8,)]


def test_a_ledger_that_is_gone_is_restored_but_not_beside_its_log(ledger, copy, tmp_path):
    with closing(sqlite3.connect(ledger)) as connection:
        connection.execute("DELETE FROM prices")
        connection.commit()
        log = ledger.with_name("ledger.db-wal").read_bytes()
    ledger.unlink()
    ledger.with_name("ledger.db-wal").write_bytes(log)
    with pytest.raises(LedgerError, match="ledger.db-wal: is the log of a ledger that is not"):
        restore(url_of(ledger), copy, NOW_NS)
    ledger.with_name("ledger.db-wal").unlink()
    assert restore(url_of(ledger), copy, NOW_NS).aside is None
    assert rows_of(ledger) == rows_of(copy)


def test_without_room_nothing_is_changed(ledger, copy):
    before = rows_of(ledger)
    with pytest.raises(LedgerError, match="free bytes to copy the backup"):
        restore(url_of(ledger), copy, NOW_NS, free=lambda _: 1000)
    assert rows_of(ledger) == before


def test_a_ledger_by_a_symlink_is_replaced_where_it_is(ledger, copy, tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "ledger.db"
    link.symlink_to(ledger)
    assert restore(url_of(link), copy, NOW_NS).aside == tmp_path / ASIDE
    assert link.is_symlink()
    assert rows_of(ledger) == rows_of(copy)
