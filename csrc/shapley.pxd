# cython: cdivision=True
"""The larger of two sums, shared out: the Shapley value of whoever brings to both of them.

The twin `shapley_py.py` explains the theory and has the same names. This is plain arithmetic, and
uses no memory but the stack.
"""

from libc.stdint cimport uint32_t

from csrc.terms cimport larger, smaller

cdef enum:
    LARGE_MAX = 5
    POWER_MAX = 6

cdef extern from *:
    """
    static double POLYNOMIALS[7][7][7];  /* of beta, by p and q */
    static double WHOLE[7][7];  /* beta at 1 */
    #define SMALL_PART 0.03125
    """
    const double SMALL_PART
    double POLYNOMIALS[POWER_MAX + 1][POWER_MAX + 1][POWER_MAX + 1]
    double WHOLE[POWER_MAX + 1][POWER_MAX + 1]

cdef struct Sides:
    double compute_ns
    double memory_ns

cdef struct Large:  # the largest requests so far, the largest first, and the next one
    uint32_t count
    double smallest  # what is smaller is of no interest
    double sizes[LARGE_MAX + 1]
    uint32_t places[LARGE_MAX + 1]
    Sides own[LARGE_MAX + 1]

cdef struct Overlap:
    double total_ns
    double base
    double compute_part
    double compute_ns
    double memory_ns
    uint32_t large_count
    uint32_t places[LARGE_MAX]  # ascending
    double charges[LARGE_MAX]

cdef struct Lines:  # rise + s * c on [low, high], run + s * m elsewhere
    double rise
    double c
    double run
    double m
    double low
    double high


cdef inline void start_large(Large *large, Sides sums, uint32_t requests) noexcept nogil:
    """Keep none of so many requests yet; `sums` are those of all."""
    large.count = 0
    large.smallest = 0.0
    if requests > LARGE_MAX:
        large.smallest = SMALL_PART * (sums.compute_ns + sums.memory_ns)


cdef inline bint is_too_small(const Large *large, double size) noexcept nogil:
    """Return whether a request is smaller than all that are kept, or than any large one."""
    return size < large.smallest or (
        large.count > LARGE_MAX and size <= large.sizes[LARGE_MAX]
    )


cdef inline void keep_large(Large *large, uint32_t place, Sides own) noexcept nogil:
    """Insert a request among the largest so far if it is one of them; they come in step order."""
    cdef double size = own.compute_ns + own.memory_ns
    cdef uint32_t at = large.count, k
    if is_too_small(large, size):
        return
    while at > 0 and large.sizes[at - 1] < size:
        at -= 1
    if at > LARGE_MAX:
        return
    k = large.count if large.count < LARGE_MAX else LARGE_MAX
    while k > at:
        large.sizes[k] = large.sizes[k - 1]
        large.places[k] = large.places[k - 1]
        large.own[k] = large.own[k - 1]
        k -= 1
    large.sizes[at] = size
    large.places[at] = place
    large.own[at] = own
    large.count = min(large.count + 1, <uint32_t>LARGE_MAX + 1)


cdef inline void solve_overlap(
    Overlap *game, Sides fixed, Sides sums, Large *large, uint32_t requests
) noexcept nogil:
    """Solve the game of so many requests, of which `large` were kept; none if all are small."""
    cdef double c[LARGE_MAX]
    cdef double m[LARGE_MAX]
    cdef Sides ocean = sums
    cdef uint32_t k
    order_large(game, large, c, m)
    for k in range(game.large_count):
        ocean.compute_ns -= c[k]
        ocean.memory_ns -= m[k]
    if game.large_count == requests:
        ocean = Sides(0.0, 0.0)
    charge_large(
        game,
        Lines(
            fixed.compute_ns,
            larger(0.0, ocean.compute_ns),
            fixed.memory_ns,
            larger(0.0, ocean.memory_ns),
            0.0,
            0.0,
        ),
        c,
        m,
    )
    game.compute_ns = fixed.compute_ns + sums.compute_ns
    game.memory_ns = fixed.memory_ns + sums.memory_ns
    game.total_ns = larger(game.compute_ns, game.memory_ns)
    game.base = larger(fixed.compute_ns, fixed.memory_ns)


cdef inline void order_large(Overlap *game, Large *large, double *c, double *m) noexcept nogil:
    """Put the large players in step order, without a tie at the cut, which goes to the ocean."""
    cdef uint32_t found = large.count, k, at
    if found > LARGE_MAX:
        found = LARGE_MAX
        while found > 0 and large.sizes[found - 1] <= large.sizes[LARGE_MAX]:
            found -= 1
    game.large_count = found
    for k in range(found):
        at = k
        while at > 0 and game.places[at - 1] > large.places[k]:
            game.places[at] = game.places[at - 1]
            c[at] = c[at - 1]
            m[at] = m[at - 1]
            at -= 1
        game.places[at] = large.places[k]
        c[at] = large.own[k].compute_ns
        m[at] = large.own[k].memory_ns


cdef inline void charge_large(
    Overlap *game, Lines heights, const double *c, const double *m
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
    for p in range(POWER_MAX + 1):
        for q in range(POWER_MAX + 1):
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
