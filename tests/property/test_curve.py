"""Goal: by a curve, a step's charges are Shapley values, by the definition and by the axioms.

Method: random curves and batches. Up to a few requests the charges are compared with the average
over all orders of joining, computed the long way; above, with an exact value that is computed in
another way (by the distribution of what is there, `lab/validation/kernel_truth.py`). Native and
twin are compared to the last bit.
"""

import itertools
import random
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.support.definitions import shapley_values
from tests.support.priors import COEFFICIENTS, SERVED
from vllm_cost_meter.attribution import _native, step_meter_py
from vllm_cost_meter.attribution.cost_model import (
    ENCODER,
    ENCODER_TOKEN,
    EXPERTS,
    FIT_TERMS,
    FIXED,
    GUIDED,
    GUIDED_ROW,
    KNOTS,
    LORA,
    LORA_TOKEN,
    PREFILL,
    RAMPS,
    SEQUENCE,
    SLOPES,
    Experts,
    Layers,
    ServedModel,
)
from vllm_cost_meter.attribution.curve_py import (
    CurveWork,
    all_of,
    arithmetic_ns,
    height,
    reading_ns,
)
from vllm_cost_meter.attribution.features_py import StepPart
from vllm_cost_meter.attribution.game_py import (
    WEIGHT_SUM,
    SolvedStep,
    StepModel,
    solve_step,
)
from vllm_cost_meter.attribution.growths_py import ENUMERATED_MAX, among_many
from vllm_cost_meter.attribution.priors import prior_without_counts
from vllm_cost_meter.attribution.shapley_py import LARGE_MAX
from vllm_cost_meter.lab.validation.kernel_truth import total_shares

FEATURES = st.just((False, False, 0)) | st.tuples(
    st.booleans(), st.booleans(), st.sampled_from([0, 0, 1, 700])
)
DECODES = st.builds(
    lambda drafts, context, features: StepPart(drafts, context + drafts, False, *features),
    st.sampled_from([1, 1, 1, 4]),
    st.integers(1, 8192),
    FEATURES,
)
CHUNKS = st.builds(
    lambda tokens, before, features: StepPart(tokens, before + tokens, True, *features),
    st.integers(1, 2048),
    st.integers(0, 8192),
    FEATURES,
)
PARTS = DECODES | CHUNKS
MODELS = st.builds(StepModel.of_curve, COEFFICIENTS, SERVED)
SMOOTH_MODELS = st.builds(
    lambda coefficients, served: StepModel.of_curve(coefficients, served._replace(captured=())),
    COEFFICIENTS,
    SERVED,
)


def value(model: StepModel, parts: tuple[StepPart, ...]) -> float:
    """Return the time of a step with these requests only."""
    if not parts:
        return 0.0
    curve = model.curve
    work = all_of([CurveWork.of(*part[:3], model.served.layers) for part in parts])
    own = curve[FIXED] + (curve[PREFILL] if work.prefills else 0.0)
    own += curve[SEQUENCE] * work.sequences
    having = [part for part in parts if part.has_lora]
    own += sum([curve[LORA_TOKEN] * part.tokens for part in having], curve[LORA] * bool(having))
    guided = [part for part in parts if part.is_guided]
    rows = sum(1 if part.is_prefill else part.tokens for part in guided)
    own += curve[GUIDED] * bool(guided) + curve[GUIDED_ROW] * rows
    encoded = sum(part.encoder_tokens for part in parts)
    own += curve[ENCODER] * bool(encoded) + curve[ENCODER_TOKEN] * encoded
    attention = max(arithmetic_ns(curve, work), reading_ns(curve, work))
    return own + height(curve, float(model.served.padded(work.tokens))) + attention


def charges_of(game: SolvedStep) -> list[float]:
    """Return the charges in ns of the model: weights are these, rounded."""
    return [weight * game.total_ns / WEIGHT_SUM for weight in game.weigh()]


@given(MODELS, st.lists(PARTS, min_size=1, max_size=LARGE_MAX))
def test_few_requests_are_charged_their_exact_shapley_values(model, parts):
    game = solve_step(model, parts)
    assume(game.total_ns > 0)
    expected = shapley_values(partial(value, model), parts)
    for charge, exact in zip(charges_of(game), expected, strict=True):
        assert charge == pytest.approx(exact, abs=2e-9 * game.total_ns)


