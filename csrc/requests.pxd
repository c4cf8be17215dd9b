"""The requests of one engine: an array of slots that grows by doubling.

Free slots are kept on a stack, and a slot is free only when its request is closed *and* has no
step in flight. A closed one that still has is a zombie: `key` is NULL, and its shares are tail.

A request holds the blocks of the KV cache that its context fills, until they are released. Of the
usual case, that the last one has room, `block_end` tells by one comparison in a step.
"""

from cpython.mem cimport PyMem_Free
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport INT64_MAX, UINT32_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from csrc.memory cimport resized
from csrc.shares cimport upper_product

cdef enum:
    NOBODY = 0xFFFFFFFF  # a slot number: not open

cdef enum:  # phases
    PREFILL = 0
    DECODE = 1
    CUT = 2  # added to either: the request was aborted meanwhile
    HAS_LORA = 4  # traits of a request, added where its part of a step has them
    IS_GUIDED = 8
    TRAITS = 12
    TRAITS_SHIFT = 2
    ENCODER_SHIFT = 8  # above are the tokens that an encoder computes

cdef struct Slot:  # what a step of decodes touches of one request: 64 bytes, as a line of a cache
    PyObject *key  # its id, owned; NULL unless it is open
    uint32_t position  # of the next token in its context
    uint32_t prefill_end
    uint32_t block_end  # the context that its blocks have room for
    uint32_t last_step  # lower half of the number of the step it entered last, and its place there
    uint16_t last_place  # its lower half
    uint16_t in_flight  # steps that it entered and that have neither ended nor were dropped
    uint32_t ended  # steps, dropped or not
    uint32_t batch  # since the last cut, as all that follows: the sum of requests in its steps
    uint32_t decode_tokens
    int64_t decode_ns
    uint64_t step_ns  # of its steps in all
    double marginal_ns

cdef struct Rest:  # what is rarely touched
    uint32_t dropped
    uint32_t steps_before  # the last cut
    uint32_t recompute_end  # the farthest position reached before a preemption
    uint32_t rejected_now  # tokens, in the step that is settled now
    uint32_t prefill_tokens
    uint32_t recomputed_tokens
    uint32_t rejected_tokens
    uint32_t cut_tokens
    uint32_t kept_tokens  # of its last ended step of several: not rejected, nor cut off so far
    int64_t kept_ns
    int64_t prefill_ns
    int64_t recomputed_ns
    int64_t rejected_ns
    int64_t cut_ns
    uint32_t blocks  # that it holds, since
    int64_t blocks_since_ns
    int64_t kv_block_ns  # until then
    uint8_t left
    uint8_t queued  # in the queue of drained requests

cdef struct Requests:
    Slot *slots
    Rest *rests
    uint8_t *traits  # of each request
    uint32_t with_traits  # open ones that have any
    uint32_t *free_slots  # a stack
    uint32_t *drained_slots  # a queue
    uint32_t block_size  # in tokens; 0: blocks are not counted
    bint charges_recomputed
    int64_t uncharged_ns  # of the time that is shared out now: recomputed and not charged
    uint32_t count
    uint32_t free_count
    uint32_t drained_count


cdef inline void free_requests(Requests *requests) noexcept:
    cdef uint32_t k
    for k in range(requests.count):
        if requests.slots[k].key != NULL:
            Py_DECREF(<object>requests.slots[k].key)
    PyMem_Free(requests.slots)
    PyMem_Free(requests.rests)
    PyMem_Free(requests.traits)
    PyMem_Free(requests.free_slots)
    PyMem_Free(requests.drained_slots)


cdef inline bint is_in_flight(const Slot *slot) noexcept nogil:
    return slot.in_flight != 0


cdef inline int make_slot_free(Requests *requests) except -1:
    """Make sure that there is a free slot."""
    cdef uint32_t count = max(<uint32_t>64, 2 * requests.count), number
    if requests.free_count:
        return 0
    requests.slots = <Slot *>resized(requests.slots, count, sizeof(Slot))
    requests.rests = <Rest *>resized(requests.rests, count, sizeof(Rest))
    requests.traits = <uint8_t *>resized(requests.traits, count, sizeof(uint8_t))
    requests.free_slots = <uint32_t *>resized(requests.free_slots, count, sizeof(uint32_t))
    requests.drained_slots = <uint32_t *>resized(requests.drained_slots, count, sizeof(uint32_t))
    for number in range(count, requests.count, -1):  # the lowest on top
        requests.slots[number - 1].key = NULL
        free_slot(requests, number - 1)
    requests.count = count
    return 0


cdef inline uint32_t next_free_slot(const Requests *requests) noexcept:
    return requests.free_slots[requests.free_count - 1]


