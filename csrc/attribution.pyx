# cython: boundscheck=False, wraparound=False, cdivision=True
"""The native attribution: divides the GPU time of a step among its requests, fast.

The Python twin `attribution/step_meter_py.py` explains what is computed and why, and has the full
docstrings. This file explains only how it is made fast. The step path (`begin`, `share`, `settle`,
`drained`) allocates nothing per request. It touches each request once in `begin` and once in
`settle`. Requests are in `requests.pxd`, steps in `steps.pxd`. `accrual.pxd` brings time to the
requests, with the arithmetic of `shapley.pxd`, `fit.pxd` and `shares.pxd`.

`begin` rarely looks up an id. vLLM passes the same str objects in the same order step after step.
So we guess that the next request is the one that came next in the step where the last request was
found. The guess is right if that slot's `key` is the very object in the dict, because slots own
their keys and an address means one id. If it is wrong, one dict lookup finds the step in which the
request was seen last, and guessing goes on from there.
"""

cimport cython
from cpython.dict cimport PyDict_GetItemWithError, PyDict_Next, PyDict_Size
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.long cimport PyLong_AsUnsignedLong
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.string cimport memset

from csrc.accrual cimport accrue, cut_in_flight, cut_off, drop, take_out
from csrc.checks cimport (
    WEIGHT_MAX, check_encoded, check_tokens, in_range, instant, tokens_of, tokens_out_of_range,
    whole_number,
)
from csrc.curve cimport Layers
from csrc.fit cimport CURVE_FORM, Fit, explained, observe
from csrc.game cimport StepWork
from csrc.requests cimport (
    HAS_LORA, IS_GUIDED, NOBODY, PREFILL, Requests, Rest, Slot, accrued_anything, accrued_of,
    adopt_key, count_blocks, free_requests, free_slot, hold_blocks, is_in_flight,
    make_slot_free, next_free_slot, release_blocks, reset, take_slot, unqueue,
)
from csrc.shapley cimport fill_polynomials
from csrc.priors cimport adopt_earlier, charge_errors_of, fitted, read_prior
from csrc.shares cimport Split, next_share, start_split
from csrc.steps cimport (
    Guess, Ring, Step, add_encoded, add_traits_of, enter, features_of, finish_work, free_ring,
    guess_after, guess_in, is_kept, is_right, look_further, make_room, parts_of, reject,
    start_ring, step_at,
)

from vllm_cost_meter.attribution.cost_model import CURVE, TWO_PLANES, Model
from vllm_cost_meter.attribution.priors import NOTHING_KNOWN
from vllm_cost_meter.records.accrued import Accrued

METHODS = ("shapley", "tokens", "equal")

fill_polynomials()

cdef int64_t NS_MAX = 2**63 - 1
MODELS_MAX = 64  # published models that are remembered
ENDED = "(ended)"


def split(object total_ns, object weights):
    """Divide a time into one share per weight, in ns, by cumulative rounding in their order."""
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


