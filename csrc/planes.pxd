# cython: cdivision=True
"""Two planes: a step as the larger of its arithmetic and its memory traffic, and how to learn them.

The twin `planes_py.py` explains the theory and has the same names.
"""

from libc.math cimport sqrt
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from csrc.least_squares cimport EMPTY, NOISE, UNKNOWN_PART, WIDTH, solve_scaled
from csrc.shares cimport Part
from csrc.terms cimport TERMS, larger

cdef enum:
    COMPUTE = 0
    MEMORY = 1
    BOTH = 2
    START_STEPS = 128

cdef extern from *:
    """
    #define PRIOR_SPREAD 0.2
    """
    const double PRIOR_SPREAD

cdef struct Work:
    int64_t tokens
    int64_t sequences
    int64_t products
    int64_t context

cdef struct PlaneSums:
    double weight
    double moments[TERMS][TERMS]  # the lower triangle
    double sums[TERMS]

cdef struct PlanesFit:
    double prior[2][TERMS]
    double working[2][TERMS]
    bint is_trusted
    int empty  # a plane without steps of its own; BOTH if each has some
    PlaneSums old[2]
    PlaneSums sweep[2]


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


cdef inline void start_planes(PlanesFit *fit, const double *prior, bint trusted) noexcept nogil:
    memset(fit, 0, sizeof(PlanesFit))
    memcpy(fit.prior, prior, sizeof(fit.prior))
    memcpy(fit.working, prior, sizeof(fit.working))
    fit.is_trusted = trusted
    fit.empty = BOTH


cdef inline double predict_plane(const double *plane, const double *row) noexcept nogil:
    return (
        plane[0] * row[0]
        + plane[1] * row[1]
        + plane[2] * row[2]
        + plane[3] * row[3]
        + plane[4] * row[4]
    )


cdef inline double predicted_by_planes(const PlanesFit *fit, const double *row) noexcept nogil:
    return larger(predict_plane(fit.working[COMPUTE], row), predict_plane(fit.working[MEMORY], row))


cdef inline void add_to_planes(
    PlanesFit *fit, const double *row, double weight, int64_t steps, bint is_old
) noexcept nogil:
    cdef int side = side_of(fit, row, steps), i, j
    cdef PlaneSums *sums = &fit.old[side] if is_old else &fit.sweep[side]
    cdef double weighed
    sums.weight += weight
    for i in range(TERMS):
        weighed = weight * row[i]
        sums.sums[i] += weighed
        for j in range(i + 1):
            sums.moments[i][j] += weighed * row[j]


cdef inline int side_of(const PlanesFit *fit, const double *row, int64_t steps) noexcept nogil:
    cdef double compute = predict_plane(fit.working[COMPUTE], row)
    cdef double memory = predict_plane(fit.working[MEMORY], row)
    cdef bint is_compute = compute >= memory, has_chunk
    if not fit.is_trusted:
        has_chunk = row[1] > row[2]  # more tokens than sequences
        if steps <= START_STEPS:
            is_compute = has_chunk
        elif fit.empty == COMPUTE:
            is_compute = has_chunk and memory < 1.0
        elif fit.empty == MEMORY:
            is_compute = has_chunk or compute >= 1.0
    return COMPUTE if is_compute else MEMORY


cdef inline void end_sweep_of_planes(PlanesFit *fit, double fade) noexcept nogil:
    cdef double scales[2]
    cdef double scale
    cdef int kind
    for kind in range(2):
        fade_plane_sums(&fit.old[kind], fade)
        add_plane_sums(&fit.sweep[kind], &fit.old[kind])
        scales[kind] = scale_of(fit.prior[kind], &fit.sweep[kind])
    fit.empty = BOTH
    for kind in range(2):
        if fit.sweep[kind].weight < EMPTY:
            fit.empty = kind
    for kind in range(2):
        scale = scales[kind]
        if scale == 0.0:
            scale = scales[1 - kind]
        if scale == 0.0:
            scale = 1.0
        solve_plane(fit.working[kind], &fit.sweep[kind], fit.prior[kind], scale, kind)
    memset(fit.sweep, 0, sizeof(fit.sweep))


cdef inline void fade_plane_sums(PlaneSums *sums, double factor) noexcept nogil:
    cdef int i, j
    sums.weight *= factor
    for i in range(TERMS):
        sums.sums[i] *= factor
        for j in range(i + 1):
            sums.moments[i][j] *= factor


cdef inline void add_plane_sums(PlaneSums *sums, const PlaneSums *other) noexcept nogil:
    cdef int i, j
    sums.weight += other.weight
    for i in range(TERMS):
        sums.sums[i] += other.sums[i]
        for j in range(i + 1):
            sums.moments[i][j] += other.moments[i][j]


cdef inline double scale_of(const double *prior, const PlaneSums *sums) noexcept nogil:
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
    return not terms & (16 if kind == COMPUTE else 8)


cdef inline void solve_plane(
    double *coefficients, PlaneSums *sums, const double *prior, double scale, int kind
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


cdef inline double solve_for(
    const PlaneSums *sums, int terms, double *coefficients
) noexcept nogil:
    """Solve for a set of terms. Return the error explained, or -1 if there is no solution >= 0."""
    cdef double matrix[TERMS][WIDTH]
    cdef double vector[TERMS]
    cdef double scales[TERMS]
    cdef int which[TERMS]
    cdef int count = 0, i, j
    cdef double gain, value
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
    gain = solve_scaled(matrix, vector, count)
    for i in range(count):
        if gain < 0.0 or not vector[i] >= 0.0:
            return -1.0
        coefficients[which[i]] = vector[i] * scales[i]
    return gain
