"""The comparison measures the errors it says it measures, on the production meter."""

import dataclasses
import functools

import numpy as np
import pytest

from tests.unit.lab.test_truth import machine_of
from vllm_cost_meter.attribution import METHODS
from vllm_cost_meter.lab.validation.compare import (
    LeaveOneOut,
    MeterSplitter,
    Splitter,
    TraceResult,
    compare,
)
from vllm_cost_meter.lab.validation.percentiles import Percentiles
from vllm_cost_meter.lab.validation.traffic import Load, Trace, TraceStep, make_trace
from vllm_cost_meter.lab.validation.truth import StepGame, enumerated

MACHINE = machine_of()


class TruthItself:
    """A method that knows the answer; `wrong_ns` are given to the first and taken from the last."""

    def __init__(
        self,
        wrong_ns: float = 0.0,
        factor: float = 1.0,
        claimed: float | None = None,
        *,
        every_other_is_unknown: bool = False,
    ) -> None:
        self.every_other_is_unknown = every_other_is_unknown
        self.split_steps = 0
        self.fed = 0
        self.claim = claimed
        self.size = 0
        self.wrong_ns = wrong_ns
        self.factor = factor

    def feed(self, step: TraceStep) -> None:
        self.fed += 1

    def split(self, step: TraceStep, game: StepGame) -> np.ndarray:
        shares = enumerated(game) * step.gpu_time_ns / game.total_s * self.factor
        shares[0] += self.wrong_ns
        shares[-1] -= self.wrong_ns
        self.size = len(shares)
        self.split_steps += 1
        return shares

    def claimed(self) -> np.ndarray | None:
        if self.every_other_is_unknown and self.split_steps % 2:
            return np.ones(self.size)
        return None if self.claim is None else np.full(self.size, self.claim)


def test_a_claim_is_kept_by_the_requests_that_are_within_it():
    found = compared(
        kept=TruthItself(factor=0.9, claimed=0.11),
        broken=TruthItself(factor=0.9, claimed=0.09),
        silent=TruthItself(factor=0.9),
    ).methods
    assert found["kept"].within_claim_share == 1
    assert found["kept"].claimed_error.p95 == pytest.approx(0.11)
    assert found["broken"].within_claim_share == 0
    assert found["silent"].claimed_error is found["silent"].within_claim_share is None
    assert found["silent"].claimed_tenants is None


def test_a_tenants_claim_is_that_of_its_shares_and_an_unknown_one_is_no_claim():
    found = compared(
        kept=TruthItself(claimed=0.11),
        unknown=TruthItself(claimed=1.0),
        half=TruthItself(claimed=0.11, every_other_is_unknown=True),
    ).methods
    tenants = found["kept"].tenants.keys()
    assert found["kept"].claimed_tenants == pytest.approx(dict.fromkeys(tenants, 0.11))
    assert found["unknown"].claimed_tenants == {}
    # Time whose error is unknown neither raises nor lowers it.
    assert found["half"].claimed_tenants == pytest.approx(dict.fromkeys(tenants, 0.11))


@functools.cache
def small_trace() -> Trace:
    """Return a trace whose every step can be enumerated."""
    trace = make_trace(MACHINE, Load(5), 300, seed=2)
    trace.steps = [step for step in trace.steps if len(step.requests) <= 12]
    assert len(trace.steps) > 250
    return trace


def compared(every: int = 3, **splitters: Splitter) -> TraceResult:
    return compare(small_trace(), splitters, learnt=100, every=every, permutations=10, seed=1)


def test_a_method_that_is_the_truth_has_no_error():
    found = compared(it=TruthItself())
    errors = found.methods["it"]
    assert errors.request_error.max == pytest.approx(0, abs=1e-12)
    assert errors.tenant_error.max == pytest.approx(0, abs=1e-12)
    assert errors.misplaced_share == pytest.approx(0, abs=1e-12)
    assert errors.uncharged_share == pytest.approx(0, abs=1e-12)
    assert errors.outside_interval_share == found.truth.outside_interval_share
    assert found.noise.request_error.max == 0


