"""Whether somebody uses a ledger: real processes that have it open, and the lock of an applier."""

import fcntl
import sqlite3
from contextlib import closing

import pytest

from tests.support.upkeep import fill, noise, server, url_of
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.upkeep.alone import alone


@pytest.fixture
def ledger(tmp_path):
    fill(tmp_path / "ledger.db")
    return tmp_path / "ledger.db"


def test_a_ledger_that_nobody_has_open_is_ours_alone(ledger):
    with alone(ledger):
        pass
    with alone(ledger):
        pass


def test_a_server_that_is_between_two_transactions_uses_the_ledger(ledger):
    with server(ledger) as running:
        with (
            pytest.raises(LedgerError, match=rf"in use by process.*{running.process.pid} \(") as no,
            alone(ledger, wait_s=0.1),
        ):
            pass
        assert "\n" not in str(no.value)
        running.stop()
    with alone(ledger):
        pass


def test_a_server_that_was_killed_does_not_use_it_any_more(ledger):
    with server(ledger) as running:
        running.process.kill()
        running.process.wait()
        with alone(ledger):
            pass


def test_a_connection_of_this_very_process_uses_it_and_keeps_its_locks(ledger):
    engine = open_database(url_of(ledger))
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM requests")
        with pytest.raises(LedgerError, match="in use"), alone(ledger, wait_s=0.1):
            pass
        # Another process still sees them: it does not take itself for the last one.
        with pytest.raises(LedgerError, match="in use"), alone(ledger, wait_s=0.1):
            pass
    engine.dispose()


def test_nobody_can_open_it_meanwhile(ledger):
    query = "SELECT count(*) FROM requests"
    connection = sqlite3.connect(ledger, timeout=0)
    with alone(ledger), pytest.raises(sqlite3.OperationalError, match="locked"):
        connection.execute(query)
    connection.close()
    with closing(sqlite3.connect(ledger)) as connection:
        assert connection.execute(query).fetchone() == (30,)


def test_a_damaged_file_can_be_held_too(ledger):
    with ledger.open("r+b") as file:
        file.write(noise(4096))
    with alone(ledger):
        pass


def test_a_server_without_a_connection_is_known_by_the_lock_of_its_applier(ledger):
    folder = ledger.with_name("ledger.db.journal")
    folder.mkdir()
    lock = folder / "applier.lock"
    lock.touch()
    with alone(ledger):
        pass
    with lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(LedgerError, match="applier.lock; stop it first"), alone(ledger):
            pass
    with alone(ledger), lock.open("r+") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_that_is_a_symlink_is_refused(ledger, tmp_path):
    folder = ledger.with_name("ledger.db.journal")
    folder.mkdir()
    (tmp_path / "other").touch()
    (folder / "applier.lock").symlink_to(tmp_path / "other")
    with pytest.raises(LedgerError, match="cannot be opened"), alone(ledger):
        pass
