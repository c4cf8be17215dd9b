# cython: cdivision=True
"""The cost model: predict a step's GPU time, learnt online from the engine's own steps.

The twin `cost_model_py.py` explains the theory and has the same names. A `Fit` is plain memory:
nothing is allocated after `start_fit`. A step costs a few records of a sweep, whatever the batch.
"""

from libc.math cimport fabs
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from csrc.charge_error cimport ChargeErrors, draw_others, forget_charge_errors
from csrc.curve cimport smooth_curve, write_curve
from csrc.curve_fit cimport (
    CurveFit, CurvePrior, CurveRow, add_to_curve, curve_of_earlier, curve_row_of,
    end_sweep_of_curve, moved, predicted_by_curve, publish_curve, start_curve, start_curve_over,
)
from csrc.features cimport is_any
from csrc.game cimport StepModel, StepWork
from csrc.least_squares cimport EMPTY, NOISE
from csrc.planes cimport (
    COMPUTE, MEMORY, PlanesFit, Work, add_to_planes, end_sweep_of_planes, predicted_by_planes,
    start_planes,
)
from csrc.terms cimport FEATURES, TERMS, larger, smaller

cdef enum:
    RING = 1024
    SWEEP_PER_STEP = 2
    SWEEP_AT_FIRST = 6
    AT_FIRST = 4096
    FIRST_PUBLISH = 32
    PUBLISH_STEPS = 4096
    ALL_STEPS = 32768
    LATER_EVERY = 4
    CHOICE_STEPS = 2048
    WATCHED_FROM = 2048
    PLANES_FORM = 0
    CURVE_FORM = 1

cdef extern from *:
    """
    #define MEMORY_STEPS 65536.0
    #define MARGIN 0.95
    #define KEEP_MARGIN 0.98
    #define ERROR_STEPS 512.0
    #define CLIP_MAX 0.9
    #define MOVED 0.01
    #define DEVIATION_MAX 4.0
    #define DEVIATION_USUAL 2.0
    #define DEVIATION_SUM 40.0
    #define USUAL_STEPS 128.0
    """
    const double MEMORY_STEPS, MARGIN, KEEP_MARGIN, ERROR_STEPS, CLIP_MAX, MOVED
    const double DEVIATION_MAX, DEVIATION_USUAL, DEVIATION_SUM, USUAL_STEPS

cdef struct Watch:
    int64_t count
    double mean
    double above
    double below

cdef struct Row:
    double planes[TERMS]
    CurveRow curve

cdef struct Fit:
    int64_t version
    int64_t steps
    double errors[2]
    int form
    bint has_experts
    bint has_seen_features
    PlanesFit planes
    CurveFit curve
    CurvePrior first_curve
    StepModel model  # the one in use
    int64_t next_publish
    double mean_ns
    double variance
    double residual
    # Since the fit began, or began anew:
    int64_t seen
    int64_t since
    int64_t judged
    int held
    int at
    int folded
    double clip[2]
    double spread[2]
    double moved[2]  # of steps without a prefill and with one, in this sweep
    int64_t moving[2]  # how many they were
    int64_t behind  # steps judged until two planes were last no better than the curve
    Watch watches[2]
    Row ring[RING]
    double features[RING][FEATURES]  # amounts of the rows of the ring that have any
    ChargeErrors charge_errors


cdef inline void start_fit(
    Fit *fit, const double *planes, const CurvePrior *curve, const double *heights
) noexcept nogil:
    """Start with a prior. `heights` are the experts chosen at each corner; `model.served` is set."""
    fit.version = fit.steps = 0
    fit.errors[0] = fit.errors[1] = 0.0
    fit.form = CURVE_FORM
    fit.mean_ns = fit.variance = fit.residual = 0.0
    fit.next_publish = FIRST_PUBLISH
    memcpy(&fit.first_curve, curve, sizeof(CurvePrior))
    start_planes(&fit.planes, planes, False)
    start_curve(&fit.curve, curve, heights)
    begin(fit)
    take(fit)


cdef inline void begin(Fit *fit) noexcept nogil:
    """Begin to learn: no step is known."""
    fit.seen = fit.since = fit.judged = fit.behind = 0
    fit.held = fit.at = fit.folded = 0
    fit.clip[0] = fit.clip[1] = CLIP_MAX
    fit.spread[0] = fit.spread[1] = 0.0
    take_moved(fit)
    memset(fit.watches, 0, sizeof(fit.watches))


cdef inline void adopt(
    Fit *fit, const double *planes, const double *coefficients, bint two_planes
) noexcept nogil:
    fit.errors[0] = fit.errors[1] = 0.0
    start_over(fit, planes, coefficients)
    publish(fit, PLANES_FORM if two_planes else CURVE_FORM)


