# cython: cdivision=True
"""The fair charge of each request in a step: its Shapley value.

The twin `shapley_py.py` explains the theory and has the same names. This is plain arithmetic over
the parts of a step, and uses no memory but the stack.
"""

from libc.stdint cimport uint32_t, uint64_t

from csrc.fit cimport Work, larger, smaller, time_of, work_of
from csrc.shares cimport Part

cdef enum:
    LARGE_MAX = 4
    CHUNKS_MAX = 16  # that a step remembers the places of; with more, all parts are searched
    WEIGHT_SUM = 0x40000000  # of a step's parts: half of what there is room for

cdef extern from *:
    """
    static double POLYNOMIALS[5][5][5];  /* of beta, by p and q */
    static double WHOLE[5][5];  /* beta at 1 */
    #define SMALLEST_NS 1e-9
    #define LARGEST_NS 9.2e18
    """
    double POLYNOMIALS[5][5][5]
    double WHOLE[5][5]
    const double SMALLEST_NS
    const double LARGEST_NS

cdef struct Game:
    double total_ns
    double base_ns
    double compute_part
    double compute_ns
    double memory_ns
    uint32_t large_count
    uint32_t places[LARGE_MAX]  # ascending
    double charges[LARGE_MAX]

cdef struct Chunks:  # the first parts of a step with more than one token
    uint32_t count  # of all of them
    uint32_t places[CHUNKS_MAX]

cdef struct Line:
    double at_0
    double slope

cdef struct Margins:
    Line c
    Line m
    double above_compute
    double above_memory
    double to_ns
    bint is_alone

cdef struct Lines:  # rise + s * c on [low, high], run + s * m elsewhere
    double rise
    double c
    double run
    double m
    double low
    double high


cdef inline Game solve_game(
    const double *compute,
    const double *memory,
    const Part *parts,
    uint32_t count,
    const Work *everyone,
    const Chunks *chunks,
) noexcept nogil:
    cdef Game game
    cdef Work ocean = everyone[0], work
    cdef double c[LARGE_MAX]
    cdef double m[LARGE_MAX]
    cdef uint32_t k
    cdef bint one_plane = (
        memory[0] == memory[1] == memory[2] == memory[3] == memory[4] == 0.0
    )
    game.compute_ns = compute[0] + time_of(compute, everyone)
    game.memory_ns = memory[0] + time_of(memory, everyone)
    game.total_ns = larger(game.compute_ns, game.memory_ns)
    game.base_ns = larger(compute[0], memory[0]) / count
    game.large_count = 0
    if not one_plane:
        find_large(&game, compute, memory, parts, count, chunks)
    for k in range(game.large_count):
        work = work_of(&parts[game.places[k]])
        c[k] = time_of(compute, &work)
        m[k] = time_of(memory, &work)
        ocean.tokens -= work.tokens
        ocean.sequences -= work.sequences
        ocean.products -= work.products
        ocean.context -= work.context
    cdef Lines heights = Lines(
        compute[0], time_of(compute, &ocean), memory[0], time_of(memory, &ocean), 0.0, 0.0
    )
    charge_large(&game, heights, c, m)
    return game


cdef inline uint64_t weigh_game(
    const Game *game,
    const double *compute,
    const double *memory,
    const Part *parts,
    uint32_t count,
    uint32_t *weights,
) noexcept nogil:
    """Fill in the charge of each part as a weight. Return the sum of the weights.

    If the model predicts no time, the sum is 0 and nothing is filled in.
    """
    cdef uint64_t whole = 0
    cdef uint32_t k, next_large = 0
    cdef double compute_part = game.compute_part, memory_part = 1.0 - game.compute_part
    cdef double own, to_weight
    cdef Work work
    cdef Line weight, c, m
    if not is_sound(game):
        return 0
    to_weight = WEIGHT_SUM / game.total_ns
    # The weight of a decode is a straight line in its context.
    c = decode_line(compute)
    m = decode_line(memory)
    weight.at_0 = (game.base_ns + (compute_part * c.at_0 + memory_part * m.at_0)) * to_weight + 0.5
    weight.slope = (compute_part * c.slope + memory_part * m.slope) * to_weight
    for k in range(count):
        if parts[k].tokens == 1 and count > LARGE_MAX:
            weights[k] = <uint32_t>(weight.at_0 + weight.slope * parts[k].context)
        else:
            work = work_of(&parts[k])
            own = compute_part * time_of(compute, &work) + memory_part * time_of(memory, &work)
            if next_large < game.large_count and game.places[next_large] == k:
                own = game.charges[next_large]
                next_large += 1
            weights[k] = <uint32_t>((game.base_ns + own) * to_weight + 0.5)
        whole += weights[k]
    return whole


