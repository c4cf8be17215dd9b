# cython: cdivision=True
"""Bring the time of a step to its requests: weigh, share out, count. No allocation, no Python.

Invariant: what `accrue` adds to open requests and to `uncharged_ns`, plus the tail it returns, is
the time it was given.
"""

from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t

from csrc.charge_error cimport look_at_charges
from csrc.features cimport usual_kind
from csrc.fit cimport Fit
from csrc.game cimport (
    Margins, SolvedStep, StepModel, margin_of, margin_of_usual, solve_step, start_margins,
    weigh_game,
)
from csrc.growths cimport ENUMERATED_MAX
from csrc.requests cimport CUT, DECODE, Requests, Rest, Slot, end_of_last_step
from csrc.shares cimport Part, Split, next_share, start_split, weigh_equal, weigh_tokens
from csrc.steps cimport Ring, Step, step_at

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
    """Share out a step's time, and end the step if `ends`. Return the tail."""
    requests.uncharged_ns = 0
    if step.count == 0:
        return total_ns
    cdef const StepModel *model = &fit.model
    cdef SolvedStep game
    solve_step(&game, model, step.parts, step.count, step.plain, &step.work)
    cdef Margins margins = start_margins(&game, model, <double>total_ns)
    cdef uint64_t whole = weigh(step, &game, model, method, weights)
    if whole == 0:
        whole = weigh_equal(step.count, weights)
        fallbacks[0] += 1
    cdef Split state = start_split(total_ns, whole)
    # Local copies: the compiler need not read them again after each write to a slot.
    cdef Slot *slots = requests.slots
    cdef const Part *parts = step.parts
    # Few requests have no usual ones among them.
    cdef uint32_t count = step.count, plain = step.plain if ends and count > ENUMERATED_MAX else 0
    cdef Slot *slot
    cdef Part part
    cdef int64_t tail_ns, share_ns
    cdef uint32_t place
    if game.has_features:
        tail_ns = accrue_usual(requests, step, &margins, &state, weights, plain, total_ns, True)
    else:
        tail_ns = accrue_usual(requests, step, &margins, &state, weights, plain, total_ns, False)
    for place in range(plain, count):
        part = parts[place]
        slot = &slots[part.slot]
        share_ns = <int64_t>next_share(&state, weights[place])
        if slot.key == NULL:
            tail_ns += share_ns
        else:
            if part.phase & DECODE:
                slot.decode_ns += share_ns
            slot.step_ns = sum_up(slot.step_ns, total_ns)
            slot.marginal_ns += margin_of(&margins, &game, model, &part)
            if part.phase & (DECODE | CUT) != DECODE or part.tokens > 1:
                count_unusual(requests, slot, &part, share_ns, ends)
        if ends:
            if part.phase & DECODE:
                slot.decode_tokens = added(slot.decode_tokens, part.tokens)
            slot.batch += count
            slot.ended += 1
            slot.in_flight -= 1
            if slot.in_flight == 0:
                end_of_last_step(requests, part.slot)
    if ends:
        look_at_charges(
            &fit.charge_errors, parts, count, step.plain, &step.work, <double>total_ns, weights
        )
    return tail_ns


cdef inline int64_t accrue_usual(
    Requests *requests,
    const Step *step,
    const Margins *margins,
    Split *split,
    const uint32_t *weights,
    uint32_t plain,
    int64_t total_ns,
    bint has_features,
) noexcept nogil:
    """Share out the time of an ending step's first parts, decodes of one token. Return the tail."""
    # Local copies: the compiler need not read them again after each write to a slot.
    cdef Slot *slots = requests.slots
    cdef const Part *parts = step.parts
    cdef Split state = split[0]
    cdef uint32_t count = step.count, place
    cdef Slot *slot
    cdef int64_t tail_ns = 0, share_ns
    for place in range(plain):
        slot = &slots[parts[place].slot]
        share_ns = <int64_t>next_share(&state, weights[place])
        if slot.key == NULL:
            tail_ns += share_ns
        else:
            slot.decode_ns += share_ns
            slot.step_ns = sum_up(slot.step_ns, total_ns)
            if has_features:  # A constant where this is called.
                slot.marginal_ns += (
                    margin_of_usual(margins, &parts[place])
                    + margins.usual_saved[usual_kind(&parts[place])]
                )
            else:
                slot.marginal_ns += margin_of_usual(margins, &parts[place])
        slot.decode_tokens = added(slot.decode_tokens, 1)
        slot.batch += count
        slot.ended += 1
        slot.in_flight -= 1
        if slot.in_flight == 0:
            end_of_last_step(requests, parts[place].slot)
    split[0] = state
    return tail_ns


cdef inline void drop(Requests *requests, const Step *step) noexcept nogil:
    """End a step without time or tokens."""
    cdef uint32_t place, number
    for place in range(step.count):
        number = step.parts[place].slot
        requests.slots[number].ended += 1
        requests.slots[number].in_flight -= 1
        requests.rests[number].dropped += 1
        if requests.slots[number].in_flight == 0:
            end_of_last_step(requests, number)


