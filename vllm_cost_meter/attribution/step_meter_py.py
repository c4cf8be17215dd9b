"""Divide the GPU time of a step among its requests: the theory, in plain Python.

This is the twin of `csrc/attribution.pyx`. It defines what is right, and tests judge the native
code by it; production runs the native code. Both have the same names and agree bit for bit,
messages included, so a change to one must be made in the other.

1. Time is an integer of GPU-nanoseconds. A step of D ns has integer weights w_1 .. w_n in scheduler
   order. W is their sum, and S_k is the sum of the first k. Request k gets

       share_k = floor(D * S_k / W) - floor(D * S_{k-1} / W)

   So the shares add up to D exactly. Each share is within 1 ns of D * w_k / W whatever the order,
   and equal weights get shares at most 1 ns apart. If all weights are 0, all count as 1.
2. A method decides how requests are weighed, and nothing else. "shapley" takes a request's Shapley
   value in the step's game (`shapley_py.py`), with the cost model that the engine's own steps
   taught (`cost_model_py.py`). "tokens" takes the tokens that the step computed for the request,
   and "equal" takes 1. Weights add up to less than 2**31, which lets the native code divide exactly
   in 64 bits; Shapley values are scaled and rounded to that. The model learns whatever the method.
   It also gives each request its marginal cost: the time the step would have saved without it.
3. A request's part of a step is prefill if the step starts before the request's prefill end, and
   decode otherwise. The prefill end is the prompt's length. After a preemption it is the position
   that the request had reached, if that is further. Three kinds of tokens are counted apart as
   well: recomputed ones, which a preemption had thrown away; rejected drafts, which were computed
   in vain; and cut tokens, which nobody got because the request had ended before them in its last
   step or was aborted while the step decoded. They get a part of the request's share in proportion
   to their number.
4. Steps overlap (async scheduling, pipelines). Each step is begun, perhaps shared in parts, and
   settled. Results come in order, so settling a step drops older steps that never got a result.
5. A request holds the KV cache blocks that its context fills. It holds them from the begin of the
   step that first needs them until it is preempted or closed. Blocks x wall time is its KV
   residency. A block that several requests share (a cached prefix) counts for each of them.
6. A request is open from `open` to `close`. Steps in flight at its close still use the GPU, but
   there is nobody to charge, so their shares are returned as the step's *tail*. If a step computed
   nothing for anyone, all its time is tail. The same id opened again is another request.
7. What a preemption threw away is computed again. Its victim pays for that, or nobody does: then
   the recomputed part of a share is counted in the request and added to `uncharged_ns` instead.

Invariant: the ns settled or shared = the ns closed, cut or discarded + all tails + `uncharged_ns` +
`open_ns`.
"""

from collections.abc import Sequence

from vllm_cost_meter.attribution.checks_py import check, checked_coefficients, checked_planes
from vllm_cost_meter.attribution.cost_model import Coefficients, Model, Planes
from vllm_cost_meter.attribution.cost_model_py import StepFit
from vllm_cost_meter.attribution.curve_py import CurveWork, all_of
from vllm_cost_meter.attribution.features_py import FeatureWork, all_features
from vllm_cost_meter.attribution.game_py import solve_step
from vllm_cost_meter.attribution.planes_py import total_of
from vllm_cost_meter.attribution.priors import NOTHING_KNOWN, Prior
from vllm_cost_meter.attribution.requests_py import NS_MAX, WEIGHT_MAX, Part, Request, Step
from vllm_cost_meter.records.accrued import Accrued

# Largest number of steps in flight. vLLM has one per pipeline stage plus one, so this many mean
# that no step is ever settled.
STEPS_MAX = 1024
# Number of published models that are remembered.
MODELS_MAX = 64
ENDED = "(ended)"

METHODS = ("shapley", "tokens", "equal")


def split(total_ns: int, weights: Sequence[int]) -> list[int]:
    """Divide a time into one share per weight, in ns, by cumulative rounding in the given order.

    Raises ValueError for a negative time or weight, for weights that add up to 2**31 or more, and
    for a time without any weight.
    """
    check(total_ns, NS_MAX, "split: total_ns")
    for weight in weights:
        check(weight, WEIGHT_MAX, "split: a weight")
    check(sum(weights), WEIGHT_MAX, "split: the sum of the weights")
    if total_ns and not weights:
        raise ValueError(f"split: expected at least one weight for {total_ns} ns, got none")
    return _shares(total_ns, weights)


