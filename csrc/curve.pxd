# cython: cdivision=True
"""A step as a sum of kernels: its time by a curve.

The twin `curve_py.py` explains the theory and has the same names. This is plain arithmetic over the
parts of a step, and uses no memory but the stack.
"""

from libc.stdint cimport int64_t, uint32_t

from csrc.requests cimport DECODE
from csrc.shapley cimport Sides
from csrc.shares cimport Part
from csrc.terms cimport (
    CURVE_TERMS, DECODE_COMPUTE, EXPERTS, KNOTS, KNOTS_COUNT, PAIRS, PREFILL_COMPUTE, RAMPS,
    RAMPS_COUNT, READ, SLOPES,
)

cdef struct Layers:
    double whole
    double windowed
    int64_t window

cdef struct Curve:  # its terms, and h at each corner
    double terms[CURVE_TERMS]
    double heights[KNOTS_COUNT]

cdef struct Served:  # what is known of the served model
    Layers layers
    const int64_t *captured  # ascending
    uint32_t captured_count

cdef struct CurveWork:
    int64_t tokens
    int64_t sequences
    int64_t prefills
    double pairs
    double read
    double prefill_read


cdef inline int64_t padded(const Served *served, int64_t tokens) noexcept nogil:
    """Return how many tokens a batch with so many computes."""
    cdef uint32_t low = 0, high = served.captured_count, middle
    if tokens == 0 or high == 0 or tokens > served.captured[high - 1]:
        return tokens
    while low < high:
        middle = (low + high) // 2
        if served.captured[middle] < tokens:
            low = middle + 1
        else:
            high = middle
    return served.captured[low]


cdef inline double read_of(const Layers *layers, int64_t tokens, int64_t context) noexcept nogil:
    cdef int64_t seen = min(context, layers.window + tokens)
    return layers.whole * context + layers.windowed * seen


cdef inline CurveWork curve_work_of(const Part *part, const Layers *layers) noexcept nogil:
    cdef int64_t tokens = part.tokens, context = part.context
    cdef int64_t seen = min(context, layers.window + tokens)
    cdef double number = <double>tokens, fewer
    cdef double read = read_of(layers, tokens, context)
    if part.phase & DECODE:
        return CurveWork(tokens, 1, 0, 0.0, read, 0.0)
    fewer = 0.5 * number * (number - 1.0)
    return CurveWork(
        tokens,
        1,
        1,
        layers.whole * (number * context - fewer) + layers.windowed * (number * seen - fewer),
        0.0,
        read,
    )


cdef inline Sides attention_of(const double *curve, const CurveWork *work) noexcept nogil:
    """Return the time of attention's arithmetic, and that in which it reads contexts."""
    return Sides(
        curve[PAIRS] * work.pairs
        + curve[PREFILL_COMPUTE] * work.prefill_read
        + curve[DECODE_COMPUTE] * work.read,
        curve[READ] * (work.read + work.prefill_read),
    )


cdef inline double height(const Curve *curve, double tokens) noexcept nogil:
    cdef int place
    if tokens <= 0.0:
        return 0.0
    place = corner_below(tokens)
    return curve.heights[place] + curve.terms[SLOPES + place] * (tokens - KNOTS[place])


cdef inline int corner_below(double tokens) noexcept nogil:
    """Return the last corner that is not beyond a number of tokens >= 0."""
    cdef int low = 0, high = KNOTS_COUNT, middle
    while high - low > 1:
        middle = (low + high) // 2
        if KNOTS[middle] <= tokens:
            low = middle
        else:
            high = middle
    return low


cdef inline void fill_heights(Curve *curve) noexcept nogil:
    cdef int place
    curve.heights[0] = 0.0
    for place in range(KNOTS_COUNT - 1):
        curve.heights[place + 1] = curve.heights[place] + curve.terms[SLOPES + place] * (
            KNOTS[place + 1] - KNOTS[place]
        )


cdef inline void write_curve(
    Curve *curve, const double *coefficients, const double *chosen
) noexcept nogil:
    """Write the curve of a fit's coefficients. `chosen` are the experts chosen at each corner."""
    cdef int place, ramp = 0, term
    cdef double slope, more
    for term in range(SLOPES):
        curve.terms[term] = coefficients[term]
    for place in range(KNOTS_COUNT):
        while ramp + 1 < RAMPS_COUNT and RAMPS[ramp + 1] <= KNOTS[place]:
            ramp += 1
        slope = coefficients[SLOPES + ramp]
        if place + 1 < KNOTS_COUNT:
            more = chosen[place + 1] - chosen[place]
            slope += coefficients[EXPERTS] * more / (KNOTS[place + 1] - KNOTS[place])
        curve.terms[SLOPES + place] = slope
    fill_heights(curve)


cdef inline void smooth_curve(
    Curve *smooth, const Curve *curve, const Served *served
) noexcept nogil:
    """Write the curve of the mean over the batch sizes around each corner, which are padded."""
    cdef double heights[KNOTS_COUNT]
    cdef int place
    cdef int64_t knot
    smooth[0] = curve[0]
    if served.captured_count == 0:
        return
    for place in range(KNOTS_COUNT):
        knot = <int64_t>KNOTS[place]
        heights[place] = (
            0.5 * height(curve, <double>padded(served, knot))
            + 0.5 * height(curve, <double>padded(served, knot + 1))
        )
    heights[0] = 0.0
    for place in range(KNOTS_COUNT - 1):
        smooth.terms[SLOPES + place] = (heights[place + 1] - heights[place]) / (
            KNOTS[place + 1] - KNOTS[place]
        )
    fill_heights(smooth)
