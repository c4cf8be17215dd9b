"""Learn the curve of a model on a GPU from its steps.

This is the twin of `csrc/curve_fit.pxd`. Both agree bit for bit, so a change to one must be made in
the other.

A step's time is linear in the coefficients of a curve, but for attention, which is the larger of
two sums. So each step belongs to the side of attention that predicts more, and coefficients are
then found by least squares on relative errors; repeat. None may be negative. Few of them can be
told apart by the steps of one kind of traffic: with 60 requests in each step nobody sees what one
alone would take, and what is shared depends on just that. So the fit leans on what is known of all
transformers:

1. A prior is a sum of a few *parts*, each with coefficients in any unit (`priors.py`). The steps
   give each part its scale; where the ratio of parts is known, it is held near that.
2. A ridge then pulls each coefficient towards that sum, as if it were known to a part of itself
   (`SPREAD`, `READ_SPREAD`), or of a step (`UNKNOWN_PART`, `UNKNOWN_OWN_PART`).
3. What features of requests take (`features_py.py`) is unknown before any step, but a small part
   of one. Where no step had a feature, its coefficients stay 0.
4. The number of distinct experts that tokens choose is known by its form, E (1 - (1 - k/E)^tokens),
   so its bend needs no steps with few tokens.

Steps are kept as sums over the corners of h, where each step is between two, so most sums are 0 by
their nature. h has fewer free slopes (`RAMPS`) than corners (`KNOTS`): the others follow.

Invariant: coefficients are finite and >= 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vllm_cost_meter.attribution.cost_model import (
    DECODE_COMPUTE,
    EXPERTS,
    FEATURES,
    FIT_TERMS,
    FIXED,
    KNOTS,
    LORA,
    PAIRS,
    PREFILL,
    PREFILL_COMPUTE,
    RAMPS,
    READ,
    SEQUENCE,
    SLOPES,
    Coefficients,
    ServedModel,
)
from vllm_cost_meter.attribution.curve_py import CurveWork, corner_below
from vllm_cost_meter.attribution.features_py import NO_FEATURES, FeatureWork
from vllm_cost_meter.attribution.least_squares_py import EMPTY, NOISE, UNKNOWN_PART, nonnegative
from vllm_cost_meter.attribution.priors import CurvePrior

# A coefficient is known to this part of what the prior says; what is read, to this part.
SPREAD = 0.2
READ_SPREAD = 0.05
# A slope of h is known to this part of the largest one.
RAMP_SPREAD = 0.5
# What each request, any prefill and features take by themselves may make up this part of a step.
UNKNOWN_OWN_PART = 0.01
_SMALL_TERMS = (PREFILL, SEQUENCE, PREFILL_COMPUTE, *range(LORA, SLOPES))
_WITHOUT_FEATURES = (0.0,) * FEATURES
# The scales of a prior's parts learn as much from all steps as from so many.
TOLD_STEPS = 10.0
# If a coefficient is far from the prior, the prior is known to this part of the difference.
FAR_OFF = 0.5
# So many steps are assigned by whether they have a prefill, if the prior's parts have no ratio.
START_STEPS = 128
# The arithmetic of decodes is learnt after so many.
DECODES_FROM = 1024


class CurveRow(NamedTuple):
    """A step as the fit sees it: work and 1, each divided by the step's time."""

    one: float
    prefill: float
    sequences: float
    pairs: float
    read: float
    prefill_read: float
    place: int  # the corner of h below its tokens
    below: float  # how much of it is at this corner, and
    above: float  # at the next
    features: tuple[float, ...] = _WITHOUT_FEATURES

    @classmethod
    def of(
        cls,
        work: CurveWork,
        served: ServedModel,
        gpu_ns: float,
        features: FeatureWork = NO_FEATURES,
    ) -> "CurveRow":
        """Return the row of a step that took so long."""
        per_ns = 1.0 / gpu_ns
        tokens = float(served.padded(work.tokens))
        place = min(corner_below(tokens), len(KNOTS) - 2)
        above = (tokens - KNOTS[place]) / (KNOTS[place + 1] - KNOTS[place])
        return cls(
            per_ns,
            per_ns if work.prefills else 0.0,
            work.sequences * per_ns,
            work.pairs * per_ns,
            work.read * per_ns,
            work.prefill_read * per_ns,
            place,
            (1.0 - above) * per_ns,
            above * per_ns,
            tuple(amount * per_ns for amount in features.amounts()),
        )