class StepMeter:
    """Accrues GPU time and tokens to the open requests of one engine, step by step.

    `open_ns` is the time accrued to open requests and not yet cut or closed. `uncharged_ns` is the
    time in which open requests computed again what a preemption had thrown away, if they are not
    charged for it. `fallbacks` counts splits with only zero weights, which became equal splits.
    `strangers` counts requests that first appeared in a step, without an `open`.
    """

    def __init__(
        self,
        method: str,
        prior: Prior = NOTHING_KNOWN,
        block_size: int = 0,
        charges_recomputed: bool = True,
    ) -> None:
        """Start with a prior for the cost model; if nothing is known, a step costs its tokens.

        `block_size` is the KV cache's block size in tokens; with 0, blocks are not counted. Without
        `charges_recomputed`, requests do not accrue the time to compute again what a preemption had
        thrown away.
        """
        check(block_size, WEIGHT_MAX, "StepMeter: block_size")
        self._block_size = block_size
        if method not in METHODS:
            raise ValueError(f"StepMeter: expected a method of {METHODS}, got {method!r}")
        self._served = prior.served
        self._fit = StepFit(prior)
        self._published: list[Model] = []
        self._remember_model()
        self._charges_recomputed = bool(charges_recomputed)
        self.open_ns = 0
        self.uncharged_ns = 0
        self.fallbacks = 0
        self.strangers = 0
        self._method = method
        self._requests: dict[str, Request] = {}  # the open ones
        self._steps: dict[int, Step] = {}  # those in flight, oldest first
        self._last_step = 0
        self._drained: list[Request] = []

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

    def is_open(self, request_id: str) -> bool:
        """Return whether a request is open."""
        return request_id in self._requests

    def step_parts(self, step: int) -> list[tuple[str, int, int, int]]:
        """Return the parts of a step in flight, in scheduler order.

        A part is (request id, tokens, position where they start, position where the prefill ends).
        If the request was closed meanwhile, the id is ENDED with the part's place. Raises
        ValueError if the step is not in flight.
        """
        return [
            (
                part.request.request_id if part.request.is_open else f"{ENDED} {place}",
                part.work.tokens,
                part.work.context - part.work.tokens,
                part.request.prefill_end,
            )
            for place, part in enumerate(self._step(step).parts)
        ]

    def step_features(self, step: int) -> list[tuple[int, bool, bool, int]]:
        """Return the features of a step in flight, by the places of its parts that have any.

        They are (place, whether the request has LoRA, whether it is guided, encoder tokens). Raises
        ValueError if the step is not in flight.
        """
        found = [
            (place, part.request.has_lora, part.request.is_guided, part.encoder_tokens)
            for place, part in enumerate(self._step(step).parts)
        ]
        return [features for features in found if any(features[1:])]

    # The life of a request

    def open(
        self, request_id: str, prompt_tokens: int, has_lora: bool = False, is_guided: bool = False
    ) -> None:
        """Start to accrue for a request. Does nothing if it is open already.

        `has_lora` says that it is computed with an adapter, `is_guided` that its tokens are sampled
        by guided decoding.
        """
        check(prompt_tokens, WEIGHT_MAX, "StepMeter.open: prompt_tokens")
        if request_id not in self._requests:
            self._requests[request_id] = Request(
                request_id, prompt_tokens, bool(has_lora), bool(is_guided)
            )

    def position(self, request_id: str, computed_tokens: int, resumed: bool) -> None:
        """Set the position in its context where a request's next step starts; call before `begin`.

        This is needed when a request is scheduled for the first time, because prefix cache hits are
        computed already, and when it is `resumed` after a preemption.
        """
        check(computed_tokens, WEIGHT_MAX, "StepMeter.position: computed_tokens")
        request = self._requests.get(request_id) or self._welcome_stranger(request_id)
        if resumed:
            request.prefill_end = max(request.prefill_end, request.position)
            request.recompute_end = max(request.recompute_end, request.position)
        request.position = computed_tokens

    def release(self, request_id: str, now_ns: int) -> None:
        """Note that an open request was preempted: it holds no blocks from now on.

        A request that is not open is ignored. As everywhere, `now_ns` is monotonic.
        """
        check(now_ns, NS_MAX, "StepMeter: now_ns")
        if request_id in self._requests:
            self._requests[request_id].release_blocks(now_ns)

    def leave(self, request_id: str) -> bool:
        """Note that a request was aborted. Return True if it can be closed now.

        False means that it has steps in flight and goes on accruing until `drained` names it. The
        tokens that these steps compute behind its prefill count as cut off.
        """
        request = self._request(request_id)
        request.left = True
        if request.in_flight:
            for step in self._steps.values():
                for part in step.parts:
                    part.is_cut |= part.request is request
            return False
        self._unqueue(request)
        return True

    def drained(self) -> list[str]:
        """Return the aborted requests that lost their last step in flight since the last call."""
        ended = [request.request_id for request in self._drained if request.in_flight == 0]
        self._drained.clear()
        return ended

    def trim(self, request_id: str, tokens: int) -> None:
        """Count the last `tokens` that were computed for an open request as cut off.

        They belong to its last settled step with several tokens. At most as many are counted as the
        request kept of that step.
        """
        check(tokens, WEIGHT_MAX, "StepMeter.trim: tokens")
        self._request(request_id).trim(tokens)

    def accrued(self, request_id: str, now_ns: int) -> Accrued:
        """Return the time, tokens and blocks that a request accrued since the last `cut`."""
        check(now_ns, NS_MAX, "StepMeter: now_ns")
        return self._request(request_id).accrued(now_ns)

    def open_gpu_ns(self) -> dict[str, int]:
        """Return the GPU-ns of each open request since the last `cut`."""
        return {
            request_id: request.prefill_ns + request.decode_ns
            for request_id, request in self._requests.items()
        }

    def close(self, request_id: str, now_ns: int) -> Accrued:
        """End a request. Return what it accrued since the last `cut`."""
        accrued = self.accrued(request_id, now_ns)
        self._forget(request_id)
        return accrued

    def discard(self, request_id: str) -> int:
        """Forget an open request that nobody will bill. Return the ns it had accrued."""
        request = self._request(request_id)
        self._forget(request_id)
        return request.prefill_ns + request.decode_ns

    def cut(self, now_ns: int) -> list[tuple[str, Accrued]]:
        """Return what the open requests accrued since the last cut, and set it to 0.

        Requests that accrued neither time, tokens nor blocks are left out. The order is that in
        which the requests were opened.
        """
        check(now_ns, NS_MAX, "StepMeter: now_ns")
        pieces = []
        for request_id, request in self._requests.items():
            accrued = request.accrued(now_ns)
            if any(accrued[:4]) or accrued.recomputed_ns or accrued.kv_block_ns:
                pieces.append((request_id, accrued))
                request.reset()
        self.open_ns = 0
        return pieces

    # The life of a step

    def begin(
        self,
        scheduled: dict[str, int],
        now_ns: int,
        decoding: list[str] | None = None,
        encoded: dict[str, int] | None = None,
    ) -> int:
        """Record a step: the tokens scheduled for each request, in scheduler order.

        `decoding` lists requests with one token each, which come before those of `scheduled`. They
        are a list because that is read faster than a dict. `encoded` has the tokens that an encoder
        computes in this step, by request; requests outside the step are ignored. Returns the step's
        number: 1, 2, and so on. A request that is not open is opened as one without a prompt.
        Raises ValueError, and records nothing, if a count is negative, if the counts add up to
        2**31 or more, or if too many steps are in flight.
        """
        check(now_ns, NS_MAX, "StepMeter: now_ns")
        for request_id, tokens in (encoded or {}).items():
            check(tokens, WEIGHT_MAX, f"StepMeter.begin: encoder tokens of {request_id!r}")
        if len(self._steps) >= STEPS_MAX:
            raise ValueError(
                f"StepMeter.begin: expected less than {STEPS_MAX} steps in flight, got as many;"
                " settle or abandon them"
            )
        for request_id, tokens in scheduled.items():
            check(tokens, WEIGHT_MAX, f"StepMeter.begin: tokens of {request_id!r}")
        batch = [*((request_id, 1) for request_id in decoding or ()), *scheduled.items()]
        all_tokens = sum(tokens for _, tokens in batch)
        check(all_tokens, WEIGHT_MAX, "StepMeter.begin: tokens of all requests")
        self._last_step += 1
        self._steps[self._last_step] = Step(
            [
                (self._requests.get(request_id) or self._welcome_stranger(request_id)).enter(tokens)
                for request_id, tokens in batch
            ]
        )
        for part in self._steps[self._last_step].parts if encoded else ():
            part.encode((encoded or {}).get(part.request.request_id, 0))
        if self._block_size:
            for part in self._steps[self._last_step].parts:
                part.request.hold_blocks(self._block_size, now_ns)
        return self._last_step

    def share(self, step: int, gpu_ns: int) -> int:
        """Divide a part of a step's time, in GPU-ns, among its requests; the step goes on.

        Returns the tail: the ns of requests that are closed by now. Raises ValueError, and does
        nothing, if the step is not in flight or the time is negative or too large.
        """
        parts = self._step(step).parts
        check(gpu_ns, NS_MAX - self.open_ns, "StepMeter: gpu_ns")
        self._step(step).shared_ns += gpu_ns
        if not parts:
            return gpu_ns
        weights, margins = self._weigh(parts, gpu_ns)
        self._weights = weights
        tail_ns = uncharged_ns = 0
        shares = _shares(gpu_ns, weights)
        for part, share_ns, marginal_ns in zip(parts, shares, margins, strict=True):
            if part.request.is_open:
                uncharged_ns += part.pay(share_ns, marginal_ns, gpu_ns, self._charges_recomputed)
            else:
                tail_ns += share_ns
        self.open_ns += gpu_ns - tail_ns - uncharged_ns
        self.uncharged_ns += uncharged_ns
        return tail_ns

    def settle(self, step: int, gpu_ns: int, rejected: dict[str, int] | None = None) -> int:
        """Divide the (rest of the) time of a step, end it, and learn from it.

        Returns and raises as `share` does. `rejected` maps a request of the step to the number of
        its draft tokens that were not accepted; requests outside the step are ignored. Older steps
        in flight never got a result: they end first, without time or tokens.
        """
        parts = self._step(step).parts
        check(gpu_ns, NS_MAX - self.open_ns, "StepMeter: gpu_ns")
        for request_id, tokens in (rejected or {}).items():
            check(tokens, WEIGHT_MAX, f"StepMeter.settle: rejected tokens of {request_id!r}")
        for part in parts:
            if part.request.is_open:
                part.reject((rejected or {}).get(part.request.request_id, 0))
        tail_ns = self.share(step, gpu_ns)
        for older in [number for number in self._steps if number < step]:
            self._drop(older)
        ended = self._steps[step]
        if parts:
            self._fit.charge_errors.look([part.in_step for part in parts], self._weights, gpu_ns)
        for part in ended.parts:
            part.end(len(ended.parts))
        self._drop(step)
        work = total_of([part.work for part in ended.parts])
        layers = self._served.layers
        in_step = [part.in_step for part in ended.parts]
        curve_work = all_of([CurveWork.of(*part[:3], layers) for part in in_step])
        features = all_features([FeatureWork.of(part) for part in in_step])
        if self._fit.observe(work, curve_work, ended.shared_ns, features):
            self._remember_model()
        return tail_ns

    def abandon(self) -> None:
        """Drop every step in flight, without time or tokens."""
        for step in list(self._steps):
            self._drop(step)

    # The cost model

    def adopt(self, planes: Planes, coefficients: Coefficients, two_planes: bool) -> None:
        """Continue from an earlier fit. Raises ValueError for anything else."""
        self._fit.adopt(checked_planes(planes), checked_coefficients(coefficients), two_planes)
        self._remember_model()

    @property
    def model_version(self) -> int:
        """Return the version of the model in use."""
        return self._fit.version

    def models(self, since_version: int) -> list[Model]:
        """Return the models published after a version, as `model` does, oldest first."""
        return [model for model in self._published if model[0] > since_version]

    def model(self) -> Model:
        """Return the model in use and its quality figures. Its planes and curve are published."""
        fit = self._fit
        return Model(
            fit.version,
            fit.form_name,
            *self._in_use,
            self._served,
            fit.steps,
            fit.errors[0],
            fit.errors[1],
            fit.explained,
            fit.charge_errors.by_kind(),
        )

    def fitted(self) -> tuple[Planes, Coefficients]:
        """Return the planes and the curve as they are learnt now; `adopt` takes them."""
        return self._fit.planes(), self._fit.coefficients()

    # Helpers

    def _request(self, request_id: str) -> Request:
        if request_id not in self._requests:
            raise ValueError(f"StepMeter: expected an open request, got {request_id!r}")
        return self._requests[request_id]

    def _step(self, step: int) -> Step:
        if not isinstance(step, int) or step not in self._steps:
            raise ValueError(f"StepMeter: expected a step in flight, got {step!r}")
        return self._steps[step]

    def _weigh(self, parts: Sequence[Part], gpu_ns: int) -> tuple[list[int], list[float]]:
        """Return the weights and the marginal costs, in GPU-ns, of a step's parts."""
        game = solve_step(self._fit.model, [part.in_step for part in parts])
        weights = game.weigh()
        if self._method == "tokens":
            weights = [part.work.tokens for part in parts]
        elif self._method == "equal":
            weights = [1 for _ in parts]
        if not any(weights):
            self.fallbacks += 1
            weights = [1 for _ in parts]
        return weights, game.margins(float(gpu_ns))

    def _remember_model(self) -> None:
        self._in_use = self.fitted()
        self._published.append(self.model())
        del self._published[:-MODELS_MAX]

    def _welcome_stranger(self, request_id: str) -> Request:
        self.strangers += 1
        self.open(request_id, 0)
        return self._requests[request_id]

    def _forget(self, request_id: str) -> None:
        request = self._requests.pop(request_id)
        request.is_open = False
        self._unqueue(request)
        self.open_ns -= request.prefill_ns + request.decode_ns

    def _drop(self, step: int) -> None:
        for part in self._steps.pop(step).parts:
            request = part.request
            request.in_flight -= 1
            has_drained = request.in_flight == 0 and request.left and request.is_open
            if has_drained and request not in self._drained:
                self._drained.append(request)

    def _unqueue(self, request: Request) -> None:
        if request in self._drained:
            self._drained.remove(request)


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
