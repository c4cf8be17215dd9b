"""Compact a ledger: smaller, with the same rows, and only when nobody uses it."""

import pytest

from tests.support.upkeep import fill, rows_of, server, sql, url_of
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.upkeep.compacting import compact


@pytest.fixture
def ledger(tmp_path):
    fill(tmp_path / "ledger.db", bills=1200)
    for table in ("requests", "usage_pieces", "http_requests", "request_energy"):
        sql(tmp_path / "ledger.db", f"DELETE FROM {table}")
    return tmp_path / "ledger.db"


def test_a_compact_ledger_is_smaller_and_has_the_same_rows(ledger):
    rows, size = rows_of(ledger), ledger.stat().st_size
    done = compact(url_of(ledger))
    assert (done.bytes_before, done.bytes_after) == (size, ledger.stat().st_size)
    assert done.bytes_after < done.bytes_before / 2
    assert rows_of(ledger) == rows
    assert sql(ledger, "PRAGMA freelist_count") == [(0,)]
    assert sql(ledger, "PRAGMA journal_mode") == [("wal",)]


def test_what_a_killed_server_left_in_its_log_is_kept(ledger):
    with server(ledger) as running:
        running.process.kill()
        running.process.wait()
    compact(url_of(ledger))
    assert sql(ledger, "SELECT count(*) FROM requests WHERE run_id='live'") == [(1,)]


def test_it_is_refused_while_a_server_uses_the_ledger(ledger):
    size = ledger.stat().st_size
    with server(ledger) as running:
        with pytest.raises(LedgerError, match="in use by process"):
            compact(url_of(ledger))
        running.stop()
    assert ledger.stat().st_size >= size
    assert sql(ledger, "SELECT count(*) FROM requests WHERE run_id='live'") == [(1,)]


@pytest.mark.parametrize("temporary", ["beside it", "elsewhere"])
def test_without_room_nothing_is_changed(ledger, monkeypatch, temporary):
    monkeypatch.setenv(
        "SQLITE_TMPDIR", str(ledger.parent) if temporary == "beside it" else "/dev/shm"
    )
    size = ledger.stat().st_size
    with pytest.raises(LedgerError, match="free bytes to write the ledger anew"):
        compact(url_of(ledger), free=lambda _: size)
    assert ledger.stat().st_size == size


def test_what_is_no_ledger_is_left_alone(tmp_path):
    sql(tmp_path / "other.db", "CREATE TABLE mine (x)")
    with pytest.raises(LedgerError, match="holds no ledger"):
        compact(url_of(tmp_path / "other.db"))