@given(MODELS, st.lists(PARTS, min_size=1, max_size=60))
def test_charges_add_up_to_the_time_of_the_step(model, parts):
    game = solve_step(model, parts)
    assume(game.total_ns > 0)
    assert sum(charges_of(game)) == pytest.approx(game.total_ns, rel=1e-6)


@given(MODELS, st.lists(PARTS, min_size=1, max_size=30), st.data())
def test_equals_are_charged_equally(model, parts, data):
    twice = data.draw(st.sampled_from(parts))
    parts = [*parts, twice, twice]
    weights = solve_step(model, parts).weigh()
    charges = {weight for weight, part in zip(weights, parts, strict=True) if part == twice}
    assert max(charges) - min(charges) <= 1e-6 * WEIGHT_SUM


@given(SMOOTH_MODELS, st.lists(PARTS, min_size=1, max_size=40), st.integers(1, 10**10))
def test_the_marginal_cost_is_what_the_step_takes_more_than_without_the_request(
    model, parts, gpu_ns
):
    game = solve_step(model, parts)
    assume(game.total_ns > 0)
    for i, margin in enumerate(game.margins(float(gpu_ns))):
        added = game.total_ns - value(model, tuple(parts[:i] + parts[i + 1 :]))
        assert margin == pytest.approx(added * gpu_ns / game.total_ns, abs=1e-6 * gpu_ns)


# h where 8 of 128 experts are read for each token, and where products become a limit at 256 tokens.
EXPERTS_ONLY = (0.0,) * EXPERTS + (1e5,)
DENSE_ONLY = (0.0,) * SLOPES + tuple(20.0 if begin < 256 else 2e4 for begin in RAMPS) + (0.0,)


@pytest.mark.parametrize("coefficients", [EXPERTS_ONLY, DENSE_ONLY], ids=["experts", "dense"])
@pytest.mark.parametrize(
    ("sizes", "prefills"), [((2000,), 1), ((500, 700), 3), ((4, 40, 256, 1500), 8), ((32, 100), 40)]
)
def test_among_many_requests_charges_miss_their_shapley_value_by_little(
    coefficients, sizes, prefills
):
    model = StepModel.of_curve(coefficients, ServedModel(Experts(128, 8)))
    rng = random.Random(prefills)
    for _ in range(5):
        tokens = [1] * rng.randint(20, 200) + rng.choices(sizes, k=prefills)
        table = np.array([height(model.curve, float(at)) for at in range(sum(tokens) + 1)])
        exact = total_shares(np.array(tokens), table)
        found = np.array(charges_of(solve_step(model, [(t, t, t > 1) for t in tokens])))
        assert found == pytest.approx(exact, rel=0.15)
        assert np.abs(found - exact).sum() / 2 < 0.02 * exact.sum()


# Products flat up to 256 tokens, then steep; beside them, or alone, experts that a few tokens read.
BOTH = tuple(a + b for a, b in zip(EXPERTS_ONLY, DENSE_ONLY, strict=True))


@pytest.mark.parametrize("coefficients", [EXPERTS_ONLY, BOTH], ids=["experts", "both"])
@pytest.mark.parametrize("decodes", [1, 10, 100])
@pytest.mark.parametrize(
    ("sizes", "prefills"), [((2, 64), 200), ((30, 40, 50), 70), ((16,), 100), ((8, 100), 40)]
)
def test_decodes_beside_many_prefills_pay_for_their_own_tokens(
    coefficients, decodes, sizes, prefills
):
    """What prefills are charged is a little wrong, and that must not land on a few decodes."""
    model = StepModel.of_curve(coefficients, ServedModel(Experts(128, 8)))
    tokens = [1] * decodes + random.Random(1).choices(sizes, k=prefills)
    table = np.array([height(model.curve, float(at)) for at in range(sum(tokens) + 1)])
    exact = total_shares(np.array(tokens), table)
    found = np.array(charges_of(solve_step(model, [(t, t, t > 1) for t in tokens])))
    assert found[:decodes].sum() == pytest.approx(exact[:decodes].sum(), rel=0.25)
    assert np.abs(found - exact).sum() / 2 < 0.04 * exact.sum()


