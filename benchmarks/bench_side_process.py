"""Benchmark: what questions to the side endpoint cost a server that serves, beside the same load.

Method, first part. A ledger of 300,000 bills lies in a SQLite file. This process is an API server:
it has the meter's runtime with its side endpoint, and on its event loop a ticker that wants to run
every 5 ms; how much later it runs is the loop's delay. Twelve clients, in a process of their own,
ask the heaviest questions all the time: reports, tenants, audit, economics. The comparison is as
much load by strangers: as many processes as questions run at once, at the same priority, which sum
up rows of a SQLite file and compute in Python, and nobody asks anything. The two take turns, a few
seconds each, in changing order, so that both meet the same machine. Before each turn there is a
pause in which what the one before had begun ends. Figures are percentiles over all ticks of a kind,
and the median over the turns of the difference between the two.
The clients, who would be elsewhere, have the lowest priority too.

Second part (`--server`). A real `vllm serve` on the tiny model: its engine bound to one core, all
else to another one. A client streams completions; the figure is the time between two tokens.
Stretches with the twelve clients and without any take turns. So the questions compete with the API
server for its core at the lowest priority, and take nothing from the engine's.

Limits. The clients are on this machine too, and part of the load. Differences between turns count,
not absolute delays: on a shared machine those change with whatever else runs.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import httpx
import psutil
from bench_attribution import machine

from vllm_cost_meter.api_server.side_endpoint import SideEndpoint
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.endpoint.answers import NO_METER
from vllm_cost_meter.lab.server import CPU_ARGUMENTS, Server, environment_of, meter_arguments
from vllm_cost_meter.lab.tiny_model import default_path, make_tiny_model
from vllm_cost_meter.ledger.batches import BatchWriter
from vllm_cost_meter.records.bill import Bill, UsagePiece
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, Latencies, Usage
from vllm_cost_meter.tenants.budgets import BudgetFigures
from vllm_cost_meter.units.time import NS_PER_HOUR

TICK_S = 0.005
CLIENTS = 12
# What takes longer is ended, so that a turn of a busy machine ends too.
QUESTION_TIMEOUT_S = 15
QUESTIONS = (
    "/cost/report?aggregate=tenant,model,hour&step=1h",
    "/cost/tenants",
    "/cost/report?aggregate=tag:team&idle=proportional",
    "/cost/audit",
    "/cost/summary",
    "/cost/economics",
    "/cost/requests?limit=1000",
)
TENANTS, HOURS = 50, 24


# ---- the ledger


def records(number: int, now_hour: int) -> tuple[EngineRequest, HttpRequest]:
    """Return an engine request with its bill, and its HTTP request."""
    hour = now_hour - number % HOURS
    at_ns, http_id, owner = hour * NS_PER_HOUR, f"cost-{number:032x}", Owner(f"t{number % TENANTS}")
    bill = Bill(
        *("run", number + 1, f"cmpl-{number}-0", "length_capped", "tokens", 128, 0, 128),
        *(0, 128, 1280, 1, 1, (UsagePiece(hour, 1_000_000, 80_000_000, 128, 127),)),
    )
    part = EngineRequest(
        bill=bill,
        http_request_id=http_id,
        response_id=f"cmpl-{number}",
        external_id=f"cmpl-{number}-0",
        prompt_group=bill.request_id,
        owner=owner,
        model=f"model-{number % 3}",
        lora=None,
        route="/v1/completions",
        cost_nanousd=56_250,
        marginal_cost_nanousd=50_000,
        started_at_ns=at_ns,
        finished_at_ns=at_ns,
        latencies=Latencies(1.0, 10.0, 5.0, 700.0),
    )
    http = HttpRequest(
        http_request_id=http_id,
        response_id=part.response_id,
        x_request_id=None,
        owner=owner,
        model=part.model,
        route=part.route,
        status=200,
        streamed=True,
        usage=Usage(128, 0, 128),
        gpu_time_ns=bill.gpu_time_ns,
        cost_nanousd=part.cost_nanousd,
        started_at_ns=at_ns,
        finished_at_ns=at_ns,
    )
    return part, http


def fill(url: str, bills: int) -> None:
    """Write bills, and the engine's totals that count them, into a ledger."""
    from tests.support.builders import make_snapshot  # noqa: PLC0415 - the builder of all tests
    from vllm_cost_meter.records.snapshot import ClassTotals  # noqa: PLC0415

    now_hour = time.time_ns() // NS_PER_HOUR
    batches = BatchWriter(url)
    hours: dict[int, int] = {}
    for first in range(0, bills, 5_000):
        batch = [records(n, now_hour) for n in range(first, min(first + 5_000, bills))]
        for part, _ in batch:
            (piece,) = part.bill.pieces
            hours[piece.hour] = hours.get(piece.hour, 0) + piece.gpu_time_ns
        batches.write([record for both in batch for record in both])
    used = sum(hours.values())
    taken = make_snapshot(
        run_id="run",
        last_seq=bills,
        billed_ns=used,
        wall_ns=used,
        totals=ClassTotals(requests=used),
        hours={hour: ClassTotals(requests=ns) for hour, ns in hours.items()},
        taken_at_ns=time.time_ns(),
    )
    batches.write([taken])
    batches.drop()