cdef inline void start_over(
    Fit *fit, const double *planes, const double *coefficients
) noexcept nogil:
    """Forget all steps, and learn from new ones with an earlier fit as the prior."""
    cdef CurvePrior prior
    cdef double kept[2][TERMS]
    begin(fit)
    memcpy(kept, planes, sizeof(kept))  # They may be the fit's own.
    start_planes(&fit.planes, &kept[0][0], True)
    if curve_of_earlier(&prior, coefficients):
        start_curve_over(&fit.curve, &prior)
    else:
        start_curve_over(&fit.curve, &fit.first_curve)
    fit.next_publish = FIRST_PUBLISH
    forget_charge_errors(&fit.charge_errors)


cdef inline bint observe(Fit *fit, const StepWork *work, double gpu_ns) noexcept nogil:
    cdef Row row
    cdef Row *record
    cdef double amounts[FEATURES]
    cdef int k, sweeps
    if gpu_ns <= 0.0 or work.planes.sequences <= 0:
        return False
    write_planes_row(row.planes, &work.planes, gpu_ns)
    row.curve = curve_row_of(
        &work.curve, &work.features, amounts, &fit.model.served, gpu_ns
    )
    if is_any(&work.features):
        fit.has_seen_features = True
    if judge(fit, &row, gpu_ns):
        start_over(fit, &fit.planes.working[0][0], fit.curve.published)
    fit.seen += 1
    if fit.seen > ALL_STEPS and fit.seen % LATER_EVERY:
        return False
    record = &fit.ring[fit.since & (RING - 1)]
    if fit.since >= RING:
        accumulate(fit, record, True)
        fit.folded += 1
    else:
        fit.held += 1
    record[0] = row
    if row.curve.features != NULL:
        memcpy(fit.features[fit.since & (RING - 1)], amounts, sizeof(amounts))
        record.curve.features = fit.features[fit.since & (RING - 1)]
    fit.since += 1
    fit.steps += 1
    sweeps = SWEEP_AT_FIRST if fit.since <= AT_FIRST else SWEEP_PER_STEP
    for k in range(sweeps):
        accumulate(fit, &fit.ring[fit.at], False)
        fit.at += 1
        if fit.at == fit.held:
            return end_sweep(fit)
    return False


cdef inline void write_planes_row(double *row, const Work *work, double gpu_ns) noexcept nogil:
    row[0] = 1.0 / gpu_ns
    row[1] = work.tokens * row[0]
    row[2] = work.sequences * row[0]
    row[3] = work.products * row[0]
    row[4] = work.context * row[0]


cdef inline bint judge(Fit *fit, const Row *row, double gpu_ns) noexcept nogil:
    """Predict a step before learning from it. Return whether the machine has changed."""
    cdef double rate = 1.0 / (fit.judged + 1.0 if fit.judged < ERROR_STEPS else ERROR_STEPS)
    cdef double predicted[2]
    cdef double clip = fit.clip[fit.form], missed, usual_ns = gpu_ns, apart
    cdef int form
    cdef bint has_changed
    predicted[PLANES_FORM] = predicted_by_planes(&fit.planes, row.planes)
    predicted[CURVE_FORM] = predicted_by_curve(&fit.curve, &row.curve)
    fit.judged += 1
    for form in range(2):
        missed = smaller(fabs(predicted[form] - 1.0), 1.0)
        fit.errors[form] += (missed - fit.errors[form]) * rate
    missed = predicted[fit.form] - 1.0
    has_changed = note(
        &fit.watches[1 if row.curve.prefill > 0.0 else 0],
        missed,
        clip / 3.0,
        fit.since >= WATCHED_FROM,
    )
    if fabs(missed) > clip:
        missed = clip if missed > 0.0 else -clip
        usual_ns = predicted[fit.form] * gpu_ns / (1.0 + missed)
    missed = missed * usual_ns
    apart = usual_ns - fit.mean_ns
    fit.mean_ns += apart * rate
    fit.variance += (apart * apart - fit.variance) * rate
    fit.residual += (missed * missed - fit.residual) * rate
    return has_changed


cdef inline bint note(
    Watch *watch, double missed, double deviation, bint is_watching
) noexcept nogil:
    """Note how far a prediction missed. Return whether the machine has changed."""
    cdef double apart = (missed - watch.mean) / deviation, limited, rate
    if is_watching:
        limited = smaller(larger(apart, -DEVIATION_MAX), DEVIATION_MAX)
        watch.above = larger(0.0, watch.above + (limited - DEVIATION_USUAL))
        watch.below = larger(0.0, watch.below + (-limited - DEVIATION_USUAL))
    watch.count += 1
    rate = 1.0 / (<double>watch.count if watch.count < USUAL_STEPS else USUAL_STEPS)
    watch.mean += smaller(larger(missed - watch.mean, -CLIP_MAX), CLIP_MAX) * rate
    return watch.above > DEVIATION_SUM or watch.below > DEVIATION_SUM