cdef inline bint is_sound(const Game *game) noexcept nogil:
    return SMALLEST_NS < game.total_ns < LARGEST_NS


cdef inline Line decode_line(const double *plane) noexcept nogil:
    return Line(plane[1] + plane[2], plane[3] + plane[4])


cdef inline Margins start_margins(
    const Game *game, const double *compute, const double *memory, uint32_t count, double gpu_ns
) noexcept nogil:
    """Prepare the marginal costs in a step that took `gpu_ns`."""
    cdef Margins margins
    cdef Line c = decode_line(compute), m = decode_line(memory)
    gpu_ns = smaller(gpu_ns, LARGEST_NS)
    margins.to_ns = gpu_ns / game.total_ns if is_sound(game) else 0.0
    margins.above_compute = game.total_ns - game.compute_ns
    margins.above_memory = game.total_ns - game.memory_ns
    # Both margins of a decode are straight lines in its context.
    margins.c = Line((margins.above_compute + c.at_0) * margins.to_ns, c.slope * margins.to_ns)
    margins.m = Line((margins.above_memory + m.at_0) * margins.to_ns, m.slope * margins.to_ns)
    if count == 1:
        margins.c = margins.m = Line(gpu_ns, 0.0)
    margins.is_alone = count == 1
    return margins


cdef inline double margin_of_decode(const Margins *margins, uint32_t context) noexcept nogil:
    return smaller(
        margins.c.at_0 + margins.c.slope * context, margins.m.at_0 + margins.m.slope * context
    )


cdef inline double margin_of(
    const Margins *margins, const double *compute, const double *memory, const Part *part
) noexcept nogil:
    """Return the marginal cost of a part, in ns of the step."""
    cdef Work work
    if part.tokens == 1 or margins.is_alone:
        return margin_of_decode(margins, part.context)
    work = work_of(part)
    return margins.to_ns * smaller(
        margins.above_compute + time_of(compute, &work),
        margins.above_memory + time_of(memory, &work),
    )


cdef inline void note_chunk(Chunks *chunks, uint32_t place) noexcept nogil:
    if chunks.count < CHUNKS_MAX:
        chunks.places[chunks.count] = place
    chunks.count += 1


cdef inline void find_large(
    Game *game,
    const double *compute,
    const double *memory,
    const Part *parts,
    uint32_t count,
    const Chunks *chunks,
) noexcept nogil:
    """Find the places of the large players (the largest chunks), in step order."""
    cdef double sizes[LARGE_MAX + 1]  # the largest first
    cdef uint32_t places[LARGE_MAX + 1]
    cdef uint32_t found = 0, k, at
    if count <= LARGE_MAX:
        game.large_count = count
        for k in range(count):
            game.places[k] = k
        return
    if chunks.count <= CHUNKS_MAX:
        for k in range(chunks.count):
            found = keep_large(sizes, places, found, compute, memory, parts, chunks.places[k])
    else:
        for k in range(count):
            if parts[k].tokens > 1:
                found = keep_large(sizes, places, found, compute, memory, parts, k)
    if found > LARGE_MAX:  # a tie at the cut goes to the ocean
        found = LARGE_MAX
        while found > 0 and sizes[found - 1] <= sizes[LARGE_MAX]:
            found -= 1
    game.large_count = found
    for k in range(found):
        at = k
        while at > 0 and game.places[at - 1] > places[k]:
            game.places[at] = game.places[at - 1]
            at -= 1
        game.places[at] = places[k]


