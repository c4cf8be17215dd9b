"""Goal: what LoRA, an encoder and guided decoding take is found, and paid by those who have them.

Method: steps of a machine whose features are known, with noise, in random traffic where some
requests have some of them. Charges are compared with the machine's own by the true coefficients.
"""

import random

import pytest

from tests.property.test_fit import DENSE, KERNELS, ROOF, ROOFLINE, observe, prior_of, steps, taught
from vllm_cost_meter.attribution import _native, step_meter_py
from vllm_cost_meter.attribution.cost_model import (
    CURVE,
    ENCODER,
    ENCODER_TOKEN,
    FIXED,
    GUIDED,
    GUIDED_ROW,
    LORA,
    LORA_TOKEN,
    SLOPES,
    TWO_PLANES,
    ServedModel,
)
from vllm_cost_meter.attribution.cost_model_py import CURVE_FORM, PLANES_FORM, StepFit
from vllm_cost_meter.attribution.features_py import ENCODER_TOKENS_MAX, StepPart
from vllm_cost_meter.attribution.game_py import StepModel, solve_step

TRUE = {
    LORA: 1.2e6,
    LORA_TOKEN: 2e3,
    GUIDED: 3e5,
    GUIDED_ROW: 6e4,
    ENCODER: 4e6,
    ENCODER_TOKEN: 1e4,
}
WITH_FEATURES = StepModel.of_curve(
    tuple(TRUE.get(term, value) for term, value in enumerate(DENSE)), ServedModel()
)
IMPLEMENTATIONS = pytest.mark.parametrize("impl", [_native, step_meter_py], ids=["native", "twin"])


def some_with_features(rng: random.Random, batches: list[list[StepPart]]) -> list[list[StepPart]]:
    """Return the same steps, where tenants with features come and go."""
    found = []
    for parts in batches:
        lora, guided = rng.choice([0, 0.1, 0.3]), rng.choice([0, 0.1, 0.3])
        found.append(
            [
                part._replace(
                    has_lora=rng.random() < lora,
                    is_guided=rng.random() < guided,
                    encoder_tokens=(
                        rng.choice([0, 0, 600, 1500]) if part.is_prefill and part.tokens > 1 else 0
                    ),
                )
                for part in parts
            ]
        )
    return found


@pytest.mark.parametrize("seed", range(2))
def test_what_features_take_is_found_from_steps_with_and_without_them(seed):
    rng = random.Random(seed)
    batches = some_with_features(rng, steps(rng, 2500))
    found = taught(StepFit(prior_of(DENSE)), WITH_FEATURES, batches, rng).coefficients()
    for term in (LORA, LORA_TOKEN, GUIDED_ROW, ENCODER, ENCODER_TOKEN):
        assert found[term] == pytest.approx(TRUE[term], rel=0.1), term
    assert found[GUIDED] == pytest.approx(TRUE[GUIDED], rel=0.25)  # 2 % of a step
    assert found[FIXED] == pytest.approx(DENSE[FIXED], rel=0.1)


def test_a_feature_that_no_request_had_takes_nothing():
    rng = random.Random(1)
    batches = [
        [part._replace(is_guided=False, encoder_tokens=0) for part in parts]
        for parts in some_with_features(rng, steps(rng, 600))
    ]
    found = taught(StepFit(prior_of(DENSE)), WITH_FEATURES, batches, rng).coefficients()
    assert found[LORA] > 0.9 * TRUE[LORA]
    assert found[GUIDED:SLOPES] == (0.0,) * (SLOPES - GUIDED)


def test_what_was_learnt_of_a_feature_stays_while_every_request_has_it():
    rng = random.Random(2)
    fit = taught(
        StepFit(prior_of(DENSE)), WITH_FEATURES, some_with_features(rng, steps(rng, 2000)), rng
    )
    always = [[part._replace(has_lora=True) for part in parts] for parts in steps(rng, 4000)]
    taught(fit, WITH_FEATURES, always, rng)
    assert fit.coefficients()[LORA] == pytest.approx(TRUE[LORA], rel=0.15)


def test_two_planes_are_never_used_where_a_request_had_a_feature():
    rng = random.Random(1)
    fit = taught(StepFit(prior_of(DENSE)), ROOFLINE, steps(rng, 4200), rng)
    assert fit.form == PLANES_FORM
    one = [[parts[0]._replace(has_lora=True), *parts[1:]] for parts in steps(rng, 600)]
    for parts in one:
        if observe(fit, parts, solve_step(ROOFLINE, parts).total_ns):
            break
    assert fit.form == CURVE_FORM, "with the first version after it"
    taught(fit, ROOFLINE, steps(rng, 3000), rng)
    assert fit.errors[PLANES_FORM] < 0.9 * fit.errors[CURVE_FORM]
    assert fit.form == CURVE_FORM


