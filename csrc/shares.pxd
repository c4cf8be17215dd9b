# cython: cdivision=True
"""Weights and shares of one step: the arithmetic of the native attribution, nothing else.

A method is one function of type `Weigh`, which fills in the weights of a step's parts and returns
their sum, less than 2**31. Shares are exact in 64 bits. With q, r = divmod(D, W),
floor(D*S/W) = S*q + floor(S*r/W), and the remainder of S*r/W is carried from part to part; a weight
of 1, any decode, needs no division.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef struct Part:  # one request in one step
    uint32_t slot
    uint32_t tokens
    uint32_t phase

ctypedef uint64_t (*Weigh)(const Part *parts, uint32_t count, uint32_t *weights) noexcept nogil


cdef inline uint64_t weigh_tokens(
    const Part *parts, uint32_t count, uint32_t *weights
) noexcept nogil:
    cdef uint64_t whole = 0
    cdef uint32_t k
    for k in range(count):
        weights[k] = parts[k].tokens
        whole += weights[k]
    return whole


cdef inline uint64_t weigh_equal(
    const Part *parts, uint32_t count, uint32_t *weights
) noexcept nogil:
    cdef uint32_t k
    for k in range(count):
        weights[k] = 1
    return count


cdef struct Split:
    uint64_t whole  # W
    uint64_t quotient  # q, r = divmod(D, W)
    uint64_t remainder
    uint64_t carry  # S*r mod W


cdef inline Split start_split(uint64_t total_ns, uint64_t whole) noexcept nogil:
    return Split(whole, total_ns // whole, total_ns % whole, 0)


cdef inline uint64_t next_share(Split *split, uint32_t weight) noexcept nogil:
    cdef uint64_t carry = split.carry + weight * split.remainder  # < 2**31 * 2**31 + 2**31
    cdef uint64_t extra
    if weight == 1:  # carry < 2*W
        extra = carry >= split.whole
    else:
        extra = carry // split.whole
    split.carry = carry - extra * split.whole
    return weight * split.quotient + extra
