"""Simulated traffic: a trace of engine steps with mixed requests from three tenants.

The tenants send requests at once in an open loop, each as a Poisson process. Lengths are log-normal
with the means in `TENANTS`. The server schedules like vLLM v1 with chunked prefill, within a budget
of tokens per step. Running requests come first, in their order of admission; a decode takes one
token. Waiting requests follow, first come, first served. At most the request admitted last can be
in the middle of its prompt: it has used up the budget, so nobody is admitted after it.

A trace starts in the middle of operation: as many requests run as the mean batch has. Each is drawn
as if met at a random instant, so long requests are more frequent, at a random point of its output.
KV memory is not limited; the trace records how much it would need.

The arrival rate for a mean batch L is found in two steps. Little's law gives the arrivals per
*step* for L, and the mean step time turns them into arrivals per second. Near its limit a server
answers a little more load with a much larger batch. So the trace is made again with a corrected
rate until its mean batch is L to 3 %, at most `CALIBRATIONS_MAX` times.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_cost_meter.lab.validation.games import Features, Flags, Ints, Simulated, SimulatedGame

TOKEN_BUDGET = 2_048
# vLLM's default for large GPUs. Simulated batches stay far below, unless the server is overloaded.
SEQUENCES_MAX = 1_024
PROMPT_SIGMA = 0.3
OUTPUT_SIGMA = 0.5
IMAGE_SIGMA = 0.3
TOKENS_LEAST = 8
# The standard deviation of a step's log time around the roofline.
NOISE_SIGMA = 0.02
CALIBRATIONS_MAX = 8
CALIBRATION_TOLERANCE = 0.03
# The length of the trace that measures the mean step time at the mean batch.
PILOT_STEPS = 2_000


@dataclass(frozen=True)
class SimulatedTenant:
    """A tenant's mean prompt and output tokens, and its share of all requests.

    One output token is none: the prompt's last chunk makes it, as an embedding. The tenant's first
    request comes in the step `first_step`. Its requests have the `adapter` of this number (0: none)
    and are sampled by a grammar if `has_grammar`. They begin with an image of `image_tokens` on
    average.
    """

    name: str
    prompt_tokens: int
    output_tokens: int
    requests_share: float
    first_step: int = 0
    adapter: int = 0
    has_grammar: bool = False
    image_tokens: int = 0


TENANTS = (
    SimulatedTenant("chat", 512, 256, 0.60),
    SimulatedTenant("rag", 4_096, 1_024, 0.25),
    SimulatedTenant("agentic", 1_024, 4_096, 0.15),
)
# All that people send to one server.
SEVEN_TENANTS = (
    SimulatedTenant("chat", 512, 256, 0.32),
    SimulatedTenant("rag", 4_096, 512, 0.10),
    SimulatedTenant("agentic", 1_024, 2_048, 0.08),
    SimulatedTenant("summaries", 8_192, 256, 0.04),
    SimulatedTenant("long context", 32_768, 512, 0.01),
    SimulatedTenant("embeddings", 256, 1, 0.30),
    SimulatedTenant("tiny batch", 32, 8, 0.15),
)
# The chance of a draft token to be accepted, if those before it were.
ACCEPTED = 0.7


@dataclass(frozen=True, slots=True)
class TraceStep:
    """One step. Requests are numbers; arrays have the shape (n,), in scheduler order.

    `started` are scheduled for the first time, `ended` for the last time. `rejected` are tokens of
    drafts that were computed in vain. `gpu_time_ns` is the measured time, with noise.
    """

    requests: list[int]
    tokens: Ints
    positions: Ints
    is_prefill: Flags
    rejected: Ints
    gpu_time_ns: int
    started: list[int]
    ended: list[int]
    features: Features | None = None


@dataclass(frozen=True)
class MachineChange:
    """From a step on, another machine runs the model."""

    step: int
    machine: Simulated


@dataclass(frozen=True)
class Load:
    """What a simulated server runs: tenants, at a mean batch, with so many draft tokens a decode.

    With `change` the machine is another one from a step on.
    """

    mean_batch: int
    tenants: Sequence[SimulatedTenant] = TENANTS
    draft_tokens: int = 0
    change: MachineChange | None = None

    @property
    def mean_life_steps(self) -> float:
        """The mean steps of a request: its output, and the whole chunks before."""
        a_step = sum(ACCEPTED**drafts for drafts in range(self.draft_tokens + 1))
        return sum(
            tenant.requests_share
            * (
                tenant.output_tokens / a_step
                + max(0, math.ceil(tenant.prompt_tokens / TOKEN_BUDGET) - 1)
            )
            for tenant in self.tenants
        )


@dataclass(slots=True)
class Trace:
    """A trace's steps and requests, which are counted from 0, and the machine that ran them.

    `tenants` (places in the load's), `prompt_tokens`, `image_tokens` and `first_positions` have an
    entry for each request. `requests_per_s` is the arrival rate.
    """

    machine: Simulated
    load: Load
    steps: list[TraceStep] = field(default_factory=list)
    tenants: list[int] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    image_tokens: list[int] = field(default_factory=list)
    first_positions: list[int] = field(default_factory=list)
    requests_per_s: float = 0.0

    def machine_at(self, number: int) -> Simulated:
        """Return the machine that runs the step with this number."""
        change = self.load.change
        return self.machine if change is None or number < change.step else change.machine

    def game(self, number: int) -> SimulatedGame:
        """Return the game of the step with this number."""
        step = self.steps[number]
        machine = self.machine_at(number)
        return machine.game(step.tokens, step.positions, step.is_prefill, step.features)

    def tenant_of(self, request: int) -> SimulatedTenant:
        """Return the tenant that sent a request."""
        return self.load.tenants[self.tenants[request]]

    @property
    def mean_batch(self) -> float:
        """The mean number of requests per step."""
        return sum(len(step.requests) for step in self.steps) / max(1, len(self.steps))

    @property
    def kv_tokens_max(self) -> int:
        """The largest sum of contexts in a step, in tokens."""
        sums = (int((step.positions + step.tokens).sum()) for step in self.steps)
        return max(sums, default=0)


def make_trace(machine: Simulated, load: Load, steps: int, seed: int) -> Trace:
    """Return a trace whose mean batch is as near to the load's as calibration brings it."""
    mean_batch = load.mean_batch
    per_step = mean_batch / load.mean_life_steps
    pilot = _Server(machine, load, seed, requests_per_s=per_step, step_s=1.0)
    pilot.run(min(steps, PILOT_STEPS))
    mean_step_s = sum(step.gpu_time_ns for step in pilot.trace.steps) / len(pilot.trace.steps) / 1e9
    rate = per_step / mean_step_s
    tried: list[tuple[float, float]] = []
    best: Trace | None = None
    for _ in range(CALIBRATIONS_MAX):
        server = _Server(machine, load, seed, requests_per_s=rate)
        server.run(steps)
        trace = server.trace
        if best is None or _miss(trace, mean_batch) < _miss(best, mean_batch):
            best = trace
        if _miss(best, mean_batch) <= CALIBRATION_TOLERANCE:
            break
        tried.append((math.log(rate), math.log(trace.mean_batch)))
        rate = math.exp(_next_log_rate(tried, math.log(mean_batch)))
    assert best is not None  # noqa: S101 - CALIBRATIONS_MAX is positive
    return best


class _Server:
    """Runs requests step by step. With `step_s`, every step takes that long for arrivals."""

    def __init__(
        self,
        machine: Simulated,
        load: Load,
        seed: int,
        *,
        requests_per_s: float,
        step_s: float | None = None,
    ) -> None:
        self.trace = Trace(machine, load, requests_per_s=requests_per_s)
        self._load = load
        self._has_features = any(
            tenant.adapter or tenant.has_grammar or tenant.image_tokens for tenant in load.tenants
        )
        self._step_s = step_s
        # Four streams let another rate meet the same requests and the same noise.
        self._lengths, self._arrivals, self._noise, self._drafts = (
            np.random.default_rng([seed, stream]) for stream in range(4)
        )
        self._now_s = 0.0
        self._next_arrival_s = self._gap_s()
        self._ends: list[int] = []  # The position of each request after its last step.
        self._waiting: deque[int] = deque()
        # The decoding requests in order of admission, and the request in the middle of its prompt.
        self._decoding: list[int] = []
        self._positions = np.empty(0, dtype=np.int64)
        self._decode_ends = np.empty(0, dtype=np.int64)
        self._prefilling: tuple[int, int] | None = None
        self._started = list(range(load.mean_batch))
        self._start_mid_life(load.mean_batch)

    def run(self, steps: int) -> None:
        """Add steps until the trace has so many."""
        while len(self.trace.steps) < steps:
            self._admit_arrivals()
            if not (self._waiting or self._decoding or self._prefilling):
                self._now_s = self._next_arrival_s
                continue
            self._step()

    def _step(self) -> None:
        drafts = self._load.draft_tokens
        chunks = self._schedule_chunks()
        requests = self._decoding + [request for request, _, _ in chunks]
        decodes = len(self._decoding)
        positions = np.append(self._positions, [start for _, start, _ in chunks]).astype(np.int64)
        tokens = np.full(len(requests), 1 + drafts, dtype=np.int64)
        tokens[decodes:] = [count for _, _, count in chunks]
        is_prefill = np.arange(len(requests)) >= decodes
        machine = self.trace.machine_at(len(self.trace.steps))
        features = self._features_of(requests, chunks)
        true_s = machine.game(tokens, positions, is_prefill, features).total_s
        measured_s = true_s * math.exp(NOISE_SIGMA * self._noise.standard_normal())
        self._now_s += self._step_s or measured_s
        rejected = np.zeros(len(requests), dtype=np.int64)
        if drafts:
            is_good = self._drafts.random((decodes, drafts)) < ACCEPTED
            rejected[:decodes] = drafts - np.cumprod(is_good, axis=1).sum(axis=1)
        ended = self._advance(chunks, 1 + drafts - rejected[:decodes])
        gpu_time_ns = round(measured_s * 1e9)
        self.trace.steps.append(
            TraceStep(
                requests,
                tokens,
                positions,
                is_prefill,
                rejected,
                gpu_time_ns,
                self._started,
                ended,
                features,
            )
        )
        self._started = []

    def _features_of(
        self, requests: list[int], chunks: list[tuple[int, int, int]]
    ) -> Features | None:
        """Return what the requests of a step need beside the model; None if no tenant has any."""
        if not self._has_features:
            return None
        trace = self.trace
        tenants = [trace.tenant_of(request) for request in requests]
        rows = np.array([int(tenant.has_grammar) for tenant in tenants])
        rows[: len(self._decoding)] *= 1 + self._load.draft_tokens
        encoded = np.zeros(len(requests), dtype=np.int64)
        for place, (request, start, count) in enumerate(chunks, start=len(self._decoding)):
            if start + count < trace.prompt_tokens[request]:
                rows[place] = 0  # It samples nothing yet.
            if start == 0:
                encoded[place] = trace.image_tokens[request]
        return Features(np.array([tenant.adapter for tenant in tenants]), rows, encoded)

    def _schedule_chunks(self) -> list[tuple[int, int, int]]:
        """Return (request, start, tokens) for each prompt in this step."""
        left = TOKEN_BUDGET - len(self._decoding) * (1 + self._load.draft_tokens)
        chunks = []
        running = len(self._decoding)
        if self._prefilling:
            request, start = self._prefilling
            chunks.append((request, start, min(left, self.trace.prompt_tokens[request] - start)))
            left -= chunks[-1][2]
            running += 1
        while self._waiting and left > 0 and running < SEQUENCES_MAX:
            request = self._waiting.popleft()
            chunks.append((request, 0, min(left, self.trace.prompt_tokens[request])))
            left -= chunks[-1][2]
            running += 1
            self._started.append(request)
        return chunks

    def _advance(self, chunks: list[tuple[int, int, int]], decoded: Ints) -> list[int]:
        """Advance every request, decodes by so many tokens; return those that ended."""
        self._positions += decoded
        self._prefilling = None
        for request, start, count in chunks:
            prompt = self.trace.prompt_tokens[request]
            if start + count < prompt:
                self._prefilling = (request, start + count)
            else:
                self._decode(request, prompt)
        is_over = self._positions >= self._decode_ends
        if not is_over.any():
            return []
        ended = [self._decoding[place] for place in np.flatnonzero(is_over)]
        self._decoding = [self._decoding[place] for place in np.flatnonzero(~is_over)]
        self._positions = self._positions[~is_over]
        self._decode_ends = self._decode_ends[~is_over]
        return ended

    def _decode(self, request: int, position: int) -> None:
        self._decoding.append(request)
        self._positions = np.append(self._positions, position)
        self._decode_ends = np.append(self._decode_ends, self._ends[request])

    def _admit_arrivals(self) -> None:
        while self._next_arrival_s <= self._now_s:
            self._next_arrival_s += self._gap_s()
            tenants = self._load.tenants
            shares = [tenant.requests_share for tenant in tenants]
            place = int(self._lengths.choice(len(tenants), p=shares))
            if tenants[place].first_step <= len(self.trace.steps):
                self._waiting.append(self._add(place, size_biased=False))

    def _gap_s(self) -> float:
        # Three independent Poisson processes equal one process whose arrivals draw their tenant.
        return float(self._arrivals.standard_exponential()) / self.trace.requests_per_s

    def _add(self, place: int, *, size_biased: bool) -> int:
        """Add a request of a tenant; return its number."""
        tenant = self._load.tenants[place]
        prompt = self._length(tenant.prompt_tokens, PROMPT_SIGMA)
        image = self._length(tenant.image_tokens, IMAGE_SIGMA) if tenant.image_tokens else 0
        prompt += image
        # A log-normal length that is met at a random instant is log-normal with mu + sigma^2.
        bias = math.exp(OUTPUT_SIGMA**2) if size_biased else 1.0
        output = 1
        if tenant.output_tokens > 1:
            output = self._length(tenant.output_tokens * bias, OUTPUT_SIGMA)
        trace = self.trace
        trace.tenants.append(place)
        trace.prompt_tokens.append(prompt)
        trace.image_tokens.append(image)
        trace.first_positions.append(0)
        # The prompt's last chunk makes the first token, so the last token needs no step.
        self._ends.append(prompt + output - 1)
        return len(trace.tenants) - 1

    def _length(self, mean: float, sigma: float) -> int:
        drawn = self._lengths.lognormal(math.log(mean) - sigma**2 / 2, sigma)
        return max(TOKENS_LEAST, round(drawn))

    def _start_mid_life(self, count: int) -> None:
        tenants = self._load.tenants
        weights = np.array(
            [
                tenant.requests_share * (tenant.output_tokens - 1) * (not tenant.first_step)
                for tenant in tenants
            ]
        )
        for _ in range(count):
            place = int(self._lengths.choice(len(tenants), p=weights / weights.sum()))
            request = self._add(place, size_biased=True)
            position = int(
                self._lengths.integers(self.trace.prompt_tokens[request], self._ends[request])
            )
            self.trace.first_positions[request] = position
            self._decode(request, position)


def _miss(trace: Trace, mean_batch: int) -> float:
    return abs(trace.mean_batch / mean_batch - 1)


def _next_log_rate(tried: list[tuple[float, float]], target: float) -> float:
    """Return the next log rate to try: the secant through the last two trials, as logarithms."""
    rate, batch = tried[-1]
    slope = 2.0
    if len(tried) > 1:
        before_rate, before_batch = tried[-2]
        if before_rate != rate:
            slope = (batch - before_batch) / (rate - before_rate)
    # A batch grows at least as fast as the rate, and far faster only near full load.
    return rate + (target - batch) / min(10.0, max(1.0, slope))