def ledger_of(folder: Path, options: argparse.Namespace) -> Path:
    """Return the ledger to ask, filled if it was not there."""
    path: Path = options.ledger or folder / "ledger.db"
    if not path.exists():
        fill(f"sqlite:///{path}", options.bills)
    return path


# ---- clients and strangers


def ask(url: str, works: Event, answered: Any) -> None:
    """Ask the heaviest questions from twelve threads, whenever `works` is set."""
    os.setpriority(os.PRIO_PROCESS, 0, 19)  # real clients are not on this machine

    def one(number: int) -> None:
        with httpx.Client(base_url=url, trust_env=False, timeout=120) as client:
            while works.wait():
                number += 1
                with contextlib.suppress(httpx.HTTPError):
                    client.get(QUESTIONS[number % len(QUESTIONS)])
                    answered.value += 1

    threads = [threading.Thread(target=one, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def burn(path: str, works: Event) -> None:
    """Be a stranger: as much SQL and Python as a question, at the same priority."""
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    connection = sqlite3.connect(path)
    while works.wait():
        until_s = time.monotonic() + 0.5
        while time.monotonic() < until_s:
            connection.execute("SELECT tenant, hour, sum(decode_ns) FROM requests GROUP BY 1, 2")
            sum(number * number for number in range(100_000))


@contextlib.contextmanager
def process(target: Any, *args: Any) -> Iterator[Event]:
    """Run a process of ours that works while its event is set."""
    spawn = multiprocessing.get_context("spawn")
    works = spawn.Event()
    made = spawn.Process(target=target, args=(*args[:1], works, *args[1:]), daemon=True)
    made.start()
    try:
        yield works
    finally:
        made.kill()
        made.join()


# ---- first part: the loop's delay


async def ticks(seconds: float) -> list[float]:
    """Return by how many ms the loop ran each tick too late."""
    late_ms = []
    end_s = time.perf_counter() + seconds
    while (began_s := time.perf_counter()) < end_s:
        await asyncio.sleep(TICK_S)
        late_ms.append((time.perf_counter() - began_s - TICK_S) * 1e3)
    return late_ms


async def loop_delays(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the percentiles of the loop's delay, by kind of turn."""
    path = ledger_of(folder, options)
    settings = Settings(port=0, question_timeout_s=QUESTION_TIMEOUT_S)

    async def refresh() -> None:
        """The engines of this server are not there to be asked."""

    side = SideEndpoint(
        lambda: settings,
        f"sqlite:///{path}",
        refresh=refresh,
        alive=lambda: ["run"],
        figures=BudgetFigures,
        health=lambda: NO_METER,
    )
    await side.serve()
    assert await side.process.wait(120)
    answered = multiprocessing.get_context("spawn").Value("i", 0)
    late: dict[str, list[list[float]]] = {"idle": [], "questions": [], "strangers": []}
    url = f"http://127.0.0.1:{side.port}"
    with contextlib.ExitStack() as stack:
        clients = stack.enter_context(process(ask, url, answered))
        strangers = [
            stack.enter_context(process(burn, str(path))) for _ in range(settings.questions_at_once)
        ]
        await asyncio.sleep(3)
        for turn in range(options.turns):
            kinds = ["idle", "questions", "strangers"]
            for kind in kinds if turn % 2 else kinds[::-1]:
                works = {"idle": [], "questions": [clients], "strangers": strangers}[kind]
                for each in works:
                    each.set()
                await asyncio.sleep(1)
                late[kind].append(await ticks(options.seconds))
                for each in works:
                    each.clear()
                print(f"turn {turn}, {kind}: {percentiles(late[kind][-1])}", flush=True)
                await until_quiet(side)
    await side.stop()
    return {"answered": answered.value, **compared(late, "questions", "strangers")}


async def until_quiet(side: SideEndpoint) -> None:
    """Wait until the questions of the turn before are answered, and the strangers rest."""
    await asyncio.sleep(0.6)
    async with httpx.AsyncClient(trust_env=False, timeout=120) as client:
        while True:
            health = (await client.get(f"http://127.0.0.1:{side.port}/cost/health")).json()
            if not health["questions"]["running"] + health["questions"]["waiting"]:
                return
            await asyncio.sleep(0.1)


def percentiles(of_ms: list[float]) -> dict[str, float]:
    """Return the median, p90, p99 and the number of values."""
    cuts = statistics.quantiles(of_ms, n=100)
    return {
        "p50_ms": round(cuts[49], 3),
        "p90_ms": round(cuts[89], 3),
        "p99_ms": round(cuts[98], 3),
        "n": len(of_ms),
    }


def compared(turns: dict[str, list[list[float]]], one: str, other: str) -> dict[str, Any]:
    """Return the percentiles over all turns of a kind, and how two kinds differ turn by turn."""
    pairs = [
        (percentiles(ours), percentiles(theirs))
        for ours, theirs in zip(turns[one], turns[other], strict=True)
    ]
    differences = {
        name: round(statistics.median(ours[name] - theirs[name] for ours, theirs in pairs), 3)
        for name in ("p50_ms", "p90_ms", "p99_ms")
    }
    together = {
        kind: percentiles([ms for of in all_of for ms in of]) for kind, all_of in turns.items()
    }
    return {**together, f"{one} - {other}, median of turns": differences}


# ---- second part: tokens of a real server


def tokens(url: str, model: str, seconds: float, clients: int) -> list[float]:
    """Return the ms between two tokens of streams that run for so long."""
    gaps: list[float] = []

    def stream() -> None:
        end_s = time.monotonic() + seconds
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            while time.monotonic() < end_s:
                body = {"model": model, "prompt": "a b c d", "max_tokens": 128, "stream": True}
                sent = {**body, "ignore_eos": True}
                with client.stream("POST", "/v1/completions", json=sent) as reply:
                    before_s = None
                    for line in reply.iter_lines():
                        if not line.startswith("data: {"):
                            continue
                        now_s = time.perf_counter()
                        if before_s is not None:
                            gaps.append((now_s - before_s) * 1e3)
                        before_s = now_s

    threads = [threading.Thread(target=stream) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return gaps


def bind(server: Server) -> None:
    """Bind the engine and its workers to one core, and all else of the server to the other."""
    main = psutil.Process(server.pid)
    for each in (main, *main.children(recursive=True)):
        core = 0 if each.name().startswith("VLLM::") else 1
        subprocess.run(["taskset", "-a", "-cp", str(core), str(each.pid)], check=True, stdout=-3)  # noqa: S607


def token_gaps(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the percentiles of the time between two tokens, with questions and without."""
    make_tiny_model(default_path())
    url = f"sqlite:///{ledger_of(folder, options)}"
    environment = {
        **environment_of(default_path().parent, offline=True),
        "COST_METER_LEDGER": url,
        "COST_METER_GPU_HOUR_USD": "2.50",
        "OMP_NUM_THREADS": "1",
    }
    arguments = [*CPU_ARGUMENTS, *meter_arguments()]
    server = Server(str(default_path()), arguments, environment, folder / "server.log")
    server.launch()
    gaps: dict[str, list[list[float]]] = {"without": [], "with": []}
    answered = multiprocessing.get_context("spawn").Value("i", 0)
    try:
        server.wait()
        bind(server)
        os.sched_setaffinity(0, {1})  # the clients too
        tokens(server.url, str(default_path()), 3, options.streams)
        with process(ask, server.side_url, answered) as clients:
            for turn in range(options.turns):
                for kind in ("without", "with") if turn % 2 else ("with", "without"):
                    if kind == "with":
                        clients.set()
                        time.sleep(1)
                    of = tokens(server.url, str(default_path()), options.seconds, options.streams)
                    gaps[kind].append(of)
                    clients.clear()
                    time.sleep(2)
    finally:
        server.stop()
    return {"answered": answered.value, **compared(gaps, "with", "without")}


def main() -> None:
    """Run a part, and print its percentiles."""
    parser = argparse.ArgumentParser(description="Measure what questions cost a server.")
    parser.add_argument("--server", action="store_true", help="the second part: a real server")
    parser.add_argument("--bills", type=int, default=300_000)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn")
    parser.add_argument("--streams", type=int, default=4, help="streams at once, second part")
    parser.add_argument("--ledger", type=Path, help="a file to keep for the other part")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    print(f"Machine: {machine()}\n\n{__doc__}")
    print(f"Load average at the start: {os.getloadavg()[0]:.1f} (0 is a quiet machine).\n")
    with tempfile.TemporaryDirectory(dir=default_path().parent) as name:
        folder = Path(name)
        if options.server:
            results = token_gaps(folder, options)
        else:
            results = asyncio.run(loop_delays(folder, options))
    for kind, figures in results.items():
        print(f"{kind:<10} {figures}")
    print(f"Load average at the end: {os.getloadavg()[0]:.1f}.")
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