def test_what_is_moved_from_one_request_to_another_is_misplaced():
    whole_ns = sum(step.gpu_time_ns for step in small_trace().steps[100::3])
    steps = [step for step in small_trace().steps[100::3] if len(step.requests) > 1]
    found = compared(it=TruthItself(wrong_ns=1_000_000))
    assert len(small_trace().steps) == 300
    expected = len(steps) * 1_000_000 / whole_ns
    assert found.methods["it"].misplaced_share == pytest.approx(expected, rel=1e-9)


def test_charging_a_tenth_too_little_is_an_error_of_a_tenth_for_all():
    errors = compared(it=TruthItself(factor=0.9)).methods["it"]
    for spread in (errors.request_error, errors.tenant_error):
        assert dataclasses.astuple(spread) == pytest.approx([0.1] * 3, rel=1e-9)
    assert errors.uncharged_share == pytest.approx(0.1, rel=1e-9)
    assert errors.misplaced_share == pytest.approx(0.05, rel=1e-9)


def test_the_first_steps_are_fed_and_then_every_nth_step_is_compared():
    splitter = TruthItself()
    found = compared(every=4, it=splitter)
    assert found.compared_steps == 50
    assert splitter.fed == 250


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_production_meter_charges_each_compared_step_in_full(method):
    splitter = MeterSplitter(method, small_trace())
    for number, step in enumerate(small_trace().steps):
        if number % 2:
            splitter.feed(step)
            continue
        game = MACHINE.game(step.tokens, step.positions)
        assert splitter.split(step, game).sum() == step.gpu_time_ns


def test_the_meters_shares_are_those_of_the_step_in_its_order():
    for step, game in ((s, MACHINE.game(s.tokens, s.positions)) for s in small_trace().steps[:1]):
        tokens = MeterSplitter("tokens", small_trace()).split(step, game)
        assert tokens == pytest.approx(step.gpu_time_ns * step.tokens / step.tokens.sum(), abs=1)
        equal = MeterSplitter("equal", small_trace()).split(step, game)
        assert equal == pytest.approx([step.gpu_time_ns / len(step.requests)] * len(equal), abs=1)


def test_leave_one_out_says_by_how_much_it_does_not_add_up_and_never_leaves_the_interval():
    errors = compared(it=LeaveOneOut()).methods["it"]
    assert 0.1 < errors.uncharged_share < 1
    assert errors.outside_interval_share == errors.outside_interval_parts_share == 0


def test_more_than_the_step_would_take_with_it_alone_is_outside_the_interval():
    step = small_trace().steps[100]
    game = MACHINE.game(step.tokens, step.positions)
    scale = step.gpu_time_ns / game.total_s

    class Above(TruthItself):
        def split(self, step: TraceStep, game: StepGame) -> np.ndarray:
            return game.alone_s() * scale + 500.0

    class Below(TruthItself):
        def split(self, step: TraceStep, game: StepGame) -> np.ndarray:
            return game.marginal_s() * scale - 300.0

    trace = dataclasses.replace(small_trace(), steps=[step])
    found = compare(
        trace, {"a": Above(), "b": Below()}, learnt=0, every=1, permutations=2, seed=1
    ).methods
    for name, wrong_ns in (("a", 500), ("b", 300)):
        expected = wrong_ns * len(step.requests) / step.gpu_time_ns
        assert found[name].outside_interval_share == pytest.approx(expected, rel=1e-6)
        assert found[name].outside_interval_parts_share == 1


def test_the_noise_of_a_sampled_truth_is_stated():
    trace = make_trace(MACHINE, Load(30), 300, seed=1)
    rough, fine = (
        compare(trace, {}, learnt=100, every=2, permutations=count, seed=1).noise
        for count in (4, 400)
    )
    assert 0 < fine.request_error.p95 < rough.request_error.p95 / 3
    assert 0 < fine.misplaced_share < rough.misplaced_share


def test_each_step_is_announced():
    seen = []
    compare(
        small_trace(),
        {},
        learnt=100,
        every=50,
        permutations=2,
        seed=1,
        on_step=lambda: seen.append(1),
    )
    assert len(seen) == len(small_trace().steps)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], (None, None, None)),
        ([3.0], (3.0, 3.0, 3.0)),
        ([3.0, 1.0], (2.0, 2.9, 3.0)),
        (range(101), (50.0, 95.0, 100.0)),
    ],
)
def test_percentiles_are_interpolated(values, expected):
    assert dataclasses.astuple(Percentiles.of(values)) == pytest.approx(expected)
