# cython: cdivision=True
"""Exact integer shares of one step's time, by weight.

Shares are exact in 64 bits. With q, r = divmod(D, W) and S the weights so far,
floor(D*S/W) = S*q + floor(S*r/W). W stays the same for all parts of a step, so the division by it
is a multiplication by a rounded-up reciprocal, which is exact for every x = S*r < 2**62 (Granlund
and Montgomery 1994): with 2**L >= W and magic = floor(2**(62+L) / W) + 1,
floor(x / W) = x * magic >> 62+L = (the upper 64 bits of 4x * magic) >> L.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from *:
    """
    static inline uint64_t upper_product(uint64_t a, uint64_t b) {
        return (uint64_t)(((unsigned __int128)a * b) >> 64);
    }
    """
    uint64_t upper_product(uint64_t a, uint64_t b) noexcept nogil

cdef struct Part:  # one request in one step
    uint32_t slot
    uint32_t tokens
    uint32_t context  # its length at the end of the step
    uint32_t phase

cdef struct Split:
    uint64_t quotient  # q, r = divmod(D, W)
    uint64_t remainder_4  # times 4
    uint64_t magic
    unsigned log  # L
    uint64_t weight_so_far
    uint64_t given_ns


cdef inline uint64_t weigh_tokens(
    const Part *parts, uint32_t count, uint32_t *weights
) noexcept nogil:
    cdef uint64_t whole = 0
    cdef uint32_t k
    for k in range(count):
        weights[k] = parts[k].tokens
        whole += weights[k]
    return whole


cdef inline uint64_t weigh_equal(uint32_t count, uint32_t *weights) noexcept nogil:
    cdef uint32_t k
    for k in range(count):
        weights[k] = 1
    return count


cdef inline Split start_split(uint64_t total_ns, uint64_t whole) noexcept nogil:
    cdef unsigned log = 0
    cdef uint64_t one = <uint64_t>1 << 62
    while (<uint64_t>1 << log) < whole:
        log += 1
    # floor(2**(62+L) / W) in two steps, each within 64 bits.
    cdef uint64_t magic = (one // whole << log) + ((one % whole) << log) // whole + 1
    return Split(total_ns // whole, total_ns % whole * 4, magic, log, 0, 0)


cdef inline uint64_t next_share(Split *split, uint32_t weight) noexcept nogil:
    split.weight_so_far += weight
    cdef uint64_t until_ns = split.weight_so_far * split.quotient + (
        upper_product(split.weight_so_far * split.remainder_4, split.magic) >> split.log
    )
    cdef uint64_t share_ns = until_ns - split.given_ns
    split.given_ns = until_ns
    return share_ns
