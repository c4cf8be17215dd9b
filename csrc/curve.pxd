# cython: cdivision=True
"""A step as a sum of kernels: its time by a curve, and the fair charge of each request.

The twin `curve_py.py` explains the theory and has the same names. This is plain arithmetic over the
parts of a step, and uses no memory but the stack.
"""

from libc.math cimport pow
from libc.stdint cimport int64_t, uint32_t, uint64_t

from csrc.fit cimport larger, smaller
from csrc.requests cimport DECODE
from csrc.shapley cimport LARGEST_NS, SMALLEST_NS, WEIGHT_SUM
from csrc.shares cimport Part

cdef enum:
    KNOTS_COUNT = 23
    FIXED = 0
    PREFILL = 1
    SEQUENCE = 2
    READ = 3
    PAIRS = 4
    PREFILL_READ = 5
    SLOPES = 6
    CURVE_TERMS = 29
    ENUMERATED_MAX = 6
    LEFT_OUT_MAX = 4
    LUMPS_MAX = 64
    NODES_COUNT = 8

cdef extern from *:
    """
    static const double KNOTS[23] = {
        0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256,
        384, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384,
    };
    static const double NODES[8][2] = {
        {0.01985507175123188, 0.05061426814518813},
        {0.10166676129318664, 0.11119051722668724},
        {0.2372337950418355, 0.15685332293894366},
        {0.4082826787521751, 0.18134189168918102},
        {0.5917173212478249, 0.18134189168918102},
        {0.7627662049581645, 0.15685332293894366},
        {0.8983332387068134, 0.11119051722668724},
        {0.9801449282487681, 0.05061426814518813},
    };
    static const double FACTORIALS[7] = {1, 1, 2, 6, 24, 120, 720};
    #define REST_PART 0.1
    """
    const double KNOTS[KNOTS_COUNT]
    const double NODES[NODES_COUNT][2]
    const double FACTORIALS[ENUMERATED_MAX + 1]
    const double REST_PART

cdef struct Layers:
    double whole
    double windowed
    int64_t window

cdef struct CurveWork:
    int64_t tokens
    int64_t sequences
    int64_t prefills
    double read
    double pairs
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

cdef struct CurveGame:
    double total_ns
    double base_ns
    double prefill_ns
    double token_ns
    int64_t all_tokens
    int64_t all_prefills
    bint is_enumerated
    double growths[ENUMERATED_MAX]  # of each part, if enumerated; else of each leader
    Lumps lumps
    # What tells the growth of the other lumps.
    double heights[KNOTS_COUNT]
    double weights[KNOTS_COUNT]
    double small
    double scale


cdef inline CurveWork curve_work_of(const Part *part, const Layers *layers) noexcept nogil:
    cdef int64_t tokens = part.tokens, context = part.context
    cdef int64_t seen = min(context, layers.window + tokens)
    cdef double number = <double>tokens, fewer
    cdef double read = layers.whole * context + layers.windowed * seen
    if part.phase & DECODE:
        return CurveWork(tokens, 1, 0, read, 0.0, 0.0)
    fewer = 0.5 * number * (number - 1.0)
    return CurveWork(
        tokens,
        1,
        1,
        0.0,
        layers.whole * (number * context - fewer) + layers.windowed * (number * seen - fewer),
        read,
    )


cdef inline CurveWork all_of(
    const Part *parts, uint32_t count, const Layers *layers
) noexcept nogil:
    cdef CurveWork total = CurveWork(0, 0, 0, 0.0, 0.0, 0.0), work
    cdef uint32_t k
    for k in range(count):
        work = curve_work_of(&parts[k], layers)
        total.tokens += work.tokens
        total.sequences += work.sequences
        total.prefills += work.prefills
        total.read += work.read
        total.pairs += work.pairs
        total.prefill_read += work.prefill_read
    return total


cdef inline double own_ns(const double *curve, const CurveWork *work) noexcept nogil:
    return (
        curve[SEQUENCE] * work.sequences
        + curve[READ] * work.read
        + curve[PAIRS] * work.pairs
        + curve[PREFILL_READ] * work.prefill_read
    )


cdef inline double height(const double *curve, double tokens) noexcept nogil:
    cdef double found = 0.0, end
    cdef int place
    for place in range(KNOTS_COUNT):
        if tokens <= KNOTS[place]:
            break
        end = KNOTS[place + 1] if place + 1 < KNOTS_COUNT else tokens
        found += curve[SLOPES + place] * (smaller(tokens, end) - KNOTS[place])
    return found


