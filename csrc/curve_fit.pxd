# cython: cdivision=True
"""Learn the curve of a model on a GPU from its steps.

The twin `curve_fit_py.py` explains the theory and has the same names. A `CurveFit` is plain memory.
"""

from libc.math cimport fabs, sqrt
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from csrc.curve cimport CurveWork, Served, corner_below, padded
from csrc.features cimport FeatureWork, is_any, write_amounts
from csrc.least_squares cimport EMPTY, NOISE, UNKNOWN_PART, Equations, solve_nonnegative
from csrc.terms cimport (
    COLUMNS, DECODE_COMPUTE, ENCODER, ENCODER_TOKEN, EXPERTS, FEATURES, FIT_TERMS, FIXED, KNOTS,
    KNOTS_COUNT, LORA, PAIRS, PREFILL, PREFILL_COMPUTE, RAMPS, RAMPS_COUNT, READ, SEQUENCE,
    SLOPES, larger, smaller,
)

cdef enum:
    PARTS_MAX = 6
    CURVE_START_STEPS = 128
    DECODES_FROM = 1024

cdef extern from *:
    """
    #define SPREAD 0.2
    #define READ_SPREAD 0.05
    #define RAMP_SPREAD 0.5
    #define UNKNOWN_OWN_PART 0.01
    #define FAR_OFF 0.5
    #define EARLIER_SPREAD 0.33
    #define TOLD_STEPS 10.0
    """
    const double SPREAD, READ_SPREAD, RAMP_SPREAD, UNKNOWN_OWN_PART, FAR_OFF, EARLIER_SPREAD
    const double TOLD_STEPS

cdef struct PriorPart:
    double coefficients[FIT_TERMS]
    double scale
    double spread

cdef struct CurvePrior:
    int count
    PriorPart parts[PARTS_MAX]
    double start[FIT_TERMS]
    bint counts_reading
    bint has_ratio

cdef struct CurveRow:
    double one
    double prefill
    double sequences
    double pairs
    double read
    double prefill_read
    int place
    double below
    double above
    const double *features  # amounts; NULL if there are none

cdef struct CurveSums:
    double weight
    double arithmetic_weight
    double own[SLOPES][SLOPES]  # the lower triangle
    double cross[KNOTS_COUNT][SLOPES]
    double corners[KNOTS_COUNT]
    double beside[KNOTS_COUNT]
    double own_sums[SLOPES]
    double corner_sums[KNOTS_COUNT]

cdef struct CurveFit:
    CurvePrior prior
    double chosen[KNOTS_COUNT]  # experts, at each corner
    double columns[KNOTS_COUNT][COLUMNS]
    double coefficients[FIT_TERMS]
    double heights[KNOTS_COUNT]
    double published[FIT_TERMS]
    double published_heights[KNOTS_COUNT]
    bint lacks_arithmetic
    CurveSums old
    CurveSums sweep
    double moments[FIT_TERMS][FIT_TERMS]  # what the steps of the last sweep tell
    double ridges[FIT_TERMS]  # what the prior does


cdef inline CurveRow curve_row_of(
    const CurveWork *work,
    const FeatureWork *features,
    double *amounts,
    const Served *served,
    double gpu_ns,
) noexcept nogil:
    """Return a step's row. `amounts` is where it keeps those of features, if there are any."""
    cdef double per_ns = 1.0 / gpu_ns, above
    cdef double tokens = <double>padded(served, work.tokens)
    cdef int place = min(corner_below(tokens), KNOTS_COUNT - 2), k
    cdef const double *kept = NULL
    if is_any(features):
        kept = amounts
        write_amounts(amounts, features)
        for k in range(FEATURES):
            amounts[k] *= per_ns
    above = (tokens - KNOTS[place]) / (KNOTS[place + 1] - KNOTS[place])
    return CurveRow(
        per_ns,
        per_ns if work.prefills else 0.0,
        work.sequences * per_ns,
        work.pairs * per_ns,
        work.read * per_ns,
        work.prefill_read * per_ns,
        place,
        (1.0 - above) * per_ns,
        above * per_ns,
        kept,
    )


cdef inline void start_curve(
    CurveFit *fit, const CurvePrior *prior, const double *heights
) noexcept nogil:
    cdef int k, q
    cdef double end
    memset(fit, 0, sizeof(CurveFit))
    for k in range(KNOTS_COUNT):
        for q in range(RAMPS_COUNT):
            end = RAMPS[q + 1] if q + 1 < RAMPS_COUNT else KNOTS[KNOTS_COUNT - 1]
            fit.columns[k][q] = larger(0.0, smaller(KNOTS[k], end) - RAMPS[q])
        fit.columns[k][RAMPS_COUNT] = fit.chosen[k] = heights[k]
    start_curve_over(fit, prior)
    publish_curve(fit)