@settings(max_examples=20, deadline=None)
@given(
    COEFFICIENTS,
    st.lists(st.integers(2, 2048), min_size=1, max_size=ENUMERATED_MAX),
    st.integers(0, 400),
)
def test_a_few_lumps_get_their_mean_growth_and_decodes_all_that_is_left(coefficients, lumps, small):
    """By the definition: the mean over instants, and over what of the others is there by then."""
    curve = StepModel.of_curve(coefficients, ServedModel()).curve
    everyone = small + sum(lumps)
    token_ns, growths = among_many(curve, dict(enumerate(lumps)), everyone)
    instants = (np.arange(4_000) + 0.5) / 4_000
    table = np.interp(np.arange(everyone + 1), KNOTS, [height(curve, float(at)) for at in KNOTS])
    all_ns = height(curve, float(everyone))
    for place, lump in enumerate(lumps):
        others = lumps[:place] + lumps[place + 1 :]
        mean = 0.0
        for there in itertools.product((0, 1), repeat=len(others)):
            tokens = sum(size for size, is_there in zip(others, there, strict=True) if is_there)
            chance = instants ** sum(there) * (1 - instants) ** (len(others) - sum(there))
            before = tokens + instants * small
            places = np.arange(everyone + 1)
            grown = np.interp(before + lump, places, table) - np.interp(before, places, table)
            mean += float((chance * grown).mean())
        assert growths[place] == pytest.approx(mean, rel=1e-5, abs=1e-6 * all_ns)
    assert token_ns * small + sum(growths.values()) == pytest.approx(all_ns)


def test_batches_that_a_graph_pads_cost_what_the_padded_batch_costs():
    captured = (1, 2, 4, 8, 16, 24, 32)
    model = StepModel.of_curve(EXPERTS_ONLY, ServedModel(Experts(128, 8), captured=captured))
    of_five, of_eight = (solve_step(model, [(1, 100, False)] * count) for count in (5, 8))
    assert of_five.total_ns == pytest.approx(1e5 * 128 * (1 - (15 / 16) ** 8))
    # Beyond a few requests all sizes are met on the way, so the steps of padding are smoothed.
    around = [1e5 * 128 * (1 - (15 / 16) ** size) for size in (8, 16)]
    assert of_eight.total_ns == pytest.approx(sum(around) / 2)


@given(
    COEFFICIENTS,
    SERVED,
    st.lists(PARTS, min_size=1, max_size=90),
    st.integers(0, 2**62),
)
def test_native_and_twin_charge_the_same_to_the_last_bit(coefficients, served, parts, gpu_ns):
    accrued = []
    for meter in (
        _native.StepMeter("shapley", prior_without_counts(served)),
        step_meter_py.StepMeter("shapley", prior_without_counts(served)),
    ):
        meter.adopt(((0.0,) * 5, (0.0,) * 5), coefficients, False)
        ids = [f"cmpl-{number:032x}-0" for number in range(len(parts))]
        for request_id, part in zip(ids, parts, strict=True):
            prompt_tokens = part.context if part.is_prefill else 0
            meter.open(request_id, prompt_tokens, part.has_lora, part.is_guided)
            meter.position(request_id, part.context - part.tokens, False)
        # One token each comes in the list, as from the hook, until a part has more.
        tokens = dict(zip(ids, (part.tokens for part in parts), strict=True))
        more = next((at for at, part in enumerate(parts) if part.tokens != 1), len(parts))
        decoding = ids[:more]
        others = {name: tokens[name] for name in ids[more:]}
        encoded = {name: part.encoder_tokens for name, part in zip(ids, parts, strict=True)}
        meter.settle(meter.begin(others, 0, decoding, encoded), gpu_ns)
        accrued.append((meter.cut(0), meter.fallbacks, meter.model()))
    assert accrued[0] == accrued[1]


def test_a_window_bounds_what_is_read_and_computed():
    layers = Layers(whole=1, windowed=2, window=10)
    decode = CurveWork.of(1, 100, False, layers)
    assert decode.read == 100 + 2 * 11
    chunk = CurveWork.of(4, 100, True, layers)
    assert chunk.prefill_read == 100 + 2 * 14
    # Token by token: what each of the four sees.
    whole, windowed = 97 + 98 + 99 + 100, 11 + 12 + 13 + 14
    assert chunk.pairs == whole + 2 * windowed


def test_distinct_experts_are_those_of_a_draw():
    model = StepModel.of_curve((0.0,) * (FIT_TERMS - 1) + (1.0,), ServedModel(Experts(128, 8)))
    assert height(model.curve, 1.0) == pytest.approx(8)
    assert height(model.curve, 2.0) == pytest.approx(128 * (1 - (15 / 16) ** 2))
    assert height(model.curve, float(KNOTS[-1])) == pytest.approx(128)
