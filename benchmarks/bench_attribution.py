"""Nanoseconds that the attribution takes per step and per running request, native and twin.

Method. A step is `begin`, `settle` and `drained`, as the engine calls them, with two steps in
flight (async scheduling). Each of N running requests decodes one token, but the newest is a
prefill chunk of 512. After every step N/50 requests, spread over the batch, have left and as many
new ones follow at its end. As the hook hands them over, those that decode are a list and the others
a dict, both made right before the step, as vLLM's scheduler makes them, of the same str objects as
before. Making them, `open` and `close` are not timed (the latter come once per request, not per
step). Native and twin take turns, block by block of
steps, in one process. A figure is the median over blocks of a block's mean per step, so what comes
every few steps (the fit) is in it, shared out. The native one has made as many steps before as it
takes until the fit learns from one step in four, as in an engine that has run for a few minutes.

What is fixed in a step of decodes is the time of a step of one request that decodes; the reading of
the clock is in it.

A second table has the native figures at 256 running by the prefill chunks in the step: with two
planes each is a large player, and all subsets of at most four are enumerated.

Limits. The process does nothing else, so the meter's memory stays in the CPU's caches more than it
would beside a model's work. The machine's clock speed is not pinned. A reading of the clock is in
each step (about 40 ns, which matters to a batch of 1 only). The end of a sweep of the fit, about
15 us every 2,048 steps, is in too few blocks to move a median: 7 ns per step.
"""

import argparse
import gc
import json
import os
import platform
import statistics
from pathlib import Path
from time import perf_counter_ns

from vllm_cost_meter.attribution._native import StepMeter as NativeMeter

from vllm_cost_meter.attribution import step_meter_py
from vllm_cost_meter.attribution.cost_model_py import ALL_STEPS, Planes

BATCHES = (1, 32, 256, 1024, 4096)
CHUNKS = (0, 1, 2, 4)
CHUNKS_BATCH = 256
STEPS_PER_BLOCK = 40
PREFILL_CHUNK = 512
BLOCK_SIZE = 16  # tokens of a block of the KV cache, vLLM's default
METERS = {"native": NativeMeter, "twin": step_meter_py.StepMeter}
# Two planes, so that large players are enumerated: 20 us a token, or 6 ms and 40 ns of context.
PRIOR: Planes = (
    (1e6, 2e4, 0.0, 1.0, 0.0),
    (6e6, 1e3, 0.0, 0.0, 40.0),
    (7e6, 2.1e4, 0.0, 1.0, 40.0),
)


class Traffic:
    """A running batch on a meter of its own: some leave after each step, and as many arrive."""

    def __init__(self, meter: step_meter_py.StepMeter, running: int, chunks: int) -> None:
        self.meter = meter
        self.chunks = min(chunks, running)
        self.running: list[str] = []
        self.now_ns = 0
        self.born = self.steps = self.departures = 0
        self.arrive(running)
        self.in_flight = meter.begin(dict.fromkeys(self.running, PREFILL_CHUNK), self.now_ns)
        self.in_flight_ns = 10**7

    def arrive(self, count: int) -> None:
        """Open so many requests. The prompts of all but the newest `chunks` are computed."""
        for left in range(count, 0, -1):
            self.born += 1
            self.running.append(f"cmpl-{self.born:032x}-0")
            self.meter.open(self.running[-1], PREFILL_CHUNK)
            if left > self.chunks:
                self.meter.position(self.running[-1], PREFILL_CHUNK, False)

    def depart(self, count: int) -> None:
        for _ in range(count):
            self.departures += 1
            self.meter.close(
                self.running.pop(self.departures * 47 % len(self.running)), self.now_ns
            )

    def timed_step(self) -> int:
        """Return the ns that a step takes the meter."""
        begin, settle, drained = self.meter.begin, self.meter.settle, self.meter.drained
        decoding = self.running[: len(self.running) - self.chunks]
        scheduled = dict.fromkeys(self.running[len(decoding) :], PREFILL_CHUNK)
        self.now_ns += self.in_flight_ns
        started_ns = perf_counter_ns()
        step = begin(scheduled, self.now_ns, decoding)
        settle(self.in_flight, self.in_flight_ns)
        drained()
        took_ns = perf_counter_ns() - started_ns
        self.in_flight = step
        # By two planes, and a little noise.
        tokens = len(self.running) + self.chunks * (PREFILL_CHUNK - 1)
        noise = 1 + (self.steps * 37 % 101 - 50) / 2000
        compute, memory = 1e6 + 2e4 * tokens, 6e6 + 1e3 * tokens
        self.in_flight_ns = int(max(compute, memory) * noise)
        self.steps += 1
        # One in 50; of a batch smaller than 50 one now and then.
        leaving = self.steps * len(self.running) // 50 - self.departures
        self.depart(leaving)
        self.arrive(leaving)
        return took_ns


def measure(
    running: int, method: str, blocks: int, chunks: int = 1, meters: tuple[str, ...] = tuple(METERS)
) -> dict[str, float]:
    """Return the ns per step and per request of the meters at one batch size."""
    traffic = {
        name: Traffic(METERS[name](method, PRIOR, True, BLOCK_SIZE), running, chunks)
        for name in meters
    }
    for _ in range(ALL_STEPS):
        traffic["native"].timed_step()
    block_means: dict[str, list[float]] = {name: [] for name in meters}
    for number in range(blocks + 1):
        gc.collect()
        for name in sorted(meters, reverse=number % 2 == 1):  # they take turns at going first
            block_ns = [traffic[name].timed_step() for _ in range(STEPS_PER_BLOCK)]
            if number:  # the first block warms up
                block_means[name].append(statistics.fmean(block_ns))
    figures = {}
    for name, means in block_means.items():
        median_ns = statistics.median(means)
        figures[f"{name}_ns_per_step"] = round(median_ns, 1)
        figures[f"{name}_ns_per_request"] = round(median_ns / running, 2)
    return figures


def machine() -> str:
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return (
        f"{cpu}, {os.cpu_count()} CPUs, {platform.platform()}, Python {platform.python_version()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the attribution, native and twin.")
    parser.add_argument("--method", choices=step_meter_py.METHODS, default="shapley")
    parser.add_argument("--blocks", type=int, default=41, help="timed blocks per batch size")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    print(f"Machine: {machine()}\n\n{__doc__}")
    print(f"Method {options.method}, {options.blocks} blocks of {STEPS_PER_BLOCK} steps.\n")
    print(" running  native ns/step  /request    twin ns/step  /request")
    results = {}
    for running in BATCHES:
        figures = measure(running, options.method, options.blocks)
        results[str(running)] = figures
        print(
            f"{running:>8}  {figures['native_ns_per_step']:>14.0f}"
            f" {figures['native_ns_per_request']:>9.2f}  {figures['twin_ns_per_step']:>14.0f}"
            f" {figures['twin_ns_per_request']:>9.2f}",
            flush=True,
        )
    fixed = measure(1, options.method, options.blocks, 0, ("native",))
    results["1 that decodes"] = fixed
    print(f"\nFixed: {fixed['native_ns_per_step']:.0f} ns, a step of one request that decodes.")
    print(f"\n  chunks  native ns/step  ({CHUNKS_BATCH} running)")
    for chunks in CHUNKS:
        figures = measure(CHUNKS_BATCH, options.method, options.blocks, chunks, ("native",))
        results[f"{CHUNKS_BATCH} with {chunks} chunks"] = figures
        print(f"{chunks:>8}  {figures['native_ns_per_step']:>14.0f}", flush=True)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
