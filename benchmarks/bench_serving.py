"""Benchmark: throughput, TTFT, TPOT and CPU time of a server with the meter and without it.

Method. Two `vllm serve` run with the same build, model and arguments: one with `--plugins
cost_meter`, the other with the meter installed but not named, and so inert. The client of `vllm
bench serve`, in one process for all runs, drives one server while the other idles. Runs come in
pairs: A B, then B A, and so on. They are many and short, a few seconds each: the speed of a shared
machine drifts over minutes, and the ratio within a pair cancels what both runs share. Both runs in
a pair send the same prompts (the pair has a seed), and each pair has new ones. Both servers get a
discarded warm-up run. After each round both are started again, in the other order, so that one
process's luck (the place of its memory, its core) does not pass for the meter's cost.

Ratios are metered / unmetered within each pair. TTFT and TPOT are each run's medians. "API CPU" is
the CPU time of the driven server's API process in a run. (EngineCore's CPU time says little: it
spins while it waits for the worker.) The output also has the CPU time of the idle server, which is
next to nothing.

`--control` starts both servers without the meter. Its figures are the noise, and a smaller
difference means nothing.

Limits. Clients and servers share the machine, so a slower server also has a slower client. On the
CPU a step of the tiny model takes 3 to 6 ms, against 10 to 50 ms on a GPU with a real model, so the
meter's work per step and token weighs most here. On a machine with other work the ratios of time
are noise; the ratio of CPU time suffers less.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from bench_attribution import machine

from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.bench_client import BenchClient, ClosedLoop
from vllm_cost_meter.lab.server import (
    CPU_ARGUMENTS,
    Server,
    environment_of,
    is_cpu_build,
    meter_arguments,
)
from vllm_cost_meter.lab.sweep.bench import Shape, Target
from vllm_cost_meter.lab.tiny_model import default_path, make_tiny_model

RATIOS = {
    "throughput_ratio": "output_throughput",
    "ttft_ratio": "median_ttft_ms",
    "tpot_ratio": "median_tpot_ms",
    "api_cpu_ratio": "api_cpu_s",
}
API_SERVER = "API server"


@dataclass(frozen=True)
class Process:
    """A process of a server, with its role as name."""

    name: str
    process: psutil.Process


@dataclass
class Subject:
    """A server under test, and its processes."""

    label: str
    server: Server
    processes: list[Process] = field(default_factory=list)

    def start(self) -> None:
        """Start the server, wait until it serves, and find its processes."""
        self.server.launch()
        self.server.wait()
        main = psutil.Process(self.server.pid)
        self.processes = [Process(API_SERVER, main)]
        for child in main.children(recursive=True):
            name = child.name()
            if name.startswith("VLLM::"):
                self.processes.append(Process(name.removeprefix("VLLM::"), child))

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds used so far, by process."""
        used: dict[str, float] = {}
        for entry in self.processes:
            times = entry.process.cpu_times()
            used[entry.name] = used.get(entry.name, 0.0) + times.user + times.system
        return used


class Bench:
    """The two servers of a round, and the client."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        make_tiny = options.model is None
        self.model = options.model or str(default_path())
        self.environment = environment_of(default_path().parent, offline=make_tiny)
        # A plugin that is named for all servers would be in the unmetered one, too.
        self.environment.pop("VLLM_PLUGINS", None)
        self.arguments = [*(CPU_ARGUMENTS if make_tiny and is_cpu_build() else ())]
        self.client = BenchClient(self.environment, folder / "client.log")
        self.load = ClosedLoop(
            Shape(options.input_tokens, options.output_tokens),
            options.requests,
            options.concurrency,
        )
        self.own_ns = self.busy_ns = 0

    def subject(self, label: str, *, metered: bool, number: int) -> Subject:
        """Return a server for a round, with the meter or without it; it is not started yet."""
        name = f"{label}-{number}".replace(" ", "-")
        environment = {
            **self.environment,
            "COST_METER_LEDGER": f"sqlite:///{self.folder / name}.db",
            "COST_METER_GPU_HOUR_USD": "2.50",
        }
        arguments = [*self.arguments, *(meter_arguments() if metered else ())]
        return Subject(
            label, Server(self.model, arguments, environment, self.folder / f"{name}.log")
        )

    @contextlib.contextmanager
    def round(self, number: int) -> Iterator[list[Subject]]:
        """Start both servers, [metered, unmetered], warm them up, and stop them at the end."""
        second = not self.options.control
        subjects = [
            self.subject("metered" if second else "control", metered=second, number=number),
            self.subject("unmetered", metered=False, number=number),
        ]
        try:
            for subject in subjects if number % 2 else subjects[::-1]:
                subject.start()
            for subject in subjects:
                self.drive(subject, seed=10_000 + number, requests=self.options.warmup)
            yield subjects
            if second:
                summary = subjects[0].server.cost("summary")
                self.own_ns += summary["own_ns"]
                self.busy_ns += summary["busy_ns"]
                if not subjects[0].server.cost("audit")["balanced"]:
                    raise ServerError("the metered server's books do not balance")
        finally:
            for subject in subjects:
                subject.server.stop()

    def drive(self, subject: Subject, seed: int, requests: int) -> dict[str, Any]:
        """Send a run's requests; return its measurements. Raises ServerError."""
        target = Target(subject.server.url, self.model, self.model)
        return self.client.run(target, replace(self.load, requests=requests), seed)

    def run(self, subject: Subject, idle: Subject, seed: int) -> dict[str, Any]:
        """Drive one server while the other idles; the answer has the CPU time of both."""
        before, idle_before = subject.cpu_s(), idle.cpu_s()
        measured = self.drive(subject, seed, self.options.requests)
        after, idle_after = subject.cpu_s(), idle.cpu_s()
        by_process = {name: after[name] - before[name] for name in after}
        idle_s = sum(idle_after.values()) - sum(idle_before.values())
        return {
            **{key: measured[key] for key in RATIOS.values() if key in measured},
            "api_cpu_s": by_process[API_SERVER],
            "by_process": by_process,
            "idle_cpu_s": idle_s,
        }


