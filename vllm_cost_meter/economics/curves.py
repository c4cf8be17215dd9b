"""A curve: what a deployment did at each of several arrival rates, and what follows for its cost.

Full load is the point with the most output tokens per second (theta_max): the cost there is what a
calculator that assumes full utilization says (c_naive), and every other point costs more by its
penalty. Between measured points cost is interpolated in logarithms of rate and cost, in which it is
a straight line as long as arrivals set the pace.

Invariant: the penalty of a point is at least 1, and 1 at theta_max.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from vllm_cost_meter.economics.numbers import S_PER_HOUR, TOKENS_PER_M, positive, usd_per_m

POINTS_MAX = 10_000
# Names that a curve may have for the same thing.
_NAMES = {
    "requests_per_s": ("requests_per_s", "rps"),
    "output_tokens_per_s": ("output_tokens_per_s", "output_tps"),
    "ttft_p99_ms": ("ttft_p99_ms", "p99_ttft_ms"),
    "tpot_ms": ("tpot_ms", "mean_tpot_ms"),
}


@dataclass(frozen=True, slots=True)
class Point:
    """One rate of arrivals, and what came of it. Latencies are None where nobody measured them."""

    requests_per_s: float
    output_tokens_per_s: float
    ttft_p99_ms: float | None = None
    tpot_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """Points by rising rate, and what the deployment cost when they were measured, if told."""

    points: Sequence[Point]
    usd_per_hour: float | None = None

    def price(self, usd_per_hour: float | None) -> float:
        """Return the price given, else the curve's own. Raises ValueError if there is neither."""
        found = self.usd_per_hour if usd_per_hour is None else usd_per_hour
        if found is None:
            raise ValueError("usd_per_hour: expected a price, here or in the curve, got none")
        return positive("usd_per_hour", found)


def curve_of(told: object) -> Curve:
    """Return a curve: of a list of objects, or of an object with `points` and `usd_per_hour`.

    Raises ValueError for anything else, a rate that stands twice, and a number that is none.
    """
    points, price = told, None
    if isinstance(told, Mapping):
        points, price = told.get("points"), told.get("usd_per_hour")
    if not isinstance(points, Sequence) or isinstance(points, str) or not points:
        raise ValueError("curve: expected a list of points, or an object that has `points`")
    if len(points) > POINTS_MAX:
        raise ValueError(f"curve: expected at most {POINTS_MAX} points, got {len(points)}")
    found = sorted(
        (_point(number, each) for number, each in enumerate(points)),
        key=lambda point: point.requests_per_s,
    )
    for one, other in pairwise(found):
        if one.requests_per_s == other.requests_per_s:
            raise ValueError(f"curve: expected each rate once, got {one.requests_per_s} twice")
    return Curve(found, None if price is None else _number("curve: usd_per_hour", price))


def _point(number: int, told: object) -> Point:
    if not isinstance(told, Mapping):
        raise ValueError(f"curve: expected point {number} to be an object, got {told!r}")
    found: dict[str, float | None] = {}
    for name, names in _NAMES.items():
        given = next((told[each] for each in names if told.get(each) not in (None, "")), None)
        where = f"curve: {name} of point {number}"
        found[name] = None if given is None else _number(where, given)
    rate, tokens = found["requests_per_s"], found["output_tokens_per_s"]
    if rate is None or tokens is None:
        missing = "requests_per_s" if rate is None else "output_tokens_per_s"
        raise ValueError(f"curve: expected {missing} at point {number}, got none")
    return Point(rate, tokens, found["ttft_p99_ms"], found["tpot_ms"])


def _number(where: str, given: Any) -> float:
    try:
        return positive(where, float(given))
    except (TypeError, ValueError):
        raise ValueError(f"{where}: expected a number above 0, got {given!r}") from None


@dataclass(frozen=True, slots=True)
class PenaltyPoint:
    """What a point costs, and how many times what full load does."""

    requests_per_s: float
    output_tokens_per_s: float
    usd_per_m_output_tokens: float
    penalty: float


@dataclass(frozen=True, slots=True)
class Penalty:
    """What each load of a curve costs against full load."""

    FORMULA: ClassVar = (
        "theta_max = the largest output_tokens_per_s; c_naive = usd_per_hour x 10^6 /"
        " (3600 x theta_max); penalty = usd_per_m_output_tokens / c_naive ="
        " theta_max / output_tokens_per_s"
    )

    theta_max: float
    c_naive: float
    points: Sequence[PenaltyPoint]