@cython.final  # Final classes have their methods called directly and inlined.
cdef class StepMeter:
    """Accrues GPU time and tokens to the open requests of one engine, step by step."""

    cdef readonly int64_t open_ns
    cdef readonly int64_t uncharged_ns
    cdef readonly int64_t fallbacks
    cdef readonly int64_t strangers
    cdef int method
    cdef Fit *fit
    cdef list published  # models, by version, the latest last
    cdef tuple in_use  # planes and coefficients
    cdef object served
    cdef dict ids  # of open requests: id -> slot number
    cdef Requests requests
    cdef Ring ring

    def __cinit__(self, object method, object prior=NOTHING_KNOWN, object block_size=0,
                  bint charges_recomputed=True):
        if method not in METHODS:
            raise ValueError(f"StepMeter: expected a method of {METHODS}, got {method!r}")
        self.requests.block_size = whole_number(block_size, WEIGHT_MAX, "StepMeter: block_size")
        self.requests.charges_recomputed = charges_recomputed
        self.method = METHODS.index(method)
        self.fit = <Fit *>PyMem_Calloc(1, sizeof(Fit))
        if self.fit == NULL:
            raise MemoryError
        read_prior(self.fit, prior)
        self.served = prior.served
        self.published = []
        self.remember_model()
        self.ids = {}
        start_ring(&self.ring)

    def __dealloc__(self):
        free_requests(&self.requests)
        free_ring(&self.ring)
        if self.fit != NULL:
            PyMem_Free(<void *>self.fit.model.served.captured)
        PyMem_Free(self.fit)

    @property
    def open_requests(self):
        """Return how many requests are open."""
        return len(self.ids)

    @property
    def steps_in_flight(self):
        """Return how many steps were begun and neither settled nor dropped."""
        return self.ring.newest - self.ring.oldest + 1

    def request_ids(self):
        """Return the ids of all open requests, in the order they were opened."""
        return list(self.ids)

    def is_open(self, object request_id):
        """Return whether a request is open."""
        return request_id in self.ids

    def step_parts(self, object step):
        """Return (id, tokens, position, prefill end) of a step in flight, in scheduler order."""
        return parts_of(&self.requests, step_at(&self.ring, self.number_in_flight(step)), ENDED)

    def step_features(self, object step):
        """Return (place, has LoRA, is guided, encoder tokens) of its parts that have any."""
        return features_of(&self.requests, step_at(&self.ring, self.number_in_flight(step)))

    # The life of a request

    def open(
        self, object request_id, object prompt_tokens, bint has_lora=False, bint is_guided=False
    ):
        """Start to accrue for a request. Does nothing if it is open already."""
        cdef int64_t prompt = whole_number(
            prompt_tokens, WEIGHT_MAX, "StepMeter.open: prompt_tokens"
        )
        if request_id not in self.ids:
            self.give_slot(
                request_id, prompt, (HAS_LORA if has_lora else 0) | (IS_GUIDED if is_guided else 0)
            )

    def position(self, object request_id, object computed_tokens, bint resumed):
        """Set the position in its context where a request's next step starts; before `begin`."""
        cdef int64_t tokens = whole_number(
            computed_tokens, WEIGHT_MAX, "StepMeter.position: computed_tokens"
        )
        cdef uint32_t number = self.find(request_id)
        if number == NOBODY:
            number = self.welcome_stranger(request_id)
        cdef Slot *slot = &self.requests.slots[number]
        cdef Rest *rest = &self.requests.rests[number]
        if resumed:
            slot.prefill_end = max(slot.prefill_end, slot.position)
            rest.recompute_end = max(rest.recompute_end, slot.position)
        slot.position = <uint32_t>tokens

    def release(self, object request_id, object now_ns):
        """Note that an open request was preempted: it holds no blocks from now on."""
        cdef int64_t until_ns = instant(now_ns)
        cdef uint32_t number = self.find(request_id)
        if number != NOBODY:
            release_blocks(&self.requests, number, until_ns)

    def leave(self, object request_id):
        """Note that a request was aborted. Return True if it can be closed now."""
        cdef uint32_t number = self.find_open(request_id)
        self.requests.rests[number].left = True
        if is_in_flight(&self.requests.slots[number]):
            cut_in_flight(&self.ring, number)
            return False
        unqueue(&self.requests, number)
        return True

    def drained(self):
        """Return the aborted requests that lost their last step in flight since the last call."""
        cdef uint32_t k
        cdef Slot *slot
        cdef list ended = []
        for k in range(self.requests.drained_count):
            slot = &self.requests.slots[self.requests.drained_slots[k]]
            self.requests.rests[self.requests.drained_slots[k]].queued = False
            if not is_in_flight(slot):
                ended.append(<object>slot.key)
        self.requests.drained_count = 0
        return ended

    def trim(self, object request_id, object tokens):
        """Count the last `tokens` that were computed for an open request as cut off."""
        cdef int64_t count = whole_number(tokens, WEIGHT_MAX, "StepMeter.trim: tokens")
        cut_off(&self.requests.rests[self.find_open(request_id)], count)

    def accrued(self, object request_id, object now_ns):
        """Return what a request accrued since the last `cut`."""
        cdef int64_t until_ns = instant(now_ns)
        return Accrued(*accrued_of(&self.requests, self.find_open(request_id), until_ns))

    def open_gpu_ns(self):
        """Return what each open request accrued since the last `cut`, in GPU-ns."""
        return {request_id: self.gpu_ns(self.find(request_id)) for request_id in self.ids}

    def close(self, object request_id, object now_ns):
        """End a request. Return what it accrued since the last `cut`."""
        accrued = self.accrued(request_id, now_ns)
        self.forget(request_id)
        return accrued

    def discard(self, object request_id):
        """Forget an open request that nobody will bill. Return the ns it had accrued."""
        return self.forget(request_id)

    def cut(self, object now_ns):
        """Return what the open requests accrued since the last cut, and set it to 0."""
        cdef int64_t until_ns = instant(now_ns)
        cdef Slot *slot
        cdef Rest *rest
        cdef uint32_t number
        cdef list pieces = []
        for request_id in self.ids:
            number = self.find(request_id)
            slot = &self.requests.slots[number]
            rest = &self.requests.rests[number]
            count_blocks(rest, until_ns)
            if accrued_anything(slot, rest):
                pieces.append((request_id, self.accrued(request_id, now_ns)))
                reset(&self.requests, number)
        self.open_ns = 0
        return pieces

    # The life of a step

    def begin(
        self, dict scheduled not None, object now_ns, list decoding=None, dict encoded=None
    ):
        """Record a step: the tokens scheduled for each request, in scheduler order."""
        cdef int64_t since_ns = instant(now_ns)
        cdef Py_ssize_t count = 0 if decoding is None else PyList_GET_SIZE(decoding)
        if encoded:
            check_encoded(encoded)
        cdef Step *step = make_room(&self.ring, <uint32_t>(count + PyDict_Size(scheduled)))
        cdef uint32_t full = self.fill_in(scheduled, decoding, count, step), k
        for k in range(full):
            hold_blocks(&self.requests, step.parts[self.ring.weights[k]].slot, since_ns)
        self.ring.newest += 1
        if encoded:
            add_encoded(&self.requests, step, <uint32_t>self.ring.newest, self.ids, encoded)
        return self.ring.newest

    def share(self, object step, object gpu_ns):
        """Divide a part of a step's time, in GPU-ns, among its requests; the step goes on."""
        cdef Step *parts = step_at(&self.ring, self.number_in_flight(step))
        cdef int64_t total_ns = self.time_to_share(gpu_ns)
        parts.shared_ns += total_ns
        return self.accrue(parts, total_ns, False)

    def settle(self, object step, object gpu_ns, dict rejected=None):
        """Divide the (rest of the) time of a step and end it. Returns and raises as `share`."""
        cdef int64_t number = self.number_in_flight(step)
        cdef int64_t total_ns = self.time_to_share(gpu_ns)
        cdef Step *ended = step_at(&self.ring, number)
        if rejected:
            reject(&self.requests, ended, rejected)
        self.drop_before(number)
        self.ring.oldest += 1
        cdef int64_t tail_ns = self.accrue(ended, total_ns, True)
        if observe(self.fit, &ended.work, <double>(ended.shared_ns + total_ns)):
            self.remember_model()
        return tail_ns

    def abandon(self):
        """Drop every step in flight, without time or tokens."""
        self.drop_before(self.ring.newest + 1)

    # The cost model

    def adopt(self, object planes, object coefficients, bint two_planes):
        """Continue from an earlier fit. Raises ValueError for anything else."""
        adopt_earlier(self.fit, planes, coefficients, two_planes)
        self.remember_model()

    @property
    def model_version(self):
        """Return the version of the model in use."""
        return self.fit.version

    def models(self, object since_version):
        """Return the models published after a version, as `model` does, oldest first."""
        return [model for model in self.published if model[0] > since_version]

    def model(self):
        """Return the model in use and its quality figures. Its planes and curve are published."""
        return Model(
            self.fit.version,
            CURVE if self.fit.form == CURVE_FORM else TWO_PLANES,
            *self.in_use,
            self.served,
            self.fit.steps,
            self.fit.errors[0],
            self.fit.errors[1],
            explained(self.fit),
            charge_errors_of(self.fit),
        )

    def fitted(self):
        """Return the planes and the curve as they are learnt now; `adopt` takes them."""
        return fitted(self.fit)

    cdef int remember_model(self) except -1:
        self.in_use = self.fitted()
        self.published = [*self.published[1 - MODELS_MAX :], self.model()]

    # Steps: leaves of the step path

    cdef int64_t number_in_flight(self, object step) except -1:
        cdef int64_t number = in_range(step, NS_MAX)
        if self.ring.oldest <= number <= self.ring.newest:
            return number
        raise ValueError(f"StepMeter: expected a step in flight, got {step!r}")

    cdef int64_t time_to_share(self, object gpu_ns) except -1:
        return whole_number(gpu_ns, NS_MAX - self.open_ns, "StepMeter: gpu_ns")

    cdef uint32_t fill_in(
        self, dict scheduled, list decoding, Py_ssize_t count, Step *step
    ) except? 0xFFFFFFFF:
        """Enter all scheduled requests into a step. Nothing is changed if this raises.

        Return how many of them need another block. Their places stand in the ring's `weights`.
        """
        cdef PyObject *key
        cdef PyObject *value
        cdef PyObject *last_value = NULL  # mostly the same small int as before
        cdef Py_ssize_t at = 0, k
        cdef uint32_t place = 0, full = 0, this_step = <uint32_t>(self.ring.newest + 1), number
        cdef Guess guess = guess_in(step_at(&self.ring, self.ring.newest), 0), found
        cdef Slot *slots = self.requests.slots
        cdef int64_t tokens = 0
        cdef bint prefills = False
        cdef const Layers *layers = &self.fit.model.served.layers
        cdef StepWork total
        memset(&total, 0, sizeof(StepWork))
        try:
            for k in range(count):
                key = <PyObject *>PyList_GET_ITEM(decoding, k)
                if is_right(guess, slots, key):
                    number = guess.part.slot
                    guess.part += 1
                else:
                    number = self.find_next(&found, guess, scheduled, key)
                    guess = found
                    slots = self.requests.slots
                self.ring.weights[full] = place
                full += enter(&slots[number], number, 1, this_step, step, place, &total, layers)
                prefills |= step.parts[place].phase == PREFILL
                place += 1
            step.plain = 0 if prefills else place
            while PyDict_Next(scheduled, &at, &key, &value):
                if value != last_value:
                    tokens = tokens_of(<object>key, <object>value)
                    last_value = value
                if is_right(guess, slots, key):
                    number = guess.part.slot
                    guess.part += 1
                else:
                    number = self.find_next(&found, guess, scheduled, key)
                    guess = found
                    slots = self.requests.slots
                self.ring.weights[full] = place
                full += enter(&slots[number], number, tokens, this_step, step, place, &total, layers)
                place += 1
            if total.planes.tokens > WEIGHT_MAX:
                raise tokens_out_of_range(total.planes.tokens)
        except:
            take_out(&self.requests, step, place)
            raise
        step.count = place
        finish_work(&total, place, layers)
        step.work = total
        if self.requests.with_traits:
            add_traits_of(&self.requests, step)
        return full

    cdef uint32_t find_next(
        self, Guess *after, Guess guess, dict scheduled, PyObject *key
    ) except? 0xFFFFFFFF:
        """Return the slot of a request that was guessed wrong, and the guess for the next one."""
        cdef uint32_t number
        after[0] = look_further(guess, self.requests.slots, key)
        if after.part < after.end:
            number = after.part.slot
            after.part += 1
            return number
        number = self.look_up(scheduled, key)
        after[0] = guess  # A new request is in no step yet, so the guess stays.
        if is_kept(&self.ring, &self.requests.slots[number]):
            after[0] = guess_after(&self.ring, &self.requests.slots[number])
        return number

    cdef uint32_t look_up(self, dict scheduled, PyObject *key) except? 0:
        """Return the slot of a scheduled request that was not where it was expected."""
        cdef uint32_t number = self.find(<object>key)
        if number == NOBODY:
            check_tokens(scheduled)  # Check before anything is changed.
            return self.welcome_stranger(<object>key)
        adopt_key(&self.requests, number, key)
        return number

    cdef int64_t accrue(self, const Step *step, int64_t total_ns, bint ends) noexcept nogil:
        cdef int64_t tail_ns = accrue(
            &self.requests, step, self.fit, self.method, self.ring.weights, total_ns, ends,
            &self.fallbacks,
        )
        self.open_ns += total_ns - tail_ns - self.requests.uncharged_ns
        self.uncharged_ns += self.requests.uncharged_ns
        return tail_ns

    cdef void drop_before(self, int64_t number) noexcept nogil:
        """End all older steps in flight, without time or tokens."""
        while self.ring.oldest < number:
            drop(&self.requests, step_at(&self.ring, self.ring.oldest))
            self.ring.oldest += 1

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
        cdef uint32_t number = self.give_slot(request_id, 0, 0)
        self.strangers += 1
        return number

    cdef uint32_t give_slot(
        self, object request_id, int64_t prompt_tokens, uint8_t traits
    ) except? 0:
        make_slot_free(&self.requests)
        cdef uint32_t number = next_free_slot(&self.requests)
        self.ids[request_id] = number
        take_slot(&self.requests, request_id, <uint32_t>prompt_tokens, traits)
        return number

    cdef int64_t gpu_ns(self, uint32_t number) noexcept:
        """Return what a request accrued since the last `cut`."""
        return self.requests.slots[number].decode_ns + self.requests.rests[number].prefill_ns

    cdef int64_t forget(self, object request_id) except -1:
        """Close a request. Return the ns it had accrued."""
        cdef uint32_t number = self.find_open(request_id)
        cdef Slot *slot = &self.requests.slots[number]
        cdef PyObject *key = slot.key
        cdef int64_t unbilled_ns = self.gpu_ns(number)
        del self.ids[request_id]
        self.requests.with_traits -= self.requests.traits[number] != 0
        unqueue(&self.requests, number)
        self.open_ns -= unbilled_ns
        slot.key = NULL
        if not is_in_flight(slot):
            free_slot(&self.requests, number)
        Py_DECREF(<object>key)
        return unbilled_ns
