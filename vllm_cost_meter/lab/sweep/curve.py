"""A curve as a file: what a sweep measured, and the whole protocol by which it did.

The calculators read it as any other curve (`economics.curves`), and a ledger takes its largest
throughput for full load (`economics.saturation`).

Invariant: a point's figures are medians over its repeats, which stand in `measurements`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from vllm_cost_meter.economics.numbers import usd_per_m
from vllm_cost_meter.lab.sweep.bench import client_version
from vllm_cost_meter.lab.sweep.run import Measured, Plan
from vllm_cost_meter.lab.sweep.side_client import Deployment
from vllm_cost_meter.units.time import rfc3339
from vllm_cost_meter.version import __version__

FORMAT = 1
# A point takes no median of these columns over its repeats.
_OF_REPEATS = ("repeat", "seed", "requests_per_s", "saturated", "settled", "warmup_s")


@dataclass(frozen=True, slots=True)
class Context:
    """The circumstances of a sweep: its plan, the deployment, the prices, begin and end."""

    plan: Plan
    deployment: Deployment
    usd_per_gpu_hour: float | None
    prices: Sequence[Mapping[str, Any]]
    started_at_ns: int
    finished_at_ns: int
    interrupted: bool

    @property
    def usd_per_hour(self) -> float | None:
        """The cost of the deployment in an hour."""
        per_gpu = self.usd_per_gpu_hour
        return None if per_gpu is None else per_gpu * self.deployment.gpus


def curve_file(context: Context, measured: Sequence[Measured]) -> dict[str, Any]:
    """Return the content of a curve's file."""
    return {
        "format": FORMAT,
        "usd_per_hour": context.usd_per_hour,
        "saturated": any(point.steady.saturated for point in measured),
        "points": points_of(measured, context.usd_per_hour),
        "measurements": [point.as_dict() for point in measured],
        "protocol": {
            "client": "vllm bench serve",
            "client_version": client_version(),
            "rates": sorted({point.requests_per_s for point in measured}),
            "arrivals": "gamma-distributed gaps; Poisson at burstiness 1",
            "tokens": "as the client received them, chunk by chunk",
            "plan": context.plan.as_dict(),
            "deployment": context.deployment.as_dict(),
            "meter_version": __version__,
            "usd_per_gpu_hour": context.usd_per_gpu_hour,
            "prices": list(context.prices),
            "started_at": rfc3339(context.started_at_ns),
            "finished_at": rfc3339(context.finished_at_ns),
            "interrupted": context.interrupted,
        },
    }


def points_of(measured: Sequence[Measured], usd_per_hour: float | None) -> list[dict[str, Any]]:
    """Return a row for each rate, lowest first, with what a million tokens cost at it."""
    rows = []
    for rate in sorted({one.requests_per_s for one in measured}):
        repeats = [one for one in measured if one.requests_per_s == rate]
        dicts = [one.as_dict() for one in repeats]
        row: dict[str, Any] = {
            "requests_per_s": rate,
            "repeats": len(repeats),
            "warmup_s": min(one.warmup_s for one in repeats),
            "settled": all(one.settled for one in repeats),
            "saturated": any(one.steady.saturated for one in repeats),
        }
        for name in dicts[0]:
            if name not in _OF_REPEATS:
                known = [each[name] for each in dicts if each[name] is not None]
                row[name] = median(known) if known else None
        out, total = row["output_tokens_per_s"], row["input_tokens_per_s"]
        for name, tokens_per_s in (("output", out), ("total", out + total)):
            is_known = usd_per_hour is not None and tokens_per_s > 0
            row[f"usd_per_m_{name}_tokens"] = (
                usd_per_m(usd_per_hour or 0.0, tokens_per_s) if is_known else None
            )
        rows.append(row)
    return rows
