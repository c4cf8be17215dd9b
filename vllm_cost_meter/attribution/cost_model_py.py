"""The cost model: predict a step's GPU time, learnt online from the engine's own steps, in Python.

This is the twin of `csrc/fit.pxd`. Both agree bit for bit, so a change to one must be made in the
other.

1. A GPU step is a roofline: it takes as long as the slower of its arithmetic and its memory
   traffic. Each side is a plane over the contents of the batch, with coefficients >= 0 in GPU-ns:

       compute  f + a * tokens + b * sequences + q * products
       memory   g + a' * tokens + b' * sequences + k * context

   `context` is the sum of the requests' contexts at the end of the step, all of which are read.
   `products` is the sum of tokens * context, which is vLLM's own count (ModelMetrics). Within a
   prompt's first chunk a causal kernel does about half of that; the coefficient of tokens absorbs
   most of the difference.
2. Two forms compete: the larger of both planes, and *one* plane with all of the terms, for a
   machine that never meets its memory's limit, e.g. a CPU. Both predict every step before they
   learn from it. The form with the smaller running error is used, but two planes only if they are
   better by a margin.
3. The two planes are fitted by turns. Each step belongs to the plane that predicts more; then each
   plane is fitted by least squares; repeat. Steps are weighed by 1 / time squared, so the error is
   relative, and a step that took ten times too long (a page fault, a compile) has little influence.
   Beyond three standard deviations a step is weighed down further (Huber 1964).
4. The model learns from all of the first `ALL_STEPS` steps, later from one in `LATER_EVERY`. Sweeps
   go over the last `RING` of them again and again, a few records per step. So the fit costs every
   step the same, and each sweep assigns the steps to planes anew. Older steps stay as sums, which
   fade with a time constant of `MEMORY_STEPS`. If the prediction misses the latest steps by far
   more than usual, the machine has changed, and older steps are forgotten.
5. If the traffic cannot tell the terms apart (one shape only), the prior does. A ridge pulls each
   coefficient towards the prior's, as if that were known to `PRIOR_SPREAD` of itself. The scale of
   a prior plane is fitted first, so the plane may be in any unit, e.g. FLOPs.
6. Splits use a published copy of the coefficients, with a version number. A new version comes when
   the steps seen have doubled, later every `PUBLISH_STEPS`.

Invariant: published coefficients are finite and >= 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_cost_meter.attribution.cost_model import Plane, Planes

COMPUTE, MEMORY, ONE = 0, 1, 2
ZERO: Plane = (0.0, 0.0, 0.0, 0.0, 0.0)
# The default prior: a step costs its tokens.
TOKENS_PRIOR: Planes = ((0.0, 1.0, 0.0, 0.0, 0.0), ZERO, (0.0, 1.0, 0.0, 0.0, 0.0))

TERMS = 5
# The terms that each plane may have, as bits.
_MAY_HAVE = (0b01111, 0b10111, 0b11111)

RING = 1024
SWEEP_PER_STEP = 2
MEMORY_STEPS = 65_536.0
# If the heights of the planes cannot be compared, the first steps are assigned by their contents: a
# step with a prefill chunk belongs to compute. If a plane later loses all its steps, it is offered
# the steps of its kind that take longer than the other plane predicts.
START_STEPS = 128
FIRST_PUBLISH = 32
PUBLISH_STEPS = 4096
# After this many steps a single step adds little, so only every fourth is used.
ALL_STEPS = 32_768
LATER_EVERY = 4
# Two planes must predict better than one by this factor before they are used, and to stay so.
MARGIN = 0.95
KEEP_MARGIN = 0.98
TRUSTED_MARGIN = 1.02  # a trusted prior's two planes stay in use unless steps contradict them
# A plane with a weight below this many steps counts as empty.
EMPTY = 8.0
# Relative noise of a step's time, and of a prior coefficient, for the strength of the ridge.
NOISE = 0.03
PRIOR_SPREAD = 0.2
# A term that the prior lacks is expected to make up about this part of a step.
UNKNOWN_PART = 0.05
ERROR_STEPS = 512.0  # time constant of the running errors

# The machine has changed if a sweep's error is this many times the usual error. The usual error is
# the smallest so far, which may rise a little with every sweep.
CHANGED = 2.5
USUAL_RISE = 1.02
CLIP_MAX = 0.9  # relative error beyond which a step is always an outlier

_PIVOT_MIN = 1e-12


@dataclass(slots=True, frozen=True)
class Work:
    """The work that one or several requests do in a step."""

    tokens: int
    sequences: int
    products: int
    context: int

    @classmethod
    def of(cls, tokens: int, context: int) -> "Work":
        """Return the work of one request; `context` is its length at the end of the step."""
        return cls(tokens, 1, tokens * context, context)

    def without(self, other: "Work") -> "Work":
        """Return the rest of this work."""
        return Work(
            self.tokens - other.tokens,
            self.sequences - other.sequences,
            self.products - other.products,
            self.context - other.context,
        )


def total_of(works: Sequence[Work]) -> Work:
    """Return the work of several requests together."""
    return Work(
        sum(work.tokens for work in works),
        sum(work.sequences for work in works),
        sum(work.products for work in works),
        sum(work.context for work in works),
    )


def time_of(plane: Plane, work: Work) -> float:
    """Return the time of some work by a plane, in ns, without the constant."""
    if work.tokens == 1 and work.products == work.context:  # a decode, by far the usual case
        return (plane[1] + plane[2]) + (plane[3] + plane[4]) * work.context
    return (
        plane[1] * work.tokens
        + plane[2] * work.sequences
        + plane[3] * work.products
        + plane[4] * work.context
    )


class _Sums:
    """Normal equations of one plane; each row is scaled so that its time is 1."""

    def __init__(self) -> None:
        self.weight = 0.0
        self.moments = [[0.0] * TERMS for _ in range(TERMS)]  # the lower triangle
        self.sums = [0.0] * TERMS

    def add(self, row: Sequence[float], weight: float) -> None:
        self.weight += weight
        for i in range(TERMS):
            weighed = weight * row[i]
            self.sums[i] += weighed
            for j in range(i + 1):
                self.moments[i][j] += weighed * row[j]

    def add_sums(self, other: "_Sums") -> None:
        self.weight += other.weight
        for i in range(TERMS):
            self.sums[i] += other.sums[i]
            for j in range(i + 1):
                self.moments[i][j] += other.moments[i][j]

    def fade(self, factor: float) -> None:
        self.weight *= factor
        for i in range(TERMS):
            self.sums[i] *= factor
            for j in range(i + 1):
                self.moments[i][j] *= factor


class StepFit:
    """The cost model of one engine, fitted step by step.

    `version` counts the published models from 0, the prior. `compute` and `memory` are the planes
    in use. The one-plane form stands in `compute`, with a zero `memory`.
    """

    def __init__(self, prior: Planes | None, trusted: bool) -> None:
        """Start from a prior. `trusted` says that the heights of its planes can be compared."""
        self.version = 0
        self.steps = 0
        self._seen = 0
        self.errors = [0.0, 0.0]  # running mean relative error of: two planes, one plane
        self.two_planes = trusted
        self._is_trusted = trusted
        self._prior = prior or TOKENS_PRIOR
        self._working: list[Plane] = list(self._prior)
        self.compute, self.memory = self._in_use()
        self._ring: list[tuple[float, ...]] = []
        self._at = 0  # the sweep's place in the ring
        self._empty = ONE  # a plane without steps of its own; ONE if both have some
        self._folded = 0
        self._clip = [CLIP_MAX, CLIP_MAX]
        self._spread = [0.0, 0.0]
        self._old = [_Sums() for _ in range(3)]
        self._sweep = [_Sums() for _ in range(3)]
        self._next_publish = FIRST_PUBLISH
        self._mean_ns = self._variance = self._residual = 0.0
        self._usual = 0.0  # error of a sweep

    def observe(self, work: Work, gpu_ns: int) -> bool:
        """Learn from one step. Return True if a new version was published."""
        if gpu_ns <= 0 or work.sequences <= 0:
            return False
        self._seen += 1
        if self._seen > ALL_STEPS and self._seen % LATER_EVERY:
            return False
        row = _row(work, float(gpu_ns))
        self._judge(row, float(gpu_ns))
        if self.steps >= RING:
            self._accumulate(self._old, self._ring[self.steps % RING])
            self._folded += 1
            self._ring[self.steps % RING] = row
        else:
            self._ring.append(row)
        self.steps += 1
        for _ in range(SWEEP_PER_STEP):
            self._accumulate(self._sweep, self._ring[self._at], self._spread)
            self._at += 1
            if self._at == len(self._ring):
                return self._end_sweep()
        return False

    def adopt(self, prior: Planes, two_planes: bool) -> None:
        """Continue from an earlier fit, a prior with comparable planes."""
        self._prior = prior
        self._is_trusted = True
        self._working = list(prior)
        self.errors = [0.0, 0.0]
        self._publish(two_planes)

    @property
    def explained(self) -> float:
        """Return the share of the variance of step times that the planes in use explain."""
        return max(0.0, 1.0 - self._residual / self._variance) if self._variance > 0.0 else 0.0

    def planes(self) -> Planes:
        """Return the three planes as they are learnt now."""
        compute, memory, one = self._working
        return compute, memory, one

    # -- learning ---------------------------------------------------------------------------

    def _judge(self, row: Sequence[float], gpu_ns: float) -> None:
        """Predict a step before learning from it."""
        rate = 1.0 / (self.steps + 1.0 if self.steps < ERROR_STEPS else ERROR_STEPS)
        two = max(_of(self._working[COMPUTE], row), _of(self._working[MEMORY], row))
        errors = (abs(two - 1.0), abs(_of(self._working[ONE], row) - 1.0))
        for form in (0, 1):
            self.errors[form] += (min(errors[form], 1.0) - self.errors[form]) * rate
        used = max(_of(self.compute, row), _of(self.memory, row))
        clip = self._clip[0 if self.two_planes else 1]
        missed, usual_ns = used - 1.0, gpu_ns
        if abs(missed) > clip:  # an outlier counts as if it lay at the edge of the usual range
            missed = clip if missed > 0.0 else -clip
            usual_ns = used * gpu_ns / (1.0 + missed)
        missed = missed * usual_ns
        apart = usual_ns - self._mean_ns
        self._mean_ns += apart * rate
        self._variance += (apart * apart - self._variance) * rate
        self._residual += (missed * missed - self._residual) * rate

    def _accumulate(
        self, sums: Sequence[_Sums], row: Sequence[float], spread: list[float] | None = None
    ) -> None:
        compute, memory = _of(self._working[COMPUTE], row), _of(self._working[MEMORY], row)
        is_compute = compute >= memory
        if not self._is_trusted:
            has_chunk = row[1] > row[2]  # more tokens than sequences
            if self.steps <= START_STEPS:
                is_compute = has_chunk
            elif self._empty == COMPUTE:
                is_compute = has_chunk and memory < 1.0
            elif self._empty == MEMORY:
                is_compute = has_chunk or compute >= 1.0
        plane = COMPUTE if is_compute else MEMORY
        for form, kind, predicted in (
            (0, plane, max(compute, memory)),
            (1, ONE, _of(self._working[ONE], row)),
        ):
            missed = abs(predicted - 1.0)
            clip = self._clip[form]
            sums[kind].add(row, clip / missed if missed > clip else 1.0)
            if spread is not None:
                spread[form] += min(missed, clip)

    def _end_sweep(self) -> bool:
        fade = 1.0 - self._folded / MEMORY_STEPS
        self._forget_if_changed(min(self._spread) / len(self._ring))
        scales = [0.0, 0.0, 0.0]
        for kind in (COMPUTE, MEMORY, ONE):
            self._old[kind].fade(fade)
            self._sweep[kind].add_sums(self._old[kind])
            scales[kind] = _scale_of(self._prior[kind], self._sweep[kind])
        self._empty = ONE
        for kind in (COMPUTE, MEMORY):
            if self._sweep[kind].weight < EMPTY:
                self._empty = kind
        for kind, other in ((COMPUTE, MEMORY), (MEMORY, COMPUTE), (ONE, ONE)):
            scale = scales[kind] or scales[other] or 1.0
            self._working[kind] = _solve(
                self._sweep[kind], [scale * p for p in self._prior[kind]], _MAY_HAVE[kind]
            )
        for form in (0, 1):
            # The mean of a normal distribution's absolute values is 0.8 standard deviations.
            clip = 3.75 * self._spread[form] / len(self._ring)
            self._clip[form] = min(max(clip, NOISE), CLIP_MAX)
        self._spread = [0.0, 0.0]
        self._sweep = [_Sums() for _ in range(3)]
        self._at = self._folded = 0
        if self.steps < self._next_publish:
            return False
        self._next_publish = self.steps + min(self.steps, PUBLISH_STEPS)
        two, one = self.errors
        self._publish(two_planes=two < self._margin_to_beat() * one)
        return True

    def _margin_to_beat(self) -> float:
        """Return the factor by which two planes must beat one plane to be used."""
        if not self.two_planes:
            return MARGIN
        return TRUSTED_MARGIN if self._is_trusted else KEEP_MARGIN

    def _forget_if_changed(self, missed: float) -> None:
        """Forget the older steps if the prediction misses the latest by far more than usual."""
        if len(self._ring) < RING:
            return
        if self._usual > 0.0 and missed > CHANGED * max(self._usual, NOISE / 3.0):
            self._old = [_Sums() for _ in range(3)]
            self._usual = 0.0
        else:
            self._usual = min(self._usual * USUAL_RISE, missed) if self._usual > 0.0 else missed

    def _publish(self, two_planes: bool) -> None:
        self.two_planes = two_planes
        self.compute, self.memory = self._in_use()
        self.version += 1

    def _in_use(self) -> tuple[Plane, Plane]:
        if self.two_planes:
            return self._working[COMPUTE], self._working[MEMORY]
        return self._working[ONE], ZERO


def _row(work: Work, gpu_ns: float) -> tuple[float, ...]:
    per_ns = 1.0 / gpu_ns
    return (
        per_ns,
        work.tokens * per_ns,
        work.sequences * per_ns,
        work.products * per_ns,
        work.context * per_ns,
    )


def _of(plane: Sequence[float], row: Sequence[float]) -> float:
    return (
        plane[0] * row[0]
        + plane[1] * row[1]
        + plane[2] * row[2]
        + plane[3] * row[3]
        + plane[4] * row[4]
    )


def _scale_of(prior: Sequence[float], sums: _Sums) -> float:
    """Return the factor that brings a prior closest to the steps; 0 if there is none."""
    along = across = 0.0
    for i in range(TERMS):
        along += prior[i] * sums.sums[i]
        for j in range(i + 1):
            product = prior[i] * prior[j] * sums.moments[i][j]
            across += product if i == j else 2.0 * product
    return along / across if along > 0.0 and across > 0.0 else 0.0


def _solve(sums: _Sums, prior: Sequence[float], may_have: int) -> Plane:
    """Fit coefficients >= 0 by least squares with a ridge towards the prior.

    The result is exact: it tries every set of terms (2**5 at most), and takes the set with the
    smallest error among those with all coefficients >= 0.
    """
    if sums.weight <= 0.0:
        return tuple(prior)  # type: ignore[return-value]
    moments = [list(row) for row in sums.moments]
    right = list(sums.sums)
    for i in range(TERMS):
        size = math.sqrt(moments[i][i] / sums.weight)
        expected = UNKNOWN_PART / size if size > 0.0 else 0.0
        spread = PRIOR_SPREAD * max(prior[i], expected)
        if spread > 0.0:
            ridge = (NOISE / spread) * (NOISE / spread)
            moments[i][i] += ridge
            right[i] += ridge * prior[i]
    best, best_gain = list(ZERO), 0.0
    for terms in range(1, 1 << TERMS):
        if terms & ~may_have:
            continue
        found = _solve_for(moments, right, [i for i in range(TERMS) if terms >> i & 1])
        if found is not None and found[0] > best_gain:
            best_gain, best = found
    return tuple(best)  # type: ignore[return-value]


def _solve_for(
    moments: Sequence[Sequence[float]], right: Sequence[float], terms: Sequence[int]
) -> tuple[float, list[float]] | None:
    """Solve for some terms by scaled elimination. Return (error explained, coefficients).

    Returns None if the equations are singular or a coefficient is negative.
    """
    count = len(terms)
    scales = [0.0] * count
    matrix = [[0.0] * TERMS for _ in range(TERMS)]
    vector = [0.0] * TERMS
    for i in range(count):
        if moments[terms[i]][terms[i]] <= 0.0:
            return None
        scales[i] = 1.0 / math.sqrt(moments[terms[i]][terms[i]])
        vector[i] = right[terms[i]] * scales[i]
        for j in range(i + 1):
            value = moments[terms[i]][terms[j]] * scales[i] * scales[j]
            matrix[i][j] = matrix[j][i] = value
    gain = solve_scaled(matrix, vector, count)
    if gain is None or not all(value >= 0.0 for value in vector[:count]):
        return None
    coefficients = [0.0] * TERMS
    for i in range(count):
        coefficients[terms[i]] = vector[i] * scales[i]
    return gain, coefficients


def solve_scaled(matrix: list[list[float]], vector: list[float], count: int) -> float | None:
    """Solve the first `count` equations in place, by elimination; `vector` has the unknowns then.

    Return the error that they explain, None if an equation follows from the others. The matrix is
    symmetric, and its diagonal 1 or near it.
    """
    gain = 0.0
    for i in range(count):
        if matrix[i][i] < _PIVOT_MIN:
            return None
        # After the elimination the error explained is the sum of pivot times unknown squared.
        gain += vector[i] * vector[i] / matrix[i][i]
        for k in range(i + 1, count):
            factor = matrix[k][i] / matrix[i][i]
            vector[k] -= factor * vector[i]
            for j in range(i + 1, count):
                matrix[k][j] -= factor * matrix[i][j]
    for i in range(count - 1, -1, -1):
        value = vector[i]
        for j in range(i + 1, count):
            value -= matrix[i][j] * vector[j]
        vector[i] = value / matrix[i][i]
    return gain
