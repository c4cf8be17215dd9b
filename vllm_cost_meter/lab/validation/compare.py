"""Compare each attribution method with the truth, step by step, over one simulated trace.

The production StepMeter is driven through its public methods, with the engine's calls in the
engine's order, and learns from every step (if its method learns). The first steps of the trace are
fed and not compared; after that every n-th step is compared. The true shares are scaled to the
measured time, which has noise. So an error is about how a method divides a step, not about the
step's time.

All errors are fractions. Let s be the share that a method gives a request in a step, and t the true
share, both in ns and summed over the compared steps:

- `request_error`: |sum of s / sum of t - 1| for each request; `tenant_error`: the same for tenants,
  and `tenants`: by name and with its sign.
- `misplaced_share`: the time that would have to move from one request to another, as a fraction of
  all GPU time. It is half the sum of |s - t| over all parts of all steps.
- `outside_interval_share`: the GPU time by which shares lie outside their interval, as a fraction
  of all GPU time. A request should pay at least what it adds to the step, v(N) - v(N without it),
  and at most the time of a step with it alone, v({it}). `outside_interval_parts_share` is the
  fraction of parts (a request in a step) that lie outside.
- `claimed_error`: the part by which the rule itself says that a request may be off
  (`charge_error_py.py`), and `within_claim_share`: the fraction of requests that are within it.
- `claimed_tenants`: the same part for each tenant, by name: the sum of its shares' claims, as
  statements have it (`reports/charges.py`); a tenant without any known claim has none.
- `uncharged_share`: GPU time that nobody is charged for, as a fraction of all GPU time. It is
  negative if more is charged than was measured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vllm_cost_meter.attribution import StepMeter
from vllm_cost_meter.attribution.cost_model import charge_kind
from vllm_cost_meter.attribution.priors import NOTHING_KNOWN, Prior
from vllm_cost_meter.lab.validation.games import Floats, Ints, SimulatedGame
from vllm_cost_meter.lab.validation.percentiles import Percentiles
from vllm_cost_meter.lab.validation.traffic import Trace, TraceStep

# Shares are whole nanoseconds, and the ends of an interval have floating-point errors.
TOLERANCE_NS = 1.0
TOLERANCE_PART = 1e-9


class Splitter(Protocol):
    """A rule that divides steps: a method of the meter, or another rule."""

    def feed(self, step: TraceStep) -> None:
        """Take in a step that is not compared."""

    def split(self, step: TraceStep, game: SimulatedGame) -> Floats:
        """Return the step's shares in ns, in the step's order; shape (n,)."""

    def claimed(self) -> Floats | None:
        """Return the part by which each share of the last split may be off, by the rule itself.

        The shape is (n,). None if the rule does not say.
        """


class MeterSplitter:
    """A method of the production StepMeter, driven with the engine's calls."""

    def __init__(self, method: str, trace: Trace, prior: Prior = NOTHING_KNOWN) -> None:
        self._meter = StepMeter(method, prior)
        self._trace = trace
        self._ids = [f"request-{number}" for number in range(len(trace.tenants))]
        self._claimed: Floats | None = None

    def feed(self, step: TraceStep) -> None:
        self._settle(step)
        self._close(step)

    def split(self, step: TraceStep, game: SimulatedGame) -> Floats:
        self._meter.cut(0)
        self._settle(step)
        shares = {name: used.prefill_ns + used.decode_ns for name, used in self._meter.cut(0)}
        self._close(step)
        return np.array([shares.get(self._ids[number], 0) for number in step.requests], dtype=float)

    def claimed(self) -> Floats | None:
        return self._claimed

    def _settle(self, step: TraceStep) -> None:
        for number in step.started:
            tenant = self._trace.tenant_of(number)
            self._meter.open(
                self._ids[number],
                self._trace.prompt_tokens[number],
                tenant.adapter > 0,
                tenant.has_grammar,
            )
            self._meter.position(self._ids[number], self._trace.first_positions[number], False)
        ids = [self._ids[number] for number in step.requests]
        encoded = {}
        if step.features is not None:
            encoded = dict(zip(ids, step.features.encoded.tolist(), strict=True))
        tokens = dict(zip(ids, step.tokens.tolist(), strict=True))
        begun = self._meter.begin(tokens, 0, None, encoded)
        errors = self._meter.model().charge_errors
        self._claimed = np.array(
            [
                errors[charge_kind(tokens, position + tokens, position < prefill_end)]
                for _, tokens, position, prefill_end in self._meter.step_parts(begun)
            ]
        )
        rejected = dict(zip(ids, step.rejected.tolist(), strict=True))
        self._meter.settle(begun, step.gpu_time_ns, rejected if any(rejected.values()) else None)

    def _close(self, step: TraceStep) -> None:
        for number in step.ended:
            self._meter.close(self._ids[number], 0)


class LeaveOneOut:
    """Charges each request what it adds, v(N) - v(N without it). The shares miss the step's sum."""

    def feed(self, step: TraceStep) -> None:
        pass

    def split(self, step: TraceStep, game: SimulatedGame) -> Floats:
        return game.marginal_s() * (step.gpu_time_ns / game.total_s)

    def claimed(self) -> Floats | None:
        return None


@dataclass(frozen=True, slots=True)
class Errors:
    """A method's errors against the truth; the module's docstring defines each figure."""

    request_error: Percentiles
    tenant_error: Percentiles
    tenants: dict[str, float]
    misplaced_share: float
    outside_interval_share: float
    outside_interval_parts_share: float
    uncharged_share: float
    claimed_error: Percentiles | None = None
    within_claim_share: float | None = None
    claimed_tenants: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Noise:
    """The truth's own error: half the difference between two independent halves of it."""

    request_error: Percentiles
    tenant_error: Percentiles
    misplaced_share: float


