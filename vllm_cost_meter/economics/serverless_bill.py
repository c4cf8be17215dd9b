"""Monthly bill of a serverless provider: hardware by the second, storage by the month.

Invariant: the total is the sum of its four lines.
"""

from dataclasses import dataclass
from typing import ClassVar

from vllm_cost_meter.economics.numbers import not_negative, positive


@dataclass(frozen=True, slots=True)
class Serverless:
    """A month's bill in four lines, the price of one hardware second, and USD per call."""

    FORMULA: ClassVar = (
        "usd_per_s = (gpu_usd_per_s + cpu_cores x cpu_usd_per_core_s + memory_gib x"
        " memory_usd_per_gib_s) x multiplier; build_usd = build_s x builds x usd_per_s; init_usd ="
        " init_s x cold_starts x usd_per_s; inference_usd = run_s x calls x usd_per_s; storage_usd"
        " = max(storage_gib - free_storage_gib, 0) x storage_usd_per_gib_month"
    )

    usd_per_s: float
    """USD per second: the price of the hardware."""
    build_usd: float
    """USD: the cost of builds in a month."""
    init_usd: float
    """USD: the cost of cold starts in a month."""
    inference_usd: float
    """USD: the cost of calls in a month."""
    storage_usd: float
    """USD: the cost of storage in a month."""
    total_usd: float
    """USD: the total cost of a month."""
    usd_per_call: float | None
    """USD: the cost of one call; null without calls."""


def serverless(
    *,
    gpu_usd_per_s: float,
    run_s: float,
    calls: float,
    cpu_cores: float = 0,
    cpu_usd_per_core_s: float = 0,
    memory_gib: float = 0,
    memory_usd_per_gib_s: float = 0,
    multiplier: float = 1,
    build_s: float = 0,
    builds: float = 1,
    init_s: float = 0,
    cold_starts: float = 0,
    storage_gib: float = 0,
    free_storage_gib: float = 0,
    storage_usd_per_gib_month: float = 0,
) -> Serverless:
    """Monthly cost at a provider that bills hardware by the second.

    `multiplier` is the factor for a price tier or region; it applies to hardware only. Each of the
    `calls` takes `run_s` seconds. `builds` build the image. In each of the `cold_starts` a machine
    loads the model, which is billed too. Raises ValueError for an argument out of range.
    """
    cores = not_negative("cpu_cores", cpu_cores)
    memory = not_negative("memory_gib", memory_gib)
    usd_per_s = positive("multiplier", multiplier) * (
        positive("gpu_usd_per_s", gpu_usd_per_s)
        + cores * not_negative("cpu_usd_per_core_s", cpu_usd_per_core_s)
        + memory * not_negative("memory_usd_per_gib_s", memory_usd_per_gib_s)
    )
    count = not_negative("calls", calls)
    stored = not_negative("storage_gib", storage_gib)
    billed = max(stored - not_negative("free_storage_gib", free_storage_gib), 0.0)
    lines = (
        not_negative("build_s", build_s) * not_negative("builds", builds) * usd_per_s,
        not_negative("init_s", init_s) * not_negative("cold_starts", cold_starts) * usd_per_s,
        positive("run_s", run_s) * count * usd_per_s,
        billed * not_negative("storage_usd_per_gib_month", storage_usd_per_gib_month),
    )
    total = sum(lines)
    return Serverless(usd_per_s, *lines, total, total / count if count else None)