cdef inline void start_curve_over(CurveFit *fit, const CurvePrior *prior) noexcept nogil:
    """Forget all steps, and begin with a prior."""
    if prior != &fit.prior:
        memcpy(&fit.prior, prior, sizeof(CurvePrior))
    memset(&fit.old, 0, sizeof(CurveSums))
    memset(&fit.sweep, 0, sizeof(CurveSums))
    fit.lacks_arithmetic = False
    use_coefficients(fit, prior.start)


cdef inline bint curve_of_earlier(CurvePrior *prior, const double *coefficients) noexcept nogil:
    """Write what an earlier fit tells of a curve. Return False if it tells nothing."""
    cdef int term, part
    cdef bint is_arithmetic
    memset(prior, 0, sizeof(CurvePrior))
    for part in range(2):
        for term in range(FIT_TERMS):
            is_arithmetic = (
                term == PAIRS
                or term == PREFILL_COMPUTE
                or term == DECODE_COMPUTE
                or term == ENCODER
                or term == ENCODER_TOKEN
                or SLOPES <= term < EXPERTS
            )
            if is_arithmetic == (part == 1) and coefficients[term] != 0.0:
                prior.parts[prior.count].coefficients[term] = coefficients[term]
                prior.parts[prior.count].scale = 1.0
                prior.parts[prior.count].spread = EARLIER_SPREAD
        if prior.parts[prior.count].scale > 0.0:
            prior.count += 1
    memcpy(prior.start, coefficients, sizeof(prior.start))
    prior.has_ratio = True
    return prior.count > 0


cdef inline void publish_curve(CurveFit *fit) noexcept nogil:
    memcpy(fit.published, fit.coefficients, sizeof(fit.published))
    memcpy(fit.published_heights, fit.heights, sizeof(fit.heights))


cdef inline double predicted_by_curve(const CurveFit *fit, const CurveRow *row) noexcept nogil:
    return predict_curve(fit.coefficients, fit.heights, row)


cdef inline double moved(
    const CurveFit *fit, const CurveRow *row, double predicted
) noexcept nogil:
    return fabs(predicted - predict_curve(fit.published, fit.published_heights, row))


cdef inline double predict_curve(
    const double *c, const double *heights, const CurveRow *row
) noexcept nogil:
    cdef double time = (
        (c[FIXED] * row.one + c[PREFILL] * row.prefill + c[SEQUENCE] * row.sequences)
        + (heights[row.place] * row.below + heights[row.place + 1] * row.above)
        + larger(arithmetic_of(c, row), reading_of(c, row))
    )
    if row.features != NULL:
        time += sum_of_products(&c[LORA], row.features, FEATURES)
    return time


cdef inline double arithmetic_of(const double *c, const CurveRow *row) noexcept nogil:
    return (
        c[PAIRS] * row.pairs
        + c[PREFILL_COMPUTE] * row.prefill_read
        + c[DECODE_COMPUTE] * row.read
    )


cdef inline double reading_of(const double *c, const CurveRow *row) noexcept nogil:
    return c[READ] * (row.read + row.prefill_read)


cdef inline void add_to_curve(
    CurveFit *fit, const CurveRow *row, double weight, int64_t steps, bint is_old
) noexcept nogil:
    cdef bint is_start = not fit.prior.has_ratio and steps <= CURVE_START_STEPS
    cdef double own[SLOPES]
    memset(own, 0, sizeof(own))
    own[FIXED] = row.one
    own[PREFILL] = row.prefill
    own[SEQUENCE] = row.sequences
    if is_arithmetic(fit, row, is_start):
        own[PAIRS] = row.pairs
        own[PREFILL_COMPUTE] = row.prefill_read
        if steps > DECODES_FROM or fit.prior.start[DECODE_COMPUTE] > 0.0:
            own[DECODE_COMPUTE] = row.read
    else:
        own[READ] = row.read + row.prefill_read
    if row.features != NULL:
        memcpy(&own[LORA], row.features, FEATURES * sizeof(double))
    add_curve_row(&fit.old if is_old else &fit.sweep, own, row, weight)


