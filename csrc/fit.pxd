# cython: cdivision=True
"""The cost model: predict a step's GPU time, learnt online from the engine's own steps.

The twin `cost_model_py.py` explains the theory and has the same names. A `Fit` is plain memory:
nothing is allocated after `start_fit`. A step costs `SWEEP_PER_STEP` records of a sweep, whatever
the batch.
"""

from libc.math cimport fabs, sqrt
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from csrc.shares cimport Part

cdef enum:
    TERMS = 5
    COMPUTE = 0
    MEMORY = 1
    ONE = 2
    RING = 1024
    SWEEP_PER_STEP = 2
    START_STEPS = 128
    FIRST_PUBLISH = 32
    PUBLISH_STEPS = 4096
    ALL_STEPS = 32768
    LATER_EVERY = 4

cdef extern from *:
    """
    #define MEMORY_STEPS 65536.0
    #define MARGIN 0.95
    #define NOISE 0.03
    #define PRIOR_SPREAD 0.2
    #define UNKNOWN_PART 0.05
    #define ERROR_STEPS 512.0
    #define PIVOT_MIN 1e-12
    #define CLIP_MAX 0.9
    #define CHANGED 2.5
    #define KEEP_MARGIN 0.98
    #define TRUSTED_MARGIN 1.02
    #define EMPTY 8.0
    #define USUAL_RISE 1.02
    """
    const double MEMORY_STEPS, MARGIN, NOISE, PRIOR_SPREAD, UNKNOWN_PART, ERROR_STEPS, PIVOT_MIN
    const double CLIP_MAX, CHANGED, USUAL_RISE, KEEP_MARGIN, TRUSTED_MARGIN, EMPTY

cdef struct Work:
    int64_t tokens
    int64_t sequences
    int64_t products
    int64_t context

cdef struct Sums:
    double weight
    double moments[TERMS][TERMS]  # the lower triangle
    double sums[TERMS]

cdef struct Fit:
    int64_t version
    int64_t seen
    int64_t steps
    int64_t next_publish
    double errors[2]
    bint two_planes
    bint is_trusted
    double prior[3][TERMS]
    double working[3][TERMS]
    double compute[TERMS]
    double memory[TERMS]
    double clip[2]
    double spread[2]
    double mean_ns
    double variance
    double residual
    double usual
    int at
    int folded
    int empty  # a plane without steps of its own; ONE if both have some
    Sums old[3]
    Sums sweep[3]
    double ring[RING][TERMS]


cdef inline Work work_of(const Part *part) noexcept nogil:
    cdef int64_t tokens = part.tokens, context = part.context
    return Work(tokens, 1, tokens * context, context)


cdef inline double time_of(const double *plane, const Work *work) noexcept nogil:
    if work.tokens == 1 and work.products == work.context:
        return (plane[1] + plane[2]) + (plane[3] + plane[4]) * work.context
    return (
        plane[1] * work.tokens
        + plane[2] * work.sequences
        + plane[3] * work.products
        + plane[4] * work.context
    )


cdef inline void start_fit(Fit *fit, const double *prior, bint trusted) noexcept nogil:
    memset(fit, 0, sizeof(Fit))
    fit.two_planes = fit.is_trusted = trusted
    fit.clip[0] = fit.clip[1] = CLIP_MAX
    fit.next_publish = FIRST_PUBLISH
    fit.empty = ONE
    memcpy(fit.prior, prior, sizeof(fit.prior))
    memcpy(fit.working, prior, sizeof(fit.working))
    use_working(fit)


cdef inline void adopt_prior(Fit *fit, const double *prior, bint two_planes) noexcept nogil:
    memcpy(fit.prior, prior, sizeof(fit.prior))
    memcpy(fit.working, prior, sizeof(fit.working))
    fit.is_trusted = True
    fit.errors[0] = fit.errors[1] = 0.0
    publish(fit, two_planes)


cdef inline bint observe(Fit *fit, const Work *work, double gpu_ns) noexcept nogil:
    cdef double row[TERMS]
    cdef int64_t held = fit.steps if fit.steps < RING else RING
    cdef double *record
    cdef int k
    if gpu_ns <= 0.0 or work.sequences <= 0:
        return False
    fit.seen += 1
    if fit.seen > ALL_STEPS and fit.seen % LATER_EVERY:
        return False
    record = fit.ring[fit.steps & (RING - 1)]
    row[0] = 1.0 / gpu_ns
    row[1] = work.tokens * row[0]
    row[2] = work.sequences * row[0]
    row[3] = work.products * row[0]
    row[4] = work.context * row[0]
    judge(fit, row, gpu_ns)
    if held == RING:
        accumulate(fit, fit.old, record, False)
        fit.folded += 1
    else:
        held += 1
    memcpy(record, row, sizeof(row))
    fit.steps += 1
    for k in range(SWEEP_PER_STEP):
        accumulate(fit, fit.sweep, fit.ring[fit.at], True)
        fit.at += 1
        if fit.at == held:
            return end_sweep(fit, <double>held)
    return False