def penalty(*, curve: Curve, usd_per_hour: float | None = None) -> Penalty:
    """Return what each measured load costs, and the penalty against full load.

    Without `usd_per_hour` at the curve's own price. Raises ValueError.
    """
    price = curve.price(usd_per_hour)
    theta_max = max(point.output_tokens_per_s for point in curve.points)
    return Penalty(
        theta_max=theta_max,
        c_naive=usd_per_m(price, theta_max),
        points=[
            PenaltyPoint(
                point.requests_per_s,
                point.output_tokens_per_s,
                usd_per_m(price, point.output_tokens_per_s),
                theta_max / point.output_tokens_per_s,
            )
            for point in curve.points
        ],
    )


@dataclass(frozen=True, slots=True)
class SloCost:
    """The highest measured rate within latency bounds, and what keeping them costs.

    All None where no point keeps them. `premium` is its cost / that at full load, less 1.
    """

    FORMULA: ClassVar = (
        "of the points with ttft_p99_ms and tpot_ms within bounds the one of the highest rate;"
        " premium = its usd_per_m_output_tokens / c_naive - 1"
    )

    requests_per_s: float | None
    output_tokens_per_s: float | None
    usd_per_m_output_tokens: float | None
    premium: float | None


def slo(
    *, curve: Curve, ttft_p99_ms: float, tpot_ms: float, usd_per_hour: float | None = None
) -> SloCost:
    """Return the highest measured rate that meets both bounds, its cost, and its premium.

    A point without latencies meets none. Without `usd_per_hour` at the curve's own price. Raises
    ValueError, also for a curve of which no latency was measured.
    """
    bounds = positive("ttft_p99_ms", ttft_p99_ms), positive("tpot_ms", tpot_ms)
    measured = [(p.ttft_p99_ms, p.tpot_ms, p) for p in curve.points]
    known = [(a, b, p) for a, b, p in measured if a is not None and b is not None]
    if not known:
        raise ValueError("curve: expected ttft_p99_ms and tpot_ms at its points, got none")
    whole = penalty(curve=curve, usd_per_hour=usd_per_hour)
    kept = [point for ttft, tpot, point in known if ttft <= bounds[0] and tpot <= bounds[1]]
    if not kept:
        return SloCost(None, None, None, None)
    best = kept[-1]
    cost = usd_per_m(curve.price(usd_per_hour), best.output_tokens_per_s)
    return SloCost(best.requests_per_s, best.output_tokens_per_s, cost, cost / whole.c_naive - 1)


@dataclass(frozen=True, slots=True)
class Crossover:
    """From which rate of arrivals on self-hosting costs less than an API, by output tokens.

    `requests_per_s` is the closed form, true below saturation. Of a curve `requests_per_s_log_log`
    is what was measured; None where the curve does not cross the API's price, as `reason` says.
    """

    FORMULA: ClassVar = (
        "requests_per_s = usd_per_hour x 10^6 / (3600 x output_tokens_per_request x"
        " api_usd_per_m_output); log-log: log rate linear in log cost between the two measured"
        " points around the API's price"
    )

    requests_per_s: float
    requests_per_s_log_log: float | None
    reason: str | None


def crossover(
    *,
    usd_per_hour: float,
    api_usd_per_m_output: float,
    output_tokens_per_request: float,
    curve: Curve | None = None,
) -> Crossover:
    """Return the rate at which a deployment's output tokens cost what an API's do.

    Both are prices of output tokens: a blended price does not compare. Raises ValueError.
    """
    price = positive("usd_per_hour", usd_per_hour)
    api = positive("api_usd_per_m_output", api_usd_per_m_output)
    tokens = positive("output_tokens_per_request", output_tokens_per_request)
    closed = price * TOKENS_PER_M / (S_PER_HOUR * tokens * api)
    if curve is None:
        return Crossover(closed, None, "no curve")
    costs = [(p.requests_per_s, usd_per_m(price, p.output_tokens_per_s)) for p in curve.points]
    rate = _crossing(costs, api)
    if rate is not None:
        return Crossover(closed, rate, None)
    is_cheaper = all(cost < api for _, cost in costs)
    why = "costs less than the API at every point" if is_cheaper else "never costs as little"
    return Crossover(closed, None, f"the curve {why}")


def _crossing(costs: Iterable[tuple[float, float]], target: float) -> float | None:
    """Return the lowest rate at which cost falls to the target, log-log between two points."""
    for (rate, cost), (next_rate, next_cost) in pairwise(costs):
        if cost == target:
            return rate
        if cost > target >= next_cost:
            part = math.log(cost / target) / math.log(cost / next_cost)
            return rate * math.exp(part * math.log(next_rate / rate))
    return None
