"""The fair charge of each request in a step: its Shapley value, in plain Python.

This is the twin of `csrc/shapley.pxd`. Both agree bit for bit, so a change to one must be made in
the other.

A step is a cooperative game (docs/explanation/attribution.md). A step with only the requests S
would take

    v(S) = max(f + sum of c_i, g + sum of m_i) over S,   v of nobody = 0

where c_i and m_i are the compute and memory time of request i by the fitted planes
(`cost_model_py.py`). The Shapley value of a request is the time it adds, averaged over all orders
in which the requests could have joined. The base max(f, g) falls to whoever joins first, so it is
shared equally. The rest is computed like this:

1. The few large players (the largest prefill chunks, at most `LARGE_MAX`) are enumerated. The many
   small ones are an ocean, which arrives evenly over s in [0, 1] (Milnor and Shapley 1978). With
   ocean totals C and M, and a subset S of the m large players there at s, the step has the height
   u(s, S) = max(f + C_S + sC, g + M_S + sM) - max(f, g). Everyone arrives at a time that is uniform
   on [0, 1], so S is there at s with the probability s^|S| (1-s)^(m-|S|).
2. A large player gets the integral over s of the sum over S without it of
   s^|S| (1-s)^(m-1-|S|) [u(s, S + it) - u(s, S)].
3. A small one gets W * c_i + (1 - W) * m_i, where W is the probability that compute is on top.
4. Both sides are straight lines in s, so each subset has at most one crossing. On either side of it
   the integrand is a polynomial, so the integral is exact and needs no quadrature.
5. If a tie lies at the cut between large and small, its members all go to the ocean, so equals stay
   equal. A step with up to `LARGE_MAX` requests has only large players, and its result is exact.

The marginal cost of a request is v(all) - v(all without it).

Invariant: the charges are >= 0, and add up to v(all) except for rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_cost_meter.attribution.cost_model import Plane
from vllm_cost_meter.attribution.cost_model_py import Work, time_of, total_of

LARGE_MAX = 4
# The weights of a step add up to about this: half of the largest sum allowed.
WEIGHT_SUM = 2**30
# Bounds of the step time that a model may predict. A shorter time would give infinite weights.
SMALLEST_NS, LARGEST_NS = 1e-9, 9.2e18


@dataclass(slots=True, frozen=True)
class Game:
    """The solved game of one step: all that is needed to charge each of its requests."""

    total_ns: float  # v(all)
    base_ns: float  # each request's part of the base
    compute_part: float  # W
    compute_ns: float  # compute time of the whole step, with the constant
    memory_ns: float
    large: dict[int, float]  # place in the step -> charge without the base

    def weigh(self, compute: Plane, memory: Plane, works: Sequence[Work]) -> list[int]:
        """Return each request's charge as a weight; all are 0 if the model predicts no time."""
        if not self._is_sound():
            return [0] * len(works)
        to_weight = WEIGHT_SUM / self.total_ns
        part, rest = self.compute_part, 1.0 - self.compute_part
        # The weight of a decode is a straight line in its context.
        (c_0, c_slope), (m_0, m_slope) = _decode_line(compute), _decode_line(memory)
        weight_0 = (self.base_ns + (part * c_0 + rest * m_0)) * to_weight + 0.5
        weight_slope = (part * c_slope + rest * m_slope) * to_weight
        weights = []
        for place, work in enumerate(works):
            if work.tokens == 1 and len(works) > LARGE_MAX:
                weight = weight_0 + weight_slope * work.context
            else:
                own = part * time_of(compute, work) + rest * time_of(memory, work)
                weight = (self.base_ns + self.large.get(place, own)) * to_weight + 0.5
            weights.append(int(weight))
        return weights

    def margins(
        self, compute: Plane, memory: Plane, works: Sequence[Work], gpu_ns: float
    ) -> list[float]:
        """Return the marginal cost of each request in a step that took `gpu_ns`, in GPU-ns."""
        gpu_ns = min(gpu_ns, LARGEST_NS)
        if len(works) == 1:
            return [gpu_ns]
        to_ns = gpu_ns / self.total_ns if self._is_sound() else 0.0
        above_compute = self.total_ns - self.compute_ns
        above_memory = self.total_ns - self.memory_ns
        (c_0, c_slope), (m_0, m_slope) = _decode_line(compute), _decode_line(memory)
        c_0, c_slope = (above_compute + c_0) * to_ns, c_slope * to_ns
        m_0, m_slope = (above_memory + m_0) * to_ns, m_slope * to_ns
        margins = []
        for work in works:
            if work.tokens == 1:
                margin = min(c_0 + c_slope * work.context, m_0 + m_slope * work.context)
            else:
                c, m = time_of(compute, work), time_of(memory, work)
                margin = to_ns * min(above_compute + c, above_memory + m)
            margins.append(margin)
        return margins

    def _is_sound(self) -> bool:
        return SMALLEST_NS < self.total_ns < LARGEST_NS