@dataclass(frozen=True, slots=True)
class TraceResult:
    """The results on one trace. `truth` has the same figures for the truth itself."""

    compared_steps: int
    compared_requests: int
    noise: Noise
    truth: Errors
    methods: dict[str, Errors]


def compare(
    trace: Trace,
    splitters: Mapping[str, Splitter],
    *,
    learnt: int,
    every: int,
    permutations: int,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> TraceResult:
    """Drive all splitters over the trace and compare every `every`-th step after `learnt` steps.

    The truth is the mean of two independent halves, each from `permutations` random orders; it is
    exact for steps with few requests. `on_step` is called after each step.
    """
    rng = np.random.default_rng([seed, 1])
    tenants = np.array(trace.tenants)
    sums = {name: _Sums(len(tenants)) for name in (*splitters, "", "halves")}
    names = [tenant.name for tenant in trace.load.tenants]
    compared = 0
    for number, step in enumerate(trace.steps):
        if number < learnt or (number - learnt) % every:
            for splitter in splitters.values():
                splitter.feed(step)
        else:
            compared += 1
            game = trace.game(number)
            to_ns = step.gpu_time_ns / game.total_s
            halves = [game.shapley(permutations, rng) * to_ns for _ in range(2)]
            true = (halves[0] + halves[1]) / 2
            interval = (game.marginal_s() * to_ns, game.alone_s() * to_ns)
            sums[""].add(step, true, true, interval)
            # Their mean differs from either half by half their difference.
            sums["halves"].add(step, halves[0], true, interval)
            for name, splitter in splitters.items():
                given = splitter.split(step, game)
                sums[name].add(step, given, true, interval, splitter.claimed())
        on_step()
    truth = sums.pop("")
    halves_of_truth = sums.pop("halves").errors(tenants, names)
    return TraceResult(
        compared_steps=compared,
        compared_requests=int((truth.true_ns > 0).sum()),
        noise=Noise(
            halves_of_truth.request_error,
            halves_of_truth.tenant_error,
            halves_of_truth.misplaced_share,
        ),
        truth=truth.errors(tenants, names),
        methods={name: method.errors(tenants, names) for name, method in sums.items()},
    )


class _Sums:
    """One method's shares and the true shares, summed over the compared steps."""

    def __init__(self, requests: int) -> None:
        self.given_ns = np.zeros(requests)
        self.true_ns = np.zeros(requests)
        self.claimed_ns = np.zeros(requests)
        # Of the shares whose error is known.
        self.known_ns = np.zeros(requests)
        self.known_error_ns = np.zeros(requests)
        self.claims = False
        self.step_ns = 0
        self.misplaced_ns = 0.0
        self.outside_ns = 0.0
        self.outside_parts = 0
        self.parts = 0

    def add(
        self,
        step: TraceStep,
        given: Floats,
        true: Floats,
        interval: tuple[Floats, Floats],
        claimed: Floats | None = None,
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
        if claimed is not None:
            self.claims = True
            self.claimed_ns[step.requests] += claimed * given
            is_known = claimed < 1
            self.known_ns[step.requests] += given * is_known
            self.known_error_ns[step.requests] += claimed * given * is_known

    def errors(self, tenants: Ints, names: Sequence[str]) -> Errors:
        seen = self.true_ns > 0
        given, true, whose = self.given_ns[seen], self.true_ns[seen], tenants[seen]
        per_tenant = [
            np.bincount(whose, weights=values, minlength=len(names)) for values in (given, true)
        ]
        signed = {
            name: float(given_ns / true_ns - 1)
            for name, given_ns, true_ns in zip(names, *per_tenant, strict=True)
            if true_ns
        }
        whole_ns = max(1, self.step_ns)
        return Errors(
            request_error=Percentiles.of(np.abs(given / true - 1)),
            tenant_error=Percentiles.of(map(abs, signed.values())),
            tenants=signed,
            misplaced_share=self.misplaced_ns / whole_ns,
            outside_interval_share=self.outside_ns / whole_ns,
            outside_interval_parts_share=self.outside_parts / max(1, self.parts),
            uncharged_share=1 - float(self.given_ns.sum()) / whole_ns,
            **self._claims(seen),
            **self._tenants_claims(tenants, names),
        )

    def _tenants_claims(self, tenants: Ints, names: Sequence[str]) -> dict[str, Any]:
        if not self.claims:
            return {}
        known, errors = (
            np.bincount(tenants, weights=values, minlength=len(names))
            for values in (self.known_ns, self.known_error_ns)
        )
        pairs = zip(names, known, errors, strict=True)
        return {"claimed_tenants": {name: float(off / ns) for name, ns, off in pairs if ns}}

    def _claims(self, seen: "np.ndarray[Any, np.dtype[np.bool_]]") -> dict[str, Any]:
        given, true = self.given_ns[seen], self.true_ns[seen]
        has_claim = given > 0
        if not self.claims or not has_claim.any():
            return {}
        claimed = self.claimed_ns[seen][has_claim] / given[has_claim]
        errors = np.abs(given / true - 1)[has_claim]
        return {
            "claimed_error": Percentiles.of(claimed),
            "within_claim_share": float(np.mean(errors <= claimed)),
        }