@dataclass(slots=True)
class _Sums:
    """Normal equations: own terms among themselves, with corners, and corners with neighbours."""

    weight: float
    arithmetic_weight: float  # of steps in which attention's arithmetic takes longer
    own: list[list[float]]  # the lower triangle
    cross: list[list[float]]  # corner, own term
    corners: list[float]
    beside: list[float]  # of a corner and the next
    own_sums: list[float]
    corner_sums: list[float]

    @classmethod
    def none(cls) -> "_Sums":
        knots = len(KNOTS)
        return cls(
            0.0,
            0.0,
            [[0.0] * SLOPES for _ in range(SLOPES)],
            [[0.0] * SLOPES for _ in range(knots)],
            [0.0] * knots,
            [0.0] * knots,
            [0.0] * SLOPES,
            [0.0] * knots,
        )

    def add(self, own: Sequence[float], row: CurveRow, weight: float) -> None:
        self.weight += weight
        if own[PAIRS] > 0.0:
            self.arithmetic_weight += weight
        below, above = weight * row.below, weight * row.above
        k = row.place
        for i in range(SLOPES):
            weighed = weight * own[i]
            self.own_sums[i] += weighed
            for j in range(i + 1):
                self.own[i][j] += weighed * own[j]
            self.cross[k][i] += below * own[i]
            self.cross[k + 1][i] += above * own[i]
        self.corners[k] += below * row.below
        self.corners[k + 1] += above * row.above
        self.beside[k] += below * row.above
        self.corner_sums[k] += below
        self.corner_sums[k + 1] += above

    def add_sums(self, other: "_Sums") -> None:
        self.weight += other.weight
        self.arithmetic_weight += other.arithmetic_weight
        for i in range(SLOPES):
            self.own_sums[i] += other.own_sums[i]
            for j in range(i + 1):
                self.own[i][j] += other.own[i][j]
        for k in range(len(KNOTS)):
            for i in range(SLOPES):
                self.cross[k][i] += other.cross[k][i]
            self.corners[k] += other.corners[k]
            self.beside[k] += other.beside[k]
            self.corner_sums[k] += other.corner_sums[k]

    def fade(self, factor: float) -> None:
        self.weight *= factor
        self.arithmetic_weight *= factor
        for i in range(SLOPES):
            self.own_sums[i] *= factor
            for j in range(i + 1):
                self.own[i][j] *= factor
        for k in range(len(KNOTS)):
            for i in range(SLOPES):
                self.cross[k][i] *= factor
            self.corners[k] *= factor
            self.beside[k] *= factor
            self.corner_sums[k] *= factor