cdef inline double explained(const Fit *fit) noexcept nogil:
    return larger(0.0, 1.0 - fit.residual / fit.variance) if fit.variance > 0.0 else 0.0


cdef inline void accumulate(Fit *fit, const Row *row, bint is_old) noexcept nogil:
    cdef double planes_time = predicted_by_planes(&fit.planes, row.planes)
    cdef double curve_time = predicted_by_curve(&fit.curve, &row.curve)
    cdef double weight = weight_of(fit, planes_time, PLANES_FORM, is_old)
    cdef int kind
    add_to_planes(&fit.planes, row.planes, weight, fit.since, is_old)
    weight = weight_of(fit, curve_time, CURVE_FORM, is_old)
    add_to_curve(&fit.curve, &row.curve, weight, fit.since, is_old)
    if not is_old:
        kind = 1 if row.curve.prefill > 0.0 else 0
        fit.moved[kind] += moved(&fit.curve, &row.curve, curve_time)
        fit.moving[kind] += 1


cdef inline double weight_of(Fit *fit, double predicted, int form, bint is_old) noexcept nogil:
    """Return how much a step counts, and note how far it was missed."""
    cdef double missed = fabs(predicted - 1.0), clip = fit.clip[form]
    if not is_old:
        fit.spread[form] += smaller(missed, clip)
    return clip / missed if missed > clip else 1.0


cdef inline bint end_sweep(Fit *fit) noexcept nogil:
    cdef double held = <double>fit.held, fade = 1.0 - fit.folded / MEMORY_STEPS
    cdef bint has_moved = take_moved(fit), is_due
    if fit.form == PLANES_FORM and fit.has_seen_features:
        has_moved = True
    cdef int form
    end_sweep_of_planes(&fit.planes, fade)
    end_sweep_of_curve(&fit.curve, fade)
    for form in range(2):
        fit.clip[form] = smaller(larger(3.75 * fit.spread[form] / held, NOISE), CLIP_MAX)
        fit.spread[form] = 0.0
    fit.at = fit.folded = 0
    compare_forms(fit)
    is_due = fit.since >= fit.next_publish
    if not (is_due or (has_moved and fit.since >= FIRST_PUBLISH)):
        return False
    if is_due:
        fit.next_publish = fit.since + min(fit.since // 4, <int64_t>PUBLISH_STEPS)
    publish(fit, best_form(fit))
    draw_others(
        &fit.charge_errors, &fit.curve, &fit.model.served, fit.clip[CURVE_FORM] / 3.0
    )
    return True


cdef inline bint take_moved(Fit *fit) noexcept nogil:
    """Return whether what was learnt moved away from what is published; begin to count anew."""
    cdef bint has_moved = False
    cdef int kind
    for kind in range(2):
        if fit.moving[kind] >= EMPTY and fit.moved[kind] / fit.moving[kind] > MOVED:
            has_moved = True
        fit.moved[kind] = 0.0
        fit.moving[kind] = 0
    return has_moved


cdef inline void compare_forms(Fit *fit) noexcept nogil:
    """Note whether two planes predict better than the curve."""
    cdef double margin = KEEP_MARGIN if fit.form == PLANES_FORM else MARGIN
    if needs_curve(fit) or not fit.errors[PLANES_FORM] < margin * fit.errors[CURVE_FORM]:
        fit.behind = fit.judged


cdef inline bint needs_curve(const Fit *fit) noexcept nogil:
    """Return whether there is what two planes know nothing of: experts, or features."""
    return fit.has_experts or fit.has_seen_features


cdef inline int best_form(const Fit *fit) noexcept nogil:
    """Return the form to use: two planes must have been better for many steps."""
    if needs_curve(fit):
        return CURVE_FORM
    if fit.judged < CHOICE_STEPS:
        return fit.form
    if fit.form == PLANES_FORM:
        return CURVE_FORM if fit.behind == fit.judged else PLANES_FORM
    return PLANES_FORM if fit.judged - fit.behind >= CHOICE_STEPS else CURVE_FORM


cdef inline void publish(Fit *fit, int form) noexcept nogil:
    fit.form = form
    fit.version += 1
    take(fit)


cdef inline void take(Fit *fit) noexcept nogil:
    """Use what is learnt now."""
    cdef StepModel *model = &fit.model
    publish_curve(&fit.curve)
    model.is_curve = fit.form == CURVE_FORM
    memcpy(model.compute, fit.planes.working[COMPUTE], sizeof(model.compute))
    memcpy(model.memory, fit.planes.working[MEMORY], sizeof(model.memory))
    write_curve(&model.curve, fit.curve.published, fit.curve.chosen)
    smooth_curve(&model.smooth, &model.curve, &model.served)