cdef inline void solve_curve(
    CurveGame *game, const double *curve, const Part *parts, uint32_t count, const Layers *layers
) noexcept nogil:
    cdef CurveWork everyone = all_of(parts, count, layers)
    cdef double shared = curve[FIXED] + (curve[PREFILL] if everyone.prefills else 0.0)
    game.total_ns = shared + own_ns(curve, &everyone) + height(curve, <double>everyone.tokens)
    game.base_ns = curve[FIXED] / count
    game.prefill_ns = curve[PREFILL] / everyone.prefills if everyone.prefills else 0.0
    game.token_ns = 0.0
    game.all_tokens = everyone.tokens
    game.all_prefills = everyone.prefills
    game.is_enumerated = count <= ENUMERATED_MAX
    if game.is_enumerated:
        enumerate_subsets(game, curve, parts, count)
    else:
        share_among_many(game, curve, parts, count)


cdef inline void enumerate_subsets(
    CurveGame *game, const double *curve, const Part *parts, uint32_t count
) noexcept nogil:
    cdef uint32_t subset, j, size
    cdef int64_t there
    cdef double value, gained, missed
    for j in range(count):
        game.growths[j] = 0.0
    for subset in range(<uint32_t>1 << count):
        there = size = 0
        for j in range(count):
            if subset >> j & 1:
                there += parts[j].tokens
                size += 1
        value = height(curve, <double>there)
        gained = value * part_of_orders(size - 1, count) if size else 0.0
        missed = value * part_of_orders(size, count) if size < count else 0.0
        for j in range(count):
            if subset >> j & 1:
                game.growths[j] += gained
            else:
                game.growths[j] -= missed
    for j in range(count):
        game.growths[j] = larger(0.0, game.growths[j])


cdef inline double part_of_orders(uint32_t before, uint32_t count) noexcept nogil:
    return FACTORIALS[before] * FACTORIALS[count - 1 - before] / FACTORIALS[count]


cdef inline bint is_lump(const Part *part) noexcept nogil:
    return not part.phase & DECODE and part.tokens > 1


cdef inline void share_among_many(
    CurveGame *game, const double *curve, const Part *parts, uint32_t count
) noexcept nogil:
    cdef Lumps *lumps = &game.lumps
    cdef Lump others[LUMPS_MAX]
    cdef double all_ns = height(curve, <double>game.all_tokens), given = 0.0, often, rest
    cdef int64_t left = game.all_tokens
    cdef uint32_t k, j, used
    cdef int corner
    rank_lumps(lumps, parts, count)
    game.scale = 1.0
    if lumps.all == 0:
        game.token_ns = all_ns / game.all_tokens if game.all_tokens else 0.0
        return
    for corner in range(KNOTS_COUNT):
        game.heights[corner] = height(curve, KNOTS[corner])
    game.small = <double>game.all_tokens
    for k in range(lumps.count):
        game.small -= lumps.tokens[k]
    for k in range(lumps.leaders):
        used = 0
        for j in range(lumps.count):
            if j != k:
                others[used] = Lump(lumps.tokens[j], 1.0)
                used += 1
        spread(game.weights, game.small, others, used)
        game.growths[k] = growth(game, curve, lumps.tokens[k])
    if lumps.all > lumps.leaders:
        often = (lumps.all - lumps.leaders - 1.0) / (lumps.all - lumps.leaders)
        for j in range(lumps.count):
            others[j] = Lump(lumps.tokens[j], 1.0 if j < lumps.leaders else often)
        spread(game.weights, game.small, others, lumps.count)
    for k in range(count):
        if is_lump(&parts[k]):
            given += growth_at(game, curve, parts, k)
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
    const CurveGame *game, const double *curve, const Part *parts, uint32_t place
) noexcept nogil:
    """Return what the lump at a place of the step gets of h, before it is scaled."""
    cdef uint32_t k
    for k in range(game.lumps.leaders):
        if game.lumps.places[k] == place:
            return game.growths[k]
    return growth(game, curve, parts[place].tokens)


cdef inline void spread(
    double *means, double small, const Lump *others, uint32_t count
) noexcept nogil:
    cdef Between places[LUMPS_MAX][KNOTS_COUNT]
    cdef double weights[KNOTS_COUNT]
    cdef double s, without, chance, moved
    cdef uint32_t k
    cdef int node, corner
    for k in range(count):
        for corner in range(KNOTS_COUNT):
            places[k][corner] = between(KNOTS[corner] + others[k].tokens)
    for corner in range(KNOTS_COUNT):
        means[corner] = 0.0
    for node in range(NODES_COUNT):
        s = NODES[node][0]
        without = 1.0
        for corner in range(KNOTS_COUNT):
            weights[corner] = 0.0
        for k in range(count):
            chance = s * others[k].often
            for corner in range(KNOTS_COUNT - 1, -1, -1):
                moved = weights[corner] * chance
                weights[corner] -= moved
                put(weights, places[k][corner], moved)
            put(weights, between(s * small + others[k].tokens), without * chance)
            without -= without * chance
        for corner in range(KNOTS_COUNT):
            means[corner] += NODES[node][1] * weights[corner]


