"""Steps in flight of one engine: a ring of steps, each an array of parts.

Steps in flight are consecutive, `oldest` to `newest`. Their arrays are reused, and the ring doubles
when all its steps are in flight. Ended steps stay readable until their place is taken again.
"""

from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t

from csrc.checks cimport WEIGHT_MAX, rejected_tokens_of
from csrc.curve cimport CurveWork, Layers, curve_work_of, read_of
from csrc.features cimport ENCODER_TOKENS_MAX, add_traits, encoder_tokens_of, has_features
from csrc.game cimport StepWork
from csrc.memory cimport resized
from csrc.planes cimport work_of
from csrc.requests cimport (
    DECODE, ENCODER_SHIFT, HAS_LORA, IS_GUIDED, PREFILL, Requests, Slot,
)
from csrc.shares cimport Part

cdef enum:
    STEPS_MAX = 1024
    DEPARTED_MAX = 3  # in a row, that a guess looks past

cdef struct Step:
    Part *parts
    uint32_t count
    uint32_t plain  # so many of them come first: decodes of one token each
    uint32_t capacity
    StepWork work  # of all its parts
    int64_t shared_ns  # of its time, so far

cdef struct Guess:  # where the next request of a step was before
    const Part *part
    const Part *end

cdef struct Ring:
    Step *steps  # step n is at n % size
    uint32_t size  # a power of 2
    int64_t oldest  # in flight; none if oldest > newest
    int64_t newest
    uint32_t *weights  # of one step at a time
    uint32_t weights_capacity


cdef inline int start_ring(Ring *ring) except -1:
    ring.oldest = 1
    ring.size = 4
    ring.steps = <Step *>PyMem_Calloc(ring.size, sizeof(Step))
    if ring.steps == NULL:
        raise MemoryError
    return 0


cdef inline void free_ring(Ring *ring) noexcept:
    cdef uint32_t k
    if ring.steps != NULL:
        for k in range(ring.size):
            PyMem_Free(ring.steps[k].parts)
    PyMem_Free(ring.steps)
    PyMem_Free(ring.weights)


cdef inline Step *step_at(const Ring *ring, int64_t number) noexcept nogil:
    return &ring.steps[number & (ring.size - 1)]


cdef inline Guess guess_in(const Step *step, uint32_t place) noexcept nogil:
    return Guess(step.parts + min(place, step.count), step.parts + step.count)


cdef inline Guess guess_after(const Ring *ring, const Slot *slot) noexcept nogil:
    """Guess the next request: the one that came after this request in its last step."""
    return guess_in(step_at(ring, slot.last_step), slot.last_place + 1)


cdef inline bint is_kept(const Ring *ring, const Slot *slot) noexcept nogil:
    """Return whether the parts of a request's last step, in flight or ended, are in the ring.

    A step 2**32 steps ago also gives True. That does no harm, because keys are compared afterwards.
    """
    cdef uint32_t age = <uint32_t>(ring.newest + 1) - slot.last_step
    return (slot.ended or slot.in_flight) and age < ring.size


cdef inline bint is_right(Guess guess, const Slot *slots, const PyObject *key) noexcept nogil:
    return guess.part < guess.end and slots[guess.part.slot].key == key


cdef inline Guess look_further(
    Guess guess, const Slot *slots, const PyObject *key
) noexcept nogil:
    """Move a guess to the request if that is a few places further, otherwise to the end."""
    cdef const Part *end = guess.part + min(guess.end - guess.part, <int64_t>DEPARTED_MAX + 1)
    while guess.part < end:
        if slots[guess.part.slot].key == key:
            return guess
        guess.part += 1
    guess.part = guess.end
    return guess


cdef inline bint enter(
    Slot *slot,
    uint32_t number,
    int64_t tokens,
    uint32_t this_step,
    Step *step,
    uint32_t place,
    StepWork *total,
    const Layers *layers,
) noexcept nogil:
    """Make a request the next part of a step. Return whether it needs another block."""
    cdef Part *part = &step.parts[place]
    part.slot = number
    part.tokens = <uint32_t>tokens
    part.phase = PREFILL if slot.position < slot.prefill_end else DECODE
    slot.position += part.tokens  # at most twice WEIGHT_MAX
    slot.in_flight += 1
    slot.last_step = this_step
    slot.last_place = <uint16_t>place
    slot.position = min(slot.position, <uint32_t>WEIGHT_MAX)
    part.context = slot.position
    total.planes.tokens += tokens
    total.planes.context += part.context
    if tokens == 1:
        total.planes.products += part.context
    else:
        total.planes.products += work_of(part).products
    if part.phase == PREFILL:
        add_prefill(total, part, layers)
    elif layers.windowed != 0.0:
        total.curve.read += read_of(layers, tokens, part.context)
    return slot.position > slot.block_end


cdef inline void add_prefill(StepWork *total, const Part *part, const Layers *layers) noexcept nogil:
    cdef CurveWork work = curve_work_of(part, layers)
    total.prefill_context += part.context
    total.curve.prefills += 1
    total.curve.pairs += work.pairs
    total.curve.prefill_read += work.prefill_read


