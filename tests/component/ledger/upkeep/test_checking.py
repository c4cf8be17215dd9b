"""Check a ledger: what is found wrong, what is not, and that nothing is changed."""

import pytest

from tests.support.upkeep import fill, noise, server, sql, sums_again, url_of
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION
from vllm_cost_meter.ledger.upkeep.checking import check_ledger


@pytest.fixture
def ledger(tmp_path):
    fill(tmp_path / "ledger.db")
    return tmp_path / "ledger.db"


def wrong_in(path, *, full=True):
    return {one.name: one.detail for one in check_ledger(url_of(path), full=full) if not one.ok}


@pytest.mark.parametrize("full", [False, True])
def test_a_sound_ledger_passes(ledger, full):
    assert wrong_in(ledger, full=full) == {}


def test_an_empty_ledger_passes(tmp_path):
    open_database(url_of(tmp_path / "ledger.db")).dispose()
    assert wrong_in(tmp_path / "ledger.db") == {}


def test_a_ledger_in_use_passes_and_the_server_goes_on(ledger):
    with server(ledger, commits_per_s=50) as running:
        for _ in range(3):
            assert wrong_in(ledger) == {}
        committed = running.stop()
    assert sql(ledger, "SELECT count(*) FROM requests WHERE run_id='live'") == [(committed,)]


@pytest.mark.parametrize(
    ("change", "name", "detail"),
    [
        ("DELETE FROM requests WHERE seq=6", "usage_pieces have their requests", "not 2: run 6 "),
        ("DELETE FROM usage_pieces WHERE seq=6", "bills are the sum of their pieces", "1: run 6"),
        (
            "UPDATE usage_pieces SET decode_ns=decode_ns+1 WHERE seq<26",
            "bills are the sum of their pieces",
            "not 8: run 3; run 6; run 9; run 12; run 15; and 3 more",
        ),
        ("UPDATE requests SET hour=NULL WHERE seq=7", "bills are the sum of their pieces", "run 7"),
        ("UPDATE requests SET cut_ns=9 WHERE seq=3", "bills are the sum of their pieces", "run 3"),
        (
            "UPDATE engine_hours SET idle_ns=idle_ns-1",
            "engine_hours add up to their snapshots",
            "not 1: run",
        ),
        ("DELETE FROM energy_hours", "energy_hours add up to their snapshots", "not 1: run"),
        ("DELETE FROM runs", "snapshots have their runs", "not 1: run"),
        (
            "INSERT INTO open_requests SELECT request_id, started_at, NULL, NULL, NULL, NULL, 'g',"
            " tenant, 'none', NULL, NULL, NULL, NULL, NULL, NULL, NULL FROM requests WHERE seq=3",
            "no request is open and billed",
            "not 1: internal-3 2027-01-15T08:00:00.000003Z",
        ),
    ],
)
def test_what_does_not_belong_together_is_named(ledger, change, name, detail):
    sql(ledger, change)
    assert wrong_in(ledger, full=False) == {}
    found = wrong_in(ledger)
    assert detail in found[name]


def test_bills_without_a_run_and_energy_without_a_bill_are_nothing_wrong(ledger):
    # `vllm run-batch` writes bills without snapshots; the bill of a dead API server never comes.
    sql(ledger, "UPDATE requests SET run_id='batch' WHERE seq=30")
    sql(ledger, "UPDATE usage_pieces SET run_id='batch' WHERE seq=30")
    sums_again(ledger)
    assert wrong_in(ledger) == {}


def test_a_missing_column_and_a_missing_index_are_named(ledger):
    sql(ledger, "ALTER TABLE runs DROP COLUMN labels")
    sql(ledger, "DROP INDEX ix_requests_http")
    assert wrong_in(ledger) == {"tables": "missing: ix_requests_http, runs.labels"}


def test_a_missing_view_is_named(ledger):
    sql(ledger, "DROP VIEW replies")
    assert wrong_in(ledger) == {"tables": "missing: replies"}


def test_a_damaged_page_is_found_by_the_quick_check_and_nothing_is_changed(ledger):
    (root,) = sql(ledger, "SELECT rootpage FROM sqlite_master WHERE name='http_requests'")[0]
    with ledger.open("r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(noise(4096))
    before = ledger.read_bytes()
    assert "ledger repair" in wrong_in(ledger, full=False)["pages"]
    assert ledger.read_bytes() == before


def test_a_damaged_index_is_found_by_the_full_check(ledger):
    query = "SELECT rootpage FROM sqlite_master WHERE name='ix_requests_request_id'"
    (root,) = sql(ledger, query)[0]
    with ledger.open("r+b") as file:
        file.seek((root - 1) * 4096 + 4000)
        file.write(noise(90))
    assert "pages" in wrong_in(ledger)


def test_a_header_that_is_lost_is_found(ledger):
    with ledger.open("r+b") as file:
        file.write(noise(100))
    assert "ledger repair" in wrong_in(ledger, full=False)["file"]


def test_a_damaged_frame_in_the_log_is_found_which_sqlite_passes_over(ledger):
    with server(ledger, commits_per_s=100) as running:
        while wrong_in(ledger, full=False) or len(list(frames_of(ledger))) < 60:
            pass
        running.process.kill()
        running.process.wait()
    wal = ledger.with_name("ledger.db-wal")
    before = sql_in_copy(ledger, "SELECT count(*) FROM requests WHERE run_id='live'")
    flip(wal, 32 + 20 * 4120 + 500)
    after = sql_in_copy(ledger, "SELECT count(*) FROM requests WHERE run_id='live'")
    assert after < before
    assert "1 damaged frames; SQLite leaves out" in wrong_in(ledger, full=False)["log"]


def frames_of(ledger):
    return range(ledger.with_name("ledger.db-wal").stat().st_size // 4120)


def flip(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def sql_in_copy(ledger, query):
    """SQLite folds the log into the file when it closes it: ask a copy."""
    folder = ledger.parent / "asked"
    folder.mkdir(exist_ok=True)
    for suffix in ("", "-wal"):
        name = ledger.name + suffix
        (folder / name).write_bytes(ledger.with_name(name).read_bytes())
    return sql(folder / ledger.name, query)


def test_an_older_schema_is_said_and_a_newer_one_refused(ledger):
    sql(ledger, "UPDATE schema_version SET version=8")
    assert f"version 8, this cost meter needs {SCHEMA_VERSION}" in wrong_in(ledger)["schema"]
    sql(ledger, "UPDATE schema_version SET version=99")
    with pytest.raises(LedgerError, match="schema version 99"):
        check_ledger(url_of(ledger))


def test_what_is_no_ledger_and_what_is_in_postgresql_is_refused(tmp_path):
    sql(tmp_path / "other.db", "CREATE TABLE mine (x)")
    with pytest.raises(LedgerError, match="holds no ledger"):
        check_ledger(url_of(tmp_path / "other.db"))
    with pytest.raises(LedgerError, match="no such file"):
        check_ledger(url_of(tmp_path / "none.db"))
    with pytest.raises(LedgerError, match="expected a file"):
        check_ledger(url_of(tmp_path))
    with pytest.raises(LedgerError, match="in PostgreSQL the tool is pg_amcheck"):
        check_ledger("postgresql+psycopg://me@host/db")
