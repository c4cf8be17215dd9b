"""Benchmark: by how much a hard budget is exceeded, in the worst cases that we know.

Method. A real `vllm serve` on loopback has a tenant with a budget for each case: 1 GPU-second, or
0.05 for each of 250 tenants, in the last day. Clients ask as the case says until each of them was
refused or has its reply. Then the budget is read from the side endpoint, once nothing runs and it
has counted every bill; `over` is what was used beyond its amount.

- burst: 60 clients ask at once for 1,500 tokens each, again and again;
- long reply: one request for 4,000 tokens;
- beams: one beam search, 4 beams of 400 tokens;
- prompt list: one request with 300 prompts, 100 tokens each;
- ledger outage: 16 clients ask for 40 tokens again and again, while another process holds the
  ledger's lock for 8 s;
- restart: the server is killed in the middle of a burst, started again, and has another burst;
- 250 tenants: a client each asks for 40 tokens again and again; the worst of them counts.

Columns. `bound` is the formula of docs/howto/budgets.md: with G = 1 GPU, L = the snapshot interval
+ 0.75 s, N = `max_concurrent` (the number of clients where there is none) and c = the GPU time of
the dearest request of the case so far, it is G*L with `stop_running` and G*L + N*c without. In an
outage of the ledger nothing is ended, so it is G*L + N*c, and L is longer by the outage or, with
`fail_closed`, by the 5 s until figures are stale.

State machine of a client: ask; 200: ask again (cases that repeat) or done; 429 `budget_exceeded`:
done; 429 `rate_limit_exceeded`: wait 50 ms and ask again; 503 or no connection: wait 200 ms and ask
again, until the case ends.

Limits. The tiny model on a CPU: a step takes 3 to 6 ms, so a second holds many requests, and each
costs little. Clients and server share the machine. One API server; several multiply N.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import re
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from bench_attribution import machine

from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.server import (
    CPU_ARGUMENTS,
    Server,
    environment_of,
    is_cpu_build,
    meter_arguments,
)
from vllm_cost_meter.lab.tiny_model import default_path, make_tiny_model
from vllm_cost_meter.units.time import NS_PER_SECOND

MODEL = "tiny"
PROMPT = "The quick brown fox jumps over the lazy dog and then goes home to sleep."
BUDGET_S = "1"
TENANTS = 250
SMALL_BUDGET_S = "0.05"
LATENESS_S = 1.75
OUTAGE_S = 8.0
# Figures are stale after that time, and who fails closed is refused.
STALE_S = 5.0
CASE_S_MAX = 100.0
SETTLED_S_MAX = 60.0
BURST = 60


@dataclass
class Case:
    """What is asked of one budget, and how it holds."""

    name: str
    load: str
    rules: dict[str, Any]
    fail_closed: bool = False
    clients: int = 1
    body: dict[str, Any] = field(default_factory=dict)
    repeats: bool = True
    served: int = 0
    refused: int = 0
    over_s: float = 0.0
    bound_s: float = 0.0
    dearest_s: float = 0.0

    @property
    def held_by(self) -> str:
        """Return what bounds the budget, for people."""
        words = [f"max_concurrent = {self.most}"] if self.most is not None else []
        words += ["stop_running"] if self.stops else []
        words += ["fail_closed"] if self.fail_closed else []
        return ", ".join(words) or "-"

    @property
    def late_s(self) -> float:
        """Return the time from a crossing to the moment from which nothing is admitted."""
        if self.load != "ledger outage":
            return LATENESS_S
        return (STALE_S if self.fail_closed else OUTAGE_S) + LATENESS_S

    @property
    def most(self) -> int | None:
        """Return the bound on what runs at once."""
        most: int | None = self.rules.get("max_concurrent")
        return most

    @property
    def stops(self) -> bool:
        """Tell whether what runs is ended."""
        return bool(self.rules.get("stop_running"))


STOPS = {"stop_running": True}
FOUR = {"max_concurrent": 4}
LONG = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True}
SHORT = {**LONG, "max_tokens": 40}
BEAMS = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "use_beam_search": True, "n": 4}
LIST = {**LONG, "prompt": [f"{number} {PROMPT}" for number in range(300)], "max_tokens": 100}


def cases() -> list[Case]:
    """Return the cases of one tenant each, in their order."""
    burst = {"load": "burst", "clients": BURST, "body": {**LONG, "max_tokens": 1_500}}
    outage = {"load": "ledger outage", "clients": 16, "body": SHORT}
    once = {"repeats": False}
    return [
        Case("burst-open", rules={}, **burst),
        Case("burst-stops", rules=STOPS, **burst),
        Case("burst-four", rules=FOUR, **burst),
        Case("burst-both", rules={**FOUR, **STOPS}, **burst),
        Case("long-open", "long reply", {}, body={**LONG, "max_tokens": 4_000}, **once),
        Case("long-stops", "long reply", STOPS, body={**LONG, "max_tokens": 4_000}, **once),
        Case("beams-stops", "beams", STOPS, body=BEAMS, **once),
        Case("list-stops", "prompt list", STOPS, body=LIST, **once),
        Case("outage-open", rules={**FOUR, **STOPS}, **outage),
        Case("outage-closed", rules={**FOUR, **STOPS}, fail_closed=True, **outage),
        Case("restart", "restart", {**FOUR, **STOPS}, clients=BURST, body=LONG),
    ]


def crowd() -> list[Case]:
    """Return the 250 tenants, a case each."""
    rules = {"max_concurrent": 1, **STOPS}
    return [Case(f"crowd-{n}", "250 tenants", rules, body=SHORT) for n in range(TENANTS)]


def configuration(all_cases: list[Case]) -> str:
    """Return the settings file: a tenant and its budget for each case."""
    lines = []
    for case in all_cases:
        digest = hashlib.sha256(case.name.encode()).hexdigest()
        amount = SMALL_BUDGET_S if case.load == "250 tenants" else BUDGET_S
        lines += [
            "[[tenants]]",
            f'name = "{case.name}"',
            f'api_key_sha256 = ["{digest}"]',
            f"fail_closed = {json.dumps(case.fail_closed)}",
            "[[budgets]]",
            f'name = "{case.name}"',
            f'tenant = "{case.name}"',
            f"gpu_seconds = {amount}",
            'period = "rolling"',
            "days = 1",
            *(f"{key} = {json.dumps(value)}" for key, value in case.rules.items()),
        ]
    return "\n".join(lines) + "\n"


class Clients:
    """The clients of one server."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def all_asked(self, case: Case) -> None:
        """Return once every client of a case was refused or has its reply."""
        limits = httpx.Limits(max_connections=None)
        headers = {"authorization": f"Bearer {case.name}"}
        async with httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=CASE_S_MAX, limits=limits
        ) as api:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CASE_S_MAX), asyncio.TaskGroup() as group:
                    for _ in range(case.clients):
                        group.create_task(self._asks(api, case))

    async def _asks(self, api: httpx.AsyncClient, case: Case) -> None:
        body = {"model": MODEL, **case.body}
        while True:
            try:
                reply = await api.post("/v1/completions", json=body)
            except httpx.TransportError:
                await asyncio.sleep(0.2)
                continue
            if reply.status_code == 200:
                case.served += 1
                if not case.repeats:
                    return
            elif reply.status_code == 503:
                await asyncio.sleep(0.2)
            elif reply.json()["error"].get("code") == "rate_limit_exceeded":
                await asyncio.sleep(0.05)
            else:
                assert reply.json()["error"]["code"] == "budget_exceeded", reply.text
                case.refused += 1
                return