cdef inline void add_traits_of(const Requests *requests, Step *step) noexcept nogil:
    """Add the features that parts of a step have because their requests have them."""
    cdef uint32_t k
    cdef Part *part
    for k in range(step.count):
        part = &step.parts[k]
        if not requests.traits[part.slot]:
            continue
        part.phase |= requests.traits[part.slot]
        if not part.phase & DECODE and part.context < requests.slots[part.slot].prefill_end:
            part.phase &= ~<uint32_t>IS_GUIDED  # The chunk samples nothing.
        add_traits(&step.work.features, part)


cdef inline int add_encoded(
    const Requests *requests, Step *step, uint32_t this_step, dict ids, dict encoded
) except -1:
    """Add the tokens that encoders compute for requests in a step; others are ignored."""
    cdef uint32_t place, number
    cdef Part *part
    for request_id, tokens in encoded.items():
        if tokens == 0 or request_id not in ids:
            continue
        number = ids[request_id]
        if requests.slots[number].last_step != this_step:
            continue
        # A slot has the lower half of its place.
        place = requests.slots[number].last_place
        while place < step.count and step.parts[place].slot != number:
            place += 0x10000
        if place >= step.count:
            continue
        part = &step.parts[place]
        part.phase |= <uint32_t>min(tokens, ENCODER_TOKENS_MAX) << ENCODER_SHIFT
        step.plain = min(step.plain, place)
        step.work.features.encoders += 1
        step.work.features.encoder_tokens += encoder_tokens_of(part)
    return 0


cdef inline list parts_of(const Requests *requests, const Step *step, str ended):
    """Return (id, tokens, position, prefill end) of each part."""
    cdef list parts = []
    cdef Slot *slot
    cdef uint32_t k
    for k in range(step.count):
        slot = &requests.slots[step.parts[k].slot]
        parts.append((
            f"{ended} {k}" if slot.key == NULL else <object>slot.key,
            step.parts[k].tokens,
            step.parts[k].context - step.parts[k].tokens,
            slot.prefill_end,
        ))
    return parts


cdef inline list features_of(const Requests *requests, const Step *step):
    """Return (place, has LoRA, is guided, encoder tokens) of each part with any of them."""
    cdef list found = []
    cdef uint8_t traits
    cdef uint32_t k
    for k in range(step.count):
        traits = requests.traits[step.parts[k].slot]
        if traits or has_features(&step.parts[k]):
            found.append((
                k,
                traits & HAS_LORA != 0,
                traits & IS_GUIDED != 0,
                encoder_tokens_of(&step.parts[k]),
            ))
    return found


cdef inline void finish_work(StepWork *total, uint32_t count, const Layers *layers) noexcept nogil:
    """Fill in what follows from the sums over all parts."""
    total.planes.sequences = total.curve.sequences = count
    total.curve.tokens = total.planes.tokens
    if layers.windowed == 0.0:
        total.curve.read = layers.whole * (total.planes.context - total.prefill_context)


cdef inline int reject(Requests *requests, const Step *step, dict rejected) except -1:
    """Note the drafts of a step that were rejected: their positions are computed again."""
    cdef uint32_t place
    cdef Slot *slot
    for request_id, tokens in rejected.items():
        rejected_tokens_of(request_id, tokens)
    for place in range(step.count):
        slot = &requests.slots[step.parts[place].slot]
        if slot.key != NULL and step.parts[place].tokens > 1:
            tokens = rejected.get(<object>slot.key, 0)
            tokens = min(tokens, step.parts[place].tokens - 1)
            requests.rests[step.parts[place].slot].rejected_now = tokens
            slot.position -= min(slot.position, <uint32_t>tokens)
    return 0


cdef inline Step *make_room(Ring *ring, uint32_t count) except NULL:
    """Return the next step with room for `count` parts; the step is not begun yet."""
    cdef uint32_t in_flight = <uint32_t>(ring.newest - ring.oldest + 1)
    if in_flight >= STEPS_MAX:
        raise ValueError(
            f"StepMeter.begin: expected less than {STEPS_MAX} steps in flight, got as many;"
            " settle or abandon them"
        )
    if in_flight == ring.size:
        grow_ring(ring)
    cdef Step *step = step_at(ring, ring.newest + 1)
    cdef uint32_t capacity = max(<uint32_t>64, 2 * count)
    step.count = step.plain = 0
    step.shared_ns = 0
    if step.capacity < count:
        step.parts = <Part *>resized(step.parts, capacity, sizeof(Part))
        step.capacity = capacity
    if ring.weights_capacity < count:
        ring.weights = <uint32_t *>resized(ring.weights, capacity, sizeof(uint32_t))
        ring.weights_capacity = capacity
    return step


cdef inline int grow_ring(Ring *ring) except -1:
    cdef uint32_t size = 2 * ring.size
    cdef Step *steps = <Step *>PyMem_Calloc(size, sizeof(Step))
    cdef int64_t number
    if steps == NULL:
        raise MemoryError
    for number in range(ring.oldest, ring.newest + 1):  # all of the old ring
        steps[number & (size - 1)] = step_at(ring, number)[0]
    PyMem_Free(ring.steps)
    ring.steps = steps
    ring.size = size
    return 0