cdef inline void take_out(Requests *requests, const Step *step, uint32_t count) noexcept nogil:
    """Take the first `count` requests out of a step again (a clamped position stays)."""
    cdef uint32_t place
    cdef Slot *slot
    for place in range(count):
        slot = &requests.slots[step.parts[place].slot]
        slot.position -= step.parts[place].tokens
        slot.in_flight -= 1


cdef inline uint64_t weigh(
    const Step *step, const SolvedStep *game, const StepModel *model, int method, uint32_t *weights
) noexcept nogil:
    """Fill in the weights of a step's parts. Return their sum."""
    if method == SHAPLEY:
        return weigh_game(game, model, step.parts, step.plain, weights)
    if method == TOKENS:
        return weigh_tokens(step.parts, step.count, weights)
    return weigh_equal(step.count, weights)


cdef inline void count_unusual(
    Requests *requests, const Slot *slot, const Part *part, int64_t share_ns, bint ends
) noexcept nogil:
    """Count the prefill of a part, and its recomputed, rejected and cut tokens."""
    cdef Rest *rest = &requests.rests[part.slot]
    cdef uint32_t start = part.context - part.tokens
    cdef uint32_t recomputed = 0, kept = part.tokens - rest.rejected_now
    cdef uint32_t cut = cut_in_part(part, kept, slot.prefill_end)
    cdef int64_t rejected_ns = part_of(share_ns, rest.rejected_now, part.tokens)
    cdef int64_t kept_ns = share_ns - rejected_ns
    cdef int64_t recomputed_ns
    cdef int64_t cut_ns = part_of(kept_ns, cut, kept)
    cdef bint is_prefill = not part.phase & DECODE
    if is_prefill:
        rest.prefill_ns += share_ns
        if ends:
            rest.prefill_tokens = added(rest.prefill_tokens, part.tokens)
    if is_prefill and rest.recompute_end > start:
        recomputed = min(part.context, rest.recompute_end) - start
        recomputed_ns = part_of(share_ns, recomputed, part.tokens)
        rest.recomputed_ns += recomputed_ns
        if not requests.charges_recomputed:
            rest.prefill_ns -= recomputed_ns
            requests.uncharged_ns += recomputed_ns
    rest.rejected_ns += rejected_ns
    rest.cut_ns += cut_ns
    if ends:
        rest.recomputed_tokens += recomputed
        rest.rejected_tokens += rest.rejected_now
        rest.cut_tokens += cut
        rest.rejected_now = 0
        if part.tokens > 1:
            rest.kept_tokens = kept - cut
            rest.kept_ns = kept_ns - cut_ns


cdef inline uint32_t cut_in_part(
    const Part *part, uint32_t kept, uint32_t prefill_end
) noexcept nogil:
    """Return how many kept tokens are cut off because the request was aborted: its output."""
    cdef uint32_t end = part.context - part.tokens + kept
    if not part.phase & CUT:
        return 0
    if part.phase & DECODE:
        return kept
    return min(kept, end - prefill_end) if end > prefill_end else 0


cdef inline void cut_off(Rest *rest, int64_t tokens) noexcept nogil:
    """Count the last `tokens` of a request's last ended step as cut off."""
    cdef uint32_t cut = <uint32_t>min(tokens, <int64_t>rest.kept_tokens)
    cdef int64_t cut_ns = part_of(rest.kept_ns, cut, rest.kept_tokens)
    rest.cut_tokens += cut
    rest.cut_ns += cut_ns
    rest.kept_tokens -= cut
    rest.kept_ns -= cut_ns


cdef inline void cut_in_flight(Ring *ring, uint32_t number) noexcept nogil:
    """Count tokens that the steps in flight compute behind a request's prefill as cut off."""
    cdef int64_t at
    cdef uint32_t place
    cdef Step *step
    for at in range(ring.oldest, ring.newest + 1):
        step = step_at(ring, at)
        for place in range(step.count):
            if step.parts[place].slot == number:
                step.parts[place].phase |= CUT
                step.plain = min(step.plain, place)


cdef inline uint64_t sum_up(uint64_t so_far, int64_t total_ns) noexcept nogil:
    """Return the sum, or the largest number there is."""
    cdef uint64_t total = so_far + <uint64_t>total_ns
    return total if total <= <uint64_t>INT64_MAX else <uint64_t>INT64_MAX


cdef inline int64_t part_of(int64_t share_ns, uint32_t tokens, uint32_t all_tokens) noexcept nogil:
    if tokens == 0:
        return 0
    if tokens == all_tokens:
        return share_ns
    return <int64_t>(<double>share_ns * tokens / all_tokens)


cdef inline uint32_t added(uint32_t a, uint32_t b) noexcept nogil:
    """Return the sum, or the largest number there is."""
    return a + b if a + b >= a else 0xFFFFFFFF