def pair_line(number: int, runs: dict[str, dict[str, Any]], first: str) -> str:
    """Return a pair's figures as a table row; `first` names the server that was driven first."""
    cells = [f"{number:>4}  {first:<9}"]
    for key in RATIOS.values():
        cells += [f"{run[key]:>9.2f}" for run in runs.values()]
        with_meter, without = (run[key] for run in runs.values())
        cells.append(f"{with_meter / without:>7.4f}")
    return " ".join([*cells, f"{max(run['idle_cpu_s'] for run in runs.values()):>7.2f}"])


def measure(bench: Bench) -> list[dict[str, dict[str, Any]]]:
    """Run all pairs, print a row for each, and return their measurements by server label."""
    options = bench.options
    print(
        "pair  first          tokens/s: with, without, ratio   TTFT ms: with, without, ratio"
        "   TPOT ms: with, without, ratio   API CPU s: with, without, ratio   idle CPU s",
        flush=True,
    )
    pairs: list[dict[str, dict[str, Any]]] = []
    for number in range(1, options.rounds + 1):
        with bench.round(number) as subjects:
            until = options.pairs * number // options.rounds
            while len(pairs) < until:
                seed = options.seed + len(pairs)
                first, second = subjects if len(pairs) % 2 == 0 else subjects[::-1]
                runs = {first.label: bench.run(first, second, seed)}
                runs[second.label] = bench.run(second, first, seed)
                pairs.append({subject.label: runs[subject.label] for subject in subjects})
                print(pair_line(len(pairs), pairs[-1], first.label), flush=True)
    return pairs


def summed_up(pairs: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Return the median, minimum and maximum of each ratio over the pairs."""
    results = {}
    for name, key in RATIOS.items():
        ratios = []
        for runs in pairs:
            with_meter, without = (run[key] for run in runs.values())
            ratios.append(with_meter / without)
        results[name] = {
            "median": round(statistics.median(ratios), 4),
            "min": round(min(ratios), 4),
            "max": round(max(ratios), 4),
        }
    return results


def print_cpu_by_process(pairs: list[dict[str, dict[str, Any]]]) -> None:
    """Print the median CPU seconds of a run for each server and process."""
    print("\nCPU seconds of a run by process, median:")
    for label in pairs[0]:
        names = pairs[0][label]["by_process"]
        medians = {
            name: statistics.median(runs[label]["by_process"][name] for runs in pairs)
            for name in names
        }
        print(f"  {label:<10} " + "  ".join(f"{n} {s:.2f}" for n, s in medians.items()))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what the meter costs a server.")
    parser.add_argument("--model", help="model to serve; the tiny one otherwise")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2, help="fresh starts of both servers")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int, default=96, help="in a run")
    parser.add_argument("--warmup", type=int, default=256, help="requests of the warm-up run")
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--control", action="store_true", help="both without the meter: the noise")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if options.model is None:
        make_tiny_model(default_path())
    print(f"Machine: {machine()}\n\n{__doc__}")
    print(
        f"{options.pairs} pairs in {options.rounds} rounds; a run is {options.requests} requests "
        f"of {options.input_tokens} + {options.output_tokens} tokens, {options.concurrency} at a "
        "time."
    )
    print(f"Load average at the start: {os.getloadavg()[0]:.1f} (0 is a quiet machine).\n")
    cache = default_path().parent
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=cache))
    bench = Bench(options, folder)
    try:
        with bench.client:
            pairs = measure(bench)
    except ServerError as error:
        sys.exit(f"bench_serving: {error}\nlogs are in {folder}")
    shutil.rmtree(folder)
    results: dict[str, Any] = summed_up(pairs)
    print_cpu_by_process(pairs)
    print()
    for name, ratio in results.items():
        print(f"{name:<17} {ratio['median']:.4f}  ({ratio['min']:.4f} to {ratio['max']:.4f})")
    results["own_time_share"] = bench.own_ns / bench.busy_ns if bench.busy_ns else None
    if bench.busy_ns:
        print(f"own_time_share    {results['own_time_share']:.4f}  of the engine's busy time")
    print(f"Load average at the end: {os.getloadavg()[0]:.1f}.")
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
