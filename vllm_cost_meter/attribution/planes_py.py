"""Two planes: a step as the larger of its arithmetic and its memory traffic, and how to learn them.

This is the twin of `csrc/planes.pxd`. Both agree bit for bit, so a change to one must be made in
the other.

1. The whole step is a roofline: it takes as long as the slower of its arithmetic and its memory
   traffic. Each side is a plane over the contents of the batch, with coefficients >= 0 in GPU-ns:

       compute  f + a * tokens + b * sequences + q * products
       memory   g + a' * tokens + b' * sequences + k * context

   `context` is the sum of the requests' contexts at the end of the step, all of which are read.
   `products` is the sum of tokens * context, which is vLLM's own count (ModelMetrics).
2. The two planes are fitted by turns. Each step belongs to the plane that predicts more; then each
   plane is fitted by least squares; repeat.
3. If the heights of the planes cannot be compared, the first steps are assigned by their contents:
   a step with more tokens than sequences belongs to compute. If a plane later loses all its steps,
   it is offered the steps of its kind that take longer than the other plane predicts.
4. If the traffic cannot tell the terms apart, the prior does. A ridge pulls each coefficient
   towards the prior's, as if that were known to `PRIOR_SPREAD` of itself. The scale of a prior
   plane is fitted first, so the plane may be in any unit, e.g. FLOPs.

Invariant: coefficients are finite and >= 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_cost_meter.attribution.cost_model import Plane, Planes
from vllm_cost_meter.attribution.least_squares_py import EMPTY, NOISE, UNKNOWN_PART, solve_scaled

COMPUTE, MEMORY, BOTH = 0, 1, 2
ZERO: Plane = (0.0, 0.0, 0.0, 0.0, 0.0)
TERMS = 5
# The terms that each plane may have, as bits.
_MAY_HAVE = (0b01111, 0b10111)
START_STEPS = 128
# Relative noise of a prior coefficient, for the strength of the ridge.
PRIOR_SPREAD = 0.2


@dataclass(slots=True, frozen=True)
class Work:
    """The work that one or several requests do in a step, as the planes see it."""

    tokens: int
    sequences: int
    products: int
    context: int

    @classmethod
    def of(cls, tokens: int, context: int) -> "Work":
        """Return the work of one request; `context` is its length at the end of the step."""
        return cls(tokens, 1, tokens * context, context)


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


class PlaneSums:
    """Normal equations of one plane; each row is scaled so that its time is 1."""

    def __init__(self) -> None:
        self.weight = 0.0
        self.moments = [[0.0] * TERMS for _ in range(TERMS)]  # the lower triangle
        self.sums = [0.0] * TERMS

    def add(self, row: Sequence[float], weight: float) -> None:
        """Add a step's row, so many times."""
        self.weight += weight
        for i in range(TERMS):
            weighed = weight * row[i]
            self.sums[i] += weighed
            for j in range(i + 1):
                self.moments[i][j] += weighed * row[j]

    def add_sums(self, other: "PlaneSums") -> None:
        """Add the steps of other equations."""
        self.weight += other.weight
        for i in range(TERMS):
            self.sums[i] += other.sums[i]
            for j in range(i + 1):
                self.moments[i][j] += other.moments[i][j]

    def fade(self, factor: float) -> None:
        """Let all steps count so much less."""
        self.weight *= factor
        for i in range(TERMS):
            self.sums[i] *= factor
            for j in range(i + 1):
                self.moments[i][j] *= factor


class PlanesFit:
    """Two planes that learn. `working` are the planes as they are learnt now."""

    def __init__(self, prior: Planes) -> None:
        """Start from a prior; the heights of its planes cannot be compared."""
        self.working: list[Plane] = list(prior)
        self._prior = prior
        self._is_trusted = False
        self._empty = BOTH  # a plane without steps of its own; BOTH if each has some
        self._old, self._sweep = _no_sums(), _no_sums()

    def predicted(self, row: Sequence[float]) -> float:
        """Return what a step takes, as a part of what it took."""
        return max(_of(self.working[COMPUTE], row), _of(self.working[MEMORY], row))

    def add(self, row: Sequence[float], weight: float, steps: int, is_old: bool) -> None:
        """Add a step to those of the sweep, or to the old ones. `steps` were learnt from so far."""
        sums = self._old if is_old else self._sweep
        sums[self._side(row, steps)].add(row, weight)

    def end_sweep(self, fade: float) -> None:
        """Fit both planes to the steps of the sweep and to the old ones, which fade."""
        scales = [0.0, 0.0]
        for kind in (COMPUTE, MEMORY):
            self._old[kind].fade(fade)
            self._sweep[kind].add_sums(self._old[kind])
            scales[kind] = _scale_of(self._prior[kind], self._sweep[kind])
        self._empty = BOTH
        for kind in (COMPUTE, MEMORY):
            if self._sweep[kind].weight < EMPTY:
                self._empty = kind
        for kind, other in ((COMPUTE, MEMORY), (MEMORY, COMPUTE)):
            scale = scales[kind] or scales[other] or 1.0
            self.working[kind] = _solve(
                self._sweep[kind], [scale * p for p in self._prior[kind]], _MAY_HAVE[kind]
            )
        self._sweep = _no_sums()

    def start_over(self, prior: Planes) -> None:
        """Forget all steps, and begin with planes whose heights can be compared."""
        self.working = list(prior)
        self._prior = prior
        self._is_trusted = True
        self._empty = BOTH
        self._old, self._sweep = _no_sums(), _no_sums()

    def _side(self, row: Sequence[float], steps: int) -> int:
        compute, memory = _of(self.working[COMPUTE], row), _of(self.working[MEMORY], row)
        is_compute = compute >= memory
        if not self._is_trusted:
            has_chunk = row[1] > row[2]  # more tokens than sequences
            if steps <= START_STEPS:
                is_compute = has_chunk
            elif self._empty == COMPUTE:
                is_compute = has_chunk and memory < 1.0
            elif self._empty == MEMORY:
                is_compute = has_chunk or compute >= 1.0
        return COMPUTE if is_compute else MEMORY


def _no_sums() -> list[PlaneSums]:
    return [PlaneSums(), PlaneSums()]


def _of(plane: Sequence[float], row: Sequence[float]) -> float:
    return (
        plane[0] * row[0]
        + plane[1] * row[1]
        + plane[2] * row[2]
        + plane[3] * row[3]
        + plane[4] * row[4]
    )


def _scale_of(prior: Sequence[float], sums: PlaneSums) -> float:
    """Return the factor that brings a prior closest to the steps; 0 if there is none."""
    along = across = 0.0
    for i in range(TERMS):
        along += prior[i] * sums.sums[i]
        for j in range(i + 1):
            product = prior[i] * prior[j] * sums.moments[i][j]
            across += product if i == j else 2.0 * product
    return along / across if along > 0.0 and across > 0.0 else 0.0


def _solve(sums: PlaneSums, prior: Sequence[float], may_have: int) -> Plane:
    """Fit coefficients >= 0 by least squares with a ridge towards the prior.

    The result is exact: it tries every set of terms (2**4 at most), and takes the set with the
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