class Bench:
    """The server and what is asked of it."""

    def __init__(self, folder: Path, some: str) -> None:
        self.all_cases = [case for case in cases() if re.search(some, case.name)]
        self.crowd = crowd() if re.search(some, "crowd") else []
        config = folder / "meter.toml"
        config.write_text(configuration([*self.all_cases, *self.crowd]))
        self.ledger = folder / "ledger.db"
        environment = {
            **environment_of(default_path().parent, offline=True),
            "COST_METER_LEDGER": f"sqlite:///{self.ledger}",
        }
        arguments = [
            *(CPU_ARGUMENTS if is_cpu_build() else ()),
            *("--served-model-name", MODEL, "--max-model-len", "8192"),
            *meter_arguments(config),
        ]
        self.server = Server(str(default_path()), arguments, environment, folder / "server.log")

    def start(self) -> None:
        """Start the server and wait until it serves."""
        self.server.launch()
        self.server.wait()

    def run(self) -> None:
        """Run all cases, one after the other."""
        for case in self.all_cases:
            asked: Callable[[Case], None] = {
                "ledger outage": self._outage,
                "restart": self._restart,
            }.get(case.load, self._plain)
            asked(case)
            self.measure([case])
            report([case])
        if self.crowd:
            asyncio.run(self._ask_crowd())
            self.measure(self.crowd)

    def _plain(self, case: Case) -> None:
        asyncio.run(Clients(self.server.url).all_asked(case))

    async def _ask_crowd(self) -> None:
        clients = Clients(self.server.url)
        await asyncio.gather(*(clients.all_asked(case) for case in self.crowd))

    def _outage(self, case: Case) -> None:
        async def asked_in_an_outage() -> None:
            asking = asyncio.create_task(Clients(self.server.url).all_asked(case))
            await asyncio.sleep(0.3)
            blocker = sqlite3.connect(self.ledger, isolation_level=None, timeout=10)
            blocker.execute("BEGIN EXCLUSIVE")
            await asyncio.sleep(OUTAGE_S)
            blocker.close()
            await asking

        asyncio.run(asked_in_an_outage())

    def _restart(self, case: Case) -> None:
        async def asked_meanwhile() -> None:
            asking = asyncio.create_task(Clients(self.server.url).all_asked(case))
            await asyncio.sleep(0.7)
            os.killpg(self.server.pid, signal.SIGKILL)
            await asyncio.to_thread(self.start)
            await asking

        asyncio.run(asked_meanwhile())

    def measure(self, measured: list[Case]) -> None:
        """Read how far the budgets were exceeded, once they have counted everything."""
        names = {case.name for case in measured}
        deadline = time.monotonic() + SETTLED_S_MAX
        while True:
            runs = self.server.cost("audit")["runs"]
            used = {
                row["tenant"]: row["gpu_time_ns"]
                for row in self.server.cost("tenants")["tenants"]
                if row["tenant"] in names
            }
            budgets = {b["budget"]: b for b in self.server.cost("budgets")["budgets"]}
            is_idle = all(run["in_flight_ns"] == 0 for run in runs if run["alive"])
            if is_idle and all(budgets[name]["used"] == used.get(name, 0) for name in names):
                break
            if time.monotonic() > deadline:
                raise ServerError("the budgets have not counted everything in time")
            time.sleep(0.3)
        for case in measured:
            case.over_s = budgets[case.name]["over"] / NS_PER_SECOND
            path = f"requests?tenant={case.name}&limit=1000"
            rows = self.server.cost(path)["requests"]
            case.dearest_s = max((row["gpu_time_ns"] for row in rows), default=0) / NS_PER_SECOND
            case.bound_s = case.late_s
            if not case.stops or case.load == "ledger outage":
                case.bound_s += (case.most or case.clients) * case.dearest_s


def report(some: list[Case]) -> None:
    """Print a line of the table: the worst of these cases."""
    worst = max(some, key=lambda case: case.over_s)
    served, refused = sum(case.served for case in some), sum(case.refused for case in some)
    print(
        f"| {worst.load} | {worst.held_by} | {served} / {refused} | {worst.over_s:.2f}"
        f" | {worst.bound_s:.2f} |",
        flush=True,
    )


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", default="", help="run the cases whose name this regular expression finds"
    )
    parser.add_argument("--json", action="store_true", help="print all cases as JSON at the end")
    options = parser.parse_args()
    # So that the server is stopped, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    make_tiny_model(default_path())
    print(machine())
    print("| load | held by | served / refused | over, GPU-s | bound, GPU-s |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.only)
        try:
            bench.start()
            bench.run()
            if bench.crowd:
                report(bench.crowd)
        except Exception:
            print(bench.server.log_end(), file=sys.stderr)
            raise
        finally:
            bench.server.stop()
    if options.json:
        print(json.dumps([vars(case) for case in [*bench.all_cases, *bench.crowd]], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
