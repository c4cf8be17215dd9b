"""A step as a sum of kernels: its time by a curve, and what each request adds to it.

This is the twin of `csrc/curve.pxd`. Both agree bit for bit, so a change to one must be made in the
other.

The kernels of a step run one after another, and each takes as long as the slower of its arithmetic
and its memory traffic. So a step is no maximum of two sums, but a sum over kernels. Most of them
(products, experts, norms, exchanges between GPUs) depend on the number of tokens alone, in a way
that bends both up (a product is flat until its arithmetic is the limit) and down (a second token
mostly chooses experts that were read before). Attention depends on each request: the arithmetic of
prefills goes on while the contexts of decodes are read. A step with only the requests S takes

    v(S) = f + p, if S has a prefill, + b for each of S + h(tokens of S) + attention(S)
    attention(S) = max(sum over S of (q * pairs + r * prefill read + u * decode read),
                       sum over S of k * read),           v of nobody = 0

`read` is a request's context, that of a prefill or of a decode, and `pairs` are the pairs of query
and key of a prefill, which is causal. (A prefill computes with its context also where a latent
cache must be unpacked.) Where layers see only a window of tokens, each counts what
its layers see. A server that runs decodes and prefills one after another has u = k. h is a broken
line with corners at `KNOTS`, and h(0) = 0. Where vLLM captured GPU graphs, a batch is computed as
the next captured size, so the tokens of h are padded.

The Shapley value is additive over these terms. f is shared equally, p equally among the prefills, b
belongs to each, and attention is a game of its own (`shapley_py.py`). What a request adds to h
depends on the tokens that came before it, X, in a random order of arrival:

1. In a step of up to `ENUMERATED_MAX` requests all subsets are enumerated, with padding.
2. With more, h is smoothed over the captured sizes, as X meets all of them. Every request arrives
   at a time that is uniform on [0, 1], so at the instant s each other one is there with the
   probability s. The tokens of decodes are many and small: s times their number is there. Each
   prefill is a lump, there or not. So X has a known distribution, which is kept by its weights at
   the corners of h: between two corners h is straight, so a weight there may be divided between
   both. A prefill gets the mean growth of h over X and s, where s takes the `NODES` of Gauss and
   Legendre.
3. X is that of the others. For the `LEFT_OUT_MAX` largest prefills it is computed without each of
   them; for all smaller ones together, each is there a little less often, so that one is missing
   on average. Beyond the `LUMPS_MAX` largest, prefills count as many small tokens.
4. Decodes share what is left of h by their tokens; or, if that is little, each token gets the mean
   growth by one, and all parts are scaled to h.

Invariant: what the requests get of h adds up to h of all tokens except for rounding.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_cost_meter.attribution.cost_model import (
    DECODE_COMPUTE,
    EXPERTS,
    KNOTS,
    PAIRS,
    PREFILL_COMPUTE,
    RAMPS,
    READ,
    SLOPES,
    Coefficients,
    Layers,
    ServedModel,
    TokenCurve,
)

ENUMERATED_MAX = 6
LEFT_OUT_MAX = 4
LUMPS_MAX = 64
# What lumps leave of h is what decodes have, if it is at least this part: lumps are known better.
REST_PART = 0.1
# Of Gauss and Legendre on [0, 1]: instants, and their weights.
NODES = (
    (0.06943184420297371, 0.17392742256872679),
    (0.33000947820757187, 0.3260725774312732),
    (0.6699905217924281, 0.3260725774312732),
    (0.9305681557970262, 0.17392742256872679),
)


@dataclass(slots=True, frozen=True)
class CurveWork:
    """What one or several requests of a step bring to the terms of a curve."""

    tokens: int = 0
    sequences: int = 0
    prefills: int = 0
    pairs: float = 0.0
    read: float = 0.0
    prefill_read: float = 0.0

    @classmethod
    def of(cls, tokens: int, context: int, is_prefill: bool, layers: Layers) -> "CurveWork":
        """Return the work of one request; `context` is its length at the end of the step."""
        seen = min(context, layers.window + tokens)
        read = float(layers.whole) * context + float(layers.windowed) * seen
        if not is_prefill:
            return cls(tokens, 1, 0, 0.0, read)
        number = float(tokens)
        # The last token sees `context` keys, the one before it one fewer, and so on.
        fewer = 0.5 * number * (number - 1.0)
        pairs = layers.whole * (number * context - fewer) + layers.windowed * (
            number * seen - fewer
        )
        return cls(tokens, 1, 1, pairs, 0.0, read)

    def plus(self, other: "CurveWork") -> "CurveWork":
        """Return this work and another."""
        return CurveWork(
            self.tokens + other.tokens,
            self.sequences + other.sequences,
            self.prefills + other.prefills,
            self.pairs + other.pairs,
            self.read + other.read,
            self.prefill_read + other.prefill_read,
        )


def all_of(works: Sequence[CurveWork]) -> CurveWork:
    """Return the work of several requests together, added up in their order."""
    total = CurveWork()
    for work in works:
        total = total.plus(work)
    return total


def arithmetic_ns(curve: Sequence[float], work: CurveWork) -> float:
    """Return the time of attention's arithmetic."""
    return (
        curve[PAIRS] * work.pairs
        + curve[PREFILL_COMPUTE] * work.prefill_read
        + curve[DECODE_COMPUTE] * work.read
    )


