"""The larger of two sums, shared out: the Shapley value of whoever brings to both of them.

This is the twin of `csrc/shapley.pxd`. Both agree bit for bit, so a change to one must be made in
the other.

Arithmetic and memory traffic go on at the same time, so what both take together is

    v(S) = max(f + sum of c_i, g + sum of m_i) over S,   v of nobody = 0

where c_i and m_i are the compute and memory time of request i, by two planes (`planes_py.py`) or by
the attention of a curve (`curve_py.py`). The Shapley value of a request is the time it adds,
averaged over all orders in which the requests could have joined. The base max(f, g) falls to
whoever joins first, so it is shared equally. The rest is computed like this:

1. The few large players (at most `LARGE_MAX`, each at least `SMALL_PART` of all) are enumerated.
   The many small ones are an ocean, which arrives evenly over s in [0, 1] (Milnor and Shapley
   1978). With ocean totals C and M, and a subset S of the m large players there at s, the step has
   the height u(s, S) = max(f + C_S + sC, g + M_S + sM) - max(f, g). Everyone arrives at a time that
   is uniform on [0, 1], so S is there at s with the probability s^|S| (1-s)^(m-|S|).
2. A large player gets the integral over s of the sum over S without it of
   s^|S| (1-s)^(m-1-|S|) [u(s, S + it) - u(s, S)].
3. A small one gets W * c_i + (1 - W) * m_i, where W is the probability that compute is on top.
4. Both sides are straight lines in s, so each subset has at most one crossing. On either side of it
   the integrand is a polynomial, so the integral is exact and needs no quadrature.
5. If a tie lies at the cut between large and small, its members all go to the ocean, so equals stay
   equal. Up to `LARGE_MAX` requests are all large, and the result is exact.

Invariant: the charges are >= 0, and add up to v(all) except for rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LARGE_MAX = 5
SMALL_PART = 1 / 32  # A request of less than this part of all is small.


@dataclass(slots=True, frozen=True)
class Overlap:
    """The solved game: all that is needed to charge each request."""

    total_ns: float  # v(all)
    base: float  # max(f, g), which is shared equally
    compute_part: float  # W
    compute_ns: float  # f + the sum of all c_i
    memory_ns: float
    large: dict[int, float]  # place in the step -> charge without the base


def solve_overlap(
    fixed: tuple[float, float],
    sums: tuple[float, float],
    own: Sequence[tuple[float, float]],
    may_cross: bool,
) -> Overlap:
    """Solve the game. `fixed` are f and g, `sums` those of all c_i and m_i, `own` each (c_i, m_i).

    `may_cross` says that the requests are of different kinds, so either side may be on top on the
    way. Otherwise all are small, unless there are few.
    """
    places = _large_players(own, sums[0] + sums[1], may_cross)
    compute_ns, memory_ns = sums
    if len(places) == len(own):
        compute_ns = memory_ns = 0.0
    else:
        for place in places:
            compute_ns -= own[place][0]
            memory_ns -= own[place][1]
    part, charges = _charge_large(
        (fixed[0], max(0.0, compute_ns)),
        (fixed[1], max(0.0, memory_ns)),
        [own[place][0] for place in places],
        [own[place][1] for place in places],
    )
    compute_ns, memory_ns = fixed[0] + sums[0], fixed[1] + sums[1]
    return Overlap(
        total_ns=max(compute_ns, memory_ns),
        base=max(fixed),
        compute_part=part,
        compute_ns=compute_ns,
        memory_ns=memory_ns,
        large=dict(zip(places, charges, strict=True)),
    )


def _large_players(own: Sequence[tuple[float, float]], all_ns: float, may_cross: bool) -> list[int]:
    """Return the places of the large players, in step order."""
    if len(own) <= LARGE_MAX:
        return list(range(len(own)))
    if not may_cross:
        return []
    # Python's sort keeps the order of equals, so of these the first in the step comes first.
    sizes = [(c + m, place) for place, (c, m) in enumerate(own) if c + m >= SMALL_PART * all_ns]
    sizes.sort(key=lambda pair: -pair[0])
    if len(sizes) > LARGE_MAX:
        sizes = [pair for pair in sizes[:LARGE_MAX] if pair[0] > sizes[LARGE_MAX][0]]
    return sorted(place for _, place in sizes)


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
