"""Servers that clients ask and faults hit, each started again as soon as it is gone.

Invariant: `port` is None unless the server's process was alive a moment ago.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from random import Random

from tests.integration.server import Server
from tests.soak.clients import Clients
from vllm_cost_meter.lab.server import free_ports, meter_arguments

ROOT = Path(__file__).parents[2]


class FakeServers:
    """A process of `fake_server` after the other, on a port of each."""

    def __init__(self, name: str, folder: Path) -> None:
        self.starts = 0
        # How long each took until it could be asked.
        self.starts_s: list[float] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._name = name
        self._folder = folder
        self._port = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._keep_up)
        self._thread.start()

    def port(self) -> int | None:
        process = self.process
        return self._port if process is not None and process.poll() is None else None

    def _keep_up(self) -> None:
        while not self._is_over.is_set():
            self.starts += 1
            (self._port,) = free_ports(1)
            run_id = f"{self._name}-{self.starts}"
            command = [sys.executable, "-m", "tests.soak.fake_server", str(self._folder)]
            with (self._folder / f"{self._name}.log").open("ab") as log:
                self.process = subprocess.Popen(
                    [*command, str(self._port), run_id],
                    cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
            self._note_start(self.process)
            self.process.wait()

    def _note_start(self, process: subprocess.Popen[bytes]) -> None:
        begun = time.monotonic()
        while process.poll() is None:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self._port), 1).close()
                self.starts_s.append(time.monotonic() - begun)
                return
            time.sleep(0.02)

    def applier(self) -> int | None:
        """Return the process that applies journals beside the server; None without one."""
        process = self.process
        if process is None:
            return None
        # Any of its threads may have started it.
        for task in Path(f"/proc/{process.pid}/task").glob("*/children"):
            with suppress(OSError, IndexError):
                return int(task.read_text().split()[0])
        return None

    def stop(self) -> None:
        """End the server as an operator does, and start none."""
        self._is_over.set()
        if self.process is not None:
            self.process.terminate()
        self._thread.join()


class RealServers:
    """Real `vllm serve` processes on the same ledger, each killed whole after some seconds of load.

    `Server.kill` ends the engine, the API server and the applier at once. Some lose their engine
    alone a moment before.
    """

    def __init__(self, folder: Path, ledger: Path, random: Random) -> None:
        self.kills = 0
        self.engine_kills = 0
        self.starts_s: list[float] = []
        self.clients = Clients(
            {"authorization": "Bearer any-key"},
            '{"model": "tiny", "prompt": [1, 2, 3, 4, 5], "max_tokens": 3}',
        )
        self._folder = folder
        self._ledger = ledger
        self._random = random
        self._server: Server | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._keep_up)

    def start(self) -> None:
        self._thread.start()
        self.clients.start(lambda: self._server.port if self._server is not None else None, 2)

    def _keep_up(self) -> None:
        while not self._is_over.is_set():
            environment = {"COST_METER_LEDGER": f"sqlite:///{self._ledger}"}
            server = Server(
                self._folder / f"real-{self.kills}",
                arguments=meter_arguments(),
                environment=environment,
            )
            begun = time.monotonic()
            try:
                server.start()
                self.starts_s.append(time.monotonic() - begun)
                self._server = server
                self._is_over.wait(self._random.uniform(5, 15))
                if self._random.random() < 0.3:
                    os.kill(server.engine_pid, signal.SIGKILL)
                    self.engine_kills += 1
                    time.sleep(self._random.uniform(0, 1))
            finally:
                self._server = None
                server.kill()
            self.kills += 1

    def stop(self) -> None:
        """Kill the last one, and start none."""
        self._is_over.set()
        self._thread.join()
        self.clients.stop()


def kill_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Signal a server and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
