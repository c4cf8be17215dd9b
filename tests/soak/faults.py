"""What happens to servers and their ledger: kills, pauses, locks, a file that is away, a full disk.

Each fault is over when its function returns. What only looks at the ledger is a fault too: it must
cost nothing either.
"""

import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from random import Random

from tests.soak.servers import FakeServers, kill_group

COMMANDS = (
    ("audit",),
    ("report",),
    ("ledger", "check"),
    ("ledger", "apply"),
    ("ledger", "backup", "--force", "COPY"),
)


class Faults:
    """The faults, on some servers and their ledger; `counts` says how many there were of each."""

    def __init__(self, random: Random, servers: list[FakeServers], ledger: Path) -> None:
        self.counts: dict[str, int] = {}
        self._random = random
        self._servers = servers
        self._ledger = ledger
        self._beside: list[subprocess.Popen[bytes]] = []
        self._kinds: dict[str, tuple[int, Callable[[FakeServers], bool]]] = {
            "server killed": (4, self._kill_server),
            "server killed with its applier": (2, self._kill_all),
            "applier killed": (4, self._kill_applier),
            "server stopped": (1, self._stop),
            "server paused": (1, self._pause_server),
            "applier paused": (1, self._pause_applier),
            "disk full for a server": (2, self._fill_for_server),
            "disk full for an applier": (2, self._fill_for_applier),
            "ledger locked": (2, self._lock),
            "ledger moved away and back": (1, self._move),
            "command beside": (3, self._command),
            "sqlite3 beside": (3, self._sqlite),
        }

    def one(self) -> None:
        """Let one happen, of any kind that can happen now."""
        kinds = list(self._kinds)
        weights = [weight for weight, _ in self._kinds.values()]
        (name,) = self._random.choices(kinds, weights)
        self._note(name)
        if self._kinds[name][1](self._random.choice(self._servers)):
            self.counts[name] = self.counts.get(name, 0) + 1

    def _note(self, name: str) -> None:
        """Write down when a fault begins: whatever is lost has its time in its id."""
        with self._ledger.with_name("faults.log").open("a") as log:
            log.write(f"{datetime.now(UTC).isoformat()} {name}\n")

    def end(self) -> None:
        """Wait for the commands beside."""
        for process in self._beside:
            process.wait(120)

    def _kill_server(self, server: FakeServers) -> bool:
        if server.port() is None or server.process is None:
            return False
        server.process.kill()
        return True

    def _kill_all(self, server: FakeServers) -> bool:
        if server.port() is None or server.process is None:
            return False
        kill_group(server.process, signal.SIGKILL)
        return True

    def _kill_applier(self, server: FakeServers) -> bool:
        return _signal(server.applier(), signal.SIGKILL)

    def _stop(self, server: FakeServers) -> bool:
        return _signal(server.process and server.process.pid, signal.SIGTERM)

    def _pause_server(self, server: FakeServers) -> bool:
        return self._pause(server.process and server.process.pid)

    def _pause_applier(self, server: FakeServers) -> bool:
        return self._pause(server.applier())

    def _pause(self, pid: int | None) -> bool:
        if not _signal(pid, signal.SIGSTOP):
            return False
        time.sleep(self._random.uniform(0.2, 2))
        return _signal(pid, signal.SIGCONT)

    def _fill_for_server(self, server: FakeServers) -> bool:
        return self._fill(server.process and server.process.pid)

    def _fill_for_applier(self, server: FakeServers) -> bool:
        return self._fill(server.applier())

    def _fill(self, pid: int | None) -> bool:
        """Let no file of a process grow beyond a few kilobytes for a while."""
        if pid is None:
            return False
        with suppress(ProcessLookupError, PermissionError):
            _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 12, most))
            time.sleep(self._random.uniform(0.2, 2))
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
            return True
        return False

    def _lock(self, _server: FakeServers) -> bool:
        if not self._ledger.exists():
            return False
        with closing(sqlite3.connect(self._ledger, isolation_level=None, timeout=5)) as blocker:
            try:
                blocker.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
            time.sleep(self._random.uniform(0.2, 2))
        return True

    def _move(self, _server: FakeServers) -> bool:
        """Move the ledger's files away and back, with their log: nobody may write one meanwhile."""
        away = self._ledger.with_name("away")
        away.mkdir(exist_ok=True)
        names = [self._ledger.name + suffix for suffix in ("", "-wal", "-shm")]
        for name in names:
            with suppress(FileNotFoundError):
                self._ledger.with_name(name).rename(away / name)
        time.sleep(self._random.uniform(0.2, 2))
        for name in reversed(names):
            with suppress(FileNotFoundError):
                (away / name).rename(self._ledger.with_name(name))
        shutil.rmtree(away)
        return True

    def _command(self, _server: FakeServers) -> bool:
        words = self._random.choice(COMMANDS)
        copy = str(self._ledger.with_name("copy.db"))
        self._beside = [process for process in self._beside if process.poll() is None]
        if len(self._beside) >= 2:
            return False
        self._beside.append(
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "vllm_cost_meter.cli"),
                    *(copy if word == "COPY" else word for word in words),
                    *("--ledger", str(self._ledger)),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        return True

    def _sqlite(self, _server: FakeServers) -> bool:
        if not self._ledger.exists():
            return False
        with closing(sqlite3.connect(self._ledger)) as connection, suppress(sqlite3.DatabaseError):
            connection.execute("SELECT count(*) FROM requests").fetchall()
        return True


def _signal(pid: int | None, number: int) -> bool:
    if pid is None:
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