cdef inline bint is_arithmetic(
    const CurveFit *fit, const CurveRow *row, bint is_start
) noexcept nogil:
    if is_start or row.prefill <= 0.0:
        return row.prefill > 0.0
    return arithmetic_of(fit.coefficients, row) >= reading_of(fit.coefficients, row) or (
        fit.lacks_arithmetic and predicted_by_curve(fit, row) < 1.0
    )


cdef inline void add_curve_row(
    CurveSums *sums, const double *own, const CurveRow *row, double weight
) noexcept nogil:
    cdef double below = weight * row.below, above = weight * row.above, weighed
    cdef int i, j, k = row.place
    cdef int terms = LORA if row.features == NULL else SLOPES  # The last ones are features.
    sums.weight += weight
    if own[PAIRS] > 0.0:
        sums.arithmetic_weight += weight
    for i in range(terms):
        weighed = weight * own[i]
        sums.own_sums[i] += weighed
        for j in range(i + 1):
            sums.own[i][j] += weighed * own[j]
        sums.cross[k][i] += below * own[i]
        sums.cross[k + 1][i] += above * own[i]
    sums.corners[k] += below * row.below
    sums.corners[k + 1] += above * row.above
    sums.beside[k] += below * row.above
    sums.corner_sums[k] += below
    sums.corner_sums[k + 1] += above


cdef inline void end_sweep_of_curve(CurveFit *fit, double fade) noexcept nogil:
    # A struct of doubles only: both loops go over it as over one array.
    cdef double *old = <double *>&fit.old
    cdef double *sweep = <double *>&fit.sweep
    cdef int k, count = sizeof(CurveSums) // sizeof(double)
    for k in range(count):
        old[k] *= fade
        sweep[k] += old[k]
    fit.lacks_arithmetic = fit.sweep.arithmetic_weight < EMPTY
    if fit.sweep.weight > 0.0:
        solve_curve_fit(fit)
    memset(&fit.sweep, 0, sizeof(CurveSums))


cdef inline void use_coefficients(CurveFit *fit, const double *coefficients) noexcept nogil:
    cdef int k
    if coefficients != fit.coefficients:
        memcpy(fit.coefficients, coefficients, sizeof(fit.coefficients))
    for k in range(KNOTS_COUNT):
        fit.heights[k] = sum_of_products(fit.columns[k], &fit.coefficients[SLOPES], COLUMNS)


cdef inline double sum_of_products(
    const double *one, const double *other, int count
) noexcept nogil:
    cdef double total = 0.0
    cdef int i
    for i in range(count):
        total += one[i] * other[i]
    return total


cdef inline void solve_curve_fit(CurveFit *fit) noexcept nogil:
    cdef Equations e
    cdef double prior[FIT_TERMS]
    cdef double scales[PARTS_MAX]
    cdef double spread, ridge
    cdef int term
    write_equations(fit, &e)
    scale_prior(fit, &e, prior, scales)
    memcpy(fit.moments, e.moments, sizeof(fit.moments))
    for term in range(FIT_TERMS):
        spread = spread_of(fit, &e, prior, scales, term)
        ridge = (NOISE / spread) * (NOISE / spread) if spread > 0.0 else 0.0
        fit.ridges[term] = ridge
        e.moments[term][term] += ridge
        e.right[term] += ridge * prior[term]
    solve_nonnegative(&e, fit.coefficients)
    if e.found[READ] > 0.0:
        e.found[DECODE_COMPUTE] = smaller(e.found[DECODE_COMPUTE], e.found[READ])
    use_coefficients(fit, e.found)


cdef inline void write_equations(const CurveFit *fit, Equations *e) noexcept nogil:
    cdef const CurveSums *sums = &fit.sweep
    cdef double met[KNOTS_COUNT][COLUMNS]
    cdef double value, height
    cdef int i, j, k, p, q
    cdef int terms = SLOPES if has_seen_features(sums) else LORA
    e.count = FIT_TERMS
    for k in range(KNOTS_COUNT):
        for q in range(COLUMNS):
            value = sums.corners[k] * fit.columns[k][q]
            if k > 0:
                value += sums.beside[k - 1] * fit.columns[k - 1][q]
            if k + 1 < KNOTS_COUNT:
                value += sums.beside[k] * fit.columns[k + 1][q]
            met[k][q] = value
    for i in range(SLOPES):
        e.right[i] = sums.own_sums[i]
        for j in range(i + 1):
            e.moments[i][j] = sums.own[i][j]
            e.moments[j][i] = sums.own[i][j]
    for q in range(COLUMNS):
        e.right[SLOPES + q] = 0.0
        for i in range(SLOPES + q + 1):
            e.moments[SLOPES + q][i] = 0.0
        for k in range(KNOTS_COUNT):
            height = fit.columns[k][q]
            if height == 0.0:
                continue
            e.right[SLOPES + q] += height * sums.corner_sums[k]
            for i in range(terms):
                e.moments[SLOPES + q][i] += height * sums.cross[k][i]
            for p in range(q + 1):
                e.moments[SLOPES + q][SLOPES + p] += height * met[k][p]
        for i in range(SLOPES + q):
            e.moments[i][SLOPES + q] = e.moments[SLOPES + q][i]


