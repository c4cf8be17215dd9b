"""Goal: a step's charges are Shapley values, by the axioms and by enumeration.

Method: random planes and batches. Up to four requests the charges are compared with the average
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
from vllm_cost_meter.attribution.cost_model_py import ZERO, Work, time_of
from vllm_cost_meter.attribution.shapley_py import LARGE_MAX, WEIGHT_SUM, Game, solve_game

COEFFICIENT = st.just(0.0) | st.floats(1e-3, 1e4)
COMPUTE = st.tuples(COEFFICIENT, COEFFICIENT, COEFFICIENT, COEFFICIENT, st.just(0.0))
MEMORY = st.tuples(COEFFICIENT, COEFFICIENT, COEFFICIENT, st.just(0.0), COEFFICIENT)
DECODES = st.builds(lambda context: Work.of(1, context), st.integers(1, 8192))
CHUNKS = st.builds(
    lambda tokens, before: Work.of(tokens, before + tokens),
    st.integers(2, 2048),
    st.integers(0, 8192),
)


def value(compute: Plane, memory: Plane, works: tuple[Work, ...]) -> float:
    """Return the time of a step with these requests only."""
    if not works:
        return 0.0
    return max(
        compute[0] + sum(time_of(compute, work) for work in works),
        memory[0] + sum(time_of(memory, work) for work in works),
    )


def charges_of(game: Game, compute: Plane, memory: Plane, works: list[Work]) -> list[float]:
    """Return the charges in ns of the model: weights are these, rounded."""
    return [w * game.total_ns / WEIGHT_SUM for w in game.weigh(compute, memory, works)]


@given(COMPUTE, MEMORY, st.lists(DECODES | CHUNKS, min_size=1, max_size=LARGE_MAX))
def test_up_to_four_requests_are_charged_their_exact_shapley_values(compute, memory, works):
    game = solve_game(compute, memory, works)
    assume(game.total_ns > 0)
    expected = shapley_values(partial(value, compute, memory), works)
    for charge, exact in zip(charges_of(game, compute, memory, works), expected, strict=True):
        assert charge == pytest.approx(exact, abs=2e-9 * game.total_ns)


@given(COMPUTE, MEMORY, st.lists(DECODES | CHUNKS, min_size=1, max_size=60))
def test_charges_add_up_to_the_time_of_the_step(compute, memory, works):
    game = solve_game(compute, memory, works)
    assume(game.total_ns > 0)
    total = sum(charges_of(game, compute, memory, works))
    assert total == pytest.approx(game.total_ns, rel=1e-6)


@given(COMPUTE, MEMORY, st.lists(DECODES | CHUNKS, min_size=1, max_size=30), st.data())
def test_equals_are_charged_equally(compute, memory, works, data):
    twice = data.draw(st.sampled_from(works))
    works = [*works, twice, twice]
    game = solve_game(compute, memory, works)
    charges = {
        w
        for w, work in zip(game.weigh(compute, memory, works), works, strict=True)
        if work == twice
    }
    assert max(charges) - min(charges) <= 1e-6 * WEIGHT_SUM


@given(COMPUTE, st.lists(DECODES | CHUNKS, min_size=1, max_size=60))
def test_by_one_plane_a_request_is_charged_its_own_time_and_an_equal_part_of_the_base(
    compute, works
):
    game = solve_game(compute, ZERO, works)
    assume(game.total_ns > 0)
    for charge, work in zip(charges_of(game, compute, ZERO, works), works, strict=True):
        expected = compute[0] / len(works) + time_of(compute, work)
        assert charge == pytest.approx(expected, abs=2e-9 * game.total_ns)


@given(COMPUTE, MEMORY, st.lists(DECODES | CHUNKS, min_size=1, max_size=40), st.integers(1, 10**10))
def test_the_marginal_cost_is_what_the_step_takes_more_than_without_the_request(
    compute, memory, works, gpu_ns
):
    game = solve_game(compute, memory, works)
    assume(game.total_ns > 0)
    margins = game.margins(compute, memory, works, float(gpu_ns))
    for i, margin in enumerate(margins):
        rest = tuple(works[:i] + works[i + 1 :])
        added = game.total_ns - value(compute, memory, rest)
        assert margin == pytest.approx(added * gpu_ns / game.total_ns, abs=1e-6 * gpu_ns)


@pytest.mark.parametrize("seed", range(12))
def test_small_players_as_an_ocean_miss_their_shapley_value_by_little(seed):
    # A step near the ridge of the roofline, where the ocean is at its worst: decodes are all that
    # the memory side has, chunks reach over the compute side.
    rng = random.Random(seed)
    decodes, chunks = rng.randint(5, 8), rng.randint(0, 3)
    compute = (rng.uniform(0, 100), 1.0, 0.3, 0.001, 0.0)
    memory = (rng.uniform(0, 800), 0.05, 0.1, 0.0, rng.uniform(0, 0.1))
    works = [Work.of(1, rng.randint(1, 500)) for _ in range(decodes)]
    works += [Work.of(t, t + rng.randint(0, 500)) for t in rng.choices([50, 300], k=chunks)]
    game = solve_game(compute, memory, works)
    expected = shapley_values(partial(value, compute, memory), works)
    for charge, exact in zip(charges_of(game, compute, memory, works), expected, strict=True):
        assert charge == pytest.approx(exact, abs=0.02 * game.total_ns)
