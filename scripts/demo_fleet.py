"""The books of a small fleet: PostgreSQL, two real vLLM servers, one of which is killed, one audit.

Usage: `make demo-fleet`. It needs the programs of a PostgreSQL server (`apt-get install
postgresql`), which runs in a folder of its own for as long as this takes, and no GPU.

Two servers send their ledgers to one database. Clients of three tenants ask both of them. In the
middle one server is killed as by a power cut: its processes end at once, its disk stays. The audit
then says what is complete, and of what nobody can know. After the server has come back on its disk,
everything is there, and the fleet's statement adds up to what both machines' GPUs cost.

Invariant: what ends it early leaves no process behind.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import openai

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.ecosystem.postgresql import postgresql  # noqa: E402
from vllm_cost_meter.lab.server import (  # noqa: E402
    CPU_ARGUMENTS,
    LOOPBACK,
    Server,
    command_path,
    environment_of,
    free_ports,
    is_cpu_build,
    meter_arguments,
)
from vllm_cost_meter.lab.tiny_model import default_path  # noqa: E402

TENANTS = ("chat-team", "search-team", "batch-team")
ROUNDS = 6
MODEL = "tiny"
SETTINGS = """
gpu_hour_usd = "2.50"

[[tenant_rules]]
rule = "header"
name = "x-tenant"
trust = "everyone"
"""
KEY = "none-is-checked"


def say(text: str) -> None:
    """Print a line, with the seconds since the beginning."""
    print(f"[{time.monotonic() - BEGAN_S:5.1f} s] {text}", flush=True)


BEGAN_S = time.monotonic()


class Machine:
    """A machine of the fleet: its disk, and a vLLM server that is started on it."""

    def __init__(self, name: str, folder: Path, fleet: str) -> None:
        self.name = name
        self.folder = folder / name
        self.folder.mkdir()
        config = self.folder / "meter.toml"
        config.write_text(SETTINGS)
        self._environment = {
            **environment_of(self.folder, offline=True),
            "COST_METER_CONFIG": str(config),
            "COST_METER_LEDGER": f"sqlite:///{self.folder / 'ledger.db'}",
            "COST_METER_FLEET": fleet,
            "COST_METER_LABELS": f"machine={name}",
        }
        self._starts = 0
        self.server: Server

    def launch(self) -> None:
        """Begin to start a server on this machine's disk."""
        self._starts += 1
        arguments = [*meter_arguments(), "--served-model-name", MODEL]
        arguments += CPU_ARGUMENTS if is_cpu_build() else ()
        log = self.folder / f"vllm-{self._starts}.log"
        self.server = Server(
            str(default_path()), arguments, self._environment, log, ends_with_us=True
        )
        self.server.launch()

    def kill(self) -> None:
        """End all its processes at once."""
        os.killpg(self.server.pid, signal.SIGKILL)


async def ask(machine: Machine) -> int:
    """Send requests of three tenants; return how many were answered."""

    async def one(tenant: str, number: int) -> int:
        async with openai.AsyncOpenAI(
            base_url=f"{machine.server.url}/v1",
            api_key=KEY,
            default_headers={"x-tenant": tenant},
            max_retries=0,
        ) as client:
            try:
                await client.completions.create(
                    model=MODEL,
                    prompt=f"{number} of {tenant}: tell me how the oven works. " * (1 + number),
                    max_tokens=24 + 8 * number,
                )
            except openai.APIError:
                return 0
        return 1

    asked = [one(tenant, number) for number in range(ROUNDS) for tenant in TENANTS]
    return sum(await asyncio.gather(*asked))


def run(*words: str, ledger: str, may_fail: bool = False) -> str:
    """Run one of the meter's commands on the fleet, and print what it says."""
    command = [command_path("vllm-cost-meter"), *words, "--ledger", ledger]
    print(f"\n$ vllm-cost-meter {' '.join(words)} --ledger $FLEET", flush=True)
    environment = {**os.environ, "COST_METER_GPU_HOUR_USD": "2.50"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout + done.stderr, flush=True)
    if done.returncode and not may_fail:
        raise SystemExit(f"expected {words[0]} to succeed, got status {done.returncode}")
    return done.stdout


@contextmanager
def answering(fleet: str, folder: Path) -> Iterator[str]:
    """Serve the fleet's books over HTTP meanwhile; give the address."""
    (port,) = free_ports(1)
    command = [command_path("vllm-cost-meter"), "server", "--ledger", fleet, "--port", str(port)]
    environment = {**os.environ, "COST_METER_GPU_HOUR_USD": "2.50"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stderr=log)
    try:
        yield f"http://{LOOPBACK}:{port}"
    finally:
        process.terminate()
        process.wait(20)


def wait_until_balanced(fleet: str, within_s: float) -> None:
    """Wait until the fleet has everything. Raises SystemExit if it never has."""
    until_s = time.monotonic() + within_s
    while True:
        done = subprocess.run(
            [command_path("vllm-cost-meter"), "audit", "--json", "--ledger", fleet],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return
        if time.monotonic() > until_s:
            raise SystemExit(f"expected a balanced fleet, got {done.stdout}{done.stderr}")
        time.sleep(1)


def main() -> None:
    """Run the demo."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="demo-fleet-")))
        say("starting PostgreSQL, in a folder of its own")
        fleet = stack.enter_context(postgresql()).new_database()
        machines = [Machine(name, folder, fleet) for name in ("gpu-1", "gpu-2")]
        say("starting two vLLM servers with the meter inside; each sends to the fleet")
        for machine in machines:
            machine.launch()
            stack.callback(lambda machine=machine: machine.server.stop())
        for machine in machines:
            machine.server.wait()
        address = stack.enter_context(answering(fleet, folder))
        say(f"both serve, and so does `vllm-cost-meter server` at {address}")
        answered = [asyncio.run(ask(machine)) for machine in machines]
        say(f"three tenants had {sum(answered)} replies; gpu-2 is killed in the middle of more")
        _ask_and_kill(machines)
        # An engine tells of itself each second, and its server sends every two.
        time.sleep(8)
        run("audit", ledger=fleet, may_fail=True)
        say("gpu-2 comes back on its disk")
        machines[1].launch()
        machines[1].server.wait()
        asyncio.run(ask(machines[1]))
        wait_until_balanced(fleet, 60)
        month = datetime.now(UTC).strftime("%Y-%m")
        run("statement", "--month", month, "--all", "--idle", "proportional", ledger=fleet)
        run("audit", ledger=fleet)
        say("done: one statement for both machines, and every bill is in it")


def _ask_and_kill(machines: list[Machine]) -> None:
    async def both() -> None:
        asking = [asyncio.create_task(ask(machine)) for machine in machines]
        await asyncio.sleep(1)
        machines[1].kill()
        await asyncio.gather(*asking)

    asyncio.run(both())


if __name__ == "__main__":
    main()
