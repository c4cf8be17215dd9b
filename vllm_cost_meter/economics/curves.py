"""Cost against load: a curve of measured rates, its penalty, SLO cost and crossover with an API.

A curve holds a deployment's throughput at several arrival rates. Full load is the point with the
most output tokens per second (`theta_max`). A calculator that assumes full utilization shows the
cost at full load (`c_naive`); every other point costs more by its penalty. Between two measured
points, log cost is interpolated linearly in log rate: that line is exact while arrivals set the
pace.

Invariant: the penalty of a point is at least 1, and it is 1 at full load.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from vllm_cost_meter.economics.numbers import S_PER_HOUR, TOKENS_PER_M, positive, usd_per_m
from vllm_cost_meter.units.text import quoted

POINTS_MAX = 10_000
# The names under which a curve may hold each number.
_NAMES = {
    "requests_per_s": ("requests_per_s", "rps"),
    "output_tokens_per_s": ("output_tokens_per_s", "output_tps"),
    "ttft_p99_ms": ("ttft_p99_ms", "p99_ttft_ms"),
    "tpot_ms": ("tpot_ms", "mean_tpot_ms"),
}


@dataclass(frozen=True, slots=True)
class Point:
    """One arrival rate and its measured throughput. A latency is None if nobody measured it."""

    requests_per_s: float
    """Requests per second: of the whole deployment."""
    output_tokens_per_s: float
    """Output tokens per second: of the whole deployment."""
    ttft_p99_ms: float | None = None
    """ms: the 99th percentile of time to first token, null if nobody measured it."""
    tpot_ms: float | None = None
    """ms: time per output token, null if nobody measured it."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Points by rising rate, and the deployment's price during the measurement, None if unknown."""

    points: Sequence[Point]
    """The measured loads, in the order of their rates."""
    usd_per_hour: float | None = None
    """USD per hour: of the whole deployment."""

    def price(self, usd_per_hour: float | None) -> float:
        """Return the price given, else the curve's own. Raises ValueError if there is neither."""
        found = self.usd_per_hour if usd_per_hour is None else usd_per_hour
        if found is None:
            raise ValueError("usd_per_hour: expected a price, here or in the curve, got none")
        return positive("usd_per_hour", found)


def curve_of(given: object) -> Curve:
    """Return the curve in a list of points, or in an object with `points` and `usd_per_hour`.

    `given` is parsed JSON. Raises ValueError for any other shape, for a rate that appears twice and
    for an invalid number.
    """
    points, price = given, None
    if isinstance(given, Mapping):
        points, price = given.get("points"), given.get("usd_per_hour")
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


def _point(number: int, given: object) -> Point:
    if not isinstance(given, Mapping):
        raise ValueError(f"curve: expected point {number} to be an object, got {quoted(given)}")
    found: dict[str, float | None] = {}
    for name, names in _NAMES.items():
        value = next((given[each] for each in names if given.get(each) not in (None, "")), None)
        where = f"curve: {name} of point {number}"
        found[name] = None if value is None else _number(where, value)
    rate, tokens = found["requests_per_s"], found["output_tokens_per_s"]
    if rate is None or tokens is None:
        missing = "requests_per_s" if rate is None else "output_tokens_per_s"
        raise ValueError(f"curve: expected {missing} at point {number}, got none")
    return Point(rate, tokens, found["ttft_p99_ms"], found["tpot_ms"])


def _number(where: str, given: Any) -> float:
    try:
        return positive(where, float(given))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: expected a number above 0, got {quoted(given)}") from None


@dataclass(frozen=True, slots=True)
class PenaltyPoint:
    """The cost of one load, and its penalty: that cost / the cost at full load."""

    requests_per_s: float
    """Requests per second: of the whole deployment."""
    output_tokens_per_s: float
    """Output tokens per second: of the whole deployment."""
    usd_per_m_output_tokens: float
    """USD: the cost of a million output tokens."""
    penalty: float
    """Its cost / the cost at full load."""


@dataclass(frozen=True, slots=True)
class Penalty:
    """The cost of each load on a curve, compared with full load (`theta_max`, `c_naive`)."""

    FORMULA: ClassVar = (
        "theta_max = the largest output_tokens_per_s; c_naive = usd_per_hour x 10^6 /"
        " (3600 x theta_max); penalty = usd_per_m_output_tokens / c_naive ="
        " theta_max / output_tokens_per_s"
    )

    theta_max: float
    """Output tokens per second: at full load."""
    c_naive: float
    """USD: the cost of a million output tokens at full load."""
    points: Sequence[PenaltyPoint]
    """The measured loads, in the order of their rates."""


def penalty(*, curve: Curve, usd_per_hour: float | None = None) -> Penalty:
    """Return the cost of each measured load, and its penalty against full load.

    Without `usd_per_hour` the curve's own price counts. Raises ValueError for an invalid price, and
    if neither gives one.
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
    """The highest measured rate within latency bounds, and its cost.

    All fields are None if no point keeps the bounds. `premium` is cost / cost at full load - 1.
    """

    FORMULA: ClassVar = (
        "of the points with ttft_p99_ms and tpot_ms within bounds the one of the highest rate;"
        " premium = its usd_per_m_output_tokens / c_naive - 1"
    )

    requests_per_s: float | None
    """Requests per second: of the whole deployment."""
    output_tokens_per_s: float | None
    """Output tokens per second: of the whole deployment."""
    usd_per_m_output_tokens: float | None
    """USD: the cost of a million output tokens."""
    premium: float | None
    """Its cost / the cost at full load - 1."""


def slo(
    *, curve: Curve, ttft_p99_ms: float, tpot_ms: float, usd_per_hour: float | None = None
) -> SloCost:
    """Return the highest measured rate that meets both bounds, its cost, and its premium.

    A point without latencies meets no bound. Without `usd_per_hour` the curve's own price counts.
    Raises ValueError for an invalid bound or price, and for a curve without measured latencies.
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
    """The arrival rate above which self-hosting costs less per output token than an API.

    `requests_per_s` is the closed form, which holds below full load. `requests_per_s_log_log` comes
    from a measured curve; it is None if the curve does not cross the API's price (see `reason`).
    """

    FORMULA: ClassVar = (
        "requests_per_s = usd_per_hour x 10^6 / (3600 x output_tokens_per_request x"
        " api_usd_per_m_output); log-log: log rate linear in log cost between the two measured"
        " points around the API's price"
    )

    requests_per_s: float
    """Requests per second: of the whole deployment."""
    requests_per_s_log_log: float | None
    """Requests per second: from the measured curve, null if it does not cross."""
    reason: str | None
    """Why `requests_per_s_log_log` is null; null if it is known."""


def crossover(
    *,
    usd_per_hour: float,
    api_usd_per_m_output: float,
    output_tokens_per_request: float,
    curve: Curve | None = None,
) -> Crossover:
    """Return the arrival rate at which the deployment's output tokens cost as much as the API's.

    `api_usd_per_m_output` must be a price for output tokens: a blended price does not compare.
    Raises ValueError for an argument that is not a number above 0.
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
    """Return the lowest rate at which cost falls to the target; None if it never does.

    Log cost is linear in log rate between two points.
    """
    for (rate, cost), (next_rate, next_cost) in pairwise(costs):
        if cost == target:
            return rate
        if cost > target >= next_cost:
            part = math.log(cost / target) / math.log(cost / next_cost)
            return rate * math.exp(part * math.log(next_rate / rate))
    return None
