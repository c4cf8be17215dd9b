"""Every method over one trace, step by step, against the truth: how wrong is it.

The production StepMeter is driven through its public methods, by the engine's calls in the engine's
order, and learns (where its method does) from every step. The first part of the trace is fed and
not compared; after that every n-th step is. The truth of a step is scaled to the time that was
measured, which has noise: what a method is charged with is how it divides a step, not the step.

All errors are fractions. With s the share that a method gives a request in a step and t the true
one, both in ns and summed over the compared steps:

- `request_error`: |sum of s / sum of t - 1| of each request; `tenant_error` the same of tenants;
- `misplaced_share`: half of the sum of |s - t| over all parts of all steps, of all GPU time: what
  would have to move from one request to another;
- `outside_interval_share`: a request should pay no less than it adds to the step,
  v(N) - v(N without it), and no more than the step would take with it alone, v({it}). It is the
  GPU time by which shares are outside that interval, of all GPU time;
  `outside_interval_parts_share` is how many parts (a request in a step) are outside at all;
- `uncharged_share`: GPU time that is charged to nobody, of all GPU time; negative if more is
  charged than there was.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vllm_cost_meter.attribution import StepMeter
from vllm_cost_meter.attribution.priors import NOTHING_KNOWN, Prior
from vllm_cost_meter.lab.validation.roofline import Floats, Ints, Machine, StepGame
from vllm_cost_meter.lab.validation.spread import Spread
from vllm_cost_meter.lab.validation.traffic import TENANTS, Trace, TraceStep
from vllm_cost_meter.lab.validation.truth import shapley

# Methods that learn have seen so much of a trace before they are compared.
WARM_UP_PART = 1 / 3
# Shares are whole nanoseconds, and the ends of an interval have the rounding of floats.
TOLERANCE_NS = 1.0
TOLERANCE_PART = 1e-9


class Splitter(Protocol):
    """What divides steps: a method of the meter, or another rule."""

    def feed(self, step: TraceStep) -> None:
        """See a step that is not compared."""

    def split(self, step: TraceStep, game: StepGame) -> Floats:
        """Return the shares of a step, in ns, in its order; shape (n,)."""


class MeterSplitter:
    """A method of the production StepMeter, which sees what the engine would show it."""

    def __init__(self, method: str, trace: Trace, prior: Prior = NOTHING_KNOWN) -> None:
        self._meter = StepMeter(method, prior.planes, prior.trusted)
        self._trace = trace
        self._ids = [f"request-{number}" for number in range(len(trace.tenants))]

    def feed(self, step: TraceStep) -> None:
        self._settle(step)
        self._close(step)

    def split(self, step: TraceStep, game: StepGame) -> Floats:
        self._meter.cut(0)
        self._settle(step)
        shares = {name: used.prefill_ns + used.decode_ns for name, used in self._meter.cut(0)}
        self._close(step)
        return np.array([shares.get(self._ids[number], 0) for number in step.requests], dtype=float)

    def _settle(self, step: TraceStep) -> None:
        for number in step.started:
            self._meter.open(self._ids[number], self._trace.prompt_tokens[number])
            self._meter.position(self._ids[number], self._trace.first_positions[number], False)
        ids = [self._ids[number] for number in step.requests]
        begun = self._meter.begin(dict(zip(ids, step.tokens.tolist(), strict=True)), 0)
        self._meter.settle(begun, step.gpu_time_ns)

    def _close(self, step: TraceStep) -> None:
        for number in step.ended:
            self._meter.close(self._ids[number], 0)


class LeaveOneOut:
    """Charges what a request adds, v(N) - v(N without it). It does not add up to the step."""

    def feed(self, step: TraceStep) -> None:
        pass

    def split(self, step: TraceStep, game: StepGame) -> Floats:
        return game.marginal_s() * (step.gpu_time_ns / game.total_s)


@dataclass(frozen=True, slots=True)
class Errors:
    """How far a method is from the truth; the module says what each figure is."""

    request_error: Spread
    tenant_error: Spread
    misplaced_share: float
    outside_interval_share: float
    outside_interval_parts_share: float
    uncharged_share: float


@dataclass(frozen=True, slots=True)
class Noise:
    """How far the truth itself may be off: half of what two independent halves of it differ by."""

    request_error: Spread
    tenant_error: Spread
    misplaced_share: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found on one trace. `truth` holds the intervals' figures for the truth itself."""

    compared_steps: int
    compared_requests: int
    noise: Noise
    truth: Errors
    methods: dict[str, Errors]