class CurveFit:
    """A curve that learns.

    `coefficients` are those of `FIT_TERMS` as they are learnt now, `published` those in use.
    `moments` are what the steps of the last sweep tell of them, and `ridges` what the prior does.
    """

    coefficients: list[float]
    published: Coefficients
    moments: list[list[float]]
    ridges: list[float]
    _old: _Sums
    _sweep: _Sums

    def __init__(self, prior: CurvePrior, served: ServedModel) -> None:
        self._columns = _columns(served.experts.heights())
        self.start_over(prior)
        self.publish()

    def predicted(self, row: CurveRow) -> float:
        """Return what a step takes, as a part of what it took."""
        return _predicted(self.coefficients, self._heights, row)

    def add(self, row: CurveRow, weight: float, steps: int, is_old: bool) -> None:
        """Add a step to those of the sweep, or to the old ones. `steps` were learnt from so far."""
        is_start = not self._prior.has_ratio and steps <= START_STEPS
        is_arithmetic = self._is_arithmetic(row, is_start)
        own = [row.one, row.prefill, row.sequences, 0.0, 0.0, 0.0, 0.0, *row.features]
        if is_arithmetic:
            own[PAIRS], own[PREFILL_COMPUTE] = row.pairs, row.prefill_read
            # Which side decodes are on is told apart once the others are.
            if steps > DECODES_FROM or self._prior.start[DECODE_COMPUTE] > 0.0:
                own[DECODE_COMPUTE] = row.read
        else:
            own[READ] = row.read + row.prefill_read
        (self._old if is_old else self._sweep).add(own, row, weight)

    def _is_arithmetic(self, row: CurveRow, is_start: bool) -> bool:
        """Return whether the arithmetic of attention takes longer than its reading in a step."""
        if is_start or row.prefill <= 0.0:  # Decodes alone wait for memory.
            return row.prefill > 0.0
        arithmetic, reading = _attention(self.coefficients, row)
        return arithmetic >= reading or (self._lacks_arithmetic and self.predicted(row) < 1.0)

    def end_sweep(self, fade: float) -> None:
        """Fit the curve to the steps of the sweep and to the old ones, which fade."""
        self._old.fade(fade)
        self._sweep.add_sums(self._old)
        # Once it has no steps of its own, arithmetic is offered those that take too long.
        self._lacks_arithmetic = self._sweep.arithmetic_weight < EMPTY
        if self._sweep.weight > 0.0:
            self._use(self._solve())
        self._sweep = _Sums.none()

    def start_over(self, prior: CurvePrior) -> None:
        """Forget all steps, and begin with a prior."""
        self._prior = prior
        self._old, self._sweep = _Sums.none(), _Sums.none()
        self._lacks_arithmetic = False
        self._use(list(prior.start))

    def publish(self) -> None:
        """Keep what is learnt now as what was published."""
        self.published = tuple(self.coefficients)
        self._published_heights = self._heights

    def moved(self, row: CurveRow, predicted: float) -> float:
        """Return how much else a step takes, as is `predicted` now, than by what was published."""
        return abs(predicted - _predicted(self.published, self._published_heights, row))

    def _use(self, coefficients: list[float]) -> None:
        self.coefficients = coefficients
        self._heights = [
            _sum_of_products(column, coefficients[SLOPES:]) for column in self._columns
        ]

    def _solve(self) -> list[float]:
        moments, right = self._equations()
        prior, scales = self._scaled_prior(moments, right)
        spreads = self._spreads(moments, prior, scales)
        self.moments = [list(row) for row in moments]
        self.ridges = [
            (NOISE / spread) * (NOISE / spread) if spread > 0.0 else 0.0 for spread in spreads
        ]
        for term, ridge in enumerate(self.ridges):
            moments[term][term] += ridge
            right[term] += ridge * prior[term]
        found = nonnegative(moments, right, self.coefficients)
        if found[READ] > 0.0:  # Decodes alone wait for memory.
            found[DECODE_COMPUTE] = min(found[DECODE_COMPUTE], found[READ])
        return found

    def _equations(self) -> tuple[list[list[float]], list[float]]:
        """Return the normal equations of the coefficients: a corner is a sum of ramps below it."""
        sums, columns = self._sweep, self._columns
        knots, ramps = len(KNOTS), FIT_TERMS - SLOPES
        moments = [[0.0] * FIT_TERMS for _ in range(FIT_TERMS)]
        right = [*sums.own_sums, *([0.0] * ramps)]
        # Corners only meet themselves and their neighbours.
        met = [[0.0] * ramps for _ in range(knots)]
        for k in range(knots):
            for q in range(ramps):
                value = sums.corners[k] * columns[k][q]
                if k > 0:
                    value += sums.beside[k - 1] * columns[k - 1][q]
                if k + 1 < knots:
                    value += sums.beside[k] * columns[k + 1][q]
                met[k][q] = value
        for i in range(SLOPES):
            for j in range(i + 1):
                moments[i][j] = moments[j][i] = sums.own[i][j]
        for q in range(ramps):
            for k in range(knots):
                height = columns[k][q]
                if height == 0.0:
                    continue
                right[SLOPES + q] += height * sums.corner_sums[k]
                for i in range(SLOPES):
                    moments[SLOPES + q][i] += height * sums.cross[k][i]
                for p in range(q + 1):
                    moments[SLOPES + q][SLOPES + p] += height * met[k][p]
            for i in range(SLOPES + q):
                moments[i][SLOPES + q] = moments[SLOPES + q][i]
        return moments, right

    def _scaled_prior(
        self, moments: Sequence[Sequence[float]], right: Sequence[float]
    ) -> tuple[list[float], list[float]]:
        """Return the sum of the prior's parts that is closest to the steps, and their scales."""
        parts = self._prior.parts
        along = [_sum_of_products(part.coefficients, right) for part in parts]
        across = [
            [_between(one.coefficients, moments, other.coefficients) for other in parts]
            for one in parts
        ]
        if self._prior.has_ratio:
            expected = [part.scale for part in parts]
            height = _sum_of_products(expected, along)
            square = _between(expected, across, expected)
            common = height / square if height > 0.0 and square > 0.0 else 1.0
            # What the parts miss is no noise: many steps miss the same.
            told = max(1.0, self._sweep.weight / TOLD_STEPS)
            for i, part in enumerate(parts):
                wanted = common * part.scale
                ridge = told * (NOISE / (part.spread * wanted)) * (NOISE / (part.spread * wanted))
                across[i][i] += ridge
                along[i] += ridge * wanted
        scales = nonnegative(across, along)
        prior = [0.0] * FIT_TERMS
        for scale, part in zip(scales, parts, strict=True):
            for term in range(FIT_TERMS):
                prior[term] += scale * part.coefficients[term]
        return prior, scales

    def _spreads(
        self, moments: Sequence[Sequence[float]], prior: Sequence[float], scales: Sequence[float]
    ) -> list[float]:
        """Return how well each coefficient is known before any step, as a standard deviation."""
        weight = self._sweep.weight
        steepest = max(prior[SLOPES:EXPERTS])
        spreads = []
        for term in range(FIT_TERMS):
            size = math.sqrt(moments[term][term] / weight)
            part = UNKNOWN_OWN_PART if term in _SMALL_TERMS else UNKNOWN_PART
            unknown = part / size if size > 0.0 else 0.0
            if SLOPES <= term < EXPERTS:
                spreads.append(RAMP_SPREAD * steepest or unknown)
                continue
            if self._prior.counts_reading and scales[0] > 0.0 and term in (FIXED, EXPERTS):
                # What is read is known; what else a step takes to begin is not.
                reading = scales[0] * self._prior.parts[0].coefficients[term]
                read_spread, rest = READ_SPREAD * reading, prior[term] - reading
                spreads.append(math.sqrt(read_spread * read_spread + rest * rest))
            else:
                spreads.append(max(SPREAD * prior[term], unknown))
            # A prior that is far off must not hold back what steps tell.
            apart = abs(self.coefficients[term] - prior[term])
            spreads[-1] = max(spreads[-1], FAR_OFF * apart)
        return spreads