cdef inline double predict(const double *plane, const double *row) noexcept nogil:
    return (
        plane[0] * row[0]
        + plane[1] * row[1]
        + plane[2] * row[2]
        + plane[3] * row[3]
        + plane[4] * row[4]
    )


cdef inline double larger(double a, double b) noexcept nogil:
    return b if b > a else a


cdef inline double smaller(double a, double b) noexcept nogil:
    return b if b < a else a


cdef inline void judge(Fit *fit, const double *row, double gpu_ns) noexcept nogil:
    cdef double rate = 1.0 / (fit.steps + 1.0 if fit.steps < ERROR_STEPS else ERROR_STEPS)
    cdef double errors[2]
    cdef double used, clip, missed, usual_ns, apart
    cdef int form
    errors[0] = fabs(
        larger(predict(fit.working[COMPUTE], row), predict(fit.working[MEMORY], row)) - 1.0
    )
    errors[1] = fabs(predict(fit.working[ONE], row) - 1.0)
    for form in range(2):
        fit.errors[form] += (smaller(errors[form], 1.0) - fit.errors[form]) * rate
    used = larger(predict(fit.compute, row), predict(fit.memory, row))
    clip = fit.clip[0] if fit.two_planes else fit.clip[1]
    missed = used - 1.0
    usual_ns = gpu_ns
    if fabs(missed) > clip:
        missed = clip if missed > 0.0 else -clip
        usual_ns = used * gpu_ns / (1.0 + missed)
    missed = missed * usual_ns
    apart = usual_ns - fit.mean_ns
    fit.mean_ns += apart * rate
    fit.variance += (apart * apart - fit.variance) * rate
    fit.residual += (missed * missed - fit.residual) * rate


cdef inline double explained(const Fit *fit) noexcept nogil:
    return larger(0.0, 1.0 - fit.residual / fit.variance) if fit.variance > 0.0 else 0.0


cdef inline void accumulate(
    Fit *fit, Sums *sums, const double *row, bint spreads
) noexcept nogil:
    cdef double compute = predict(fit.working[COMPUTE], row)
    cdef double memory = predict(fit.working[MEMORY], row)
    cdef bint is_compute = compute >= memory
    if not fit.is_trusted:
        if fit.steps <= START_STEPS:
            is_compute = row[1] > row[2]
        elif fit.empty == COMPUTE:
            is_compute = row[1] > row[2] and memory < 1.0
        elif fit.empty == MEMORY:
            is_compute = row[1] > row[2] or compute >= 1.0
    cdef Sums *side = &sums[COMPUTE if is_compute else MEMORY]
    add_missed(fit, side, row, larger(compute, memory), 0, spreads)
    add_missed(fit, &sums[ONE], row, predict(fit.working[ONE], row), 1, spreads)


cdef inline void add_missed(
    Fit *fit, Sums *sums, const double *row, double predicted, int form, bint spreads
) noexcept nogil:
    cdef double missed = fabs(predicted - 1.0)
    cdef double clip = fit.clip[form]
    add_row(sums, row, clip / missed if missed > clip else 1.0)
    if spreads:
        fit.spread[form] += smaller(missed, clip)


cdef inline void add_row(Sums *sums, const double *row, double weight) noexcept nogil:
    cdef int i, j
    cdef double weighed
    sums.weight += weight
    for i in range(TERMS):
        weighed = weight * row[i]
        sums.sums[i] += weighed
        for j in range(i + 1):
            sums.moments[i][j] += weighed * row[j]


cdef inline bint end_sweep(Fit *fit, double held) noexcept nogil:
    cdef double fade = 1.0 - fit.folded / MEMORY_STEPS
    cdef double scales[3]
    cdef double scale
    cdef int kind, form
    forget_if_changed(fit, smaller(fit.spread[0], fit.spread[1]) / held, held)
    for kind in range(3):
        fade_sums(&fit.old[kind], fade)
        add_sums(&fit.sweep[kind], &fit.old[kind])
        scales[kind] = scale_of(fit.prior[kind], &fit.sweep[kind])
    fit.empty = ONE
    for kind in range(2):
        if fit.sweep[kind].weight < EMPTY:
            fit.empty = kind
    for kind in range(3):
        scale = scales[kind]
        if scale == 0.0 and kind != ONE:
            scale = scales[MEMORY if kind == COMPUTE else COMPUTE]
        if scale == 0.0:
            scale = 1.0
        solve(fit.working[kind], &fit.sweep[kind], fit.prior[kind], scale, kind)
    for form in range(2):
        fit.clip[form] = smaller(larger(3.75 * fit.spread[form] / held, NOISE), CLIP_MAX)
        fit.spread[form] = 0.0
    memset(fit.sweep, 0, sizeof(fit.sweep))
    fit.at = fit.folded = 0
    if fit.steps < fit.next_publish:
        return False
    fit.next_publish = fit.steps + (fit.steps if fit.steps < PUBLISH_STEPS else PUBLISH_STEPS)
    publish(fit, fit.errors[0] < margin_to_beat(fit) * fit.errors[1])
    return True


