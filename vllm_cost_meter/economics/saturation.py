"""Full load from a sweep's file: the largest throughput, and the deployment that reached it.

A measured throughput holds for another deployment only if both agree in every field of `IDENTITY`,
have the same number of engines, and serve requests of about the same size. So a curve needs its
protocol. A curve in which every rate was served never reached full load.

Invariant: `point_id` is a digest of the whole file, so a point identifies its curve.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_cost_meter.economics.curves import curve_of
from vllm_cost_meter.economics.numbers import positive
from vllm_cost_meter.units.text import quoted
from vllm_cost_meter.units.time import rfc3339, unix_ns_of

# The fields that two engines must share to have the same full load.
IDENTITY = ("model", "precision", "vllm_version", "hardware", "gpus", "parallelism")
# The fields that a protocol must have.
PROTOCOL = (
    "client",
    "plan",
    "deployment",
    "meter_version",
    "prices",
    "started_at",
    "finished_at",
)


@dataclass(frozen=True, slots=True)
class SaturationPoint:
    """A deployment's full load with requests of `input_tokens` and `output_tokens` each.

    `about` has the fields of `IDENTITY`. `point_id` is a digest of the curve, `protocol` is JSON.
    """

    point_id: str
    measured_at: str
    about: Mapping[str, Any]
    engines: int
    input_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    window_s: float
    protocol: str


def saturation_of(sweep: object) -> SaturationPoint:
    """Return the full load that a sweep measured; `sweep` is its file as parsed JSON.

    Raises ValueError for a file without its protocol, and for one in which every rate was served.
    """
    curve = curve_of(sweep)
    protocol = sweep.get("protocol") if isinstance(sweep, Mapping) else None
    if not isinstance(sweep, Mapping) or not isinstance(protocol, Mapping):
        raise ValueError("curve: expected the `protocol` by which it was measured, got none")
    if missing := [name for name in PROTOCOL if name not in protocol]:
        raise ValueError(f"curve: expected {', '.join(missing)} in its protocol, got none")
    if sweep.get("saturated") is not True:
        raise ValueError(
            "curve: expected a rate that was more than the deployment served, got none;"
            " sweep higher rates"
        )
    best = max(curve.points, key=lambda point: point.output_tokens_per_s)
    plan, deployment = protocol["plan"], protocol["deployment"]
    try:
        return SaturationPoint(
            point_id=hashlib.sha256(json.dumps(sweep, sort_keys=True).encode()).hexdigest(),
            measured_at=rfc3339(unix_ns_of(protocol["finished_at"])),
            about={
                name: _count(deployment, name) if name == "gpus" else str(deployment[name])
                for name in IDENTITY
            },
            engines=_count(deployment, "engines"),
            input_tokens=_count(plan, "input_tokens"),
            output_tokens=_count(plan, "output_tokens"),
            output_tokens_per_s=best.output_tokens_per_s,
            requests_per_s=best.requests_per_s,
            window_s=positive("window_s", plan["window_s"]),
            protocol=json.dumps(protocol, sort_keys=True),
        )
    except KeyError as error:
        raise ValueError(f"curve: expected {error} in its protocol, got none") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"curve: in its protocol: {error}") from None


def _count(fields: Mapping[str, Any], name: str) -> int:
    value = fields[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a whole number above 0, got {quoted(value)}")
    return value