def reading_ns(curve: Sequence[float], work: CurveWork) -> float:
    """Return the time in which attention reads contexts."""
    return curve[READ] * (work.read + work.prefill_read)


def height(curve: TokenCurve, tokens: float) -> float:
    """Return h at a number of tokens."""
    found = 0.0
    for place, knot in enumerate(KNOTS):
        if tokens <= knot:
            break
        end = KNOTS[place + 1] if place + 1 < len(KNOTS) else tokens
        found += curve[SLOPES + place] * (min(tokens, end) - knot)
    return found


def curve_of(coefficients: Coefficients, heights: Sequence[float]) -> TokenCurve:
    """Return the curve of a fit's coefficients. `heights` are the experts that corners choose."""
    slopes = []
    for place, knot in enumerate(KNOTS):
        ramp = sum(1 for begin in RAMPS if begin <= knot) - 1
        slope = coefficients[SLOPES + ramp]
        if place + 1 < len(KNOTS):
            chosen = heights[place + 1] - heights[place]
            slope += coefficients[EXPERTS] * chosen / (KNOTS[place + 1] - knot)
        slopes.append(slope)
    return (*coefficients[:SLOPES], *slopes)


def smoothed(curve: TokenCurve, served: ServedModel) -> TokenCurve:
    """Return the curve of the mean over the batch sizes around each corner, which are padded."""
    if not served.captured:
        return curve
    heights = [
        0.5 * height(curve, float(served.padded(knot)))
        + 0.5 * height(curve, float(served.padded(knot + 1)))
        for knot in KNOTS
    ]
    heights[0] = 0.0
    slopes = [
        (heights[place + 1] - heights[place]) / (KNOTS[place + 1] - KNOTS[place])
        for place in range(len(KNOTS) - 1)
    ]
    return (*curve[:SLOPES], *slopes, curve[-1])


def enumerated(curve: TokenCurve, served: ServedModel, tokens: Sequence[int]) -> dict[int, float]:
    """Return the mean growth of h by each request, over all subsets of the others."""
    count = len(tokens)
    growths = [0.0] * count
    for subset in range(1 << count):
        there, size = 0, 0
        for j in range(count):
            if subset >> j & 1:
                there += tokens[j]
                size += 1
        value = height(curve, float(served.padded(there)))
        # Of all orders, those in which this subset comes before or up to one request.
        gained = value * _part_of_orders(size - 1, count) if size else 0.0
        missed = value * _part_of_orders(size, count) if size < count else 0.0
        for j in range(count):
            if subset >> j & 1:
                growths[j] += gained
            else:
                growths[j] -= missed
    return {place: max(0.0, growth) for place, growth in enumerate(growths)}


def _part_of_orders(before: int, count: int) -> float:
    """Return the part of all orders of `count` in which given ones come before a given one."""
    return math.factorial(before) * math.factorial(count - 1 - before) / math.factorial(count)


def among_many(
    curve: TokenCurve, lumps: dict[int, int], tokens: int
) -> tuple[float, dict[int, float]]:
    """Return what a token of a decode gets of a smooth h, and what each lump gets.

    `lumps` has their tokens by their place in the step, `tokens` are those of all requests.
    """
    all_ns = height(curve, float(tokens))
    if not lumps:
        return all_ns / tokens if tokens else 0.0, {}
    # Among equals the first in the step comes first.
    ranked = sorted(lumps, key=lambda place: -lumps[place])
    leaders = _leaders(ranked, lumps)
    followers, spread = ranked[len(leaders) :], ranked[len(leaders) : LUMPS_MAX]
    heights = [height(curve, float(knot)) for knot in KNOTS]
    growths: dict[int, float] = {}
    small = float(tokens)
    for place in (*leaders, *spread):
        small -= lumps[place]
    absent = len(leaders) + len(spread)
    for place in leaders:
        others = [(lumps[other], 1.0) for other in (*leaders, *spread) if other != place]
        weights = _spread(small, others)
        growths[place] = _growth(curve, heights, weights, small, absent - 1, lumps[place])
    if followers:
        often = (len(followers) - 1.0) / len(followers)
        others = [(lumps[other], 1.0) for other in leaders]
        others += [(lumps[other], often) for other in spread]
        weights = _spread(small, others)
        for place in followers:
            growths[place] = _growth(curve, heights, weights, small, absent - 1, lumps[place])
    token_ns, given, left = 0.0, 0.0, tokens
    for place in sorted(lumps):
        given += growths[place]
        left -= lumps[place]
    if left > 0:
        rest = all_ns - given
        if rest >= REST_PART * all_ns:
            return rest / left, growths
        weights = _spread(small, [(lumps[other], 1.0) for other in (*leaders, *spread)])
        token_ns = _mean_slope(curve, weights, small, absent)
        given += token_ns * left
    # The means miss the whole by little.
    scale = all_ns / given if given > 0.0 else 0.0
    return token_ns * scale, {place: growth * scale for place, growth in growths.items()}


