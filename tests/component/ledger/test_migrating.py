"""A ledger of before is migrated beside servers, commands and kills."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.component.ledger.test_packing import rows_as_read, rows_as_texts, with_hour
from tests.component.ledger.test_reader import http, part, snapshot
from tests.support.untouched import state_of
from tests.support.upkeep import sql, url_of, wrong_sums
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.journal.places import folder_of_ledger
from vllm_cost_meter.journal.writer import JournalWriter
from vllm_cost_meter.ledger.applier import Applier
from vllm_cost_meter.ledger.batches import BatchWriter
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION

# A process that migrates, and stops within the transaction, until a file is gone or it dies.
MIGRATING = """
import os, sys, time
from vllm_cost_meter.ledger import migrations
from vllm_cost_meter.ledger.database import open_database

def wait(_connection):
    open(sys.argv[2], "x").close()
    while os.path.exists(sys.argv[2]):
        time.sleep(0.01)

migrations.MIGRATIONS[13] = (*migrations.MIGRATIONS[13], wait)
open_database(sys.argv[1], busy_timeout_s=30).dispose()
"""
# Commands that people and schedulers run at any time, with the words that they need.
BESIDE = [
    *(["report"], ["audit"], ["explain", "cost-1"], ["economics"], ["doctor"], ["ledger", "check"]),
    *(["ledger", "apply"], ["ledger", "drop", "--before", "2020-01-01"]),
]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A ledger as version 13 of its schema had it, in a folder of its own."""
    folder = tmp_path / "vllm-cost-meter"
    folder.mkdir(mode=0o700)
    path = folder / "ledger.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((Path(__file__).parent / "ledger_v13.sql").read_text())
    path.chmod(0o600)
    return path


@contextmanager
def migrating(path: Path, mark: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Have a process in the middle of a migration; it goes on at the end of the block."""
    process = subprocess.Popen([sys.executable, "-c", MIGRATING, url_of(path), str(mark)])
    try:
        until = time.monotonic() + 30
        while not mark.exists():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        yield process
        mark.unlink()
        process.wait(30)
    finally:
        process.kill()
        process.wait()


def test_costs_are_told_while_an_old_ledger_waits_and_are_in_it_once_it_is_migrated(old):
    writer = JournalWriter(folder_of_ledger(old))
    writer.start()
    told = part(1, "h-new", run_id="new")
    writer.append(told, http("h-new")).result(5)
    writer.append(snapshot([told], run_id="new")).result(5)
    writer.close()
    assert sql(old, "SELECT version FROM schema_version") == [(13,)]
    batches = BatchWriter(url_of(old))
    applier = Applier(batches, folder_of_ledger(old), look_for_dead_s=0)
    while applier.apply():
        pass
    applier.close()
    with LedgerReader(url_of(old)) as reader:
        row = reader.look_up("h-new")[0]
        assert row["cost_nanousd"] == told.cost_nanousd
        runs = {run["run_id"]: run["balanced"] for run in reader.audit(full=True)["runs"]}
    assert runs["new"] is True
    assert wrong_sums(old) == []


def test_a_migration_that_is_killed_changes_nothing_and_the_next_start_begins_again(old, tmp_path):
    before = rows_as_texts(old)
    with migrating(old, tmp_path / "in the middle") as process:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert rows_as_texts(old) == before
    assert sql(old, "SELECT version FROM schema_version") == [(13,)]
    open_database(url_of(old)).dispose()
    assert rows_as_read(old) == with_hour(before)


def test_a_second_server_that_starts_meanwhile_waits_and_changes_no_row_twice(old, tmp_path):
    before = rows_as_texts(old)
    command = "import sys; from vllm_cost_meter.ledger.database import open_database\n"
    command += "open_database(sys.argv[1], busy_timeout_s=30).dispose()"
    with migrating(old, tmp_path / "in the middle") as first:
        second = subprocess.Popen([sys.executable, "-c", command, url_of(old)])
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(1.5)
    assert (first.returncode, second.wait(30)) == (0, 0)
    assert sql(old, "SELECT version FROM schema_version") == [(SCHEMA_VERSION,)]
    assert rows_as_read(old) == with_hour(before)
    assert wrong_sums(old) == []


def test_a_second_server_that_waits_too_long_says_so_and_tries_again(old, tmp_path):
    before = rows_as_texts(old)
    writer = JournalWriter(folder_of_ledger(old))
    writer.start()
    told = part(1, "h-new", run_id="new")
    writer.append(told, http("h-new")).result(5)
    writer.close()
    applier = Applier(BatchWriter(url_of(old)), folder_of_ledger(old), look_for_dead_s=0)
    with migrating(old, tmp_path / "in the middle"), pytest.raises(LedgerError, match="locked"):
        applier.apply()
    while applier.apply():
        pass
    applier.close()
    rows = rows_as_read(old)["requests"]
    assert [row for row in rows if row["run_id"] != "new"] == with_hour(before)["requests"]
    assert len(rows) == len(before["requests"]) + 1


def test_commands_beside_a_migration_end_with_one_line_and_disturb_nothing(old, tmp_path):
    before = rows_as_texts(old)
    environment = {**os.environ, "COST_METER_LEDGER": url_of(old), "COST_METER_PORT": "off"}
    with migrating(old, tmp_path / "in the middle"):
        files = state_of(old.parent)
        for words in BESIDE:
            command = [sys.executable, "-m", "vllm_cost_meter.cli", *words]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False
            )
            said = done.stdout + done.stderr
            assert "version 13, this cost meter" in said, words
            assert "Traceback" not in said, words
            # Doctor finds nothing wrong: it warns of what has begun.
            assert (done.returncode != 0) is (words != ["doctor"]), words
        is_untouched = state_of(old.parent) == files
    assert is_untouched
    assert rows_as_read(old) == with_hour(before)
