"""How wrong charges may be: what else the steps allow to think of the cost model, in charges.

This is the twin of `csrc/charge_error.pxd`. Both agree bit for bit, so a change to one must be made
in the other.

A step's time tells little of how it is split: a model may predict every step and charge a tenant
10 % too much, as nobody saw what its requests would take by themselves. So the error of a
prediction is no measure of a charge's. But the fit knows what it does not know. Its equations, from
steps and prior, say how far each coefficient may be from where it is, and together with which
others. So:

1. Whenever a model is published, `DRAWS` other models are drawn from around it, as a normal
   distribution with the fit's moments has it. What a curve misses is no noise, as many steps miss
   the same; so steps tell as much as a part of them would (`TOLD_STEPS`), and less if noisy.
2. Now and then a step is split by one of these models too, in turn. So for each model and kind of
   charge (`charge_kind`) there are two sums over the same steps: what was charged, and what this
   model would have charged. Within a sum, errors of single steps cancel, as they do in a bill.
3. Twice the root of the mean of (other / charged - 1) squared, over the models, is a kind's error:
   about 95 of 100 bills should be within it (docs/explanation/attribution.md has how many are).

The signs of the draws are fixed, so equal fits have equal errors.

Invariant: an error is between 0 and 1. A kind that too few models were compared on has 1.
"""

import math
from collections.abc import Sequence

from vllm_cost_meter.attribution.cost_model import (
    CHARGE_KINDS,
    DECODE_COMPUTE,
    FIT_TERMS,
    LORA,
    READ,
    SLOPES,
    ServedModel,
    charge_kind,
)
from vllm_cost_meter.attribution.curve_fit_py import TOLD_STEPS, CurveFit
from vllm_cost_meter.attribution.features_py import StepPart
from vllm_cost_meter.attribution.game_py import StepModel, solve_step
from vllm_cost_meter.attribution.least_squares_py import NOISE, PIVOT_MIN

DRAWS, DRAWS_MIN = 16, 8
# A look every so many steps: the charges of prefills are seldom, and the least known.
LOOK_EVERY, LOOK_AT_PREFILLS_EVERY = 32, 8
LOOKS_KEPT = 64.0  # number of looks at a model that a mean goes over
SIGNS_FACTOR, SIGNS_SUMMAND = 1103515245, 12345  # of a linear congruential generator
# The terms of features have signs of their own, so those of the others are as without features.
SIGNS_SEED, FEATURE_SIGNS_SEED = 1, 2


class ChargeErrors:
    """Errors of the charges by a published model, by kind."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self.forget()

    def forget(self) -> None:
        """Know of no error, as the machine has changed."""
        self._others: list[StepModel] = []
        # In ns, the mean of the looks, by model and kind.
        self._charged = [[0.0] * CHARGE_KINDS for _ in range(DRAWS)]
        self._other = [[0.0] * CHARGE_KINDS for _ in range(DRAWS)]
        self._looks = [[0] * CHARGE_KINDS for _ in range(DRAWS)]
        self._turn = self._since = 0

    def draw(self, curve: CurveFit, deviation: float) -> None:
        """Draw other models around a published one; `deviation` is that of its steps' errors."""
        noise = deviation / NOISE if deviation > NOISE else 1.0
        factor, scales = _factored(curve.moments, curve.ridges, TOLD_STEPS * (noise * noise))
        state, of_features = SIGNS_SEED, FEATURE_SIGNS_SEED
        self._others = []
        for _ in range(DRAWS):
            signs = []
            for term in range(FIT_TERMS):
                if LORA <= term < SLOPES:
                    of_features = drawn_bits = _next(of_features)
                else:
                    state = drawn_bits = _next(state)
                signs.append(1.0 if drawn_bits & 0x10000 else -1.0)
            drawn = [
                max(0.0, known + NOISE * scale * apart)
                for known, scale, apart in zip(
                    curve.published, scales, _solved(factor, signs), strict=True
                )
            ]
            drawn[DECODE_COMPUTE] = min(drawn[DECODE_COMPUTE], drawn[READ])
            self._others.append(StepModel.of_curve(tuple(drawn), self._served))

    def look(self, parts: Sequence[StepPart], weights: Sequence[int], gpu_ns: int) -> None:
        """Split a step with these weights by another model too, if that is due."""
        self._since += 1
        has_prefill = any(part.is_prefill for part in parts)
        every = LOOK_AT_PREFILLS_EVERY if has_prefill else LOOK_EVERY
        if self._since < every or len(parts) < 2 or not self._others:
            return
        self._since = 0
        others = solve_step(self._others[self._turn], parts).weigh()
        charged, other = [0] * CHARGE_KINDS, [0] * CHARGE_KINDS
        for part, weight, other_weight in zip(parts, weights, others, strict=True):
            kind = charge_kind(part.tokens, part.context, part.is_prefill)
            charged[kind] += weight
            other[kind] += other_weight
        whole, other_whole = sum(charged), sum(other)
        if other_whole:
            for kind in range(CHARGE_KINDS):
                if charged[kind]:
                    share, other_share = charged[kind] / whole, other[kind] / other_whole
                    self._note(kind, gpu_ns * share, gpu_ns * other_share)
        self._turn = (self._turn + 1) % DRAWS

    def _note(self, kind: int, charged_ns: float, other_ns: float) -> None:
        charged, other = self._charged[self._turn], self._other[self._turn]
        self._looks[self._turn][kind] += 1
        rate = 1.0 / min(float(self._looks[self._turn][kind]), LOOKS_KEPT)
        charged[kind] += (charged_ns - charged[kind]) * rate
        other[kind] += (other_ns - other[kind]) * rate

    def by_kind(self) -> tuple[float, ...]:
        """Return the part by which charges of each kind may be off."""
        return tuple(self._error(kind) for kind in range(CHARGE_KINDS))

    def _error(self, kind: int) -> float:
        squares, draws = 0.0, 0
        for charged, other in zip(self._charged, self._other, strict=True):
            if charged[kind] > 0.0:
                apart = other[kind] / charged[kind] - 1.0
                squares += apart * apart
                draws += 1
        return min(2.0 * math.sqrt(squares / draws), 1.0) if draws >= DRAWS_MIN else 1.0


def _next(state: int) -> int:
    """Return the next state of the generator of signs."""
    return (state * SIGNS_FACTOR + SIGNS_SUMMAND) & 0x7FFFFFFF


def _factored(
    moments: Sequence[Sequence[float]], ridges: Sequence[float], told: float
) -> tuple[list[list[float]], list[float]]:
    """Return the Cholesky factor of a fit's equations, with a diagonal of 1, and the scales."""
    factor = [[0.0] * FIT_TERMS for _ in range(FIT_TERMS)]
    scales = []
    for i in range(FIT_TERMS):
        square = moments[i][i] / told + ridges[i]
        scales.append(1.0 / math.sqrt(square) if square > 0.0 else 0.0)
    for i in range(FIT_TERMS):
        for j in range(i):
            value = moments[i][j] / told * scales[i] * scales[j]
            for k in range(j):
                value -= factor[i][k] * factor[j][k]
            factor[i][j] = value / factor[j][j]
        value = 1.0
        for k in range(i):
            value -= factor[i][k] * factor[i][k]
        factor[i][i] = math.sqrt(max(value, PIVOT_MIN))
    return factor, scales


def _solved(factor: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Return x of L'x = right, for a lower triangle L."""
    found = list(right)
    for i in range(FIT_TERMS - 1, -1, -1):
        for k in range(i + 1, FIT_TERMS):
            found[i] -= factor[k][i] * found[k]
        found[i] /= factor[i][i]
    return found
