"""Who can read a ledger's files: modes that are tightened, and places that are refused."""

import os
import stat
from pathlib import Path

import pytest

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.database import check_location, open_database


def url_of(path: Path) -> str:
    return f"sqlite:///{path}"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Return a ledger that is open somewhere, with its write-ahead log beside it."""
    path = tmp_path / "vllm-cost-meter" / "ledger.db"
    engine = open_database(url_of(path))
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        yield path
    engine.dispose()


def files_of(ledger: Path) -> list[Path]:
    return sorted(ledger.parent.iterdir())


@pytest.mark.parametrize("start", [check_location, open_database])
def test_looser_modes_of_an_existing_ledger_are_tightened(ledger, start):
    assert len(files_of(ledger)) == 3, "the file, its log, and the log's index"
    for file in files_of(ledger):
        file.chmod(0o666)
    ledger.parent.chmod(0o777)
    start(url_of(ledger))
    assert {mode_of(file) for file in files_of(ledger)} == {0o600}
    assert mode_of(ledger.parent) == 0o700


def test_a_folder_that_is_not_the_meters_own_stays_as_it_is(tmp_path):
    tmp_path.chmod(0o755)
    open_database(url_of(tmp_path / "ledger.db")).dispose()
    assert mode_of(tmp_path) == 0o755
    assert mode_of(tmp_path / "ledger.db") == 0o600


def test_a_reader_changes_no_mode(ledger):
    ledger.chmod(0o640)
    open_database(url_of(ledger), create=False).dispose()
    assert mode_of(ledger) == 0o640


def test_a_file_of_another_owner_is_refused(ledger, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12_345)
    with pytest.raises(LedgerError) as caught:
        check_location(url_of(ledger))
    message = str(caught.value)
    assert message.startswith(f"ledger {ledger}: expected a file of this user (id 12345), got one")
    assert f"of user id {ledger.stat().st_uid}" in message
    assert "\n" not in message


@pytest.mark.parametrize("start", [check_location, open_database])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_symlink_into_a_folder_where_everybody_may_write_is_refused(tmp_path, start, is_there):
    shared, link = tmp_path / "shared", tmp_path / "ledger.db"
    shared.mkdir()
    shared.chmod(0o1777)
    link.symlink_to(shared / "ledger.db")
    if is_there:
        (shared / "ledger.db").touch()
    with pytest.raises(LedgerError, match="symlink into .*, where everybody may write"):
        start(url_of(link))
    assert (shared / "ledger.db").exists() == is_there


def test_the_file_that_a_symlink_names_is_private_from_its_first_moment(tmp_path):
    real, link = tmp_path / "real.db", tmp_path / "ledger.db"
    link.symlink_to(real)
    before = os.umask(0)
    try:
        open_database(url_of(link)).dispose()
    finally:
        os.umask(before)
    assert mode_of(real) == 0o600
    assert link.is_symlink()


def test_a_log_that_is_a_symlink_is_refused(tmp_path):
    path, other = tmp_path / "ledger.db", tmp_path / "other"
    other.touch()
    (tmp_path / "ledger.db-wal").symlink_to(other)
    with pytest.raises(LedgerError, match=r"ledger\.db-wal: expected a file, got a symlink"):
        check_location(url_of(path))
