"""Goal: a step's charges by two planes are Shapley values, by the axioms and by enumeration.

Method: random planes and batches. Up to five requests the charges are compared with the average
over all orders of joining, computed the long way; above, with the same over enumerated subsets, to
the bound that docs/explanation/attribution.md states, and with the axioms. Native and twin are
compared in test_attribution.py; here the twin is the theory.
"""

import random
from functools import partial

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.definitions import shapley_values
from vllm_cost_meter.attribution.cost_model import Plane
from vllm_cost_meter.attribution.features_py import StepPart
from vllm_cost_meter.attribution.game_py import (
    WEIGHT_SUM,
    SolvedStep,
    StepModel,
    solve_step,
)
from vllm_cost_meter.attribution.planes_py import Work, time_of
from vllm_cost_meter.attribution.shapley_py import LARGE_MAX

COEFFICIENT = st.just(0.0) | st.floats(1e-3, 1e4)
COMPUTE = st.tuples(COEFFICIENT, COEFFICIENT, COEFFICIENT, COEFFICIENT, st.just(0.0))
MEMORY = st.tuples(COEFFICIENT, COEFFICIENT, COEFFICIENT, st.just(0.0), COEFFICIENT)
DECODES = st.builds(lambda context: (1, context, False), st.integers(1, 8192))
CHUNKS = st.builds(
    lambda tokens, before: (tokens, before + tokens, True),
    st.integers(2, 2048),
    st.integers(0, 8192),
)
PARTS = DECODES | CHUNKS


def value(compute: Plane, memory: Plane, parts: tuple[StepPart, ...]) -> float:
    """Return the time of a step with these requests only."""
    if not parts:
        return 0.0
    works = [Work.of(tokens, context) for tokens, context, _ in parts]
    return max(
        compute[0] + sum(time_of(compute, work) for work in works),
        memory[0] + sum(time_of(memory, work) for work in works),
    )


def game_of(compute: Plane, memory: Plane, parts: list[StepPart]) -> SolvedStep:
    return solve_step(StepModel.of_planes(compute, memory), parts)


def charges_of(game: SolvedStep) -> list[float]:
    """Return the charges in ns of the model: weights are these, rounded."""
    return [weight * game.total_ns / WEIGHT_SUM for weight in game.weigh()]


@given(COMPUTE, MEMORY, st.lists(PARTS, min_size=1, max_size=LARGE_MAX))
def test_few_requests_are_charged_their_exact_shapley_values(compute, memory, parts):
    game = game_of(compute, memory, parts)
    assume(game.total_ns > 0)
    expected = shapley_values(partial(value, compute, memory), parts)
    for charge, exact in zip(charges_of(game), expected, strict=True):
        assert charge == pytest.approx(exact, abs=2e-9 * game.total_ns)


@given(COMPUTE, MEMORY, st.lists(PARTS, min_size=1, max_size=60))
def test_charges_add_up_to_the_time_of_the_step(compute, memory, parts):
    game = game_of(compute, memory, parts)
    assume(game.total_ns > 0)
    assert sum(charges_of(game)) == pytest.approx(game.total_ns, rel=1e-6)


@given(COMPUTE, MEMORY, st.lists(PARTS, min_size=1, max_size=30), st.data())
def test_equals_are_charged_equally(compute, memory, parts, data):
    twice = data.draw(st.sampled_from(parts))
    parts = [*parts, twice, twice]
    weights = game_of(compute, memory, parts).weigh()
    charges = {weight for weight, part in zip(weights, parts, strict=True) if part == twice}
    assert max(charges) - min(charges) <= 1e-6 * WEIGHT_SUM


@given(COMPUTE, MEMORY, st.lists(PARTS, min_size=1, max_size=40), st.integers(1, 10**10))
def test_the_marginal_cost_is_what_the_step_takes_more_than_without_the_request(
    compute, memory, parts, gpu_ns
):
    game = game_of(compute, memory, parts)
    assume(game.total_ns > 0)
    for i, margin in enumerate(game.margins(float(gpu_ns))):
        added = game.total_ns - value(compute, memory, tuple(parts[:i] + parts[i + 1 :]))
        assert margin == pytest.approx(added * gpu_ns / game.total_ns, abs=1e-6 * gpu_ns)


@pytest.mark.parametrize("seed", range(12))
def test_small_players_as_an_ocean_miss_their_shapley_value_by_little(seed):
    # A step near the ridge of the roofline, where the ocean is at its worst: decodes are all that
    # the memory side has, chunks reach over the compute side.
    rng = random.Random(seed)
    decodes, chunks = rng.randint(5, 8), rng.randint(0, 3)
    compute = (rng.uniform(0, 100), 1.0, 0.3, 0.001, 0.0)
    memory = (rng.uniform(0, 800), 0.05, 0.1, 0.0, rng.uniform(0, 0.1))
    parts = [(1, rng.randint(1, 500), False) for _ in range(decodes)]
    parts += [(t, t + rng.randint(0, 500), True) for t in rng.choices([50, 300], k=chunks)]
    game = game_of(compute, memory, parts)
    expected = shapley_values(partial(value, compute, memory), parts)
    for charge, exact in zip(charges_of(game), expected, strict=True):
        assert charge == pytest.approx(exact, abs=0.02 * game.total_ns)


def test_a_few_long_contexts_among_short_ones_are_no_ocean():
    # 32 decodes with short contexts, 4 with long ones, and a chunk: either side may be on top.
    compute, memory = (0.0, 30.0, 0.0, 0.01, 0.0), (0.0, 0.0, 0.0, 0.0, 1.0)
    parts = [(1, 500, False)] * 5 + [(1, 60_000, False)] * 4 + [(2048, 4096, True)]
    game = game_of(compute, memory, parts)
    expected = shapley_values(partial(value, compute, memory), parts)
    for charge, exact in zip(charges_of(game), expected, strict=True):
        assert charge == pytest.approx(exact, abs=0.01 * game.total_ns)
