"""Benchmark: nanoseconds that attribution takes per step and per request, native and twin.

Method. A step is `begin`, `settle` and `drained`, as the engine calls them, with two steps in
flight (async scheduling). Each of N running requests decodes one token, but the newest computes a
prefill chunk of 512. After every step N/50 requests, spread over the batch, leave, and as many new
ones join at its end. The hook hands over a list of the decoding requests and a dict of the others.
Both are made right before the step from the same str objects, as vLLM's scheduler makes them. That
work, `open` and `close` are not timed (the latter two come once per request, not per step).

Native and twin take turns in one process, block by block of steps. A figure is the median over
blocks of a block's mean per step, so it includes work that comes every few steps (the fit). Before
the first block, the native meter runs until its fit learns from one step in four, as in an engine
that has run for a few minutes.

The fixed cost of a decode step is the time of a step with one decoding request, with the reading of
the clock.

A second table has the native figures with 256 running requests, by the number of prefill chunks in
the step. Each chunk is a lump of tokens that is there or not, and one of the large players of
attention, of which all subsets of at most five are enumerated.

Limits. The process does nothing else, so the meter's memory stays in the CPU's caches more than it
would beside a model's work. The machine's clock speed is not pinned. Each step includes a reading
of the clock (about 40 ns, which matters only with one request). The end of a sweep by the fit
takes 20 to 60 us and comes every 2,048 steps (30 ns per step), in too few blocks to move a median.
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
from vllm_cost_meter.attribution.cost_model import FEATURES, RAMPS, Coefficients, Planes
from vllm_cost_meter.attribution.cost_model_py import ALL_STEPS
from vllm_cost_meter.attribution.priors import NOTHING_KNOWN

BATCHES = (1, 32, 256, 1024, 4096)
CHUNKS = (0, 1, 2, 4)
CHUNKS_BATCH = 256
STEPS_PER_BLOCK = 40
PREFILL_CHUNK = 512
BLOCK_SIZE = 16  # tokens per block of the KV cache, vLLM's default
METERS = {"native": NativeMeter, "twin": step_meter_py.StepMeter}
# The curve of an 8B model on an H100: 5.8 ms, 20 us a token beyond 256, 46 ns a token of context.
PLANES: Planes = ((1e6, 2e4, 0.0, 1.0, 0.0), (6e6, 1e3, 0.0, 0.0, 40.0))
COEFFICIENTS: Coefficients = (
    *(5.8e6, 2e5, 8e2, 1.0, 0.0, 15.0, 46.0),
    *([0.0] * FEATURES),
    *(2e4 if begin >= 256 else 3e3 for begin in RAMPS),
    0.0,
)


class Traffic:
    """A running batch with its own meter: after each step some requests leave and others come."""

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
        """Open `count` requests; all but the newest `chunks` have their prompt computed."""
        for left in range(count, 0, -1):
            self.born += 1
            self.running.append(f"cmpl-{self.born:032x}-0")
            self.meter.open(self.running[-1], PREFILL_CHUNK)
            if left > self.chunks:
                self.meter.position(self.running[-1], PREFILL_CHUNK, False)

    def depart(self, count: int) -> None:
        """Close `count` requests, spread over the batch."""
        for _ in range(count):
            self.departures += 1
            self.meter.close(
                self.running.pop(self.departures * 47 % len(self.running)), self.now_ns
            )

    def timed_step(self) -> int:
        """Run one step, and return the ns that the meter took for it."""
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
        # The step's time follows the curve, with a little noise.
        tokens = len(self.running) + self.chunks * (PREFILL_CHUNK - 1)
        noise = 1 + (self.steps * 37 % 101 - 50) / 2000
        time_ns = 5.8e6 + 3e3 * min(tokens, 256) + 2e4 * max(0, tokens - 256)
        self.in_flight_ns = int((time_ns + 46.0 * PREFILL_CHUNK * len(self.running)) * noise)
        self.steps += 1
        # One request in 50 leaves; from a smaller batch one leaves now and then.
        leaving = self.steps * len(self.running) // 50 - self.departures
        self.depart(leaving)
        self.arrive(leaving)
        return took_ns


def measure(
    running: int, method: str, blocks: int, chunks: int = 1, meters: tuple[str, ...] = tuple(METERS)
) -> dict[str, float]:
    """Return each meter's ns per step and per request at one batch size."""
    traffic = {
        name: Traffic(METERS[name](method, NOTHING_KNOWN, BLOCK_SIZE), running, chunks)
        for name in meters
    }
    for each in traffic.values():
        each.meter.adopt(PLANES, COEFFICIENTS, False)
    for _ in range(ALL_STEPS):
        traffic["native"].timed_step()
    block_means: dict[str, list[float]] = {name: [] for name in meters}
    for number in range(blocks + 1):
        gc.collect()
        for name in sorted(
            meters, reverse=number % 2 == 1
        ):  # The meters take turns at going first.
            block_ns = [traffic[name].timed_step() for _ in range(STEPS_PER_BLOCK)]
            if number:  # The first block warms up.
                block_means[name].append(statistics.fmean(block_ns))
    figures = {}
    for name, means in block_means.items():
        median_ns = statistics.median(means)
        figures[f"{name}_ns_per_step"] = round(median_ns, 1)
        figures[f"{name}_ns_per_request"] = round(median_ns / running, 2)
    return figures


def machine() -> str:
    """Return this machine's CPU, number of CPUs, platform and Python version in one line."""
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
    print(f"\nFixed: {fixed['native_ns_per_step']:.0f} ns, a step with one decoding request.")
    print(f"\n  chunks  native ns/step  ({CHUNKS_BATCH} running)")
    for chunks in CHUNKS:
        figures = measure(CHUNKS_BATCH, options.method, options.blocks, chunks, ("native",))
        results[f"{CHUNKS_BATCH} with {chunks} chunks"] = figures
        print(f"{chunks:>8}  {figures['native_ns_per_step']:>14.0f}", flush=True)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
