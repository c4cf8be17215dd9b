"""How the GPU time of a step is divided among its requests: the theory, in plain Python.

This is the twin of `csrc/attribution.pyx`. It states what is right and is the judge in the tests;
production runs the native one. Both have the same names and agree bit for bit, messages included,
so a change to one lands in the other.

1. Time is an integer of GPU-nanoseconds. A step of D ns with integer weights w_1 .. w_n (in
   scheduler order, W their sum, S_k the sum of the first k) gives request k

       share_k = floor(D * S_k / W) - floor(D * S_{k-1} / W)

   so the shares add up to D exactly, each is within 1 ns of D * w_k / W whatever the order, and
   equal weights get shares at most 1 ns apart. If all weights are 0, all count as 1.
2. A method is how requests are weighed, nothing else: one function per method in `_WEIGH`. "tokens"
   weighs a request by the tokens the step computed for it, "equal" by 1. Weights add up to less
   than 2**31, which lets the native code do exact division in 64 bits; a method that thinks in
   floats scales and rounds to that.
3. A request's part of a step is prefill while its position in its context, where the step starts,
   lies before its prefill end; otherwise decode. The end is its prompt's length, or, once it was
   preempted, the position it had reached if that is further: recomputing is prefill too.
   Positions count scheduled tokens, so drafts that were rejected are in them.
4. Steps overlap (async scheduling, pipelines): each is begun, perhaps shared in parts, and settled;
   results come in order, so settling a step drops older ones that never got theirs.
5. A request is open from `open` to `close`. Steps in flight at its close still use the GPU, but
   there is nobody to charge: their shares are returned as the step's *tail*. So is the whole of a
   step that computed nothing for anyone. The same id opened again is another request.

Invariant: the ns settled or shared = those closed, cut, discarded + all tails + `open_ns`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Weights and tokens of one step add up to at most this, so that (W - 1) * W fits 64 bits.
WEIGHT_MAX = 2**31 - 1
# Largest time of a step, and of all that is accrued and unbilled: a signed 64-bit integer.
NS_MAX = 2**63 - 1
# Steps in flight. vLLM has one per pipeline stage and one more; so many mean that none is settled.
STEPS_MAX = 1024


def split(total_ns: int, weights: Sequence[int]) -> list[int]:
    """Return the share of each weight in a time, in ns, by cumulative rounding in the given order.

    Raises ValueError for a negative time or weight, weights of 2**31 or more in all, or a time
    with nobody to take it.
    """
    _check(total_ns, NS_MAX, "split: total_ns")
    for weight in weights:
        _check(weight, WEIGHT_MAX, "split: a weight")
    _check(sum(weights), WEIGHT_MAX, "split: the sum of the weights")
    if total_ns and not weights:
        raise ValueError(f"split: expected at least one weight for {total_ns} ns, got none")
    return _shares(total_ns, weights)


class StepMeter:
    """Accrues GPU time and tokens to the open requests of one engine, step by step.

    `open_ns` is the time accrued to open requests and not yet cut or closed, `fallbacks` how many
    splits had only weights of 0 and became equal ones, `strangers` how many requests were first
    seen in a step, without an `open`.
    """

    def __init__(self, method: str) -> None:
        if method not in METHODS:
            raise ValueError(f"StepMeter: expected a method of {METHODS}, got {method!r}")
        self.open_ns = 0
        self.fallbacks = 0
        self.strangers = 0
        self._weigh = _WEIGH[method]
        self._requests: dict[str, _Request] = {}  # the open ones
        self._steps: dict[int, list[_Part]] = {}  # those in flight, oldest first
        self._last_step = 0
        self._drained: list[_Request] = []

    @property
    def open_requests(self) -> int:
        """Return how many requests are open."""
        return len(self._requests)

    @property
    def steps_in_flight(self) -> int:
        """Return how many steps were begun and neither settled nor dropped."""
        return len(self._steps)

    def request_ids(self) -> list[str]:
        """Return the ids of all open requests, in the order they were opened."""
        return list(self._requests)

    def step_requests(self, step: int) -> int:
        """Return how many requests a step in flight holds. Raises ValueError if it is not."""
        return len(self._parts_of(step))

    # The life of a request

    def open(self, request_id: str, prompt_tokens: int) -> None:
        """Start to accrue for a request. Does nothing if it is open already."""
        _check(prompt_tokens, WEIGHT_MAX, "StepMeter.open: prompt_tokens")
        if request_id not in self._requests:
            self._requests[request_id] = _Request(request_id, prefill_end=prompt_tokens)

    def position(self, request_id: str, computed_tokens: int, resumed: bool) -> None:
        """Say where in its context the next step of a request starts, before `begin`.

        For a request scheduled for the first time (prefix cache hits are computed already), or
        `resumed` after a preemption.
        """
        _check(computed_tokens, WEIGHT_MAX, "StepMeter.position: computed_tokens")
        request = self._requests.get(request_id) or self._welcome_stranger(request_id)
        if resumed:
            request.prefill_end = max(request.prefill_end, request.position)
        request.position = computed_tokens

    def leave(self, request_id: str) -> bool:
        """Note that a request was aborted. Return True if it can be closed now.

        False if it has steps in flight: it goes on accruing until `drained` names it.
        """
        request = self._request(request_id)
        request.left = True
        if request.in_flight:
            return False
        self._unqueue(request)
        return True

    def drained(self) -> list[str]:
        """Return the requests that left and whose last step in flight ended since last asked."""
        ended = [request.request_id for request in self._drained if request.in_flight == 0]
        self._drained.clear()
        return ended

    def accrued(self, request_id: str) -> tuple[int, int, int, int, int]:
        """Return what `close` would, and leave the request open."""
        request = self._request(request_id)
        return (
            request.prefill_ns,
            request.decode_ns,
            request.prefill_tokens,
            request.decode_tokens,
            request.steps,
        )

    def close(self, request_id: str) -> tuple[int, int, int, int, int]:
        """End a request. Return (prefill ns, decode ns, prefill tokens, decode tokens, steps).

        Time and tokens are those since the last `cut`, steps those of its whole life.
        """
        totals = self.accrued(request_id)
        self._forget(request_id)
        return totals

    def discard(self, request_id: str) -> int:
        """Forget an open request that nobody will bill. Return the ns it had accrued."""
        request = self._request(request_id)
        self._forget(request_id)
        return request.prefill_ns + request.decode_ns

    def cut(self) -> list[tuple[str, int, int, int, int]]:
        """Take what all open requests accrued since the last cut, and set it to 0.

        Return (request id, prefill ns, decode ns, prefill tokens, decode tokens) of each that
        accrued anything, in the order they were opened.
        """
        pieces = []
        for request_id in self._requests:
            accrued = self.accrued(request_id)[:4]
            if any(accrued):
                pieces.append((request_id, *accrued))
                self._requests[request_id].reset()
        self.open_ns = 0
        return pieces

    # The life of a step

    def begin(self, scheduled: dict[str, int]) -> int:
        """Record a step: the tokens scheduled for each request, in scheduler order.

        Return the step's number: 1, 2, and so on. A request that is not open is opened as one
        without a prompt. Raises ValueError, and records nothing, if a count is negative, all are
        2**31 or more, or too many steps are in flight.
        """
        if len(self._steps) >= STEPS_MAX:
            raise ValueError(
                f"StepMeter.begin: expected less than {STEPS_MAX} steps in flight, got as many;"
                " settle or abandon them"
            )
        for request_id, tokens in scheduled.items():
            _check(tokens, WEIGHT_MAX, f"StepMeter.begin: tokens of {request_id!r}")
        _check(sum(scheduled.values()), WEIGHT_MAX, "StepMeter.begin: tokens of all requests")
        self._last_step += 1
        self._steps[self._last_step] = [
            (self._requests.get(request_id) or self._welcome_stranger(request_id)).enter(tokens)
            for request_id, tokens in scheduled.items()
        ]
        return self._last_step

    def share(self, step: int, gpu_ns: int) -> int:
        """Divide a part of a step's time, in GPU-ns, among its requests; the step goes on.

        Return the tail: the ns of requests closed by now. Raises ValueError, and does nothing, if
        the step is not in flight or the time is negative or too large.
        """
        parts = self._parts_of(step)
        _check(gpu_ns, NS_MAX - self.open_ns, "StepMeter: gpu_ns")
        if not parts:
            return gpu_ns
        weights = self._weigh(parts)
        if not any(weights):
            self.fallbacks += 1
        tail_ns = 0
        for part, share_ns in zip(parts, _shares(gpu_ns, weights), strict=True):
            if not part.request.is_open:
                tail_ns += share_ns
            elif part.is_prefill:
                part.request.prefill_ns += share_ns
            else:
                part.request.decode_ns += share_ns
        self.open_ns += gpu_ns - tail_ns
        return tail_ns

    def settle(self, step: int, gpu_ns: int) -> int:
        """Divide the (rest of the) time of a step and end it. Returns and raises as `share`.

        Older steps in flight never got a result: they end first, without time or tokens.
        """
        tail_ns = self.share(step, gpu_ns)
        for older in [number for number in self._steps if number < step]:
            self._drop(older)
        for part in self._steps[step]:
            part.request.steps += 1
            if part.is_prefill:
                part.request.prefill_tokens += part.tokens
            else:
                part.request.decode_tokens += part.tokens
        self._drop(step)
        return tail_ns

    def abandon(self) -> None:
        """Drop every step in flight: no time, no tokens."""
        for step in list(self._steps):
            self._drop(step)

    # Helpers

    def _request(self, request_id: str) -> "_Request":
        if request_id not in self._requests:
            raise ValueError(f"StepMeter: expected an open request, got {request_id!r}")
        return self._requests[request_id]

    def _parts_of(self, step: int) -> list["_Part"]:
        if not isinstance(step, int) or step not in self._steps:
            raise ValueError(f"StepMeter: expected a step in flight, got {step!r}")
        return self._steps[step]

    def _welcome_stranger(self, request_id: str) -> "_Request":
        self.strangers += 1
        self.open(request_id, 0)
        return self._requests[request_id]

    def _forget(self, request_id: str) -> None:
        request = self._requests.pop(request_id)
        request.is_open = False
        self._unqueue(request)
        self.open_ns -= request.prefill_ns + request.decode_ns

    def _drop(self, step: int) -> None:
        for part in self._steps.pop(step):
            request = part.request
            request.in_flight -= 1
            has_drained = request.in_flight == 0 and request.left and request.is_open
            if has_drained and request not in self._drained:
                self._drained.append(request)

    def _unqueue(self, request: "_Request") -> None:
        if request in self._drained:
            self._drained.remove(request)


@dataclass(slots=True, eq=False)
class _Request:
    request_id: str
    prefill_end: int
    position: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    steps: int = 0
    in_flight: int = 0
    left: bool = False
    is_open: bool = True

    def enter(self, tokens: int) -> "_Part":
        """Take part in a step."""
        part = _Part(self, tokens, is_prefill=self.position < self.prefill_end)
        self.position += tokens
        self.in_flight += 1
        return part

    def reset(self) -> None:
        """Set what was accrued to zero."""
        self.prefill_ns = self.decode_ns = self.prefill_tokens = self.decode_tokens = 0


@dataclass(slots=True, frozen=True)
class _Part:
    """One request's part of one step."""

    request: _Request
    tokens: int
    is_prefill: bool


def _weigh_tokens(parts: Sequence[_Part]) -> list[int]:
    return [part.tokens for part in parts]


def _weigh_equal(parts: Sequence[_Part]) -> list[int]:
    return [1 for _ in parts]


_WEIGH: dict[str, Callable[[Sequence[_Part]], list[int]]] = {
    "tokens": _weigh_tokens,
    "equal": _weigh_equal,
}
METHODS = tuple(_WEIGH)


def _shares(total_ns: int, weights: Sequence[int]) -> list[int]:
    if not any(weights):
        weights = [1] * len(weights)
    whole = sum(weights)
    shares = []
    weight_so_far = given_ns = 0
    for weight in weights:
        weight_so_far += weight
        until_ns = total_ns * weight_so_far // whole
        shares.append(until_ns - given_ns)
        given_ns = until_ns
    return shares


def _check(value: object, maximum: int, what: str) -> None:
    if not isinstance(value, int) or not 0 <= value <= maximum:
        raise ValueError(f"{what}: expected an int from 0 to {maximum}, got {value!r}")
