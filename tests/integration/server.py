"""Starts real `vllm serve` processes for the integration tests, on loopback, on the tiny model.

Everything a server writes goes into its own folder; only processes started here are ended.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from vllm_cost_meter.lab.server import free_ports
from vllm_cost_meter.lab.tiny_model import default_path

START_TIMEOUT_S = 240
PLUGIN_FOLDER = Path(__file__).parent / "plugin"
# With these, several engines start on a machine that has fewer NUMA nodes than engines: vLLM 0.33.0
# wants a node for each.
SEVERAL_ENGINES = {"VLLM_CPU_SIM_MULTI_NUMA": "1"}
# For servers side by side on one machine: else vLLM ties each of them to the same core.
SIDE_BY_SIDE = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
# Longer than a block of the KV cache.
LONG_PROMPT = " ".join(f"word{i}" for i in range(150))
# What a router says to a prefill server, and to a decode server.
SENT_ON, RECEIVED = {"do_remote_decode": True}, {"do_remote_prefill": True}
TENANT_KEYS = {"alpha": "key-of-alpha", "beta": "key-of-beta", "gamma": "key-of-gamma"}
# Of tenants that only test_budgets.py asks as.
LIMITED_KEYS = {
    "delta": "key-of-delta",
    "epsilon": "key-of-epsilon",
    "zeta": "key-of-zeta",
    "eta": "key-of-eta",
    "theta": "key-of-theta",
}
BUDGET_S = 4
# Of theta's requests on each API server.
AT_ONCE = 2
BUDGETS = f"""
[[budgets]]
name = "delta today"
tenant = "delta"
gpu_seconds = {BUDGET_S}
period = "day"
timezone = "Asia/Kolkata"

[[budgets]]
name = "epsilon stops"
tenant = "epsilon"
gpu_seconds = {BUDGET_S}
period = "rolling"
days = 1
stop_running = true

[[budgets]]
name = "zeta searches beams"
tenant = "zeta"
gpu_seconds = 1
period = "rolling"
days = 1
stop_running = true

[[budgets]]
name = "eta sends lists"
tenant = "eta"
gpu_seconds = 1
period = "rolling"
days = 1
stop_running = true

[[budgets]]
name = "theta is prepaid"
tenant = "theta"
gpu_seconds = 1
period = "rolling"
days = 1
stop_running = true
max_concurrent = {AT_ONCE}
"""
CHILDREN = """
[[tenant_rules]]
rule = "api_key"

