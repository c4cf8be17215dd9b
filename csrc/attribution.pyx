# cython: boundscheck=False, wraparound=False, cdivision=True
"""The native attribution. What it computes, and why, stands in its twin, `_attribution_py.py`.

So do the full docstrings. Here is only how it is made fast: the step path (`begin`, `share`,
`settle`, `drained`) allocates nothing per request, and touches each request once in `begin` and
once in `settle`. The arithmetic is in `shares.pxd`.

- A request is a `Slot` in one array that grows by doubling. Free slots are kept on a stack, and a
  slot is free only when its request is closed *and* has no step in flight. A closed one that still
  has is a zombie: `key` is NULL, and its shares are tail.
- A step is an array of `Part`s in a ring. Steps in flight are consecutive, `oldest` to `newest`;
  their arrays are reused, and the ring doubles when all of it is in flight.
- `begin` rarely looks an id up. vLLM passes the same str objects in the same order step after
  step, so the guess is: the request that came next in the step where the last one was found. It is
  right if that slot's `key` is the very object in the dict (slots own their keys, so an address
  means one id). If not, one dict lookup says where the request was seen last, and guessing goes on
  from there: a departure, an arrival, a switch between a pipeline's batches costs one lookup.
"""

from cpython.dict cimport PyDict_GetItemWithError, PyDict_Next, PyDict_Size
from cpython.long cimport PyLong_AsUnsignedLong, PyLong_Check
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Realloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from csrc.checks cimport WEIGHT_MAX, out_of_range, tokens_of, whole_number
from csrc.shares cimport Part, Split, Weigh, next_share, start_split, weigh_equal, weigh_tokens

METHODS = ("tokens", "equal")

cdef int64_t NS_MAX = 2**63 - 1

cdef enum:
    STEPS_MAX = 1024
    NOBODY = 0xFFFFFFFF  # a slot number: not open

cdef enum:  # phases
    PREFILL = 0
    DECODE = 1

cdef struct Slot:  # one request
    PyObject *key  # its id, owned; NULL unless it is open
    int64_t position
    int64_t prefill_end
    int64_t ns[2]  # by phase, since the last cut; so are the tokens
    int64_t tokens[2]
    int64_t steps
    int64_t last_step  # the step it entered last, and its place in there
    uint32_t last_place
    uint32_t in_flight
    uint8_t left
    uint8_t queued  # in the queue of drained requests

cdef struct Step:
    Part *parts
    uint32_t count
    uint32_t capacity


cdef Weigh weigh_of(object method) except NULL:
    if method == "tokens":
        return weigh_tokens
    if method == "equal":
        return weigh_equal
    raise ValueError(f"StepMeter: expected a method of {METHODS}, got {method!r}")


def split(object total_ns, object weights):
    """Return the share of each weight in a time, in ns, by cumulative rounding in their order."""
    cdef int64_t total = whole_number(total_ns, NS_MAX, "split: total_ns")
    cdef list values = list(weights)
    for weight in values:
        whole_number(weight, WEIGHT_MAX, "split: a weight")
    cdef int64_t whole = whole_number(sum(values), WEIGHT_MAX, "split: the sum of the weights")
    if total and not values:
        raise ValueError(f"split: expected at least one weight for {total_ns} ns, got none")
    if whole == 0:
        values = [1] * len(values)
        whole = max(1, len(values))
    cdef Split state = start_split(total, whole)
    return [next_share(&state, weight) for weight in values]


