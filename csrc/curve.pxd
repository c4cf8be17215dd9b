# cython: cdivision=True
"""A step as a sum of kernels: its time by a curve, and what each request adds to it.

The twin `curve_py.py` explains the theory and has the same names. This is plain arithmetic over the
parts of a step, and uses no memory but the stack.
"""

from libc.stdint cimport int64_t, uint32_t

from csrc.requests cimport DECODE
from csrc.shapley cimport Sides
from csrc.shares cimport Part
from csrc.terms cimport (
    CURVE_TERMS, DECODE_COMPUTE, EXPERTS, KNOTS, KNOTS_COUNT, PAIRS, PREFILL_COMPUTE,
    RAMPS, RAMPS_COUNT, READ, SLOPES, larger, smaller,
)

cdef enum:
    ENUMERATED_MAX = 6
    LEFT_OUT_MAX = 4
    LUMPS_MAX = 64
    NODES_COUNT = 4

cdef extern from *:
    """
    static const double NODES[4][2] = {
        {0.06943184420297371, 0.17392742256872679},
        {0.33000947820757187, 0.3260725774312732},
        {0.6699905217924281, 0.3260725774312732},
        {0.9305681557970262, 0.17392742256872679},
    };
    static const double FACTORIALS[7] = {1, 1, 2, 6, 24, 120, 720};
    #define REST_PART 0.1
    """
    const double NODES[NODES_COUNT][2]
    const double FACTORIALS[ENUMERATED_MAX + 1]
    const double REST_PART

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

cdef struct Between:  # two corners
    uint32_t place
    double above

cdef struct Lump:
    double tokens
    double often

cdef struct Lumps:
    uint32_t count  # of those that are kept, the largest first
    uint32_t all
    uint32_t leaders
    uint32_t places[LUMPS_MAX + 1]
    uint32_t tokens[LUMPS_MAX + 1]

cdef struct Growths:  # what the requests of a step get of h
    double token_ns
    bint is_enumerated
    double parts[ENUMERATED_MAX]  # of each request, if enumerated; else of each leader
    Lumps lumps
    # What tells the growth of the other lumps.
    double weights[KNOTS_COUNT]
    double small
    double scale
    double first[LUMPS_MAX]  # growths of the first lumps of the step, before they are scaled


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


cdef inline double power(double base, uint32_t exponent) noexcept nogil:
    """Return a power with a whole exponent, by squares."""
    cdef double found = 1.0
    while exponent:
        if exponent & 1:
            found *= base
        base *= base
        exponent >>= 1
    return found


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


cdef inline void enumerate_subsets(
    Growths *growths, const Curve *curve, const Served *served, const Part *parts, uint32_t count
) noexcept nogil:
    cdef uint32_t subset, j, size
    cdef int64_t there
    cdef double value, gained, missed
    for j in range(count):
        growths.parts[j] = 0.0
    for subset in range(<uint32_t>1 << count):
        there = size = 0
        for j in range(count):
            if subset >> j & 1:
                there += parts[j].tokens
                size += 1
        value = height(curve, <double>padded(served, there))
        gained = value * part_of_orders(size - 1, count) if size else 0.0
        missed = value * part_of_orders(size, count) if size < count else 0.0
        for j in range(count):
            if subset >> j & 1:
                growths.parts[j] += gained
            else:
                growths.parts[j] -= missed
    for j in range(count):
        growths.parts[j] = larger(0.0, growths.parts[j])


cdef inline double part_of_orders(uint32_t before, uint32_t count) noexcept nogil:
    return FACTORIALS[before] * FACTORIALS[count - 1 - before] / FACTORIALS[count]


cdef inline bint is_lump(const Part *part) noexcept nogil:
    return not part.phase & DECODE and part.tokens > 1


cdef inline void share_among_many(
    Growths *game, const Curve *curve, const Part *parts, uint32_t count, int64_t tokens
) noexcept nogil:
    cdef Lumps *lumps = &game.lumps
    cdef Lump others[LUMPS_MAX]
    cdef double all_ns = height(curve, <double>tokens), given = 0.0, often, rest, grown
    cdef int64_t left = tokens
    cdef uint32_t k, j, used, seen = 0
    cdef int corner
    rank_lumps(lumps, parts, count)
    game.scale = 1.0
    if lumps.all == 0:
        game.token_ns = all_ns / tokens if tokens else 0.0
        return
    game.small = <double>tokens
    for k in range(lumps.count):
        game.small -= lumps.tokens[k]
    for k in range(lumps.leaders):
        used = 0
        for j in range(lumps.count):
            if j != k:
                others[used] = Lump(lumps.tokens[j], 1.0)
                used += 1
        spread(game.weights, game.small, others, used)
        game.parts[k] = growth(game, curve, lumps.tokens[k])
    if lumps.all > lumps.leaders:
        often = (lumps.all - lumps.leaders - 1.0) / (lumps.all - lumps.leaders)
        for j in range(lumps.count):
            others[j] = Lump(lumps.tokens[j], 1.0 if j < lumps.leaders else often)
        spread(game.weights, game.small, others, lumps.count)
    for k in range(count):
        if is_lump(&parts[k]):
            grown = growth_at(game, curve, parts, k)
            if seen < LUMPS_MAX:
                game.first[seen] = grown
            seen += 1
            given += grown
            left -= parts[k].tokens
    if left > 0:
        rest = all_ns - given
        if rest >= REST_PART * all_ns:
            game.token_ns = rest / left
            return
        for j in range(lumps.count):
            others[j] = Lump(lumps.tokens[j], 1.0)
        game.token_ns = mean_slope(curve, game.small, others, lumps.count)
        given += game.token_ns * left
    game.scale = all_ns / given if given > 0.0 else 0.0
    game.token_ns *= game.scale


