"""Learn the curve of a model on a GPU from its steps.

No engine uses it yet: see `curve_py.py`.

A step's time is linear in the coefficients of a curve, so they are found by least squares on
relative errors, and none may be negative. Few of them can be told apart by the steps of one kind of
traffic: with 60 requests in each step nobody sees what one alone would take, and what is shared
depends on just that. So the fit leans on what is known of all transformers:

1. A prior is a sum of a few *parts*, each a curve in any unit. Without counts of FLOPs and bytes
   these are the fixed time, the arithmetic of tokens beyond `RIDGE_TOKENS`, the reading of
   contexts, the pairs of attention, and the reading of experts. With counts, what is read is one
   part, with the true ratio of weights, experts and contexts; what is computed is another. The
   steps give each part its scale.
2. A ridge then pulls each coefficient towards that sum, as if it were known to a part of itself
   (`SPREAD`, `READ_SPREAD`), or of a step (`UNKNOWN_PART`).
3. The number of distinct experts that tokens choose is known by its form, E (1 - (1 - k/E)^tokens),
   so its bend needs no steps with few tokens.

h has fewer free slopes (`RAMPS`) than corners (`curve_py.KNOTS`): the others follow the experts.

Invariant: coefficients are finite and >= 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_cost_meter.attribution.cost_model import TokenCurve
from vllm_cost_meter.attribution.cost_model_py import solve_scaled
from vllm_cost_meter.attribution.curve_py import (
    FIXED,
    KNOTS,
    PAIRS,
    READ,
    SLOPES,
    CurveWork,
    between,
)

# Where the free slopes of h begin; each is a corner.
RAMPS = (0, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
EXPERTS = SLOPES + len(RAMPS)
FIT_TERMS = EXPERTS + 1
# From so many tokens on the products of a GPU are limited by arithmetic, where nothing is known.
RIDGE_TOKENS = 256.0
# The relative noise of a step's time.
NOISE = 0.03
# A coefficient is known to this part of what the prior says; what is read, to this part.
SPREAD = 0.2
READ_SPREAD = 0.05
# A slope of h is known to this part of the largest one.
RAMP_SPREAD = 0.5
# Any term may make up this part of a step.
UNKNOWN_PART = 0.05
_GAIN_MIN = 1e-9

PriorPart = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Experts:
    """How many experts a layer has, and how many each token chooses; 0 in a dense model."""

    number: int = 0
    per_token: int = 0

    def heights(self) -> list[float]:
        """Return the expected number of distinct experts at each corner of h."""
        if not self.number:
            return [0.0] * len(KNOTS)
        left_out = 1.0 - self.per_token / self.number
        return [self.number * (1.0 - left_out**knot) for knot in KNOTS]


def row_of(work: CurveWork, heights: Sequence[float]) -> list[float]:
    """Return what a step's time is linear in, for each of `FIT_TERMS`.

    `heights` are those of the model's experts.
    """
    row = [1.0, 1.0 if work.prefills else 0.0, float(work.sequences)]
    row += [work.read, work.pairs, work.prefill_read]
    for place, begin in enumerate(RAMPS):
        end = RAMPS[place + 1] if place + 1 < len(RAMPS) else math.inf
        row.append(min(float(work.tokens), end) - begin if work.tokens > begin else 0.0)
    corner, above = between(float(work.tokens))
    chosen = heights[corner]
    if above > 0.0:
        chosen += above * (heights[corner + 1] - heights[corner])
    row.append(chosen)
    return row


def curve_of(coefficients: Sequence[float], heights: Sequence[float]) -> TokenCurve:
    """Return the curve with these coefficients."""
    slopes = []
    for place, knot in enumerate(KNOTS):
        ramp = sum(1 for begin in RAMPS if begin <= knot) - 1
        slope = coefficients[SLOPES + ramp]
        if place + 1 < len(KNOTS):
            chosen = heights[place + 1] - heights[place]
            slope += coefficients[EXPERTS] * chosen / (KNOTS[place + 1] - knot)
        slopes.append(slope)
    return (*coefficients[:SLOPES], *slopes)


def usual_parts(experts: Experts) -> tuple[PriorPart, ...]:
    """Return the parts of a prior where nothing is counted."""
    ends = (*RAMPS[1:], 2 * RAMPS[-1])
    arithmetic = [0.0] * FIT_TERMS
    for place, (begin, end) in enumerate(zip(RAMPS, ends, strict=True)):
        beyond = max(0.0, end - RIDGE_TOKENS) - max(0.0, begin - RIDGE_TOKENS)
        arithmetic[SLOPES + place] = beyond / (end - begin)
    alone = (FIXED, READ, PAIRS, *([EXPERTS] if experts.number else []))
    return (
        tuple(arithmetic),
        *(tuple(1.0 if place == term else 0.0 for place in range(FIT_TERMS)) for term in alone),
    )


class CurveSums:
    """Normal equations of a curve; each row is scaled so that its step took 1."""

    def __init__(self) -> None:
        self.weight = 0.0
        self.moments = [[0.0] * FIT_TERMS for _ in range(FIT_TERMS)]
        self.sums = [0.0] * FIT_TERMS

    def add(self, row: Sequence[float], gpu_ns: float, weight: float = 1.0) -> None:
        """Add a step."""
        per_ns = 1.0 / gpu_ns
        scaled = [value * per_ns for value in row]
        self.weight += weight
        for i, value in enumerate(scaled):
            weighed = weight * value
            self.sums[i] += weighed
            for j in range(i + 1):
                self.moments[i][j] += weighed * scaled[j]

    def moment(self, i: int, j: int) -> float:
        """Return the moment of two terms."""
        return self.moments[i][j] if j <= i else self.moments[j][i]


def fit_curve(
    sums: CurveSums, parts: Sequence[PriorPart], read: PriorPart | None = None
) -> list[float]:
    """Return the coefficients of a curve that fit the steps and lean on a prior.

    `read` is the part of what is read, if its ratios are known from counts.
    """
    scales = _scales(sums, parts)
    prior = [0.0] * FIT_TERMS
    for scale, part in zip(scales, parts, strict=True):
        for term in range(FIT_TERMS):
            prior[term] += scale * part[term]
    moments = [[sums.moment(i, j) for j in range(FIT_TERMS)] for i in range(FIT_TERMS)]
    right = list(sums.sums)
    for term, spread in enumerate(_spreads(sums, prior, scales, parts, read)):
        if spread > 0.0:
            ridge = (NOISE / spread) * (NOISE / spread)
            moments[term][term] += ridge
            right[term] += ridge * prior[term]
    return nonnegative(moments, right)


def _scales(sums: CurveSums, parts: Sequence[PriorPart]) -> list[float]:
    """Return the scales >= 0 that bring the sum of the parts closest to the steps."""
    moments = [
        [
            sum(
                one[i] * other[j] * sums.moment(i, j)
                for i in range(FIT_TERMS)
                if one[i]
                for j in range(FIT_TERMS)
                if other[j]
            )
            for other in parts
        ]
        for one in parts
    ]
    right = [sum(part[i] * sums.sums[i] for i in range(FIT_TERMS)) for part in parts]
    return nonnegative(moments, right)


def _spreads(
    sums: CurveSums,
    prior: Sequence[float],
    scales: Sequence[float],
    parts: Sequence[PriorPart],
    read: PriorPart | None,
) -> list[float]:
    """Return how well each coefficient is known before any step, as a standard deviation."""
    steepest = max(prior[SLOPES:EXPERTS])
    counted = dict(zip(parts, scales, strict=True)).get(read, 0.0) if read is not None else 0.0
    spreads = []
    for term in range(FIT_TERMS):
        size = math.sqrt(sums.moments[term][term] / sums.weight) if sums.weight > 0.0 else 0.0
        unknown = UNKNOWN_PART / size if size > 0.0 else 0.0
        if SLOPES <= term < EXPERTS:
            spreads.append(RAMP_SPREAD * steepest or unknown)
        elif read is not None and counted > 0.0 and term in (FIXED, EXPERTS):
            # What is read is known; what else a step takes to begin is not.
            reading = counted * read[term]
            spreads.append(math.hypot(READ_SPREAD * reading, prior[term] - reading))
        else:
            spreads.append(max(SPREAD * prior[term], unknown))
    return spreads


def nonnegative(moments: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Return x >= 0 with the least x'Mx - 2r'x (Lawson and Hanson 1974, on normal equations).

    `moments` are M, symmetric. A term that the others determine stays 0.
    """
    count = len(right)
    scales = [1.0 / math.sqrt(moments[i][i]) if moments[i][i] > 0.0 else 0.0 for i in range(count)]
    found = [0.0] * count
    free: list[int] = []
    barred = [scale == 0.0 for scale in scales]
    for _ in range(3 * count):
        entering, steepest = -1, _GAIN_MIN
        for i in range(count):
            if barred[i] or i in free:
                continue
            gain = right[i]
            for j in free:
                gain -= moments[i][j] * found[j]
            if gain * scales[i] > steepest:
                entering, steepest = i, gain * scales[i]
        if entering < 0:
            break
        free.append(entering)
        free.sort()
        while free:
            tried = _solved(moments, right, scales, free)
            if tried is None:
                free.remove(entering)
                barred[entering] = True
                break
            if min(tried) > 0.0:
                for i, value in zip(free, tried, strict=True):
                    found[i] = value
                break
            _step_back(found, free, tried)
    return found


def _step_back(found: list[float], free: list[int], tried: Sequence[float]) -> None:
    """Go towards what was tried until the first coefficient is 0, which is free no more."""
    part, first = 1.0, -1
    for i, value in zip(free, tried, strict=True):
        if value <= 0.0:
            reach = found[i] / (found[i] - value) if found[i] > 0.0 else 0.0
            if first < 0 or reach < part:
                part, first = reach, i
    for i, value in zip(list(free), tried, strict=True):
        found[i] += part * (value - found[i])
        if i == first or found[i] <= 0.0:
            found[i] = 0.0
            free.remove(i)


def _solved(
    moments: Sequence[Sequence[float]],
    right: Sequence[float],
    scales: Sequence[float],
    free: Sequence[int],
) -> list[float] | None:
    """Solve for the free terms by scaled elimination; None if they determine one another."""
    matrix = [[moments[i][j] * scales[i] * scales[j] for j in free] for i in free]
    vector = [right[i] * scales[i] for i in free]
    if solve_scaled(matrix, vector, len(free)) is None:
        return None
    return [value * scales[i] for i, value in zip(free, vector, strict=True)]
