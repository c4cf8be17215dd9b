"""What the meter costs: a metered server against an unmetered one, in interleaved pairs.

Both servers have the same model and arguments, and stand on the same card; one is driven while the
other waits. Runs come as A B, B A, A B, ..., so what drifts meets both alike. Both runs of a pair
send the same prompts, and each pair has new ones. The figure is the ratio metered / unmetered: the
geometric mean over pairs, with Student's interval of 95 % on the logarithms. Both servers are
started once, so one process's luck (the place of its memory) is in the figure; the benchmark
`bench_serving` starts them anew and has a control.

Invariant: both servers of a pair answered the same requests, all of them.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from vllm_cost_meter.lab.bench_client import BenchClient
from vllm_cost_meter.lab.gpu_check.books import audited
from vllm_cost_meter.lab.gpu_check.plan import ThroughputSize
from vllm_cost_meter.lab.gpu_check.served import METERED, UNMETERED, Checked, own_environment
from vllm_cost_meter.lab.validation.real_server.estimate import student_quantile

# What `vllm bench serve` calls them. A gap is that between two tokens of a stream.
FIGURES = {
    "output_tokens_per_s": "output_throughput",
    "ttft_p50_ms": "p50_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "gap_p50_ms": "p50_itl_ms",
    "gap_p99_ms": "p99_itl_ms",
}
WARMUP_SEED = 10_000
# Nothing is divided by less.
SMALLEST = 1e-9

PairOfRuns = Mapping[str, Mapping[str, float]]


class RatioInterval(NamedTuple):
    """A ratio with its 95 % interval."""

    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> "RatioInterval":
        """Return the geometric mean of at least 4 ratios, with Student's interval."""
        logs = [math.log(ratio) for ratio in ratios]
        mean = fmean(logs)
        half = student_quantile(len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
        return cls(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def measure_throughput(
    metered: Checked,
    unmetered: Checked,
    size: ThroughputSize,
    seed: int,
    folder: Path,
    left_s: Callable[[], float],
    on_phase: Callable[[str], None],
) -> dict[str, Any]:
    """Drive both servers in turn, and return the ratios with all runs; ready for JSON.

    A pair that would not end within `left_s` is not begun. Raises ServerError.
    """
    servers = {METERED: metered, UNMETERED: unmetered}
    pairs: list[PairOfRuns] = []
    with BenchClient(own_environment(), folder / "client.log") as client:

        def run(name: str, requests: int, number: int) -> dict[str, float]:
            load = replace(size.load, requests=requests)
            measured = client.run(servers[name].target, load, seed + number)
            return {figure: float(measured[key]) for figure, key in FIGURES.items()}

        on_phase("warm-up of both servers")
        for name in servers:
            run(name, size.warmup_requests, WARMUP_SEED)
        ends_s, took_s = time.monotonic() + size.measure_s, 0.0
        while len(pairs) < size.pairs_max:
            left = min(ends_s - time.monotonic(), left_s())
            if took_s > (left if len(pairs) >= size.pairs_min else left_s()):
                break
            began_s = time.monotonic()
            order = [METERED, UNMETERED] if len(pairs) % 2 == 0 else [UNMETERED, METERED]
            runs = {name: run(name, size.load.requests, len(pairs)) for name in order}
            pairs.append({name: runs[name] for name in servers})
            took_s = time.monotonic() - began_s
            on_phase(f"pair {len(pairs)}: {took_s:.0f} s")
    summary = metered.judged.ask("summary")
    return {
        "load": asdict(size.load),
        **ratios_of(pairs, size.pairs_min),
        "own_time_share": summary["own_time_share"],
        "audit": audited(metered),
        "pairs": pairs,
    }


def ratios_of(pairs: Sequence[PairOfRuns], pairs_min: int) -> dict[str, Any]:
    """Return metered / unmetered of each figure, and the means of both; ready for JSON.

    A ratio is None where there are too few pairs for an interval, or a figure was 0.
    """
    ratios: dict[str, Any] = {}
    means: dict[str, dict[str, float | None]] = {}
    for figure in FIGURES:
        values = {name: [pair[name][figure] for pair in pairs] for name in (METERED, UNMETERED)}
        means[figure] = {name: fmean(each) if each else None for name, each in values.items()}
        is_known = len(pairs) >= pairs_min and min(map(min, values.values())) > SMALLEST
        each = [a / b for a, b in zip(*values.values(), strict=True)] if is_known else []
        ratios[figure] = RatioInterval.of(each)._asdict() if is_known else None
    return {"number_of_pairs": len(pairs), "ratios": ratios, "means": means}
