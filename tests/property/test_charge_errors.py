"""Goal: what the meter says of how wrong a bill may be is true, and never too proud.

Method: machines whose split is known step by step. Bills of requests that live for many steps are
compared with the truth, and must be within the error that the meter itself names. Where the traffic
cannot tell coefficients apart, that error must be large; where nobody looked, unknown.
"""

import random
from functools import cache
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.property.test_fit import DENSE, KERNELS, prior_of, slower, time_on
from vllm_cost_meter.attribution import StepMeter
from vllm_cost_meter.attribution.cost_model import (
    CHARGE_KIND_NAMES,
    CHARGE_KINDS,
    DECODE_KINDS,
    FIXED,
    PREFILL_KINDS,
    SEQUENCE,
    PhaseErrors,
    ServedModel,
    charge_kind,
)
from vllm_cost_meter.attribution.features_py import StepPart
from vllm_cost_meter.attribution.game_py import StepModel, solve_step
from vllm_cost_meter.attribution.priors import NOTHING_KNOWN, Prior

CHAT = CHARGE_KIND_NAMES.index("decode_to_4096_context")


class Server:
    """A simulated engine: each step it decodes who is there, and prefills who came."""

    def __init__(self, prior: Prior, seed: int, batch: tuple[int, int] = (4, 40)) -> None:
        self.meter = StepMeter("shapley", prior)
        self.machine = KERNELS
        self._rng = random.Random(seed)
        self._batch = batch
        self._numbers = count()
        self._alive: dict[str, list[int]] = {}  # position, and tokens left to decode
        self.bills: list[tuple[float, float, float | None]] = []  # charged, true, error
        self._true: dict[str, float] = {}

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._step(self._arrivals())

    def _arrivals(self) -> list[tuple[str, int]]:
        wanted = self._rng.randint(*self._batch)
        come = []
        if len(self._alive) < wanted and self._rng.random() < 0.3:
            name, prompt = f"r{next(self._numbers)}", self._rng.choice([20, 100, 300, 900])
            self.meter.open(name, prompt)
            self.meter.position(name, 0, False)
            self._alive[name] = [0, self._rng.randint(5, 80), prompt]
            come.append((name, prompt))
        return come

    def _step(self, come: list[tuple[str, int]]) -> None:
        tokens = dict.fromkeys(self._alive, 1) | dict(come)
        if not tokens:
            return
        parts: list[StepPart] = []
        for name, n in tokens.items():
            position = self._alive[name][0]
            parts.append(StepPart(n, position + n, position < self._alive[name][2]))
        gpu_ns = int(time_on(self.machine, parts) * self._rng.gauss(1, 0.02))
        truth = solve_step(self.machine, parts).weigh()
        for name, weight in zip(tokens, truth, strict=True):
            self._true[name] = self._true.get(name, 0.0) + gpu_ns * weight / sum(truth)
        self.meter.settle(self.meter.begin(tokens, 0), gpu_ns)
        for name, n in tokens.items():
            alive = self._alive[name]
            alive[0] += n
            alive[1] -= 1
            if alive[1] < 0:
                self._end(name)

    def _end(self, name: str) -> None:
        position, _, prompt = self._alive.pop(name)
        used = self.meter.close(name, 0)
        errors = PhaseErrors.of(self.meter.model().charge_errors, prompt, position)
        charged, phases = used.prefill_ns + used.decode_ns, (used.prefill_ns, used.decode_ns)
        error = errors.gpu_ns(*phases) / charged if errors.are_known(*phases) else None
        self.bills.append((charged, self._true.pop(name), error))


@pytest.mark.parametrize("prior", [prior_of(DENSE), NOTHING_KNOWN], ids=["of counts", "none"])
def test_nine_of_ten_bills_are_within_the_error_that_the_meter_names(prior):
    claims = claims_of(prior)
    assert len(claims) > 90
    assert sum(abs(apart) <= error for apart, error in claims) >= 0.9 * len(claims)


