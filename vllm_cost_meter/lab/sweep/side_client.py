"""Read the deployment, its price and its load from the side endpoint during a sweep.

The deployment and its prices come from `/cost/summary`, at the beginning and the end of each rate.
GPU time by class comes from the gauges at `/metrics`. These cost the server no read of the ledger,
so they may be read each second.

Invariant: reads only.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from vllm_cost_meter.economics.saturation import IDENTITY
from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.client import get
from vllm_cost_meter.records.snapshot import BUSY
from vllm_cost_meter.units.money import NANOUSD_PER_USD
from vllm_cost_meter.units.time import NS_PER_HOUR

TIMEOUT_S = 60
GPU_SECONDS = "cost_meter_engine_gpu_seconds"
BILLS = "cost_meter_bills_total"


@dataclass(frozen=True, slots=True)
class Sample:
    """Counters of the engines at an instant: GPU-seconds in all and at work, and bills."""

    at_s: float
    wall_gpu_s: float
    busy_gpu_s: float
    bills: float


@dataclass(frozen=True, slots=True)
class Deployment:
    """The measured deployment: the columns in `IDENTITY`, and the number of engines."""

    about: Mapping[str, Any]
    engines: int
    run_ids: tuple[str, ...]

    @property
    def gpus(self) -> int:
        return int(self.about["gpus"]) * self.engines

    def as_dict(self) -> dict[str, Any]:
        """Return it as a curve's protocol has it."""
        return {**self.about, "engines": self.engines, "run_ids": list(self.run_ids)}


class SideClient:
    """A client of one side endpoint."""

    def __init__(self, url: str, token: str | None = None) -> None:
        """`token` is the admin token, which a side endpoint off loopback wants."""
        self._url, self._token = url, token

    def deployment(self) -> Deployment:
        """Return what serves now. Raises ServerError unless that is one deployment."""
        return deployment_of(self._summary()["runs"])

    def sample(self, at_s: float) -> Sample:
        """Return what the engines did until now, which is `at_s`; at most a second old."""
        wall = busy = bills = 0.0
        for family in text_string_to_metric_families(self._get("/metrics").decode()):
            for one in family.samples:
                if one.name == GPU_SECONDS:
                    wall += one.value
                    busy += one.value if one.labels["class"] in BUSY else 0
                elif one.name == BILLS:
                    bills += one.value
        if not wall:
            raise ServerError(f"expected {GPU_SECONDS} in {self._url}/metrics, got none")
        return Sample(at_s, wall, busy, bills)

    def prices(self) -> tuple[float | None, list[dict[str, Any]]]:
        """Return USD per GPU-hour over the last hours, None without a price, and its sources."""
        summary = self._summary()
        wall_ns, nanousd, prices = (summary[n] for n in ("wall_gpu_ns", "cost_nanousd", "prices"))
        if not wall_ns or nanousd is None:
            return None, []
        if len(prices) == 1:
            return float(prices[0]["usd_per_gpu_hour"]), prices
        return nanousd * NS_PER_HOUR / (wall_ns * NANOUSD_PER_USD), prices

    def _summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads(self._get("/cost/summary?window=1h"))
        return summary

    def _get(self, path: str) -> bytes:
        expected = "the side endpoint of a metered server"
        return get(f"{self._url}{path}", self._token, expected, TIMEOUT_S)


def served_by(url: str) -> tuple[str, str]:
    """Return the name by which clients call vLLM's model, and what vLLM loaded.

    The key that vLLM may want is OPENAI_API_KEY, as its client wants it. Raises ServerError.
    """
    answer = get(f"{url}/v1/models", os.environ.get("OPENAI_API_KEY"), "vLLM", TIMEOUT_S)
    try:
        first = json.loads(answer)["data"][0]
        return first["id"], first.get("root") or first["id"]
    except (ValueError, LookupError, TypeError):
        raise ServerError(f"expected a model at {url}/v1/models, got {answer[:80]!r}") from None


def deployment_of(runs: Sequence[Mapping[str, Any]]) -> Deployment:
    """Return the deployment that these runs form. Raises ServerError without one, or for several.

    Runs that have ended are left out.
    """
    alive = [run for run in runs if run["alive"]]
    if not alive:
        raise ServerError("expected a metered engine that runs, got none")
    if off := [run for run in alive if run["state"] != "on"]:
        raise ServerError(f"expected a meter that is on, got {off[0]['state']}")
    kinds = {tuple(run[name] for name in IDENTITY) for run in alive}
    indexes = [run["engine_index"] for run in alive]
    if len(kinds) > 1 or len(set(indexes)) < len(indexes):
        raise ServerError(
            f"expected the engines of one deployment, got {len(alive)} runs of several"
        )
    about = dict(zip(IDENTITY, kinds.pop(), strict=True))
    return Deployment(about, len(alive), tuple(sorted(run["run_id"] for run in alive)))


def busy_share(samples: Sequence[Sample], from_s: float, to_s: float) -> float | None:
    """Return busy / wall between two instants, both between samples; None without two of them."""
    if len(samples) < 2:
        return None
    begin, end = _at(samples, from_s), _at(samples, to_s)
    wall = end.wall_gpu_s - begin.wall_gpu_s
    return (end.busy_gpu_s - begin.busy_gpu_s) / wall if wall > 0 else None


def _at(samples: Sequence[Sample], at_s: float) -> Sample:
    """Return what a sample at an instant would have said, linear between two."""
    later = next((n for n, one in enumerate(samples) if one.at_s >= at_s), len(samples) - 1)
    a, b = samples[max(later, 1) - 1], samples[max(later, 1)]
    part = (at_s - a.at_s) / (b.at_s - a.at_s) if b.at_s > a.at_s else 0.0
    pairs = ((a.wall_gpu_s, b.wall_gpu_s), (a.busy_gpu_s, b.busy_gpu_s), (a.bills, b.bills))
    return Sample(at_s, *(x + part * (y - x) for x, y in pairs))