cdef class StepMeter:
    """Accrues GPU time and tokens to the open requests of one engine, step by step."""

    cdef readonly int64_t open_ns
    cdef readonly int64_t fallbacks
    cdef readonly int64_t strangers
    cdef Weigh weigh
    cdef dict ids  # of open requests: id -> slot number
    cdef Slot *slots
    cdef uint32_t *free_slots  # a stack
    cdef uint32_t *drained_slots  # a queue
    cdef uint32_t slot_count, free_count, drained_count
    cdef Step *ring  # step n is at n % ring_size
    cdef uint32_t ring_size  # a power of 2
    cdef int64_t oldest, newest  # steps in flight; none if oldest > newest
    cdef uint32_t *weights  # of one step at a time
    cdef uint32_t weights_capacity

    def __cinit__(self, object method):
        self.weigh = weigh_of(method)
        self.ids = {}
        self.oldest = 1
        self.ring = <Step *>PyMem_Calloc(4, sizeof(Step))
        if self.ring == NULL:
            raise MemoryError
        self.ring_size = 4

    def __dealloc__(self):
        cdef uint32_t k
        for k in range(self.slot_count):
            if self.slots[k].key != NULL:
                Py_DECREF(<object>self.slots[k].key)
        for k in range(self.ring_size):
            PyMem_Free(self.ring[k].parts)
        PyMem_Free(self.ring)
        PyMem_Free(self.slots)
        PyMem_Free(self.free_slots)
        PyMem_Free(self.drained_slots)
        PyMem_Free(self.weights)

    @property
    def open_requests(self):
        """Return how many requests are open."""
        return len(self.ids)

    @property
    def steps_in_flight(self):
        """Return how many steps were begun and neither settled nor dropped."""
        return self.newest - self.oldest + 1

    def request_ids(self):
        """Return the ids of all open requests, in the order they were opened."""
        return list(self.ids)

    def step_requests(self, object step):
        """Return how many requests a step in flight holds. Raises ValueError if it is not."""
        return self.step_at(self.number_in_flight(step)).count

    # The life of a request

    def open(self, object request_id, object prompt_tokens):
        """Start to accrue for a request. Does nothing if it is open already."""
        cdef int64_t prompt = whole_number(
            prompt_tokens, WEIGHT_MAX, "StepMeter.open: prompt_tokens"
        )
        if request_id not in self.ids:
            self.take_slot(request_id, prompt)

    def position(self, object request_id, object computed_tokens, bint resumed):
        """Say where in its context the next step of a request starts, before `begin`."""
        cdef int64_t tokens = whole_number(
            computed_tokens, WEIGHT_MAX, "StepMeter.position: computed_tokens"
        )
        cdef uint32_t number = self.find(request_id)
        if number == NOBODY:
            number = self.welcome_stranger(request_id)
        cdef Slot *slot = &self.slots[number]
        if resumed:
            slot.prefill_end = max(slot.prefill_end, slot.position)
        slot.position = tokens

    def leave(self, object request_id):
        """Note that a request was aborted. Return True if it can be closed now."""
        cdef uint32_t number = self.find_open(request_id)
        self.slots[number].left = True
        if self.slots[number].in_flight:
            return False
        self.unqueue(number)
        return True

    def drained(self):
        """Return the requests that left and whose last step in flight ended since last asked."""
        cdef uint32_t k
        cdef Slot *slot
        cdef list ended = []
        for k in range(self.drained_count):
            slot = &self.slots[self.drained_slots[k]]
            slot.queued = False
            if slot.in_flight == 0:
                ended.append(<object>slot.key)
        self.drained_count = 0
        return ended

    def accrued(self, object request_id):
        """Return what `close` would, and leave the request open."""
        cdef Slot *slot = &self.slots[self.find_open(request_id)]
        return (
            slot.ns[PREFILL], slot.ns[DECODE], slot.tokens[PREFILL], slot.tokens[DECODE], slot.steps
        )

    def close(self, object request_id):
        """End a request. Return (prefill ns, decode ns, prefill tokens, decode tokens, steps)."""
        totals = self.accrued(request_id)
        self.forget(request_id)
        return totals

    def discard(self, object request_id):
        """Forget an open request that nobody will bill. Return the ns it had accrued."""
        return self.forget(request_id)

    def cut(self):
        """Take what all open requests accrued since the last cut, and set it to 0."""
        cdef Slot *slot
        cdef list pieces = []
        for request_id in self.ids:
            slot = &self.slots[self.find(request_id)]
            if slot.ns[PREFILL] | slot.ns[DECODE] | slot.tokens[PREFILL] | slot.tokens[DECODE]:
                pieces.append((request_id, *self.accrued(request_id)[:4]))
                slot.ns[PREFILL] = slot.ns[DECODE] = 0
                slot.tokens[PREFILL] = slot.tokens[DECODE] = 0
        self.open_ns = 0
        return pieces

    # The life of a step

    def begin(self, dict scheduled not None):
        """Record a step: the tokens scheduled for each request, in scheduler order."""
        cdef Step *step = self.make_room(<uint32_t>PyDict_Size(scheduled))
        if self.read_parts(scheduled, step):
            self.welcome_strangers(scheduled, step)
        self.newest += 1
        self.enter(step)
        return self.newest

    def share(self, object step, object gpu_ns):
        """Divide a part of a step's time, in GPU-ns, among its requests; the step goes on."""
        cdef Step *parts = self.step_at(self.number_in_flight(step))
        return self.accrue(parts, self.time_to_share(gpu_ns), False)

    def settle(self, object step, object gpu_ns):
        """Divide the (rest of the) time of a step and end it. Returns and raises as `share`."""
        cdef int64_t number = self.number_in_flight(step)
        cdef int64_t total_ns = self.time_to_share(gpu_ns)
        self.drop_before(number)
        self.oldest += 1
        return self.accrue(self.step_at(number), total_ns, True)

    def abandon(self):
        """Drop every step in flight: no time, no tokens."""
        self.drop_before(self.newest + 1)

    # Steps: leaves of the step path

    cdef inline Step *step_at(self, int64_t number) noexcept nogil:
        return &self.ring[number & (self.ring_size - 1)]

    cdef int64_t number_in_flight(self, object step) except -1:
        if PyLong_Check(step) and self.oldest <= step <= self.newest:
            return step
        raise ValueError(f"StepMeter: expected a step in flight, got {step!r}")

    cdef int64_t time_to_share(self, object gpu_ns) except -1:
        return whole_number(gpu_ns, NS_MAX - self.open_ns, "StepMeter: gpu_ns")

    cdef int read_parts(self, dict scheduled, Step *step) except -1:
        """Fill in slot and tokens of each request. Return how many are not open; change nothing."""
        cdef PyObject *key
        cdef PyObject *value
        cdef PyObject *last_value = NULL  # nearly always the same small int, once per decode
        cdef Py_ssize_t at = 0
        cdef uint32_t place = 0, guess_place = 0, number
        cdef Step *guess = self.step_at(self.newest)
        cdef int64_t tokens = 0, total = 0
        cdef int strangers = 0
        while PyDict_Next(scheduled, &at, &key, &value):
            if value != last_value:
                tokens = tokens_of(<object>key, <object>value)
                last_value = value
            total += tokens
            number = guess.parts[guess_place].slot if guess_place < guess.count else NOBODY
            if number == NOBODY or self.slots[number].key != key:
                number = self.find(<object>key)
                if number == NOBODY:
                    strangers += 1
                else:
                    self.adopt_key(number, key)
                    if self.is_kept(self.slots[number].last_step):
                        guess = self.step_at(self.slots[number].last_step)
                        guess_place = self.slots[number].last_place + 1
            else:
                guess_place += 1
            step.parts[place].slot = number
            step.parts[place].tokens = <uint32_t>tokens
            place += 1
        if total > WEIGHT_MAX:
            raise out_of_range(total, WEIGHT_MAX, "StepMeter.begin: tokens of all requests")
        step.count = place
        return strangers

    cdef inline bint is_kept(self, int64_t number) noexcept nogil:
        """Tell if the parts of a step, in flight or ended, are still in the ring (0: no step)."""
        return number > 0 and self.newest + 1 - number < self.ring_size

    cdef int welcome_strangers(self, dict scheduled, Step *step) except -1:
        cdef uint32_t place = 0
        for request_id in scheduled:
            if step.parts[place].slot == NOBODY:
                step.parts[place].slot = self.welcome_stranger(request_id)
            place += 1
        return 0

    cdef void enter(self, Step *step) noexcept nogil:
        cdef Slot *slots = self.slots
        cdef int64_t number = self.newest
        cdef Slot *slot
        cdef Part *part
        cdef uint32_t place
        for place in range(step.count):
            part = &step.parts[place]
            slot = &slots[part.slot]
            part.phase = PREFILL if slot.position < slot.prefill_end else DECODE
            slot.position += part.tokens
            slot.in_flight += 1
            slot.last_step = number
            slot.last_place = place

    cdef int64_t accrue(self, Step *step, int64_t total_ns, bint ends) noexcept nogil:
        """Share out a step's time, and end it if told so. Return the tail."""
        cdef uint32_t *weights = self.weights
        cdef uint64_t whole = self.weigh(step.parts, step.count, weights)
        if step.count == 0:
            return total_ns
        if whole == 0:
            whole = weigh_equal(step.parts, step.count, weights)
            self.fallbacks += 1
        cdef Split state = start_split(total_ns, whole)
        cdef Slot *slots = self.slots
        cdef Slot *slot
        cdef Part *part
        cdef int64_t tail_ns = 0, share_ns
        cdef uint32_t place
        for place in range(step.count):
            part = &step.parts[place]
            slot = &slots[part.slot]
            share_ns = <int64_t>next_share(&state, weights[place])
            if slot.key == NULL:
                tail_ns += share_ns
            else:
                slot.ns[part.phase] += share_ns
            if ends:
                slot.tokens[part.phase] += part.tokens
                slot.steps += 1
                self.end_part(part.slot)
        self.open_ns += total_ns - tail_ns
        return tail_ns

    cdef void drop_before(self, int64_t number) noexcept nogil:
        """End all older steps in flight, without time or tokens."""
        cdef Step *step
        cdef uint32_t place
        while self.oldest < number:
            step = self.step_at(self.oldest)
            for place in range(step.count):
                self.end_part(step.parts[place].slot)
            self.oldest += 1

    cdef inline void end_part(self, uint32_t number) noexcept nogil:
        cdef Slot *slot = &self.slots[number]
        slot.in_flight -= 1
        if slot.in_flight == 0:
            if slot.key == NULL:
                self.free_slot(number)
            elif slot.left and not slot.queued:
                slot.queued = True
                self.drained_slots[self.drained_count] = number
                self.drained_count += 1

    cdef Step *make_room(self, uint32_t count) except NULL:
        """Return the next step, with room for so many parts. Nothing is begun yet."""
        cdef uint32_t in_flight = <uint32_t>(self.newest - self.oldest + 1)
        if in_flight >= STEPS_MAX:
            raise ValueError(
                f"StepMeter.begin: expected less than {STEPS_MAX} steps in flight, got as many;"
                " settle or abandon them"
            )
        if in_flight == self.ring_size:
            self.grow_ring()
        cdef Step *step = self.step_at(self.newest + 1)
        cdef uint32_t capacity = max(64, 2 * count)
        step.count = 0
        if step.capacity < count:
            step.parts = <Part *>resized(step.parts, capacity, sizeof(Part))
            step.capacity = capacity
        if self.weights_capacity < count:
            self.weights = <uint32_t *>resized(self.weights, capacity, sizeof(uint32_t))
            self.weights_capacity = capacity
        return step

    cdef int grow_ring(self) except -1:
        cdef uint32_t size = 2 * self.ring_size
        cdef Step *ring = <Step *>PyMem_Calloc(size, sizeof(Step))
        cdef int64_t number
        if ring == NULL:
            raise MemoryError
        for number in range(self.oldest, self.newest + 1):  # all of the old ring
            ring[number & (size - 1)] = self.step_at(number)[0]
        PyMem_Free(self.ring)
        self.ring = ring
        self.ring_size = size
        return 0

    # Slots

    cdef uint32_t find(self, object request_id) except? 0:
        """Return the slot number of an open request, or NOBODY."""
        cdef PyObject *number = PyDict_GetItemWithError(self.ids, request_id)
        return NOBODY if number == NULL else <uint32_t>PyLong_AsUnsignedLong(<object>number)

    cdef uint32_t find_open(self, object request_id) except? 0:
        cdef uint32_t number = self.find(request_id)
        if number == NOBODY:
            raise ValueError(f"StepMeter: expected an open request, got {request_id!r}")
        return number

    cdef uint32_t welcome_stranger(self, object request_id) except? 0:
        cdef uint32_t number = self.take_slot(request_id, 0)
        self.strangers += 1
        return number

    cdef uint32_t take_slot(self, object request_id, int64_t prompt_tokens) except? 0:
        if self.free_count == 0:
            self.grow_slots()
        cdef uint32_t number = self.free_slots[self.free_count - 1]
        self.ids[request_id] = number
        self.free_count -= 1
        cdef Slot *slot = &self.slots[number]
        memset(slot, 0, sizeof(Slot))
        Py_INCREF(request_id)
        slot.key = <PyObject *>request_id
        slot.prefill_end = prompt_tokens
        return number

    cdef void adopt_key(self, uint32_t number, PyObject *key):
        """Know a request by the object that stands for its id from now on."""
        cdef PyObject *old = self.slots[number].key
        Py_INCREF(<object>key)
        self.slots[number].key = key
        Py_DECREF(<object>old)

    cdef int64_t forget(self, object request_id) except -1:
        """Close a request. Return the ns it had accrued."""
        cdef uint32_t number = self.find_open(request_id)
        cdef Slot *slot = &self.slots[number]
        cdef PyObject *key = slot.key
        cdef int64_t unbilled_ns = slot.ns[PREFILL] + slot.ns[DECODE]
        del self.ids[request_id]
        self.unqueue(number)
        self.open_ns -= unbilled_ns
        slot.key = NULL
        if slot.in_flight == 0:
            self.free_slot(number)
        Py_DECREF(<object>key)
        return unbilled_ns

    cdef void free_slot(self, uint32_t number) noexcept nogil:
        self.free_slots[self.free_count] = number
        self.free_count += 1

    cdef void unqueue(self, uint32_t number) noexcept nogil:
        cdef uint32_t k, kept = 0
        if not self.slots[number].queued:
            return
        for k in range(self.drained_count):
            if self.drained_slots[k] != number:
                self.drained_slots[kept] = self.drained_slots[k]
                kept += 1
        self.drained_count = kept
        self.slots[number].queued = False

    cdef int grow_slots(self) except -1:
        cdef uint32_t count = max(64, 2 * self.slot_count), number
        self.slots = <Slot *>resized(self.slots, count, sizeof(Slot))
        self.free_slots = <uint32_t *>resized(self.free_slots, count, sizeof(uint32_t))
        self.drained_slots = <uint32_t *>resized(self.drained_slots, count, sizeof(uint32_t))
        for number in range(count, self.slot_count, -1):  # the lowest on top
            self.slots[number - 1].key = NULL
            self.free_slot(number - 1)
        self.slot_count = count
        return 0


cdef void *resized(void *memory, size_t count, size_t size) except NULL:
    """Return the memory, moved if need be, with room for so many things."""
    cdef void *room = PyMem_Realloc(memory, count * size)
    if room == NULL:
        raise MemoryError
    return room
