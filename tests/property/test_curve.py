"""Goal: by a curve, a step's charges are Shapley values, by the definition and by the axioms.

Method: random curves and batches. Up to four requests the charges are compared with the average
over all orders of joining, computed the long way; above, with an exact value that is computed in
another way (by the distribution of what is there, `lab/validation/kernel_truth.py`).
"""

import itertools
import random
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.definitions import shapley_values
from vllm_cost_meter.attribution import _native
from vllm_cost_meter.attribution.cost_model import TokenCurve
from vllm_cost_meter.attribution.curve_py import (
    CURVE_TERMS,
    ENUMERATED_MAX,
    KNOTS,
    SLOPES,
    CurveGame,
    CurveWork,
    Layers,
    all_of,
    charges_by_curve,
    height,
    solve_curve,
    step_ns,
)
from vllm_cost_meter.attribution.shapley_py import WEIGHT_SUM
from vllm_cost_meter.lab.validation.kernel_truth import total_shares

COEFFICIENT = st.just(0.0) | st.floats(1e-3, 1e4)
CURVES = st.tuples(*[COEFFICIENT] * CURVE_TERMS)
LAYERS = Layers(8, 40, 1024)
DECODES = st.builds(
    lambda drafts, context: CurveWork.of(drafts, context + drafts, False, LAYERS),
    st.sampled_from([1, 1, 1, 4]),
    st.integers(1, 8192),
)
CHUNKS = st.builds(
    lambda tokens, before: CurveWork.of(tokens, before + tokens, True, LAYERS),
    st.integers(1, 2048),
    st.integers(0, 8192),
)
WORKS = DECODES | CHUNKS


def value(curve: TokenCurve, works: tuple[CurveWork, ...]) -> float:
    """Return the time of a step with these requests only."""
    return step_ns(curve, all_of(works)) if works else 0.0


def charges_of(game: CurveGame, curve: TokenCurve, works: list[CurveWork]) -> list[float]:
    """Return the charges in ns of the model: weights are these, rounded."""
    return [weight * game.total_ns / WEIGHT_SUM for weight in game.weigh(curve, works)]


@given(CURVES, st.lists(WORKS, min_size=1, max_size=ENUMERATED_MAX))
def test_few_requests_are_charged_their_exact_shapley_values(curve, works):
    game = solve_curve(curve, works)
    assume(game.total_ns > 0)
    expected = shapley_values(partial(value, curve), works)
    for charge, exact in zip(charges_of(game, curve, works), expected, strict=True):
        assert charge == pytest.approx(exact, abs=2e-9 * game.total_ns)


@given(CURVES, st.lists(WORKS, min_size=1, max_size=60))
def test_charges_add_up_to_the_time_of_the_step(curve, works):
    game = solve_curve(curve, works)
    assume(game.total_ns > 0)
    assert sum(charges_of(game, curve, works)) == pytest.approx(game.total_ns, rel=1e-6)


@given(CURVES, st.lists(WORKS, min_size=1, max_size=30), st.data())
def test_equals_are_charged_equally(curve, works, data):
    twice = data.draw(st.sampled_from(works))
    works = [*works, twice, twice]
    weights = solve_curve(curve, works).weigh(curve, works)
    charges = {w for w, work in zip(weights, works, strict=True) if work == twice}
    assert max(charges) - min(charges) <= 1e-6 * WEIGHT_SUM


@given(CURVES, st.lists(WORKS, min_size=1, max_size=40), st.integers(1, 10**10))
def test_the_marginal_cost_is_what_the_step_takes_more_than_without_the_request(
    curve, works, gpu_ns
):
    game = solve_curve(curve, works)
    assume(game.total_ns > 0)
    for i, margin in enumerate(game.margins(curve, works, float(gpu_ns))):
        added = game.total_ns - value(curve, tuple(works[:i] + works[i + 1 :]))
        assert margin == pytest.approx(added * gpu_ns / game.total_ns, abs=1e-6 * gpu_ns)


# h where 8 of 128 experts are read for each token, and where products become a limit at 256 tokens.
READS = [1e5 * (1 - (1 - 8 / 128) ** knot) for knot in KNOTS]
EXPERTS = [
    (after - before) / (KNOTS[place + 1] - KNOTS[place])
    for place, (before, after) in enumerate(itertools.pairwise(READS))
] + [0.0]
DENSE = [20.0 if knot < 256 else 2e4 for knot in KNOTS]


@pytest.mark.parametrize("slopes", [EXPERTS, DENSE], ids=["experts", "dense"])
@pytest.mark.parametrize(
    ("sizes", "prefills"), [((2000,), 1), ((500, 700), 3), ((4, 40, 256, 1500), 8), ((32, 100), 40)]
)
def test_among_many_requests_charges_miss_their_shapley_value_by_little(slopes, sizes, prefills):
    curve = (0.0,) * SLOPES + tuple(slopes)
    rng = random.Random(prefills)
    for _ in range(5):
        tokens = [1] * rng.randint(20, 200) + rng.choices(sizes, k=prefills)
        works = [CurveWork.of(t, t, t > 1, Layers()) for t in tokens]
        table = np.array([height(curve, float(at)) for at in range(sum(tokens) + 1)])
        exact = total_shares(np.array(tokens), table)
        found = np.array(charges_of(solve_curve(curve, works), curve, works))
        assert found == pytest.approx(exact, rel=0.15)
        assert np.abs(found - exact).sum() / 2 < 0.02 * exact.sum()


PARTS = st.builds(
    lambda tokens, before, is_prefill: (tokens, before + tokens, is_prefill),
    st.sampled_from([1, 1, 1, 4]) | st.integers(1, 2048),
    st.integers(0, 70_000),
    st.booleans(),
)


@given(
    CURVES,
    st.lists(PARTS, min_size=1, max_size=90),
    st.sampled_from([(1, 0, 0), (8, 40, 1024), (0, 1, 7)]),
    st.integers(0, 2**62),
)
def test_native_and_twin_charge_the_same_to_the_last_bit(curve, parts, layers, gpu_ns):
    expected = charges_by_curve(curve, parts, layers, float(gpu_ns))
    assert _native.charges_by_curve(curve, parts, layers, float(gpu_ns)) == expected


def test_a_window_bounds_what_is_read_and_computed():
    layers = Layers(whole=1, windowed=2, window=10)
    decode = CurveWork.of(1, 100, False, layers)
    assert decode.read == 100 + 2 * 11
    chunk = CurveWork.of(4, 100, True, layers)
    assert chunk.prefill_read == 100 + 2 * 14
    # Token by token: what each of the four sees.
    whole, windowed = 97 + 98 + 99 + 100, 11 + 12 + 13 + 14
    assert chunk.pairs == whole + 2 * windowed