[[tenant_rules]]
rule = "user"
"""
MODEL = "tiny"
# The origin of web pages that may ask a server.
ORIGIN = "https://chat.example"


def kv_arguments(kv_role: str, folder: Path) -> list[str]:
    """Return the arguments of a server that keeps the KV cache of prompts in a folder.

    vLLM's ExampleConnector does that. Servers that share the folder send to one another.
    """
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": kv_role,
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    return ["--no-enable-prefix-caching", "--kv-transfer-config", json.dumps(connector)]


@dataclass
class Server:
    """One `vllm serve` with its ledger, log and endpoints."""

    folder: Path
    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    metered: bool = True
    price: str | None = "2.50"
    config: str = ""
    model_path: Path = field(default_factory=default_path)
    port: int = field(default_factory=lambda: free_ports(1)[0])
    side_port: int = field(default_factory=lambda: free_ports(1)[0])
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def side_url(self) -> str:
        return f"http://127.0.0.1:{self.side_port}"

    @property
    def ledger_file(self) -> Path:
        return self.folder / "state" / "ledger.db"

    @property
    def ledger_url(self) -> str:
        return f"sqlite:///{self.ledger_file}"

    @property
    def pace_file(self) -> Path:
        return self.folder / "pace"

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")

    def launch(self) -> None:
        """Start the process without waiting for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pace_file.write_text("0")
        config = self.folder / "meter.toml"
        config.write_text(
            "".join(
                f'[[tenants]]\nname = "{name}"\n'
                f'api_key_sha256 = ["{hashlib.sha256(key.encode()).hexdigest()}"]\n'
                for name, key in (TENANT_KEYS | LIMITED_KEYS).items()
            )
            + self.config
        )
        environment = {
            **os.environ,
            # Whose code the tests run, the server runs too: also in another checkout.
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(PLUGIN_FOLDER), os.environ.get("PYTHONPATH")))
            ),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            # Five seconds by default: a busy client then finds its idle connections closed.
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60",
            "CMT_PACE": str(self.pace_file),
            "COST_METER_LEDGER": self.ledger_url,
            "COST_METER_PORT": str(self.side_port),
            # Where the bound is tested a server sets its own: no other test may fail because the
            # machine is busy.
            "COST_METER_BILL_TIMEOUT_MS": "10000",
            **({"COST_METER_GPU_HOUR_USD": self.price} if self.price else {}),
            **self.environment,
        }
        command = [
            str(Path(sys.executable).parent / "vllm"),
            *("serve", str(self.model_path), "--served-model-name", MODEL),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--dtype", "float32", "--enforce-eager", "--max-model-len", "8192"),
            *("--api-key", *TENANT_KEYS.values(), *LIMITED_KEYS.values(), "any-key"),
            *(["--cost-meter-config", str(config)] if self.metered else []),
            *self.arguments,
        ]
        with (self.folder / "server.log").open("wb") as log:
            self.process = subprocess.Popen(  # noqa: S603
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def start(self) -> "Server":
        """Start the process and wait until it serves."""
        self.launch()
        return self.wait()

    def wait(self, *, until_side_answers: bool = False) -> "Server":
        """Wait until a process that was started serves.

        Of several API servers one may serve before another has its side endpoint up.
        """
        health_urls = [f"{self.url}/health"]
        if until_side_answers:
            health_urls.append(f"{self.side_url}/cost/health")
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                raise RuntimeError(f"vllm serve ended: {self.log[-3000:]}")
            try:
                if all(httpx.get(url, timeout=2).status_code == 200 for url in health_urls):
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        raise RuntimeError(f"vllm serve did not start: {self.log[-3000:]}")

    def stop(self) -> None:
        """End the process and its children."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    @property
    def engine_pid(self) -> int:
        """The process of the (first) engine, as vLLM's log names it."""
        found = re.search(r"\(EngineCore\w* pid=(\d+)\)", self.log)
        assert found, "no line of an engine in the log"
        return int(found[1])

    def kill(self) -> None:
        """kill -9 every process of the server."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait(20)

    # -- asking ---------------------------------------------------------------------------------

    def client(self, tenant: str = "alpha", **options: Any) -> httpx.Client:
        key = TENANT_KEYS.get(tenant, "any-key")
        headers = {"authorization": f"Bearer {key}", **options.pop("headers", {})}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **options)

    def cost(self, path: str) -> Any:
        """GET a figure from the side endpoint."""
        reply = httpx.get(f"{self.side_url}/cost/{path}", timeout=30)
        if reply.status_code >= 500:
            # The log has the traceback of what we did not expect.
            raise AssertionError(f"{path}: {reply.text}\n{self.log[-8000:]}")
        reply.raise_for_status()
        return reply.json()

    def row_of(self, request_id: str) -> Any:
        """Return a request's row as it is now; None if it is not found.

        While the server cannot tell (503), ask again as a client does.
        """
        deadline = time.monotonic() + 20
        while True:
            reply = httpx.get(f"{self.side_url}/cost/requests/{request_id}", timeout=30)
            if reply.status_code != 503 or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return None if reply.status_code == 404 else reply.raise_for_status().json()

    def bill_of(self, request_id: str, timeout_s: float = 20.0) -> Any:
        """Return a request's row once all its parts are billed."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                reply = httpx.get(f"{self.side_url}/cost/requests/{request_id}", timeout=30)
                told = reply.text
                if reply.status_code == 200 and reply.json()["status"] is not None:
                    return reply.json()
            except httpx.TransportError as error:
                # One API server may serve before the first one has its side endpoint up.
                told = repr(error)
            assert time.monotonic() < deadline, f"no bill of {request_id}: {told}"
            time.sleep(0.1)

    @contextlib.contextmanager
    def paced(self, step_s: float) -> Iterator[None]:
        """Let each step of the model take so much longer meanwhile."""
        self.pace_file.write_text(str(step_s))
        try:
            yield
        finally:
            self.pace_file.write_text("0")

    def balanced(self, timeout_s: float = 30.0) -> Any:
        """Assert that the books balance with nothing in flight, and return the audit."""
        deadline = time.monotonic() + timeout_s
        audit: dict[str, Any] = {"runs": []}
        while time.monotonic() < deadline:
            # With several API servers another one may be ready before the one with the books.
            with contextlib.suppress(httpx.TransportError):
                audit = self.cost("audit")
            runs = audit["runs"]
            if runs and all(run["in_flight_ns"] == 0 for run in runs if run["alive"]):
                break
            time.sleep(0.2)
        assert audit["runs"], "no engine run in the ledger"
        assert audit["balanced"], audit
        assert all(run["difference_ns"] == 0 for run in audit["runs"]), audit
        assert all(not run["missing_bills"] for run in audit["runs"]), audit
        tenants = self.cost("tenants")
        assert tenants["adds_up"], tenants
        assert sum(r["gpu_time_ns"] for r in tenants["tenants"]) == tenants["wall_gpu_ns"]
        return audit
