"""Start the servers of a check: one alone, or a metered and an unmetered one on the same card.

All get the same arguments, but for the meter's own and the part of the card's memory that each may
take. So the two that are compared differ in the meter only.

Invariant: a server ends with its `with` block, and also if this process is killed.
"""

import gzip
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from vllm_cost_meter.config.engine import PREFIX
from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.client import get, get_json
from vllm_cost_meter.lab.gpu_check.card import ORDER
from vllm_cost_meter.lab.gpu_check.model import NAME
from vllm_cost_meter.lab.server import (
    CPU_ARGUMENTS,
    LOOPBACK,
    Server,
    environment_of,
    meter_arguments,
)
from vllm_cost_meter.lab.sweep.bench import Target
from vllm_cost_meter.lab.tiny_model import default_path
from vllm_cost_meter.lab.validation.real_server.burst import JudgedServer

# 0.001 USD for a GPU-second, so that costs are seen; no figure of a check depends on it.
PRICE = "3.6"
ALONE, METERED, UNMETERED = "alone", "metered", "unmetered"
# Parts of the card's memory: of a server alone, and of each of two.
MEMORY_PART = {ALONE: "0.9", METERED: "0.42", UNMETERED: "0.42"}
# Context of each of two: less room for it is needed, and none of their requests is long.
PAIR_CONTEXT = 4096
# Of the user's environment, what would change these servers: keys, and a plugin named for all.
NOT_OURS = {"VLLM_API_KEY", "VLLM_PLUGINS"}
TIMEOUT_S = 60
CACHE_CONFIG = "vllm:cache_config_info"
LOG_BYTES_MAX = 3_000_000
# vLLM leaves sockets and other files where this says. The names of its sockets are UUIDs, and their
# paths have a limit.
TEMPORARY = "TMPDIR"
SOCKET_CHARS, PATH_CHARS_MAX = 37, 107


@dataclass(frozen=True, slots=True)
class Checked:
    """A server that runs: how it is asked, and where its step log is, if it writes one."""

    name: str
    server: Server
    judged: JudgedServer
    target: Target
    ledger: Path
    step_log: Path | None

    def context_max(self) -> int:
        """Return how many tokens a context may have. Raises ServerError."""
        at = f"{self.server.url}/v1/models"
        models = get_json(at, None, "vLLM", TIMEOUT_S, dict[str, Any])["data"]
        return int(models[0]["max_model_len"])

    def kv_tokens(self) -> int | None:
        """Return how many tokens the KV cache holds; None if vLLM does not say."""
        page = get(f"{self.server.url}/metrics", None, "vLLM", TIMEOUT_S, proxies=False)
        for family in text_string_to_metric_families(page.decode()):
            for sample in family.samples:
                if sample.name == CACHE_CONFIG:
                    blocks, size = (
                        sample.labels.get(name, "") for name in ("num_gpu_blocks", "block_size")
                    )
                    if blocks.isdigit() and size.isdigit():
                        return int(blocks) * int(size)
        return None


def own_environment() -> dict[str, str]:
    """Return the environment of a check's servers: the user's, without what is set for others.

    Settings of the meter, keys and plugins that the user's own servers have are left out.
    """
    environment = environment_of(default_path().parent, offline=True) | ORDER
    return {
        name: value
        for name, value in environment.items()
        if not name.upper().startswith(PREFIX) and name not in NOT_OURS
    }


def temporary_files_in(folder: Path) -> dict[str, str]:
    """Return what has vLLM's temporary files in a folder, if paths of sockets are short enough."""
    return {TEMPORARY: str(folder)} if len(str(folder)) + SOCKET_CHARS <= PATH_CHARS_MAX else {}


def _refuse_meter(server: Server) -> None:
    """Raise ServerError if a server that is to be unmetered has the meter's side endpoint."""
    with socket.socket() as probe:
        probe.settimeout(TIMEOUT_S)
        if probe.connect_ex((LOOPBACK, server.side_port)) == 0:
            raise ServerError(
                f"expected a server without the meter, got one with a side endpoint at"
                f" {server.side_url}: do arguments of vLLM name the plugin?"
            )


@dataclass(slots=True)
class Servers:
    """Starts servers of one model in one folder, and keeps their command lines and start times."""

    model: Path
    context_tokens: int
    folder: Path
    on_cpu: bool
    more_arguments: Sequence[str] = ()
    commands: dict[str, str] = field(default_factory=dict)
    start_s: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return each server's command, and how long it took to start, None if it did not."""
        return {
            name: {"command": command, "start_s": self.start_s.get(name)}
            for name, command in self.commands.items()
        }

    @contextmanager
    def running(
        self, name: str, on_stage: Callable[[str], None], *, step_log: bool = False
    ) -> Iterator[Checked]:
        """Start a server, metered unless its name says otherwise; it ends with the block."""
        folder = self.folder / name
        folder.mkdir()
        ledger = folder / "ledger.db"
        steps = folder / "steps.jsonl" if step_log else None
        environment = own_environment() | {
            "COST_METER_LEDGER": f"sqlite:///{ledger}",
            "COST_METER_GPU_HOUR_USD": PRICE,
            **temporary_files_in(self.folder),
            **({"COST_METER_STEP_LOG": str(steps)} if steps else {}),
        }
        server = Server(
            str(self.model),
            [*self._arguments(name), *self.more_arguments],
            environment,
            folder / "vllm.log",
            ends_with_us=True,
        )
        self.commands[name] = shlex.join(
            ["vllm", "serve", str(self.model), *self._arguments(name), *self.more_arguments]
        )
        began_s = time.monotonic()
        try:
            server.launch()
            server.wait(on_stage=on_stage)
            self.start_s[name] = time.monotonic() - began_s
            if name == UNMETERED:
                _refuse_meter(server)
            judged = JudgedServer(server.url, None, server.side_url, None, NAME)
            target = Target(server.url, NAME, str(self.model))
            yield Checked(name, server, judged, target, ledger, steps)
        finally:
            server.stop()

    def _arguments(self, name: str) -> list[str]:
        context = self.context_tokens if name == ALONE else min(self.context_tokens, PAIR_CONTEXT)
        arguments = [
            *(meter_arguments() if name != UNMETERED else ()),
            *("--served-model-name", NAME, "--load-format", "dummy"),
            *("--max-model-len", str(context)),
        ]
        if self.on_cpu:
            return [*arguments, *CPU_ARGUMENTS, "--max-num-batched-tokens", "4096"]
        memory = ("--gpu-memory-utilization", MEMORY_PART[name])
        return [*arguments, *memory, "--max-num-batched-tokens", "8192"]


def keep_logs(folder: Path, path: Path) -> None:
    """Write the ends of all logs below a folder to one compressed file."""
    with gzip.open(path, "wb") as out:
        for log in sorted(folder.glob("*/*.log")):
            out.write(f"== {log.parent.name}/{log.name}\n".encode())
            out.write(log.read_bytes()[-LOG_BYTES_MAX:] + b"\n")