def compare(
    trace: Trace,
    machine: Machine,
    splitters: Mapping[str, Splitter],
    *,
    every: int,
    permutations: int,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> Comparison:
    """Drive all splitters over the trace and compare every `every`-th step after the warm-up.

    The truth is the mean of two independent halves of `permutations` random orders each, exact in
    steps of few requests. `on_step` is called after each step.
    """
    rng = np.random.default_rng([seed, 1])
    tenants = np.array(trace.tenants)
    sums = {name: _Sums(len(tenants)) for name in (*splitters, "", "halves")}
    warm_up = int(len(trace.steps) * WARM_UP_PART)
    compared = 0
    for number, step in enumerate(trace.steps):
        if number < warm_up or (number - warm_up) % every:
            for splitter in splitters.values():
                splitter.feed(step)
        else:
            compared += 1
            game = machine.game(step.tokens, step.positions)
            to_ns = step.gpu_time_ns / game.total_s
            halves = [shapley(game, permutations, rng) * to_ns for _ in range(2)]
            true = (halves[0] + halves[1]) / 2
            interval = (game.marginal_s() * to_ns, game.alone_s() * to_ns)
            sums[""].add(step, true, true, interval)
            # Their difference is twice that of their mean from either.
            sums["halves"].add(step, halves[0], true, interval)
            for name, splitter in splitters.items():
                sums[name].add(step, splitter.split(step, game), true, interval)
        on_step()
    truth = sums.pop("")
    halves_of_truth = sums.pop("halves").errors(tenants)
    return Comparison(
        compared_steps=compared,
        compared_requests=int((truth.true_ns > 0).sum()),
        noise=Noise(
            halves_of_truth.request_error,
            halves_of_truth.tenant_error,
            halves_of_truth.misplaced_share,
        ),
        truth=truth.errors(tenants),
        methods={name: method.errors(tenants) for name, method in sums.items()},
    )


class _Sums:
    """What one method gave and should have given, summed over the compared steps."""

    def __init__(self, requests: int) -> None:
        self.given_ns = np.zeros(requests)
        self.true_ns = np.zeros(requests)
        self.step_ns = 0
        self.misplaced_ns = 0.0
        self.outside_ns = 0.0
        self.outside_parts = 0
        self.parts = 0

    def add(
        self, step: TraceStep, given: Floats, true: Floats, interval: tuple[Floats, Floats]
    ) -> None:
        self.given_ns[step.requests] += given
        self.true_ns[step.requests] += true
        self.step_ns += step.gpu_time_ns
        self.misplaced_ns += float(np.abs(given - true).sum()) / 2
        least, most = interval
        outside = np.maximum(least - given, given - most)
        is_outside = outside > TOLERANCE_NS + TOLERANCE_PART * most
        self.outside_ns += float(outside[is_outside].sum())
        self.outside_parts += int(is_outside.sum())
        self.parts += len(given)

    def errors(self, tenants: Ints) -> Errors:
        seen = self.true_ns > 0
        given, true, whose = self.given_ns[seen], self.true_ns[seen], tenants[seen]
        per_tenant = [
            np.bincount(whose, weights=values, minlength=len(TENANTS)) for values in (given, true)
        ]
        present = per_tenant[1] > 0
        whole_ns = max(1, self.step_ns)
        return Errors(
            request_error=Spread.of(np.abs(given / true - 1)),
            tenant_error=Spread.of(np.abs(per_tenant[0][present] / per_tenant[1][present] - 1)),
            misplaced_share=self.misplaced_ns / whole_ns,
            outside_interval_share=self.outside_ns / whole_ns,
            outside_interval_parts_share=self.outside_parts / max(1, self.parts),
            uncharged_share=1 - float(self.given_ns.sum()) / whole_ns,
        )
