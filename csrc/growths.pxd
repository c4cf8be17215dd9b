# cython: cdivision=True
"""What each request of a step gets of h, which depends on the tokens of all of them.

The twin `growths_py.py` explains the theory and has the same names. This is plain arithmetic over
the parts of a step, and uses no memory but the stack.
"""

from libc.stdint cimport int64_t, uint32_t

from csrc.curve cimport Curve, Served, corner_below, height, padded
from csrc.requests cimport DECODE
from csrc.shapley cimport beta
from csrc.shares cimport Part
from csrc.terms cimport KNOTS, KNOTS_COUNT, SLOPES, larger

cdef enum:
    ENUMERATED_MAX = 6
    LEADERS_MAX = 4
    LEADER_SUBSETS = 16
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
    """
    const double NODES[NODES_COUNT][2]
    const double FACTORIALS[ENUMERATED_MAX + 1]

cdef struct Between:  # two corners
    uint32_t place
    double above

cdef struct Lumps:
    uint32_t count  # of those that are kept, the largest first
    uint32_t all
    uint32_t leaders
    uint32_t places[LUMPS_MAX + 1]
    uint32_t tokens[LUMPS_MAX + 1]

cdef struct Arrivals:  # what may be there: lumps, and many small tokens
    double small
    uint32_t count
    double tokens[LUMPS_MAX]
    double often[LUMPS_MAX]
    Between moves[LUMPS_MAX][KNOTS_COUNT]  # where a lump takes what was at a corner
    int reach  # no weight gets further than to this corner

cdef struct Present:  # the chances of what is there at one instant
    double weights[KNOTS_COUNT]  # with a lump, divided between corners
    int top  # the last corner that has any
    double without  # no lump

cdef struct Growths:  # what the requests of a step get of h
    double token_ns
    bint is_enumerated
    double parts[ENUMERATED_MAX]  # of each request, if enumerated; else of each leader
    Lumps lumps
    # What tells the growth of the other lumps.
    double weights[KNOTS_COUNT]
    double small
    double before_all_ns
    double scale
    double first[LUMPS_MAX]  # growths of the first lumps of the step, before they are scaled


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
    Growths *game,
    const Curve *curve,
    const Part *parts,
    uint32_t count,
    uint32_t plain,
    int64_t tokens,
) noexcept nogil:
    """Share h of a step among its requests, of which the first `plain` are no lumps."""
    cdef Lumps *lumps = &game.lumps
    cdef double all_ns = height(curve, <double>tokens), given
    cdef int64_t left
    cdef uint32_t k
    rank_lumps(lumps, parts, count, plain)
    game.scale = 1.0
    if lumps.all == 0:
        game.token_ns = all_ns / tokens if tokens else 0.0
        return
    game.small = <double>tokens
    for k in range(lumps.count):
        game.small -= lumps.tokens[k]
    if lumps.all <= ENUMERATED_MAX:
        enumerate_lumps(game, curve)
    else:
        game.before_all_ns = mean_height(curve, 0.0, game.small, lumps.count - 1)
        share_among_leaders(game, curve)
        meet_followers(game, curve)
    left = keep_first(game, curve, parts, count, plain, tokens, &given)
    if lumps.all <= ENUMERATED_MAX:  # What lumps get is exact, and so is what is left.
        game.token_ns = larger(0.0, all_ns - given) / left if left else 0.0
    else:
        scale_to_whole(game, curve, all_ns, given, left)


cdef inline int64_t keep_first(
    Growths *game,
    const Curve *curve,
    const Part *parts,
    uint32_t count,
    uint32_t plain,
    int64_t tokens,
    double *given,
) noexcept nogil:
    """Keep the growths of the first lumps. Return the tokens of all that are no lumps."""
    cdef uint32_t k, seen = 0
    cdef double grown
    given[0] = 0.0
    for k in range(plain, count):
        if is_lump(&parts[k]):
            grown = growth_at(game, curve, parts, k)
            if seen < LUMPS_MAX:
                game.first[seen] = grown
            seen += 1
            given[0] += grown
            tokens -= parts[k].tokens
    return tokens


cdef inline void scale_to_whole(
    Growths *game, const Curve *curve, double all_ns, double given, int64_t left
) noexcept nogil:
    """Give each token of all others its mean growth, and scale all growths to h."""
    cdef Arrivals arrivals
    if left > 0:
        start_arrivals(&arrivals, game, 0, 1.0)
        game.token_ns = mean_slope(curve, &arrivals)
        given += game.token_ns * left
    game.scale = all_ns / given if given > 0.0 else 0.0
    game.token_ns *= game.scale


cdef inline void enumerate_lumps(Growths *game, const Curve *curve) noexcept nogil:
    """Write the mean growth of h by each of a few lumps, over all subsets of the others."""
    cdef uint32_t count = game.lumps.count, subset, size, k
    cdef double gained = 0.0, missed = 0.0, tokens
    for k in range(count):
        game.parts[k] = 0.0
    for subset in range(<uint32_t>1 << count):
        tokens = 0.0
        size = 0
        for k in range(count):
            if subset >> k & 1:
                tokens += game.lumps.tokens[k]
                size += 1
        if size > 0:
            gained = mean_beside(curve, tokens, game.small, size - 1, count - size)
        if size < count:
            missed = mean_beside(curve, tokens, game.small, size, count - 1 - size)
        for k in range(count):
            if subset >> k & 1:
                game.parts[k] += gained
            else:
                game.parts[k] -= missed


cdef inline double mean_beside(
    const Curve *curve, double tokens, double small, uint32_t there, uint32_t absent
) noexcept nogil:
    cdef int start = corner_below(tokens), place
    cdef double before = curve.terms[SLOPES + start], bend, since
    cdef double all_zeroth = beta(there, absent, 1.0), all_first = beta(there + 1, absent, 1.0)
    cdef double found = height(curve, tokens) * all_zeroth + before * small * all_first
    for place in range(start + 1, KNOTS_COUNT):
        if KNOTS[place] >= tokens + small:
            break
        bend = curve.terms[SLOPES + place] - before
        before = curve.terms[SLOPES + place]
        since = (KNOTS[place] - tokens) / small
        found += bend * small * (
            (all_first - beta(there + 1, absent, since))
            - since * (all_zeroth - beta(there, absent, since))
        )
    return found


cdef inline void share_among_leaders(Growths *game, const Curve *curve) noexcept nogil:
    """Write the mean growth of h by each leader, over all subsets of the other leaders."""
    cdef Lumps *lumps = &game.lumps
    cdef uint32_t count = lumps.leaders, subset, size, k, corner
    cdef uint32_t sizes[LEADER_SUBSETS]
    cdef double tokens[LEADER_SUBSETS]
    cdef double beyond[LEADER_SUBSETS][KNOTS_COUNT]
    cdef double without[LEADER_SUBSETS]
    cdef double beside[LEADER_SUBSETS]
    cdef double chances[LEADERS_MAX]
    cdef double s, gained
    cdef int node
    cdef Arrivals followers
    cdef Present present
    if count == 0:
        return
    start_arrivals(&followers, game, count, 1.0)
    sizes[0] = 0
    tokens[0] = 0.0
    for k in range(count):
        for subset in range(<uint32_t>1 << k):
            sizes[subset | 1 << k] = sizes[subset] + 1
            tokens[subset | 1 << k] = tokens[subset] + lumps.tokens[k]
        game.parts[k] = (
            mean_height(curve, <double>lumps.tokens[k], game.small, lumps.count - 1)
            - game.before_all_ns
        )
    for subset in range(<uint32_t>1 << count):
        for corner in range(followers.reach + 1):
            beyond[subset][corner] = height(curve, KNOTS[corner] + tokens[subset])
    for node in range(NODES_COUNT):
        s = NODES[node][0]
        find_present(&present, &followers, s)
        for subset in range(<uint32_t>1 << count):
            without[subset] = present.without * height(curve, s * game.small + tokens[subset])
            beside[subset] = 0.0
            for corner in range(present.top + 1):
                beside[subset] += present.weights[corner] * beyond[subset][corner]
        for size in range(count):
            chances[size] = NODES[node][1] * power(s, size) * power(1.0 - s, count - 1 - size)
        for subset in range(<uint32_t>1 << count):
            for k in range(count):
                if not subset >> k & 1:
                    gained = beside[subset | 1 << k] - beside[subset]
                    if subset:  # Without any lump it is known already, and exactly.
                        gained += without[subset | 1 << k] - without[subset]
                    game.parts[k] += chances[sizes[subset]] * gained


cdef inline void meet_followers(Growths *game, const Curve *curve) noexcept nogil:
    """Find what a follower meets: each is there a little less often, so one is missing."""
    cdef Arrivals arrivals
    cdef double others = game.lumps.count - game.lumps.leaders - 1.0
    start_arrivals(&arrivals, game, 0, others / (others + 1.0))
    mean_weights(game.weights, &arrivals)


cdef inline void rank_lumps(
    Lumps *lumps, const Part *parts, uint32_t count, uint32_t plain
) noexcept nogil:
    """Keep the largest lumps in order, and find how many of them are leaders."""
    cdef uint32_t k, at, cut
    lumps.count = lumps.all = 0
    for k in range(plain, count):
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
    lumps.leaders = lumps.count
    if lumps.all > ENUMERATED_MAX:
        lumps.leaders = LEADERS_MAX
        cut = lumps.tokens[LEADERS_MAX]
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


cdef inline void start_arrivals(
    Arrivals *arrivals, const Growths *game, uint32_t first, double often
) noexcept nogil:
    """Let all lumps from the first on arrive; those that are no leaders are there so often."""
    cdef const Lumps *lumps = &game.lumps
    cdef double most
    cdef uint32_t k
    cdef int corner, place
    arrivals.small = game.small
    arrivals.count = lumps.count - first
    arrivals.reach = -1
    for k in range(arrivals.count):
        arrivals.tokens[k] = <double>lumps.tokens[first + k]
        arrivals.often[k] = often if first + k >= lumps.leaders else 1.0
        most = larger(KNOTS[max(arrivals.reach, 0)], game.small) + arrivals.tokens[k]
        arrivals.reach = min(corner_below(most) + 1, KNOTS_COUNT - 1)
    for k in range(arrivals.count):
        place = 0
        for corner in range(arrivals.reach + 1):
            place = corner_from(place, KNOTS[corner] + arrivals.tokens[k])
            arrivals.moves[k][corner] = between(place, KNOTS[corner] + arrivals.tokens[k])


cdef inline void find_present(
    Present *present, const Arrivals *arrivals, double s
) noexcept nogil:
    """Write the chances of what is there at an instant."""
    cdef double *weights = present.weights
    cdef double chance, moved, tokens
    cdef int corner, reached
    cdef uint32_t k
    cdef Between at
    present.without = 1.0
    present.top = -1
    for corner in range(KNOTS_COUNT):
        weights[corner] = 0.0
    for k in range(arrivals.count):
        chance = s * arrivals.often[k]
        # From above, so what was moved is not moved again.
        for corner in range(present.top, -1, -1):
            moved = weights[corner] * chance
            weights[corner] -= moved
            put(weights, arrivals.moves[k][corner], moved)
        tokens = s * arrivals.small + arrivals.tokens[k]
        at = between(corner_below(tokens), tokens)
        put(weights, at, present.without * chance)
        present.without -= present.without * chance
        reached = at.place + 1
        if present.top >= 0:
            reached = max(reached, <int>arrivals.moves[k][present.top].place + 1)
        present.top = min(max(present.top, reached), KNOTS_COUNT - 1)


cdef inline void mean_weights(double *means, const Arrivals *arrivals) noexcept nogil:
    """Write the chances of what is there with at least one lump, as means over the nodes."""
    cdef Present present
    cdef int node, corner
    for corner in range(KNOTS_COUNT):
        means[corner] = 0.0
    for node in range(NODES_COUNT):
        find_present(&present, arrivals, NODES[node][0])
        for corner in range(KNOTS_COUNT):
            means[corner] += NODES[node][1] * present.weights[corner]


cdef inline int corner_from(int place, double tokens) noexcept nogil:
    """Return the last corner that is not beyond a number of tokens; it is not before `place`."""
    while place + 1 < KNOTS_COUNT and KNOTS[place + 1] <= tokens:
        place += 1
    return place


cdef inline Between between(int place, double tokens) noexcept nogil:
    """Return how far a number of tokens is from a corner to the next, from 0 to 1."""
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
    found -= game.before_all_ns
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


cdef inline double power(double base, uint32_t exponent) noexcept nogil:
    """Return a power with a whole exponent, by squares."""
    cdef double found = 1.0
    while exponent:
        if exponent & 1:
            found *= base
        base *= base
        exponent >>= 1
    return found


cdef inline double mean_slope(const Curve *curve, const Arrivals *arrivals) noexcept nogil:
    cdef double weights[KNOTS_COUNT]
    cdef double found = 0.0, before = 0.0, p = <double>arrivals.count, slope
    cdef int place
    mean_weights(weights, arrivals)
    for place in range(KNOTS_COUNT):
        slope = curve.terms[SLOPES + place]
        if KNOTS[place] < arrivals.small:
            found += (slope - before) * power(
                1.0 - KNOTS[place] / arrivals.small, arrivals.count + 1
            ) / (p + 1.0)
        found += weights[place] * 0.5 * (before + slope if place else slope + slope)
        before = slope
    return found