cdef inline void take_slot(
    Requests *requests, object request_id, uint32_t prefill_end, uint8_t traits
):
    """Give the next free slot to a request."""
    cdef uint32_t number = next_free_slot(requests)
    cdef Slot *slot = &requests.slots[number]
    requests.free_count -= 1
    memset(slot, 0, sizeof(Slot))
    memset(&requests.rests[number], 0, sizeof(Rest))
    Py_INCREF(request_id)
    slot.key = <PyObject *>request_id
    requests.traits[number] = traits
    requests.with_traits += traits != 0
    slot.prefill_end = prefill_end
    slot.block_end = 0 if requests.block_size else UINT32_MAX


cdef inline void hold_blocks(Requests *requests, uint32_t number, int64_t now_ns) noexcept nogil:
    """Hold as many blocks as the context of a request fills."""
    cdef Slot *slot = &requests.slots[number]
    cdef Rest *rest = &requests.rests[number]
    count_blocks(rest, now_ns)
    rest.blocks = (slot.position - 1) // requests.block_size + 1
    slot.block_end = rest.blocks * requests.block_size


cdef inline void release_blocks(Requests *requests, uint32_t number, int64_t now_ns) noexcept nogil:
    if requests.block_size:
        count_blocks(&requests.rests[number], now_ns)
        requests.rests[number].blocks = requests.slots[number].block_end = 0


cdef inline void count_blocks(Rest *rest, int64_t now_ns) noexcept nogil:
    """Add the time that the blocks were held since the last count, up to the largest number."""
    cdef uint64_t passed_ns = max(now_ns - rest.blocks_since_ns, <int64_t>0)
    cdef uint64_t block_ns = passed_ns * rest.blocks
    rest.blocks_since_ns = now_ns
    if upper_product(passed_ns, rest.blocks) or block_ns > <uint64_t>INT64_MAX - rest.kv_block_ns:
        rest.kv_block_ns = INT64_MAX
    else:
        rest.kv_block_ns += block_ns


cdef inline void free_slot(Requests *requests, uint32_t number) noexcept nogil:
    requests.free_slots[requests.free_count] = number
    requests.free_count += 1


cdef inline void adopt_key(Requests *requests, uint32_t number, PyObject *key):
    """Replace the key by the str object that now stands for the request's id."""
    cdef PyObject *old = requests.slots[number].key
    Py_INCREF(<object>key)
    requests.slots[number].key = key
    Py_DECREF(<object>old)


cdef inline void end_of_last_step(Requests *requests, uint32_t number) noexcept nogil:
    """A request has no step in flight any more."""
    cdef Rest *rest = &requests.rests[number]
    if requests.slots[number].key == NULL:
        free_slot(requests, number)
    elif rest.left and not rest.queued:
        rest.queued = True
        requests.drained_slots[requests.drained_count] = number
        requests.drained_count += 1


cdef inline void unqueue(Requests *requests, uint32_t number) noexcept nogil:
    cdef uint32_t k, kept = 0
    if not requests.rests[number].queued:
        return
    for k in range(requests.drained_count):
        if requests.drained_slots[k] != number:
            requests.drained_slots[kept] = requests.drained_slots[k]
            kept += 1
    requests.drained_count = kept
    requests.rests[number].queued = False


cdef inline tuple accrued_of(Requests *requests, uint32_t number, int64_t now_ns):
    """Return what a request accrued since the last cut, in the order of `Accrued`."""
    cdef Slot *slot = &requests.slots[number]
    cdef Rest *rest = &requests.rests[number]
    count_blocks(rest, now_ns)
    return (
        rest.prefill_ns,
        slot.decode_ns,
        rest.prefill_tokens,
        slot.decode_tokens,
        <int64_t>slot.marginal_ns,
        rest.recomputed_ns,
        rest.recomputed_tokens,
        rest.rejected_ns,
        rest.rejected_tokens,
        rest.cut_ns,
        rest.cut_tokens,
        rest.kv_block_ns,
        <int64_t>slot.step_ns,
        slot.ended - rest.dropped - rest.steps_before,
        slot.batch,
    )


cdef inline bint accrued_anything(const Slot *slot, const Rest *rest) noexcept nogil:
    return (
        slot.decode_ns | rest.prefill_ns | rest.recomputed_ns | rest.kv_block_ns
        | slot.decode_tokens | rest.prefill_tokens
    ) != 0


cdef inline void reset(Requests *requests, uint32_t number) noexcept nogil:
    """Set what a request accrued to zero."""
    cdef Slot *slot = &requests.slots[number]
    cdef Rest *rest = &requests.rests[number]
    slot.decode_ns = rest.prefill_ns = 0
    slot.decode_tokens = rest.prefill_tokens = slot.batch = 0
    slot.marginal_ns = 0.0
    slot.step_ns = 0
    rest.steps_before = slot.ended - rest.dropped
    rest.recomputed_ns = rest.rejected_ns = rest.cut_ns = rest.kv_block_ns = 0
    rest.recomputed_tokens = rest.rejected_tokens = rest.cut_tokens = 0
