"""The cost model: predict a step's GPU time, learnt online from the engine's own steps, in Python.

This is the twin of `csrc/fit.pxd`. Both agree bit for bit, so a change to one must be made in the
other.

1. Two forms compete: a curve, i.e. a sum over kernels (`curve_py.py`, `curve_fit_py.py`), and two
   planes, where the whole step is the larger of two sums (`planes_py.py`). Both predict every step
   before they learn from it. Where steps run kernel by kernel, two planes predict them somewhat
   worse and split them far worse. So two planes are used only once they have predicted better for
   `CHOICE_STEPS` on end: traffic of a new kind makes the curve err until it has learnt it. They are
   never used for a model with experts, nor once a request had a feature (LoRA, an encoder, guided
   decoding), as they know neither.
2. Steps are weighed by 1 / time squared, so errors are relative, and a step that took ten times too
   long (a page fault, a compile) has little influence. Beyond three standard deviations a step is
   weighed down further (Huber 1964).
3. The model learns from all of the first `ALL_STEPS` steps, later from one in `LATER_EVERY`. Sweeps
   go over the last `RING` of them again and again, a few records per step. So the fit costs every
   step the same, and each sweep assigns the steps to sides anew. Older steps stay as sums, which
   fade with a time constant of `MEMORY_STEPS`.
4. If steps suddenly take another time than predicted, the machine has changed: its arithmetic is
   slower, or its memory. Steps with a prefill and without are watched apart, each against its own
   usual error, by cumulative sums (Page 1954). After a change the fit forgets all steps, and what
   it had learnt is the prior.
5. Splits use a published copy of the model, with a version number. A new version comes when the
   steps since the start have grown by a quarter, later every `PUBLISH_STEPS`, and whenever what was
   learnt predicts steps with a prefill, or those without, otherwise than what is published. How far
   its charges may be off is found as it is used (`charge_error_py.py`).

Invariant: published coefficients are finite and >= 0.
"""

from vllm_cost_meter.attribution.charge_error_py import ChargeErrors
from vllm_cost_meter.attribution.cost_model import CURVE, TWO_PLANES, Coefficients, Planes
from vllm_cost_meter.attribution.curve_fit_py import CurveFit, CurveRow
from vllm_cost_meter.attribution.curve_py import CurveWork
from vllm_cost_meter.attribution.features_py import NO_FEATURES, FeatureWork
from vllm_cost_meter.attribution.game_py import StepModel
from vllm_cost_meter.attribution.least_squares_py import EMPTY, NOISE
from vllm_cost_meter.attribution.planes_py import PlanesFit, Work
from vllm_cost_meter.attribution.priors import Prior, curve_of_earlier

RING = 1024
# Records that a sweep takes with each step: more at first, when each sweep tells much.
SWEEP_PER_STEP, SWEEP_AT_FIRST, AT_FIRST = 2, 6, 4096
MEMORY_STEPS = 65_536.0
FIRST_PUBLISH = 32
PUBLISH_STEPS = 4096
# After this many steps a single step adds little, so only every fourth is used.
ALL_STEPS = 32_768
LATER_EVERY = 4
# For so many steps two planes must predict better than the curve by this factor before they are
# used; and by that one, to stay so.
CHOICE_STEPS = 2048
MARGIN = 0.95
KEEP_MARGIN = 0.98
ERROR_STEPS = 512.0  # time constant of the running errors
CLIP_MAX = 0.9  # relative error beyond which a step is always an outlier
# What was learnt has moved if it predicts this much else than the published model, on average.
MOVED = 0.01

# A change of the machine, in standard deviations of a step's error: what one step may count at
# most, what counts as usual, and the sum beyond which it is a change.
DEVIATION_MAX, DEVIATION_USUAL, DEVIATION_SUM = 4.0, 2.0, 40.0
# After a start so many steps go by until a change can be told.
WATCHED_FROM = 2048
USUAL_STEPS = 128.0  # time constant of the usual error of a kind of steps

PLANES_FORM, CURVE_FORM = 0, 1


