"""Start a real `vllm serve` on loopback, wait for it, and stop it.

The demo, the validation and the benchmarks use it. It runs the vLLM of this Python environment. The
server gets its own session, so that a Ctrl-C at the terminal reaches only the caller, which then
stops the server. Its output goes to a log file.

Invariant: `stop` ends the processes of this server and no others.
"""

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_cost_meter.activation import NAME
from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.units.text import plain

LOOPBACK = "127.0.0.1"
# A large model compiles for minutes at its first start.
START_TIMEOUT_S = 1800
STOP_TIMEOUT_S = 30
# A report waits for bills on their way; the engine answers between two steps.
ANSWER_TIMEOUT_S = 30
LOG_LINES_SHOWN = 15

# bf16 ends the worker with SIGILL on some CPUs, and compiling is not worth it for a tiny model.
CPU_ARGUMENTS = ("--dtype", "float32", "--enforce-eager")

# The marks in vLLM's log, in their order, and what each means to somebody who waits.
STAGES = (
    ("Resolved architecture", "vLLM is there, starting the engine's process"),
    ("Initializing a V1 LLM engine", "the engine starts its worker"),
    ("Starting to load model", "loading the model"),
    ("Loading weights took", "measuring the memory"),
    ("KV cache size", "warming up"),
    ("Starting vLLM server", "opening the HTTP port"),
)


def meter_arguments(config: Path | None = None) -> list[str]:
    """Return the arguments that have `vllm serve` metered, on each vLLM that the meter understands.

    `config` is a file with settings. Whatever starts a metered server takes them from here.
    """
    return ["--plugins", NAME, *(["--cost-meter-config", str(config)] if config else [])]


def is_cpu_build() -> bool:
    """Return whether this environment's vLLM is a CPU build, by vLLM's own criterion.

    Raises ServerError if there is no vLLM.
    """
    try:
        return "cpu" in metadata.version("vllm")
    except metadata.PackageNotFoundError:
        raise ServerError(
            f"expected vLLM in the environment of {sys.executable}, found none; "
            "`make setup` makes an environment with one"
        ) from None


def command_path(name: str) -> str:
    """Return the path of a command in this environment. Raises ServerError if it is missing."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise ServerError(
            f"expected the command {path}, found none; install its package into this environment"
        )
    return str(path)


def environment_of(cache: Path, *, offline: bool) -> dict[str, str]:
    """Return the environment variables for vLLM's commands.

    Caches go below `cache` unless the user has set them. `offline` is for a model that needs no
    hub. Usage statistics are off, nothing listens beyond this machine, and requests to it go
    through no proxy.
    """
    defaults = {
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "VLLM_CONFIG_ROOT": str(cache / "vllm-config"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": LOOPBACK,
        # The unit is seconds. With vLLM's 5, a client held up by a busy machine finds its
        # connection closed, and its request fails.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
    }
    if offline:
        defaults |= {"HF_HOME": str(cache / "huggingface"), "HF_HUB_OFFLINE": "1"}
        # The unit is GiB, and only the CPU build reads it. With 1 it starts in half a minute.
        defaults |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = {**defaults, **os.environ}
    # vLLM's child processes find this environment's tools first.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    for name in ("no_proxy", "NO_PROXY"):
        environment[name] = ",".join(filter(None, (os.environ.get(name), LOOPBACK)))
    return environment


# Below those that Linux gives to connections and to whoever asks for any port: one of them may be
# taken between our look and the start of a server, which takes half a minute.
_PORTS = range(20_000, 32_000)


def free_ports(count: int) -> list[int]:
    """Return different free ports on loopback. Raises ServerError if there are not so many."""
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            found.append(port)
        if len(found) == count:
            return found
    raise ServerError(f"expected {count} free ports on {LOOPBACK}, got {len(found)}")


def get_json(port: int, path: str) -> Any:
    """GET a JSON answer from this machine. Raises OSError, or ServerError unless it is a 200."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=ANSWER_TIMEOUT_S)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
    if answer.status != http.client.OK:
        raise ServerError(f"http://{LOOPBACK}:{port}{path} answered {answer.status}")
    return json.loads(body)


class Server:
    """One `vllm serve` process, with its two ports and its log."""

    def __init__(
        self,
        model: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        ends_with_us: bool = False,
    ) -> None:
        """Choose free ports. `arguments` go to `vllm serve`, besides host and port.

        With `ends_with_us` the server also ends when the thread that launched it is killed.
        """
        self.log = log
        self.port, self.side_port = free_ports(2)
        tied = (sys.executable, "-m", "vllm_cost_meter.lab.tied", str(os.getpid()))
        self._command = [
            *(tied if ends_with_us else ()),
            *(command_path("vllm"), "serve", model),
            *("--host", LOOPBACK, "--port", str(self.port)),
            *arguments,
        ]
        self._environment = {**environment, "COST_METER_PORT": str(self.side_port)}
        self._process: subprocess.Popen[bytes] | None = None
        self._is_kept = False

    @property
    def url(self) -> str:
        """The URL on which vLLM listens."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def side_url(self) -> str:
        """The URL on which the cost meter's side endpoint listens."""
        return f"http://{LOOPBACK}:{self.side_port}"

    @property
    def pid(self) -> int:
        """The id of the process: a SIGTERM to it stops the server."""
        return self._running().pid

    def launch(self) -> None:
        """Start the process without waiting for it."""
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, on_stage: Callable[[str], None] = lambda _stage: None) -> None:
        """Wait until the server serves; `on_stage` is called now and then with the current stage.

        Raises ServerError if the server ends (with the end of its log) or takes too long.
        """
        process = self._running()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._healthy():
            if process.poll() is not None:
                raise ServerError(f"vLLM ended with status {process.returncode}; {self.log_end()}")
            if time.monotonic() > deadline:
                raise ServerError(f"vLLM does not serve after {START_TIMEOUT_S} s")
            on_stage(stage_of(self.log.read_text(errors="replace")))
            time.sleep(0.25)

    def cost(self, path: str) -> Any:
        """GET an answer from the side endpoint below `/cost/`, such as `tenants`."""
        return get_json(self.side_port, f"/cost/{path}")

    def keep(self) -> None:
        """Let the server go on after `stop`; it can be ended by its `pid`."""
        self._is_kept = True

    def stop(self) -> None:
        """End the server: SIGTERM, time to finish, then SIGKILL to its remaining processes."""
        process = self._process
        if process is None or self._is_kept:
            return
        try:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_TIMEOUT_S)
        finally:  # This runs after a second Ctrl-C too.
            # The group holds the server's children and no other process.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def log_end(self) -> str:
        """Return the last lines of the log, safe to show on a terminal."""
        return end_of(self.log)

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=2)
        with contextlib.closing(connection):
            try:
                connection.request("GET", "/health")
                return connection.getresponse().status == http.client.OK
            except (OSError, http.client.HTTPException):
                return False

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerError("the server was not launched")
        return self._process


def stage_of(log: str) -> str:
    """Return the stage of a starting server, from its log so far."""
    for mark, stage in reversed(STAGES):
        if mark in log:
            return stage
    return "importing vLLM"


def end_of(log: Path) -> str:
    """Return a log file's name and its last lines, safe to show on a terminal."""
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
    return "\n".join([f"the end of {log}:", *(f"  {plain(line)}" for line in lines)])