cdef inline double margin_to_beat(const Fit *fit) noexcept nogil:
    """Return the factor by which two planes must beat one plane to be used."""
    if not fit.two_planes:
        return MARGIN
    return TRUSTED_MARGIN if fit.is_trusted else KEEP_MARGIN


cdef inline void forget_if_changed(Fit *fit, double missed, double held) noexcept nogil:
    """Forget the older steps if the prediction misses the latest by far more than usual."""
    if held < RING:
        return
    if fit.usual > 0.0 and missed > CHANGED * larger(fit.usual, NOISE / 3.0):
        memset(fit.old, 0, sizeof(fit.old))
        fit.usual = 0.0
    else:
        fit.usual = smaller(fit.usual * USUAL_RISE, missed) if fit.usual > 0.0 else missed


cdef inline void publish(Fit *fit, bint two_planes) noexcept nogil:
    fit.two_planes = two_planes
    use_working(fit)
    fit.version += 1


cdef inline void use_working(Fit *fit) noexcept nogil:
    memset(fit.memory, 0, sizeof(fit.memory))
    if fit.two_planes:
        memcpy(fit.compute, fit.working[COMPUTE], sizeof(fit.compute))
        memcpy(fit.memory, fit.working[MEMORY], sizeof(fit.memory))
    else:
        memcpy(fit.compute, fit.working[ONE], sizeof(fit.compute))


cdef inline void fade_sums(Sums *sums, double factor) noexcept nogil:
    cdef int i, j
    sums.weight *= factor
    for i in range(TERMS):
        sums.sums[i] *= factor
        for j in range(i + 1):
            sums.moments[i][j] *= factor


cdef inline void add_sums(Sums *sums, const Sums *other) noexcept nogil:
    cdef int i, j
    sums.weight += other.weight
    for i in range(TERMS):
        sums.sums[i] += other.sums[i]
        for j in range(i + 1):
            sums.moments[i][j] += other.moments[i][j]


cdef inline double scale_of(const double *prior, const Sums *sums) noexcept nogil:
    cdef double along = 0.0, across = 0.0, product
    cdef int i, j
    for i in range(TERMS):
        along += prior[i] * sums.sums[i]
        for j in range(i + 1):
            product = prior[i] * prior[j] * sums.moments[i][j]
            across += product if i == j else 2.0 * product
    return along / across if along > 0.0 and across > 0.0 else 0.0


cdef inline bint may_have(int kind, int terms) noexcept nogil:
    """Return whether a plane may have these terms; each plane lacks one that the other has."""
    if kind == COMPUTE:
        return not terms & 16
    if kind == MEMORY:
        return not terms & 8
    return True


cdef inline void solve(
    double *coefficients, Sums *sums, const double *prior, double scale, int kind
) noexcept nogil:
    """Write the coefficients >= 0 of ridge regression. The sums are changed."""
    cdef double pulled[TERMS]
    cdef double found[TERMS]
    cdef double size, expected, spread, ridge, gain, best = 0.0
    cdef int i, terms
    for i in range(TERMS):
        coefficients[i] = pulled[i] = scale * prior[i]
    if sums.weight <= 0.0:
        return
    for i in range(TERMS):
        size = sqrt(sums.moments[i][i] / sums.weight)
        expected = UNKNOWN_PART / size if size > 0.0 else 0.0
        spread = PRIOR_SPREAD * larger(pulled[i], expected)
        if spread > 0.0:
            ridge = (NOISE / spread) * (NOISE / spread)
            sums.moments[i][i] += ridge
            sums.sums[i] += ridge * pulled[i]
        coefficients[i] = 0.0
    for terms in range(1, 1 << TERMS):
        if may_have(kind, terms):
            gain = solve_for(sums, terms, found)
            if gain > best:
                best = gain
                memcpy(coefficients, found, sizeof(found))


cdef inline double solve_for(const Sums *sums, int terms, double *coefficients) noexcept nogil:
    """Solve for a set of terms. Return the error explained, or -1 if there is no solution >= 0."""
    cdef double matrix[TERMS][TERMS]
    cdef double vector[TERMS]
    cdef double scales[TERMS]
    cdef int which[TERMS]
    cdef int count = 0, i, j, k
    cdef double gain = 0.0, factor, value
    for i in range(TERMS):
        coefficients[i] = 0.0
        if terms >> i & 1:
            which[count] = i
            count += 1
    for i in range(count):
        if sums.moments[which[i]][which[i]] <= 0.0:
            return -1.0
        scales[i] = 1.0 / sqrt(sums.moments[which[i]][which[i]])
        vector[i] = sums.sums[which[i]] * scales[i]
        for j in range(i + 1):
            value = sums.moments[which[i]][which[j]] * scales[i] * scales[j]
            matrix[i][j] = value
            matrix[j][i] = value
    for i in range(count):
        if matrix[i][i] < PIVOT_MIN:
            return -1.0
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
        if not vector[i] >= 0.0:
            return -1.0
        coefficients[which[i]] = vector[i] * scales[i]
    return gain
