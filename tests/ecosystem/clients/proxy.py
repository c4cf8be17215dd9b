"""A LiteLLM proxy in front of a server, without a database, and what it records as costs.

Invariant: what ends it early leaves no process behind.
"""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from tests.ecosystem.clients.environments import PYTHON, environment
from tests.support.waiting import wait_for
from vllm_cost_meter.lab.server import free_ports

MASTER_KEY = "sk-the-master-key"
# A callback as its users write one: it gets each call that went well.
CALLBACK = """
import json
import os

from litellm.integrations.custom_logger import CustomLogger


class Recorder(CustomLogger):
    async def async_log_success_event(self, kwargs, response_obj, start_time, end_time):
        line = {"id": response_obj.id, "response_cost": kwargs.get("response_cost")}
        with open(os.environ["RECORDED"], "a") as file:
            file.write(json.dumps(line) + "\\n")


recorder = Recorder()
"""


class Upstream(NamedTuple):
    """The server behind a proxy, the model that it serves, and a key of it."""

    url: str
    model: str
    key: str


class Proxy:
    """A proxy that runs."""

    def __init__(self, url: str, recorded: Path) -> None:
        self.url = url
        self._recorded = recorded

    def client(self) -> httpx.Client:
        """Return a client that asks the proxy."""
        headers = {"authorization": f"Bearer {MASTER_KEY}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def recorded(self, id: str) -> list[float | None]:
        """Return what it recorded as costs, in dollars, of replies whose id begins like this."""
        if not self._recorded.exists():
            return []
        lines = map(json.loads, self._recorded.read_text().splitlines())
        return [line["response_cost"] for line in lines if line["id"].startswith(id)]


@contextmanager
def litellm_proxy(folder: Path, upstream: Upstream, *, has_rust: bool) -> Iterator[Proxy]:
    """Run a proxy of a server, by its own command; `has_rust` switches its path in Rust on."""
    folder.mkdir()
    (folder / "recorder.py").write_text(CALLBACK)
    config = {
        "model_list": [
            {
                "model_name": upstream.model,
                "litellm_params": {
                    "model": f"hosted_vllm/{upstream.model}",
                    "api_base": f"{upstream.url}/v1",
                    "api_key": upstream.key,
                },
            }
        ],
        "litellm_settings": {"callbacks": "recorder.recorder"},
        "general_settings": {"master_key": MASTER_KEY},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # which is YAML too
    (port,) = free_ports(1)
    recorded = folder / "recorded"
    command = [str(PYTHON.with_name("litellm")), "--config", "config.yaml"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (folder / "proxy.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={
                **environment(),
                "LITELLM_RUST": str(has_rust),
                "RECORDED": str(recorded),
                "PYTHONPATH": str(folder),
            },
            stdout=log,
            stderr=log,
        )
    try:
        found = Proxy(f"http://127.0.0.1:{port}", recorded)

        def is_alive() -> bool:
            assert process.poll() is None, (folder / "proxy.log").read_text()[-3000:]
            try:
                return httpx.get(f"{found.url}/health/liveliness").status_code == 200
            except httpx.TransportError:
                return False

        wait_for(is_alive, timeout_s=120, pause_s=0.3, what="the proxy did not start")
        yield found
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