cdef inline bint has_seen_features(const CurveSums *sums) noexcept nogil:
    cdef int i
    for i in range(LORA, SLOPES):
        if sums.own[i][i] > 0.0:
            return True
    return False


cdef inline void scale_prior(
    const CurveFit *fit, const Equations *steps, double *prior, double *scales
) noexcept nogil:
    """Write the sum of the prior's parts that is closest to the steps, and their scales."""
    cdef const CurvePrior *known = &fit.prior
    cdef Equations e
    cdef double expected[PARTS_MAX]
    cdef double height, square = 0.0, common = 1.0, wanted, ridge, told
    cdef int i, j, term
    e.count = known.count
    for i in range(known.count):
        expected[i] = known.parts[i].scale
        e.right[i] = sum_of_products(known.parts[i].coefficients, steps.right, FIT_TERMS)
        for j in range(known.count):
            e.moments[i][j] = product_between(
                known.parts[i].coefficients, steps, known.parts[j].coefficients
            )
    if known.has_ratio:
        height = sum_of_products(expected, e.right, known.count)
        for i in range(known.count):
            if expected[i] != 0.0:
                square += expected[i] * sum_of_products(e.moments[i], expected, known.count)
        if height > 0.0 and square > 0.0:
            common = height / square
        told = larger(1.0, fit.sweep.weight / TOLD_STEPS)
        for i in range(known.count):
            wanted = common * known.parts[i].scale
            ridge = told * (NOISE / (known.parts[i].spread * wanted)) * (
                NOISE / (known.parts[i].spread * wanted)
            )
            e.moments[i][i] += ridge
            e.right[i] += ridge * wanted
    solve_nonnegative(&e, NULL)
    for term in range(FIT_TERMS):
        prior[term] = 0.0
    for i in range(known.count):
        scales[i] = e.found[i]
        for term in range(FIT_TERMS):
            prior[term] += scales[i] * known.parts[i].coefficients[term]


cdef inline double product_between(
    const double *one, const Equations *steps, const double *other
) noexcept nogil:
    cdef double total = 0.0
    cdef int i
    for i in range(FIT_TERMS):
        if one[i] != 0.0:
            total += one[i] * sum_of_products(steps.moments[i], other, FIT_TERMS)
    return total


cdef inline double spread_of(
    const CurveFit *fit, const Equations *steps, const double *prior, const double *scales, int term
) noexcept nogil:
    """Return how well a coefficient is known before any step, as a standard deviation."""
    cdef double size = sqrt(steps.moments[term][term] / fit.sweep.weight)
    cdef bint is_small = (
        term == PREFILL
        or term == SEQUENCE
        or term == PREFILL_COMPUTE
        or LORA <= term < SLOPES
    )
    cdef double part = UNKNOWN_OWN_PART if is_small else UNKNOWN_PART
    cdef double unknown = part / size if size > 0.0 else 0.0
    cdef double steep, reading, read_spread, rest, spread
    cdef int q
    if SLOPES <= term < EXPERTS:
        steep = prior[SLOPES]
        for q in range(1, RAMPS_COUNT):
            steep = larger(steep, prior[SLOPES + q])
        return RAMP_SPREAD * steep if RAMP_SPREAD * steep != 0.0 else unknown
    if fit.prior.counts_reading and scales[0] > 0.0 and (term == FIXED or term == EXPERTS):
        reading = scales[0] * fit.prior.parts[0].coefficients[term]
        read_spread = READ_SPREAD * reading
        rest = prior[term] - reading
        spread = sqrt(read_spread * read_spread + rest * rest)
    else:
        spread = larger(SPREAD * prior[term], unknown)
    return larger(spread, FAR_OFF * fabs(fit.coefficients[term] - prior[term]))
