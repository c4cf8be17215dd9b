# cython: cdivision=True
"""How the time of a step reaches its requests: weigh, share out, count. No allocation, no Python.

Invariant: what `accrue` adds to open requests plus the tail it returns is the time it was given.
"""

from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t

from csrc.fit cimport Fit
from csrc.requests cimport PREFILL, Requests, Rest, Slot, end_of_last_step
from csrc.shapley cimport Game, Margins, margin_of, solve_game, start_margins, weigh_game
from csrc.shares cimport Part, Split, next_share, start_split, weigh_equal, weigh_tokens
from csrc.steps cimport Step

cdef enum:  # places in METHODS
    SHAPLEY = 0
    TOKENS = 1


cdef inline int64_t accrue(
    Requests *requests,
    const Step *step,
    Fit *fit,
    int method,
    uint32_t *weights,
    int64_t total_ns,
    bint ends,
    int64_t *fallbacks,
) noexcept nogil:
    """Share out a step's time, and end it if told so. Return the tail."""
    if step.count == 0:
        return total_ns
    cdef const double *compute = fit.compute
    cdef const double *memory = fit.memory
    cdef Game game = solve_game(
        compute, memory, step.parts, step.count, &step.work, &step.chunks
    )
    cdef Margins margins = start_margins(&game, compute, memory, step.count, <double>total_ns)
    cdef uint64_t whole = weigh(step, &game, fit, method, weights)
    if whole == 0:
        whole = weigh_equal(step.count, weights)
        fallbacks[0] += 1
    cdef Split state = start_split(total_ns, whole)
    # Copies, which the compiler need not read again after each write to a slot.
    cdef Slot *slots = requests.slots
    cdef const Part *parts = step.parts
    cdef uint32_t count = step.count
    cdef Slot *slot
    cdef const Part *part
    cdef int64_t tail_ns = 0, share_ns
    cdef uint32_t place
    for place in range(count):
        part = &parts[place]
        slot = &slots[part.slot]
        share_ns = <int64_t>next_share(&state, weights[place])
        if slot.key == NULL:
            tail_ns += share_ns
        else:
            slot.ns[part.phase] += share_ns
            slot.step_ns = min(slot.step_ns + <uint64_t>total_ns, <uint64_t>INT64_MAX)
            slot.marginal_ns += margin_of(&margins, compute, memory, part)
            if part.tokens > 1 or part.phase == PREFILL:
                count_wasted(&requests.rests[part.slot], part, share_ns, ends)
        if ends:
            slot.tokens[part.phase] = added(slot.tokens[part.phase], part.tokens)
            slot.batch += count
            slot.ended += 1
            if slot.ended == slot.entered:
                end_of_last_step(requests, part.slot)
    return tail_ns


cdef inline void drop(Requests *requests, const Step *step) noexcept nogil:
    """End a step without time or tokens."""
    cdef uint32_t place, number
    for place in range(step.count):
        number = step.parts[place].slot
        requests.slots[number].ended += 1
        requests.rests[number].dropped += 1
        if requests.slots[number].ended == requests.slots[number].entered:
            end_of_last_step(requests, number)


cdef inline void take_out(Requests *requests, const Step *step, uint32_t count) noexcept nogil:
    """Undo that the first so many requests entered a step (a clamped position stays)."""
    cdef uint32_t place
    cdef Slot *slot
    for place in range(count):
        slot = &requests.slots[step.parts[place].slot]
        slot.position -= step.parts[place].tokens
        slot.entered -= 1


cdef inline uint64_t weigh(
    const Step *step, const Game *game, Fit *fit, int method, uint32_t *weights
) noexcept nogil:
    """Fill in the weights of a step's parts. Return their sum."""
    if method == SHAPLEY:
        return weigh_game(game, fit.compute, fit.memory, step.parts, step.count, weights)
    if method == TOKENS:
        return weigh_tokens(step.parts, step.count, weights)
    return weigh_equal(step.count, weights)


cdef inline void count_wasted(
    Rest *rest, const Part *part, int64_t share_ns, bint ends
) noexcept nogil:
    """Count apart what was recomputed and rejected of a part."""
    cdef uint32_t start = part.context - part.tokens
    cdef uint32_t recomputed = 0
    if part.phase == PREFILL and rest.recompute_end > start:
        recomputed = min(part.context, rest.recompute_end) - start
        rest.recomputed_ns += part_of(share_ns, recomputed, part.tokens)
    if rest.rejected_now:
        rest.rejected_ns += part_of(share_ns, rest.rejected_now, part.tokens)
    if ends:
        rest.recomputed_tokens += recomputed
        rest.rejected_tokens += rest.rejected_now
        rest.rejected_now = 0


cdef inline int64_t part_of(int64_t share_ns, uint32_t tokens, uint32_t all_tokens) noexcept nogil:
    if tokens == 0:
        return 0
    if tokens == all_tokens:
        return share_ns
    return <int64_t>(<double>share_ns * tokens / all_tokens)


cdef inline uint32_t added(uint32_t a, uint32_t b) noexcept nogil:
    """Return the sum, or the largest number there is."""
    return a + b if a + b >= a else 0xFFFFFFFF