def test_with_a_prior_the_error_says_something():
    """A claim that is always kept, as it is always wide, would be worth nothing."""
    errors = sorted(error for _, error in claims_of(prior_of(DENSE)))
    assert errors[len(errors) // 2] < 0.15


@cache
def claims_of(prior: Prior) -> list[tuple[float, float]]:
    """Return how far bills are off, and how far they may be, once the meter has learnt."""
    server = Server(prior, seed=1)
    server.run(1500)
    server.bills.clear()
    server.run(1500)
    return [(charged / true - 1, error) for charged, true, error in server.bills if error]


def test_before_anybody_looked_every_error_is_unknown():
    meter = StepMeter("shapley", prior_of(DENSE))
    assert meter.model().charge_errors == (1.0,) * CHARGE_KINDS


def test_kinds_of_work_that_never_came_have_no_known_error():
    server = Server(prior_of(DENSE), seed=2)
    server.run(1500)
    errors = dict(zip(CHARGE_KIND_NAMES, server.meter.model().charge_errors, strict=True))
    assert errors["decode_beyond"] == 1.0
    assert errors["decode_to_4096_context"] < 1.0
    assert errors["prefill_beyond"] < 1.0


def test_who_knows_less_names_larger_errors():
    known, unknown = (
        sorted(error for _, error in claims_of(prior)) for prior in (prior_of(DENSE), NOTHING_KNOWN)
    )
    assert unknown[len(unknown) // 2] > 2 * known[len(known) // 2]


def test_after_a_change_of_the_machine_errors_are_unknown_until_somebody_looked_again():
    server = Server(prior_of(DENSE), seed=4)
    server.run(3000)
    version = server.meter.model_version
    assert server.meter.model().charge_errors[CHAT] < 1.0
    server.machine = StepModel.of_curve(slower(DENSE, (FIXED, SEQUENCE), 3.0), ServedModel())
    seen = []
    for _ in range(1000):
        server.run(1)
        seen.append(server.meter.model().charge_errors[CHAT])
    assert server.meter.model_version > version
    assert 1.0 in seen
    assert seen[-1] < 1.0


@given(st.integers(0, 40_000), st.integers(0, 200_000), st.booleans())
def test_every_charge_has_one_kind_and_larger_work_a_later_one(tokens, context, is_prefill):
    kind = charge_kind(tokens, context, is_prefill)
    bounds = PREFILL_KINDS if is_prefill else DECODE_KINDS
    size = tokens if is_prefill else context
    assert kind - (0 if is_prefill else len(PREFILL_KINDS) + 1) == sum(size > b for b in bounds)
    assert 0 <= kind < CHARGE_KINDS == len(CHARGE_KIND_NAMES)


def test_the_error_of_a_bill_is_that_of_its_phases_by_their_time():
    errors = (1.0, 0.4, 0.2, 0.04, 0.1, 0.3, 1.0)
    assert PhaseErrors.of(errors, 4000, 5000).gpu_ns(300, 700) == 300 * 0.04 + 700 * 0.3
    assert PhaseErrors.of(errors, 100, 100).gpu_ns(300, 0) == 300 * 0.4
    assert not PhaseErrors.of(errors, 20, 100).are_known(300, 700)
    assert not PhaseErrors.of(errors, 100, 100_000).are_known(300, 700)
    assert PhaseErrors.of(errors, 20, 100).are_known(0, 700)
    assert PhaseErrors.of(errors, 100, 100_000).are_known(300, 0)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**62), st.integers(0, 2**62))
def test_no_more_than_all_of_a_bill_may_be_misplaced(prefill, decode, prefill_ns, decode_ns):
    misplaced_ns = PhaseErrors(prefill, decode).gpu_ns(prefill_ns, decode_ns)
    assert 0 <= misplaced_ns <= prefill_ns + decode_ns