cdef inline void rank_lumps(Lumps *lumps, const Part *parts, uint32_t count) noexcept nogil:
    """Keep the largest lumps in order, and find how many of them are left out one by one."""
    cdef uint32_t k, at, cut
    lumps.count = lumps.all = 0
    for k in range(count):
        if not is_lump(&parts[k]):
            continue
        lumps.all += 1
        at = lumps.count
        while at > 0 and lumps.tokens[at - 1] < parts[k].tokens:
            lumps.tokens[at] = lumps.tokens[at - 1]
            lumps.places[at] = lumps.places[at - 1]
            at -= 1
        lumps.tokens[at] = parts[k].tokens
        lumps.places[at] = k
        lumps.count = min(lumps.count + 1, <uint32_t>LUMPS_MAX)
    lumps.leaders = min(lumps.count, <uint32_t>LEFT_OUT_MAX)
    if lumps.all > LEFT_OUT_MAX:
        cut = lumps.tokens[LEFT_OUT_MAX]
        while lumps.leaders > 0 and lumps.tokens[lumps.leaders - 1] <= cut:
            lumps.leaders -= 1


cdef inline double growth_at(
    const Growths *game, const Curve *curve, const Part *parts, uint32_t place
) noexcept nogil:
    """Return what the lump at a place of the step gets of h, before it is scaled."""
    cdef uint32_t k
    for k in range(game.lumps.leaders):
        if game.lumps.places[k] == place:
            return game.parts[k]
    return growth(game, curve, parts[place].tokens)


cdef inline void spread(
    double *means, double small, const Lump *others, uint32_t count
) noexcept nogil:
    cdef Between places[LUMPS_MAX][KNOTS_COUNT]
    cdef double weights[KNOTS_COUNT]
    cdef double s, without, chance, moved
    cdef uint32_t k
    cdef int node, corner, top, reach = 0
    cdef double most
    cdef Between at
    for k in range(count):  # No weight gets further than to this corner.
        most = larger(KNOTS[reach], small) + others[k].tokens
        reach = min(corner_below(most) + 1, KNOTS_COUNT - 1)
    for k in range(count):
        for corner in range(reach + 1):
            places[k][corner] = between(KNOTS[corner] + others[k].tokens)
    for corner in range(KNOTS_COUNT):
        means[corner] = 0.0
    for node in range(NODES_COUNT):
        s = NODES[node][0]
        without = 1.0
        top = 0  # the last corner that has any weight
        for corner in range(KNOTS_COUNT):
            weights[corner] = 0.0
        for k in range(count):
            chance = s * others[k].often
            for corner in range(top, -1, -1):
                moved = weights[corner] * chance
                weights[corner] -= moved
                put(weights, places[k][corner], moved)
            at = between(s * small + others[k].tokens)
            top = max(top, <int>places[k][top].place + 1, <int>at.place + 1)
            top = min(top, KNOTS_COUNT - 1)
            put(weights, at, without * chance)
            without -= without * chance
        for corner in range(KNOTS_COUNT):
            means[corner] += NODES[node][1] * weights[corner]


cdef inline Between between(double tokens) noexcept nogil:
    cdef int place = corner_below(tokens)
    if place == KNOTS_COUNT - 1:
        return Between(place, 0.0)
    return Between(place, (tokens - KNOTS[place]) / (KNOTS[place + 1] - KNOTS[place]))


cdef inline void put(double *weights, Between at, double weight) noexcept nogil:
    weights[at.place] += weight * (1.0 - at.above)
    if at.above > 0.0:
        weights[at.place + 1] += weight * at.above


cdef inline double growth(
    const Growths *game, const Curve *curve, uint32_t tokens
) noexcept nogil:
    cdef double found = mean_height(curve, tokens, game.small, game.lumps.count - 1)
    cdef int corner
    found -= mean_height(curve, 0.0, game.small, game.lumps.count - 1)
    for corner in range(KNOTS_COUNT):
        if game.weights[corner] > 0.0:
            found += game.weights[corner] * (
                height(curve, KNOTS[corner] + tokens) - curve.heights[corner]
            )
    return found


cdef inline double mean_height(
    const Curve *curve, double tokens, double small, uint32_t absent
) noexcept nogil:
    cdef double found = 0.0, before = 0.0, p = <double>absent, bend, ramp, rest
    cdef int place
    for place in range(KNOTS_COUNT):
        if KNOTS[place] >= tokens + small:
            break
        bend = curve.terms[SLOPES + place] - before
        before = curve.terms[SLOPES + place]
        if KNOTS[place] <= tokens:
            ramp = (tokens - KNOTS[place]) / (p + 1.0) + small / ((p + 1.0) * (p + 2.0))
        else:
            rest = 1.0 - (KNOTS[place] - tokens) / small
            ramp = small * power(rest, absent + 2) / ((p + 1.0) * (p + 2.0))
        found += bend * ramp
    return found


cdef inline double mean_slope(
    const Curve *curve, double small, const Lump *lumps, uint32_t absent
) noexcept nogil:
    cdef double weights[KNOTS_COUNT]
    cdef double found = 0.0, before = 0.0, p = <double>absent, slope
    cdef int place
    spread(weights, small, lumps, absent)
    for place in range(KNOTS_COUNT):
        slope = curve.terms[SLOPES + place]
        if KNOTS[place] < small:
            found += (slope - before) * power(1.0 - KNOTS[place] / small, absent + 1) / (p + 1.0)
        found += weights[place] * 0.5 * (before + slope if place else slope + slope)
        before = slope
    return found