@IMPLEMENTATIONS
def test_each_pays_its_own_units_and_an_equal_part_of_what_any_adds(impl):
    meter = impl.StepMeter("shapley")
    meter.adopt(ROOF, tuple(TRUE.get(term, 0.0) for term in range(len(DENSE))), False)
    for name, lora, guided in (("a", 1, 0), ("b", 1, 0), ("c", 0, 1), ("d", 0, 0), ("e", 0, 0)):
        meter.open(name, 0 if name != "d" else 3000, bool(lora), bool(guided))
    tokens = {"a": 1, "b": 5, "c": 2, "d": 2000, "e": 1}
    lora_ns = int(TRUE[LORA] + 6 * TRUE[LORA_TOKEN])
    guided_ns = int(TRUE[GUIDED] + 2 * TRUE[GUIDED_ROW])  # two rows: one is a draft's
    encoder_ns = int(TRUE[ENCODER] + 900 * TRUE[ENCODER_TOKEN])
    step = meter.begin(tokens, 0, None, {"d": 900, "nobody": 7})
    assert meter.step_features(step) == [
        (0, True, False, 0),
        (1, True, False, 0),
        (2, False, True, 0),
        (3, False, False, 900),
    ]
    meter.settle(step, lora_ns + guided_ns + encoder_ns)
    used = dict(meter.cut(0))
    charged = {name: used[name].gpu_time_ns if name in used else 0 for name in tokens}
    expected = {
        "a": TRUE[LORA] / 2 + TRUE[LORA_TOKEN],
        "b": TRUE[LORA] / 2 + 5 * TRUE[LORA_TOKEN],
        "c": guided_ns,
        "d": encoder_ns,
        "e": 0,
    }
    assert charged == pytest.approx(expected, abs=1.0)
    # Without one of two, what any adds stays; without the only one it goes.
    assert used["b"].marginal_ns == pytest.approx(5 * TRUE[LORA_TOKEN], abs=1.0)
    assert used["c"].marginal_ns == pytest.approx(guided_ns, abs=1.0)


@IMPLEMENTATIONS
def test_a_chunk_in_the_middle_of_a_prompt_is_not_guided_as_it_samples_nothing(impl):
    meter = impl.StepMeter("shapley")
    only_guided = tuple(1e6 if term in (GUIDED, LORA) else 0.0 for term in range(len(DENSE)))
    meter.adopt(ROOF, only_guided, False)
    meter.open("chunks", 100, False, True)
    meter.open("other", 0, True)
    for tokens, expected_ns in ((60, 0), (40, 1000), (1, 1000)):
        meter.settle(meter.begin({"chunks": tokens, "other": 1}, 0), 2000)
        used = dict(meter.cut(0))
        if expected_ns:
            assert used["chunks"].gpu_time_ns == expected_ns
        else:
            assert used["other"].gpu_time_ns == 2000


@IMPLEMENTATIONS
def test_encoder_tokens_are_bounded_and_wrong_ones_change_nothing(impl):
    meter = impl.StepMeter("shapley")
    meter.open("a", 10)
    with pytest.raises(ValueError, match=r"encoder tokens of 'a': expected an int from 0 to"):
        meter.begin({"a": 10}, 0, None, {"a": -1})
    assert meter.steps_in_flight == 0
    step = meter.begin({"a": 10}, 0, None, {"a": 2**31 - 1})
    assert meter.step_features(step) == [(0, False, False, ENCODER_TOKENS_MAX)]


@IMPLEMENTATIONS
def test_an_adopted_fit_of_two_planes_gives_way_to_the_curve(impl):
    meter = impl.StepMeter("shapley", prior_of(DENSE))
    meter.adopt(ROOF, DENSE, True)
    assert meter.model().form == TWO_PLANES
    meter.open("a", 0, True)
    for _ in range(200):
        meter.settle(meter.begin({"a": 1}, 0), 7_000_000)
    assert meter.model().form == CURVE


@IMPLEMENTATIONS
def test_an_encoder_at_the_end_of_a_large_step_finds_its_request(impl):
    meter = impl.StepMeter("shapley")
    names = [f"r{number}" for number in range(70_000)]  # a slot keeps 16 bits of its place
    for name in names:
        meter.open(name, 0)
    step = meter.begin({}, 0, names, {names[-1]: 5, names[3]: 6})
    assert meter.step_features(step) == [(3, False, False, 6), (69_999, False, False, 5)]


def test_known_features_do_not_change_what_the_rest_is_charged():
    parts = steps(random.Random(4), 1)[0]
    assert solve_step(WITH_FEATURES, parts).weigh() == solve_step(KERNELS, parts).weigh()