class _Watch:
    """Watches the errors of one kind of steps for a change of the machine."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.above = self.below = 0.0

    def note(self, missed: float, deviation: float, is_watching: bool) -> bool:
        """Note how far a prediction missed. Return whether the machine has changed."""
        apart = (missed - self.mean) / deviation
        if is_watching:
            limited = min(max(apart, -DEVIATION_MAX), DEVIATION_MAX)
            self.above = max(0.0, self.above + (limited - DEVIATION_USUAL))
            self.below = max(0.0, self.below + (-limited - DEVIATION_USUAL))
        self.count += 1
        rate = 1.0 / (self.count if self.count < USUAL_STEPS else USUAL_STEPS)
        self.mean += min(max(missed - self.mean, -CLIP_MAX), CLIP_MAX) * rate
        return self.above > DEVIATION_SUM or self.below > DEVIATION_SUM


class StepFit:
    """The cost model of one engine, fitted step by step.

    `version` counts the published models from 0, the prior. `model` is the one in use. `steps` have
    been learnt from.
    """

    def __init__(self, prior: Prior) -> None:
        self.version = 0
        self.steps = 0
        self.has_seen_features = False
        self.errors = [0.0, 0.0]  # running mean relative error of each form
        self.form = CURVE_FORM
        self._served = prior.served
        self._planes = PlanesFit(prior.planes)
        self._first_curve = prior.curve
        self._curve = CurveFit(prior.curve, prior.served)
        self.charge_errors = ChargeErrors(prior.served)
        self._ring: list[tuple[tuple[float, ...], CurveRow]] = []
        self._next_publish = FIRST_PUBLISH
        self._mean_ns = self._variance = self._residual = 0.0
        self._begin()
        self._take()

    def _begin(self) -> None:
        """Begin to learn: no step is known."""
        self._seen = self._since = self._judged = 0
        self._behind = 0  # steps judged until two planes were last no better than the curve
        self._ring.clear()
        self._at = 0  # the sweep's place in the ring
        self._folded = 0
        self._clip = [CLIP_MAX, CLIP_MAX]
        self._spread = [0.0, 0.0]
        self._moved, self._moving = [0.0, 0.0], [0, 0]  # without a prefill, with one
        self._watches = (_Watch(), _Watch())

    def observe(
        self,
        work: Work,
        curve_work: CurveWork,
        gpu_ns: int,
        features: FeatureWork = NO_FEATURES,
    ) -> bool:
        """Learn from one step. Return True if a new version was published."""
        if gpu_ns <= 0 or work.sequences <= 0:
            return False
        planes_row = _planes_row(work, float(gpu_ns))
        curve_row = CurveRow.of(curve_work, self._served, float(gpu_ns), features)
        self.has_seen_features |= features != NO_FEATURES
        if self._judge(planes_row, curve_row, float(gpu_ns)):
            self._start_over(self.planes(), self._curve.published)
        self._seen += 1
        if self._seen > ALL_STEPS and self._seen % LATER_EVERY:
            return False
        if self._since >= RING:
            self._accumulate(*self._ring[self._since % RING], is_old=True)
            self._folded += 1
            self._ring[self._since % RING] = (planes_row, curve_row)
        else:
            self._ring.append((planes_row, curve_row))
        self._since += 1
        self.steps += 1
        for _ in range(SWEEP_AT_FIRST if self._since <= AT_FIRST else SWEEP_PER_STEP):
            self._accumulate(*self._ring[self._at], is_old=False)
            self._at += 1
            if self._at == len(self._ring):
                return self._end_sweep()
        return False

    def adopt(self, planes: Planes, coefficients: Coefficients, two_planes: bool) -> None:
        """Continue from an earlier fit, whose planes have comparable heights."""
        self.errors = [0.0, 0.0]
        self._start_over(planes, coefficients)
        self._publish(PLANES_FORM if two_planes else CURVE_FORM)

    @property
    def explained(self) -> float:
        """Return the share of the variance of step times that the form in use explains."""
        return max(0.0, 1.0 - self._residual / self._variance) if self._variance > 0.0 else 0.0

    @property
    def form_name(self) -> str:
        """Return the name of the form in use."""
        return TWO_PLANES if self.form == PLANES_FORM else CURVE

    def planes(self) -> Planes:
        """Return both planes as they are learnt now."""
        compute, memory = self._planes.working
        return compute, memory

    def coefficients(self) -> Coefficients:
        """Return the coefficients of the curve as they are learnt now."""
        return tuple(self._curve.coefficients)

    # -- learning ---------------------------------------------------------------------------

    def _judge(self, planes_row: tuple[float, ...], curve_row: CurveRow, gpu_ns: float) -> bool:
        """Predict a step before learning from it. Return whether the machine has changed."""
        predicted = (self._planes.predicted(planes_row), self._curve.predicted(curve_row))
        rate = 1.0 / (self._judged + 1.0 if self._judged < ERROR_STEPS else ERROR_STEPS)
        self._judged += 1
        for form in (PLANES_FORM, CURVE_FORM):
            missed = min(abs(predicted[form] - 1.0), 1.0)
            self.errors[form] += (missed - self.errors[form]) * rate
        clip = self._clip[self.form]
        missed, usual_ns = predicted[self.form] - 1.0, gpu_ns
        watch = self._watches[1 if curve_row.prefill > 0.0 else 0]
        has_changed = watch.note(missed, clip / 3.0, self._since >= WATCHED_FROM)
        if abs(missed) > clip:  # an outlier counts as if it lay at the edge of the usual range
            missed = clip if missed > 0.0 else -clip
            usual_ns = predicted[self.form] * gpu_ns / (1.0 + missed)
        missed = missed * usual_ns
        apart = usual_ns - self._mean_ns
        self._mean_ns += apart * rate
        self._variance += (apart * apart - self._variance) * rate
        self._residual += (missed * missed - self._residual) * rate
        return has_changed

    def _accumulate(self, planes_row: tuple[float, ...], curve_row: CurveRow, is_old: bool) -> None:
        planes_time = self._planes.predicted(planes_row)
        curve_time = self._curve.predicted(curve_row)
        weight = self._weight(planes_time, PLANES_FORM, is_old)
        self._planes.add(planes_row, weight, self._since, is_old)
        weight = self._weight(curve_time, CURVE_FORM, is_old)
        self._curve.add(curve_row, weight, self._since, is_old)
        if not is_old:
            kind = 1 if curve_row.prefill > 0.0 else 0
            self._moved[kind] += self._curve.moved(curve_row, curve_time)
            self._moving[kind] += 1

    def _weight(self, predicted: float, form: int, is_old: bool) -> float:
        """Return how much a step counts, and note how far it was missed."""
        missed, clip = abs(predicted - 1.0), self._clip[form]
        if not is_old:
            self._spread[form] += min(missed, clip)
        return clip / missed if missed > clip else 1.0

    def _end_sweep(self) -> bool:
        held = len(self._ring)
        fade = 1.0 - self._folded / MEMORY_STEPS
        self._planes.end_sweep(fade)
        self._curve.end_sweep(fade)
        for form in (PLANES_FORM, CURVE_FORM):
            # The mean of a normal distribution's absolute values is 0.8 standard deviations.
            clip = 3.75 * self._spread[form] / held
            self._clip[form] = min(max(clip, NOISE), CLIP_MAX)
        has_moved = any(
            moving >= EMPTY and moved / moving > MOVED
            for moved, moving in zip(self._moved, self._moving, strict=True)
        )
        # Two planes split a step with features wrongly: do without them at once.
        has_moved |= self.form == PLANES_FORM and self.has_seen_features
        self._spread = [0.0, 0.0]
        self._moved, self._moving = [0.0, 0.0], [0, 0]
        self._at = self._folded = 0
        self._compare_forms()
        is_due = self._since >= self._next_publish
        if not (is_due or (has_moved and self._since >= FIRST_PUBLISH)):
            return False
        if is_due:
            self._next_publish = self._since + min(self._since // 4, PUBLISH_STEPS)
        self._publish(self._best_form())
        self.charge_errors.draw(self._curve, self._clip[CURVE_FORM] / 3.0)
        return True

    def _compare_forms(self) -> None:
        """Note whether two planes predict better than the curve."""
        margin = KEEP_MARGIN if self.form == PLANES_FORM else MARGIN
        is_better = self.errors[PLANES_FORM] < margin * self.errors[CURVE_FORM]
        if self._needs_curve or not is_better:
            self._behind = self._judged

    @property
    def _needs_curve(self) -> bool:
        """Whether there is what two planes know nothing of: experts, or features."""
        return bool(self._served.experts.number or self.has_seen_features)

    def _best_form(self) -> int:
        """Return the form to use: two planes must have been better for many steps."""
        if self._needs_curve:
            return CURVE_FORM
        if self._judged < CHOICE_STEPS:
            return self.form
        if self.form == PLANES_FORM:
            return CURVE_FORM if self._behind == self._judged else PLANES_FORM
        return PLANES_FORM if self._judged - self._behind >= CHOICE_STEPS else CURVE_FORM

    def _start_over(self, planes: Planes, coefficients: Coefficients) -> None:
        """Forget all steps, and learn from new ones with an earlier fit as the prior."""
        self._begin()
        self._planes.start_over(planes)
        self._curve.start_over(curve_of_earlier(coefficients) or self._first_curve)
        self._next_publish = FIRST_PUBLISH
        self.charge_errors.forget()

    def _publish(self, form: int) -> None:
        self.form = form
        self.version += 1
        self._take()

    def _take(self) -> None:
        """Use what is learnt now."""
        self._curve.publish()
        if self.form == PLANES_FORM:
            self.model = StepModel.of_planes(*self.planes())
        else:
            self.model = StepModel.of_curve(self._curve.published, self._served)


def _planes_row(work: Work, gpu_ns: float) -> tuple[float, ...]:
    per_ns = 1.0 / gpu_ns
    return (
        per_ns,
        work.tokens * per_ns,
        work.sequences * per_ns,
        work.products * per_ns,
        work.context * per_ns,
    )