def _decode_line(plane: Plane) -> tuple[float, float]:
    """Return a decode's time as (time without context, time per context token)."""
    return plane[1] + plane[2], plane[3] + plane[4]


def solve_game(compute: Plane, memory: Plane, works: Sequence[Work]) -> Game:
    """Solve the game of a step. A single plane counts as two, with a zero memory plane."""
    everyone = total_of(works)
    compute_ns = compute[0] + time_of(compute, everyone)
    memory_ns = memory[0] + time_of(memory, everyone)
    base = max(compute[0], memory[0])
    ocean = everyone
    places = _large_players(compute, memory, works) if any(memory) else []
    for place in places:
        ocean = ocean.without(works[place])
    part, charges = _charge_large(
        (compute[0], time_of(compute, ocean)),
        (memory[0], time_of(memory, ocean)),
        [time_of(compute, works[place]) for place in places],
        [time_of(memory, works[place]) for place in places],
    )
    return Game(
        total_ns=max(compute_ns, memory_ns),
        base_ns=base / len(works),
        compute_part=part,
        compute_ns=compute_ns,
        memory_ns=memory_ns,
        large=dict(zip(places, charges, strict=True)),
    )


def _large_players(compute: Plane, memory: Plane, works: Sequence[Work]) -> list[int]:
    """Return the places of the large players (the largest chunks), in step order."""
    if len(works) <= LARGE_MAX:
        return list(range(len(works)))
    sizes: list[tuple[float, int]] = []
    for place, work in enumerate(works):
        if work.tokens > 1:
            sizes.append((time_of(compute, work) + time_of(memory, work), place))
    sizes.sort(key=lambda pair: -pair[0])
    kept = sizes[:LARGE_MAX]
    if len(sizes) > LARGE_MAX:
        kept = [pair for pair in kept if pair[0] > sizes[LARGE_MAX][0]]
    return sorted(place for _, place in kept)


def _charge_large(
    compute: tuple[float, float],
    memory: tuple[float, float],
    c: Sequence[float],
    m: Sequence[float],
) -> tuple[float, list[float]]:
    """Return W and the charge of each large player.

    `compute` and `memory` are (height, slope): the constant, and the ocean's total.
    """
    count = len(c)
    base = max(compute[0], memory[0])
    part = 0.0
    charges = [0.0] * count
    for subset in range(1 << count):
        rise, run = compute[0] - base, memory[0] - base
        size = 0
        for j in range(count):
            if subset >> j & 1:
                rise += c[j]
                run += m[j]
                size += 1
        low, high = _compute_on_top(rise, compute[1], run, memory[1])
        part += beta(size, count - size, high) - beta(size, count - size, low)
        lines = (rise, compute[1], run, memory[1], low, high)
        if size > 0:
            gained = _integral(size - 1, count - size, lines)
        if size < count:
            missed = _integral(size, count - 1 - size, lines)
        for j in range(count):
            if subset >> j & 1:
                charges[j] += gained
            else:
                charges[j] -= missed
    return part, [max(0.0, charge) for charge in charges]


def _compute_on_top(rise: float, c: float, run: float, m: float) -> tuple[float, float]:
    """Return the stretch of [0, 1] where rise + s * c >= run + s * m."""
    slope, gap = c - m, run - rise
    if slope > 0.0:
        return min(1.0, max(0.0, gap / slope)), 1.0
    if slope < 0.0:
        return 0.0, min(1.0, max(0.0, gap / slope))
    return 0.0, 1.0 if gap <= 0.0 else 0.0


def _integral(p: int, q: int, lines: tuple[float, float, float, float, float, float]) -> float:
    """Return the integral over [0, 1] of s^p (1-s)^q times the larger of two lines."""
    rise, c, run, m, low, high = lines
    zeroth = beta(p, q, high) - beta(p, q, low)
    first = beta(p + 1, q, high) - beta(p + 1, q, low)
    return (
        rise * zeroth
        + c * first
        + run * (beta(p, q, 1.0) - zeroth)
        + m * (beta(p + 1, q, 1.0) - first)
    )


def beta(p: int, q: int, s: float) -> float:
    """Return the integral from 0 to s of t^p (1-t)^q, a polynomial in s."""
    if s <= 0.0:
        return 0.0
    return _polynomial(p, q, min(s, 1.0))


def _polynomial(p: int, q: int, s: float) -> float:
    total = 0.0
    for k in range(q, -1, -1):
        total = total * s + (-1.0) ** k * math.comb(q, k) / (p + k + 1)
    for _ in range(p + 1):
        total *= s
    return total
