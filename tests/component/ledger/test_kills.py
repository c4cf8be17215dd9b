"""Servers that are killed while commands, sqlite3 and a second server are beside them.

A server here is a process with the real journal writer and the real applier, which says each bill
that a client would have been told. What was said is there once in the end, whoever else came and
went meanwhile.
"""

import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.component.ledger.test_reader import http, part
from tests.support.waiting import wait_for
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.journal.places import folder_of_ledger
from vllm_cost_meter.journal.writer import JournalWriter
from vllm_cost_meter.ledger.apply_loop import ApplyLoop
from vllm_cost_meter.ledger.catching_up import catch_up

ROOT = Path(__file__).parents[3]
COMMANDS = (
    ("audit",),
    ("report",),
    ("ledger", "check"),
    ("ledger", "apply"),
    ("ledger", "drop", "--before", "2026-01-01"),
    ("ledger", "backup", "--force", "COPY"),
)


def serve(path: Path, run_id: str) -> None:
    """Bill, and say each bill once it is journaled; apply beside it. Never ends by itself."""
    writer = JournalWriter(folder_of_ledger(path))
    writer.start()

    def keep_up() -> None:
        loop = ApplyLoop(f"sqlite:///{path}")
        while True:
            try:
                loop.run_pass(is_asked=False)
            except LedgerError:
                time.sleep(0.05)
            time.sleep(0.02)

    threading.Thread(target=keep_up, daemon=True).start()
    for seq in range(1, 1_000_000):
        name = f"{run_id}-{seq}"
        writer.append(part(seq, name, run_id=run_id), http(name)).result(60)
        print(seq, flush=True)
        time.sleep(0.001)


class Server:
    """Such a process, and what it said."""

    def __init__(self, path: Path, run_id: str) -> None:
        command = [sys.executable, "-m", "tests.component.ledger.test_kills", str(path), run_id]
        self.run_id = run_id
        self.told = 0
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.told = int(line)

    def until(self, told: int) -> None:
        wait_for(
            lambda: self.told,
            lambda said: said >= told,
            timeout_s=60,
            what=self.run_id,
            pause_s=0.005,
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._listener.join()
        self.process.stdout.close()


def there(path: Path, run_id: str) -> list[int]:
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT seq FROM requests WHERE run_id=? ORDER BY seq", (run_id,))
        return [seq for (seq,) in rows]


def assert_all_told_is_there(path: Path, *servers: Server) -> None:
    assert catch_up(f"sqlite:///{path}") == 0
    for server in servers:
        found = there(path, server.run_id)
        assert found == list(range(1, len(found) + 1)), "each once, and none between is missing"
        assert len(found) >= server.told, f"{server.run_id}: told and not there"
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("SELECT count(*) FROM journal_losses").fetchall() == [(0,)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.db"


def test_commands_sqlite_and_a_second_server_beside_servers_that_are_killed_cost_nothing(
    path, tmp_path
):
    first, second = Server(path, "first"), Server(path, "second")
    first.until(50)
    second.until(50)
    beside = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm_cost_meter.cli"),
                *(str(tmp_path / "copy.db") if word == "COPY" else word for word in command),
                *("--ledger", str(path)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for command in COMMANDS
    ]
    for _ in range(20):  # as the shell `sqlite3` does: open, read, close
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
    first.kill()
    third = Server(path, "third")
    third.until(20)
    for process in beside:
        process.wait(120)
    second.until(second.told + 20)
    second.kill()
    third.until(third.told + 20)
    third.kill()
    assert_all_told_is_there(path, first, second, third)


def test_a_ledger_that_is_moved_away_and_back_under_a_server_has_everything(path, tmp_path):
    server = Server(path, "run")
    server.until(30)
    away = tmp_path / "away"
    away.mkdir()
    files = [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm")]
    for file in files:
        if file.exists():
            file.rename(away / file.name)
    server.until(server.told + 50)
    assert not path.exists(), "no new ledger is made where the old one was"
    for file in reversed(files):
        if (away / file.name).exists():
            (away / file.name).rename(file)
    server.until(server.told + 50)
    server.kill()
    assert_all_told_is_there(path, server)


def test_a_ledger_that_is_locked_for_a_while_loses_nothing_of_a_server_that_is_killed_meanwhile(
    path,
):
    server = Server(path, "run")
    server.until(30)
    with closing(sqlite3.connect(path, isolation_level=None, timeout=60)) as blocker:
        blocker.execute("BEGIN IMMEDIATE")
        server.until(server.told + 200)
        server.kill()
    assert_all_told_is_there(path, server)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])