def _sum_of_products(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the sum of the products of two equally long rows, added up in order."""
    total = 0.0
    for a, b in zip(one, other, strict=True):
        total += a * b
    return total


def _predicted(c: Sequence[float], heights: Sequence[float], row: CurveRow) -> float:
    arithmetic, reading = _attention(c, row)
    time = (
        (c[FIXED] * row.one + c[PREFILL] * row.prefill + c[SEQUENCE] * row.sequences)
        + (heights[row.place] * row.below + heights[row.place + 1] * row.above)
        + max(arithmetic, reading)
    )
    return time + _sum_of_products(c[LORA:SLOPES], row.features)


def _attention(c: Sequence[float], row: CurveRow) -> tuple[float, float]:
    """Return the time of attention's arithmetic, and of its reading."""
    return (
        c[PAIRS] * row.pairs + c[PREFILL_COMPUTE] * row.prefill_read + c[DECODE_COMPUTE] * row.read,
        c[READ] * (row.read + row.prefill_read),
    )


def _between(
    one: Sequence[float], moments: Sequence[Sequence[float]], other: Sequence[float]
) -> float:
    total = 0.0
    for i, a in enumerate(one):
        if a != 0.0:
            total += a * _sum_of_products(moments[i], other)
    return total


def _columns(heights: Sequence[float]) -> list[list[float]]:
    """Return how high each ramp, and what is chosen of the experts, is at each corner."""
    rows = []
    for knot, chosen in zip(KNOTS, heights, strict=True):
        row = []
        for place, begin in enumerate(RAMPS):
            end = RAMPS[place + 1] if place + 1 < len(RAMPS) else KNOTS[-1]
            row.append(float(max(0, min(knot, end) - begin)))
        rows.append([*row, chosen])
    return rows