cdef inline uint32_t keep_large(
    double *sizes,
    uint32_t *places,
    uint32_t found,
    const double *compute,
    const double *memory,
    const Part *parts,
    uint32_t place,
) noexcept nogil:
    """Insert a part among the largest so far if it is one of them. Return how many there are."""
    cdef Work work = work_of(&parts[place])
    cdef double size = time_of(compute, &work) + time_of(memory, &work)
    cdef uint32_t at = found, k
    while at > 0 and sizes[at - 1] < size:
        at -= 1
    if at > LARGE_MAX:
        return found
    k = found if found < LARGE_MAX else LARGE_MAX
    while k > at:
        sizes[k] = sizes[k - 1]
        places[k] = places[k - 1]
        k -= 1
    sizes[at] = size
    places[at] = place
    return min(found + 1, <uint32_t>LARGE_MAX + 1)


cdef inline void charge_large(
    Game *game, Lines heights, const double *c, const double *m
) noexcept nogil:
    cdef uint32_t count = game.large_count, subset, j, size
    cdef double base = larger(heights.rise, heights.run)
    cdef double gained = 0.0, missed = 0.0
    cdef Lines lines
    game.compute_part = 0.0
    for j in range(count):
        game.charges[j] = 0.0
    for subset in range(<uint32_t>1 << count):
        lines = heights
        lines.rise = heights.rise - base
        lines.run = heights.run - base
        size = 0
        for j in range(count):
            if subset >> j & 1:
                lines.rise += c[j]
                lines.run += m[j]
                size += 1
        find_compute_on_top(&lines)
        game.compute_part += (
            beta(size, count - size, lines.high) - beta(size, count - size, lines.low)
        )
        if size > 0:
            gained = integral(size - 1, count - size, &lines)
        if size < count:
            missed = integral(size, count - 1 - size, &lines)
        for j in range(count):
            if subset >> j & 1:
                game.charges[j] += gained
            else:
                game.charges[j] -= missed
    for j in range(count):
        game.charges[j] = larger(0.0, game.charges[j])


cdef inline void find_compute_on_top(Lines *lines) noexcept nogil:
    cdef double slope = lines.c - lines.m, gap = lines.run - lines.rise
    lines.low = 0.0
    lines.high = 1.0
    if slope > 0.0:
        lines.low = smaller(1.0, larger(0.0, gap / slope))
    elif slope < 0.0:
        lines.high = smaller(1.0, larger(0.0, gap / slope))
    elif gap > 0.0:
        lines.high = 0.0


cdef inline double integral(uint32_t p, uint32_t q, const Lines *lines) noexcept nogil:
    cdef double zeroth = beta(p, q, lines.high) - beta(p, q, lines.low)
    cdef double first = beta(p + 1, q, lines.high) - beta(p + 1, q, lines.low)
    return (
        lines.rise * zeroth
        + lines.c * first
        + lines.run * (beta(p, q, 1.0) - zeroth)
        + lines.m * (beta(p + 1, q, 1.0) - first)
    )


cdef inline void fill_polynomials() noexcept:
    """Fill in the constants of `beta`, once."""
    cdef uint32_t p, q, k
    cdef double binomial, sign
    for p in range(LARGE_MAX + 1):
        for q in range(LARGE_MAX + 1):
            binomial = sign = 1.0
            for k in range(q + 1):
                POLYNOMIALS[p][q][k] = sign * binomial / <double>(p + k + 1)
                binomial = binomial * (q - k) / (k + 1.0)
                sign = -sign
            WHOLE[p][q] = polynomial(p, q, 1.0)


cdef inline double polynomial(uint32_t p, uint32_t q, double s) noexcept nogil:
    cdef double total = 0.0
    cdef uint32_t k
    for k in range(q + 1, 0, -1):
        total = total * s + POLYNOMIALS[p][q][k - 1]
    for k in range(p + 1):
        total *= s
    return total


cdef inline double beta(uint32_t p, uint32_t q, double s) noexcept nogil:
    if s <= 0.0:
        return 0.0
    if s >= 1.0:
        return WHOLE[p][q]
    return polynomial(p, q, s)
