"""What each request of a step gets of h, which depends on the tokens of all of them.

This is the twin of `csrc/growths.pxd`. Both agree bit for bit, so a change to one must be made in
the other.

The Shapley value is additive over the terms of a step (`curve_py.py`). f is shared equally, p
equally among the prefills, b belongs to each, and attention is a game of its own
(`shapley_py.py`). What a request adds to h depends on the tokens that came before it, in a random
order of arrival:

1. In a step of up to `ENUMERATED_MAX` requests all subsets are enumerated, with padding.
2. With more, h is smoothed over the captured sizes, as all of them are met. Every request arrives
   at a time that is uniform on [0, 1], so at the instant s each other one is there with the
   probability s. The tokens of decodes are many and small: s times their number is there. Each
   prefill is a lump, there or not. A lump gets the mean growth of h over s and over what is there.
3. Of up to `ENUMERATED_MAX` lumps all subsets are enumerated, and the mean over s is exact.
4. With more, the `LEADERS_MAX` largest are leaders, and all others followers. What is there of the
   followers has a known distribution, which is kept by its weights at the corners of h: between two
   corners h is straight, so a weight there may be divided between both. A leader meets each subset
   of the other leaders, beside that distribution. All followers meet the same one, of leaders and
   followers, in which each follower is there a little less often, so that one is missing on
   average. s takes the `NODES` of Gauss and Legendre. Beyond the `LUMPS_MAX` largest, lumps count
   as many small tokens.
5. Of a few lumps the growths are exact, so decodes share what is left of h by their tokens. With
   followers a token gets the mean growth by one, and all parts are scaled to h. What is left would
   then be no measure: it holds the errors of all lumps, and decodes may be few beside them.

Invariant: what the requests get of h adds up to h of all tokens except for rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_cost_meter.attribution.cost_model import KNOTS, SLOPES, ServedModel, TokenCurve
from vllm_cost_meter.attribution.curve_py import corner_below, height
from vllm_cost_meter.attribution.shapley_py import beta

ENUMERATED_MAX = 6
LEADERS_MAX = 4
LUMPS_MAX = 64
# Of Gauss and Legendre on [0, 1]: instants, and their weights.
NODES = (
    (0.06943184420297371, 0.17392742256872679),
    (0.33000947820757187, 0.3260725774312732),
    (0.6699905217924281, 0.3260725774312732),
    (0.9305681557970262, 0.17392742256872679),
)


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
    led = [float(lumps[place]) for place in leaders]
    following = [float(lumps[place]) for place in ranked[len(leaders) : LUMPS_MAX]]
    small = float(tokens) - sum(led) - sum(following)
    if len(lumps) <= ENUMERATED_MAX:
        growths = dict(zip(leaders, _enumerated_lumps(curve, led, small), strict=True))
    else:
        before_all_ns = _mean_height(curve, 0.0, small, len(led) + len(following) - 1)
        each = _growths_of_leaders(curve, led, following, small, before_all_ns)
        growths = dict(zip(leaders, each, strict=True))
        others = len(following) - 1.0
        met = _Arrivals.of(small, led, following, others / (others + 1.0))
        weights = met.mean_weights()
        for place in ranked[len(leaders) :]:
            growths[place] = _growth(curve, met, weights, before_all_ns, lumps[place])
    given, left = 0.0, tokens
    for place in sorted(lumps):
        given += growths[place]
        left -= lumps[place]
    if len(lumps) <= ENUMERATED_MAX:  # What lumps get is exact, and so is what is left.
        return max(0.0, all_ns - given) / left if left else 0.0, growths
    token_ns = 0.0
    if left > 0:
        token_ns = _mean_slope(curve, _Arrivals.of(small, led, following, 1.0))
        given += token_ns * left
    # The means miss the whole by little.
    scale = all_ns / given if given > 0.0 else 0.0
    return token_ns * scale, {place: growth * scale for place, growth in growths.items()}


def _enumerated_lumps(curve: TokenCurve, lumps: Sequence[float], small: float) -> list[float]:
    """Return the mean growth of h by each of a few lumps, over all subsets of the others."""
    count = len(lumps)
    growths = [0.0] * count
    for subset in range(1 << count):
        there = [tokens for k, tokens in enumerate(lumps) if subset >> k & 1]
        tokens, size = sum(there, 0.0), len(there)
        if size > 0:
            gained = _mean_beside(curve, tokens, small, size - 1, count - size)
        if size < count:
            missed = _mean_beside(curve, tokens, small, size, count - 1 - size)
        for k in range(count):
            if subset >> k & 1:
                growths[k] += gained
            else:
                growths[k] -= missed
    return growths


def _mean_beside(curve: TokenCurve, tokens: float, small: float, there: int, absent: int) -> float:
    """Return the integral over s in [0, 1] of s^there (1-s)^absent h(tokens + s * small).

    From each corner on the slope is another one, so each bend adds what comes after it.
    """
    start = corner_below(tokens)
    before = curve[SLOPES + start]
    all_zeroth, all_first = beta(there, absent, 1.0), beta(there + 1, absent, 1.0)
    found = height(curve, tokens) * all_zeroth + before * small * all_first
    for place in range(start + 1, len(KNOTS)):
        if KNOTS[place] >= tokens + small:
            break
        bend = curve[SLOPES + place] - before
        before = curve[SLOPES + place]
        since = (KNOTS[place] - tokens) / small
        found += (
            bend
            * small
            * (
                (all_first - beta(there + 1, absent, since))
                - since * (all_zeroth - beta(there, absent, since))
            )
        )
    return found


def _leaders(ranked: Sequence[int], lumps: dict[int, int]) -> Sequence[int]:
    """Return the largest lumps; a tie at the cut is not among them, so equals stay equal."""
    if len(ranked) <= ENUMERATED_MAX:
        return ranked
    cut = lumps[ranked[LEADERS_MAX]]
    return [place for place in ranked[:LEADERS_MAX] if lumps[place] > cut]


def _growths_of_leaders(
    curve: TokenCurve,
    leaders: Sequence[float],
    followers: Sequence[float],
    small: float,
    before_all_ns: float,
) -> list[float]:
    """Return the mean growth of h by each leader, over all subsets of the other leaders."""
    count = len(leaders)
    absent = count + len(followers) - 1
    arrivals = _Arrivals.of(small, (), followers, 1.0)
    tokens, sizes = [0.0], [0]
    for led in leaders:
        sizes += [size + 1 for size in sizes]
        tokens += [there + led for there in tokens]
    growths = [_mean_height(curve, led, small, absent) - before_all_ns for led in leaders]
    beyond = [[height(curve, knot + there) for knot in KNOTS] for there in tokens]
    for s, part in NODES:
        present = arrivals.at(s)
        without = [present.without * height(curve, s * small + there) for there in tokens]
        beside = [_weighed(present.weights, heights) for heights in beyond]
        chances = [
            part * power(s, size) * power(1.0 - s, count - 1 - size) for size in range(count)
        ]
        for subset in range(1 << count):
            for k in range(count):
                if subset >> k & 1:
                    continue
                gained = beside[subset | 1 << k] - beside[subset]
                if subset:  # Without any lump it is known already, and exactly.
                    gained += without[subset | 1 << k] - without[subset]
                growths[k] += chances[sizes[subset]] * gained
    return growths


def _weighed(weights: Sequence[float], heights: Sequence[float]) -> float:
    total = 0.0
    for weight, at in zip(weights, heights, strict=True):
        total += weight * at
    return total


@dataclass(slots=True, frozen=True)
class _Present:
    """The chances of what is there at one instant."""

    weights: list[float]  # with a lump, divided between corners
    without: float  # no lump


@dataclass(slots=True, frozen=True)
class _Arrivals:
    """What may be there: lumps, each with how often it is there at the end, and small tokens."""

    small: float
    tokens: Sequence[float]
    often: Sequence[float]

    @classmethod
    def of(
        cls, small: float, leaders: Sequence[float], followers: Sequence[float], often: float
    ) -> "_Arrivals":
        """Return these leaders, and these followers that are there so often."""
        chances = (1.0,) * len(leaders) + (often,) * len(followers)
        return cls(small, (*leaders, *followers), chances)

    def at(self, s: float) -> _Present:
        """Return the chances of what is there at an instant."""
        weights, without = [0.0] * len(KNOTS), 1.0
        for tokens, often in zip(self.tokens, self.often, strict=True):
            chance = s * often
            # From above, so what was moved is not moved again.
            for corner, knot in reversed(list(enumerate(KNOTS))):
                moved = weights[corner] * chance
                weights[corner] -= moved
                _put(weights, between(knot + tokens), moved)
            _put(weights, between(s * self.small + tokens), without * chance)
            without -= without * chance
        return _Present(weights, without)

    def mean_weights(self) -> list[float]:
        """Return the chances of what is there with at least one lump, as means over the nodes."""
        means = [0.0] * len(KNOTS)
        for s, part in NODES:
            for corner, weight in enumerate(self.at(s).weights):
                means[corner] += part * weight
        return means


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
    met: _Arrivals,
    weights: Sequence[float],
    before_all_ns: float,
    tokens: int,
) -> float:
    """Return the mean growth of h by a follower: before all other lumps, and beside some."""
    found = _mean_height(curve, float(tokens), met.small, len(met.tokens) - 1)
    found -= before_all_ns
    for knot, weight in zip(KNOTS, weights, strict=True):
        if weight > 0.0:
            found += weight * (height(curve, float(knot + tokens)) - height(curve, float(knot)))
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
            ramp = small * power(rest, absent + 2) / ((p + 1.0) * (p + 2.0))
        found += bend * ramp
    return found


def power(base: float, exponent: int) -> float:
    """Return a power with a whole exponent >= 0, by squares."""
    found = 1.0
    while exponent:
        if exponent & 1:
            found *= base
        base *= base
        exponent >>= 1
    return found


def _mean_slope(curve: TokenCurve, arrivals: _Arrivals) -> float:
    """Return the mean growth of h by one token: before all lumps, and beside some."""
    weights, absent = arrivals.mean_weights(), len(arrivals.tokens)
    found, before, p = 0.0, 0.0, float(absent)
    for place, knot in enumerate(KNOTS):
        slope = curve[SLOPES + place]
        if knot < arrivals.small:
            rest = 1.0 - knot / arrivals.small
            found += (slope - before) * power(rest, absent + 1) / (p + 1.0)
        # A weight at a corner stands for tokens on both sides of it.
        found += weights[place] * 0.5 * (before + slope if place else slope + slope)
        before = slope
    return found