cdef inline Between between(double tokens) noexcept nogil:
    cdef uint32_t place = KNOTS_COUNT - 1
    if tokens >= KNOTS[place]:
        return Between(place, 0.0)
    while KNOTS[place] > tokens:
        place -= 1
    return Between(place, (tokens - KNOTS[place]) / (KNOTS[place + 1] - KNOTS[place]))


cdef inline void put(double *weights, Between at, double weight) noexcept nogil:
    weights[at.place] += weight * (1.0 - at.above)
    if at.above > 0.0:
        weights[at.place + 1] += weight * at.above


cdef inline double growth(
    const CurveGame *game, const double *curve, uint32_t tokens
) noexcept nogil:
    cdef double found = mean_height(curve, tokens, game.small, game.lumps.count - 1)
    cdef int corner
    found -= mean_height(curve, 0.0, game.small, game.lumps.count - 1)
    for corner in range(KNOTS_COUNT):
        if game.weights[corner] > 0.0:
            found += game.weights[corner] * (
                height(curve, KNOTS[corner] + tokens) - game.heights[corner]
            )
    return found


cdef inline double mean_height(
    const double *curve, double tokens, double small, uint32_t absent
) noexcept nogil:
    cdef double found = 0.0, before = 0.0, p = <double>absent, bend, ramp, rest
    cdef int place
    for place in range(KNOTS_COUNT):
        if KNOTS[place] >= tokens + small:
            break
        bend = curve[SLOPES + place] - before
        before = curve[SLOPES + place]
        if KNOTS[place] <= tokens:
            ramp = (tokens - KNOTS[place]) / (p + 1.0) + small / ((p + 1.0) * (p + 2.0))
        else:
            rest = 1.0 - (KNOTS[place] - tokens) / small
            ramp = small * pow(rest, p + 2.0) / ((p + 1.0) * (p + 2.0))
        found += bend * ramp
    return found


cdef inline double mean_slope(
    const double *curve, double small, const Lump *lumps, uint32_t absent
) noexcept nogil:
    cdef double weights[KNOTS_COUNT]
    cdef double found = 0.0, before = 0.0, p = <double>absent, slope
    cdef int place
    spread(weights, small, lumps, absent)
    for place in range(KNOTS_COUNT):
        slope = curve[SLOPES + place]
        if KNOTS[place] < small:
            found += (slope - before) * pow(1.0 - KNOTS[place] / small, p + 1.0) / (p + 1.0)
        found += weights[place] * 0.5 * (before + slope if place else slope + slope)
        before = slope
    return found


cdef inline uint64_t weigh_curve(
    const CurveGame *game,
    const double *curve,
    const Part *parts,
    uint32_t count,
    const Layers *layers,
    uint32_t *weights,
) noexcept nogil:
    """Fill in the charge of each part as a weight. Return the sum of the weights.

    If the model predicts no time, the sum is 0 and nothing is filled in.
    """
    cdef uint64_t whole = 0
    cdef double to_weight, charge, of_tokens
    cdef CurveWork work
    cdef uint32_t k
    if not SMALLEST_NS < game.total_ns < LARGEST_NS:
        return 0
    to_weight = WEIGHT_SUM / game.total_ns
    for k in range(count):
        work = curve_work_of(&parts[k], layers)
        if game.is_enumerated:
            of_tokens = game.growths[k]
        elif is_lump(&parts[k]):
            of_tokens = growth_at(game, curve, parts, k) * game.scale
        else:
            of_tokens = game.token_ns * work.tokens
        charge = game.base_ns + own_ns(curve, &work) + of_tokens
        if work.prefills:
            charge += game.prefill_ns
        weights[k] = <uint32_t>(charge * to_weight + 0.5)
        whole += weights[k]
    return whole


cdef inline double margin_by_curve(
    const CurveGame *game,
    const double *curve,
    const Part *part,
    const Layers *layers,
    double gpu_ns,
) noexcept nogil:
    """Return the marginal cost of a part of a step with others, in ns of a step of `gpu_ns`."""
    cdef CurveWork work = curve_work_of(part, layers)
    cdef double to_ns = 0.0, added = own_ns(curve, &work)
    if SMALLEST_NS < game.total_ns < LARGEST_NS:
        to_ns = smaller(gpu_ns, LARGEST_NS) / game.total_ns
    added += height(curve, <double>game.all_tokens) - height(
        curve, <double>(game.all_tokens - work.tokens)
    )
    if work.prefills and game.all_prefills == 1:
        added += curve[PREFILL]
    return added * to_ns