def _leaders(ranked: Sequence[int], lumps: dict[int, int]) -> Sequence[int]:
    """Return the largest lumps, which are left out one by one.

    A tie at the cut is not among them, so equals stay equal.
    """
    if len(ranked) <= LEFT_OUT_MAX:
        return ranked
    cut = lumps[ranked[LEFT_OUT_MAX]]
    return [place for place in ranked[:LEFT_OUT_MAX] if lumps[place] > cut]


def _spread(small: float, others: Sequence[tuple[int, float]]) -> list[float]:
    """Return the weights at the corners of the tokens that are there, with at least one lump.

    They are means over the nodes. `others` are lumps, each with how often it is there at the end.
    """
    count = len(KNOTS)
    moves = [
        ([between(float(knot + tokens)) for knot in KNOTS], float(tokens), often)
        for tokens, often in others
    ]
    means = [0.0] * count
    for s, part in NODES:
        weights, without = [0.0] * count, 1.0
        for places, tokens, often in moves:
            chance = s * often
            # From above, so what was moved is not moved again.
            for corner in range(count - 1, -1, -1):
                moved = weights[corner] * chance
                weights[corner] -= moved
                _put(weights, places[corner], moved)
            _put(weights, between(s * small + tokens), without * chance)
            without -= without * chance
        for corner in range(count):
            means[corner] += part * weights[corner]
    return means


def corner_below(tokens: float) -> int:
    """Return the last corner that is not beyond a number of tokens >= 0."""
    return bisect_right(KNOTS, tokens) - 1


def between(tokens: float) -> tuple[int, float]:
    """Return the corner below a number of tokens, and how far it is to the next one, from 0 to 1.

    The last corner stands for all that is beyond.
    """
    place = corner_below(tokens)
    if place == len(KNOTS) - 1:
        return place, 0.0
    return place, (tokens - KNOTS[place]) / (KNOTS[place + 1] - KNOTS[place])


def _put(weights: list[float], at: tuple[int, float], weight: float) -> None:
    """Divide a weight between two corners."""
    place, above = at
    weights[place] += weight * (1.0 - above)
    if above > 0.0:
        weights[place + 1] += weight * above


def _growth(
    curve: TokenCurve,
    heights: Sequence[float],
    weights: Sequence[float],
    small: float,
    absent: int,
    tokens: int,
) -> float:
    """Return the mean growth of h by a lump: before all `absent` others, and beside some."""
    found = _mean_height(curve, float(tokens), small, absent)
    found -= _mean_height(curve, 0.0, small, absent)
    for corner, weight in enumerate(weights):
        if weight > 0.0:
            found += weight * (height(curve, float(KNOTS[corner] + tokens)) - heights[corner])
    return found


def _mean_height(curve: TokenCurve, tokens: float, small: float, absent: int) -> float:
    """Return the integral over s in [0, 1] of (1-s)^absent h(tokens + s * small)."""
    found, before, p = 0.0, 0.0, float(absent)
    for place, knot in enumerate(KNOTS):
        if knot >= tokens + small:
            break
        bend = curve[SLOPES + place] - before  # of the slope, at this corner
        before = curve[SLOPES + place]
        if knot <= tokens:
            ramp = (tokens - knot) / (p + 1.0) + small / ((p + 1.0) * (p + 2.0))
        else:
            rest = 1.0 - (knot - tokens) / small
            ramp = small * _power(rest, absent + 2) / ((p + 1.0) * (p + 2.0))
        found += bend * ramp
    return found


def _mean_slope(curve: TokenCurve, weights: Sequence[float], small: float, absent: int) -> float:
    """Return the mean growth of h by one token: before all `absent` lumps, and beside some."""
    found, before, p = 0.0, 0.0, float(absent)
    for place, knot in enumerate(KNOTS):
        slope = curve[SLOPES + place]
        if knot < small:
            found += (slope - before) * _power(1.0 - knot / small, absent + 1) / (p + 1.0)
        # A weight at a corner stands for tokens on both sides of it.
        found += weights[place] * 0.5 * (before + slope if place else slope + slope)
        before = slope
    return found


def _power(base: float, exponent: int) -> float:
    """Return a power with a whole exponent >= 0, by squares."""
    found = 1.0
    while exponent:
        if exponent & 1:
            found *= base
        base *= base
        exponent >>= 1
    return found
