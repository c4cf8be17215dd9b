"""Goal: the cost model finds what steps cost from the steps alone, and is not led astray.

Method: steps of machines whose curve or planes are known, with noise, in random traffic of chunks
and decodes. What is asked of the fit is what splits need: that it predicts steps, in the form of
the machine, and that outliers, a single shape of traffic, a wrong prior or a change of the machine
do not bend it. Native and twin learn the same to the last bit.
"""

import random
from dataclasses import replace

import pytest

from tests.support.examples import examples
from vllm_cost_meter.attribution import _native, step_meter_py
from vllm_cost_meter.attribution.cost_model import (
    DECODE_COMPUTE,
    EXPERTS,
    FEATURES,
    FIXED,
    PAIRS,
    READ,
    SLOPES,
    UNKNOWN_MODEL,
    Coefficients,
    Experts,
    Plane,
    ServedModel,
)
from vllm_cost_meter.attribution.cost_model_py import (
    CHOICE_STEPS,
    CURVE_FORM,
    FIRST_PUBLISH,
    PLANES_FORM,
    StepFit,
)
from vllm_cost_meter.attribution.curve_py import CurveWork, all_of
from vllm_cost_meter.attribution.features_py import (
    FeatureWork,
    StepPart,
    all_features,
)
from vllm_cost_meter.attribution.game_py import StepModel, solve_step
from vllm_cost_meter.attribution.planes_py import Work, total_of
from vllm_cost_meter.attribution.priors import (
    NOTHING_KNOWN,
    CurvePrior,
    Prior,
    PriorPart,
    curve_of_earlier,
    prior_without_counts,
)
from vllm_cost_meter.lab.validation.scenarios import SCENARIOS

SEEDS = pytest.mark.parametrize("seed", range(examples(2)))
# A GPU: 1 ms fixed + 20 us a token against 8 ms of weights + 40 ns a token of context.
ROOF: tuple[Plane, Plane] = ((1e6, 2e4, 0.0, 1.0, 0.0), (8e6, 1e3, 0.0, 0.0, 40.0))
# A GPU that runs kernel by kernel: flat up to 256 tokens, then 20 us a token.
DENSE: Coefficients = (
    *(5.8e6, 2e5, 8e2, 1.0, 0.0, 15.0, 46.0),
    *([0.0] * FEATURES),
    *([3e3] * 10),
    *([2e4] * 15),
    0.0,
)
MIXTURE = ServedModel(Experts(128, 8))
MIXTURE_CURVE: Coefficients = (
    *(2.5e6, 3e5, 2e3, 1.5, 0.0, 12.0, 33.0),
    *([0.0] * FEATURES),
    *([3e3] * 25),
    1.5e5,
)
Machine = StepModel


def prior_of(coefficients: Coefficients, served: ServedModel = UNKNOWN_MODEL) -> Prior:
    """Return a prior that knows the ratios within what is read, and within what is computed."""
    reading = [
        value if term in (FIXED, READ, EXPERTS) else 0.0 for term, value in enumerate(coefficients)
    ]
    arithmetic = [
        value if term == PAIRS or SLOPES <= term < EXPERTS else 0.0
        for term, value in enumerate(coefficients)
    ]
    parts = (PriorPart(tuple(reading), 1.2, 0.33), PriorPart(tuple(arithmetic), 1.5, 0.33))
    curve = CurvePrior(parts, tuple(coefficients), counts_reading=True)
    return replace(NOTHING_KNOWN, planes=ROOF, curve=curve, served=served)


def steps(rng: random.Random, count: int) -> list[list[StepPart]]:
    """Return the requests of some steps: mostly decodes, a chunk now and then, varying batches."""
    found = []
    batch = 20.0
    for _ in range(count):
        batch = min(80.0, max(2.0, batch + rng.gauss(0, 3)))
        parts = [StepPart(1, rng.randint(50, 6000), False) for _ in range(int(batch))]
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            tokens = rng.choice([64, 300, 512, 900])
            parts.append(StepPart(tokens, tokens + rng.randint(0, 3000), True))
        found.append(parts)
    return found


def time_on(machine: Machine, parts: list[StepPart]) -> float:
    return solve_step(machine, parts).total_ns


def observe(fit: StepFit, parts: list[StepPart], gpu_ns: float) -> bool:
    layers = NOTHING_KNOWN.served.layers
    return fit.observe(
        total_of([Work.of(part.tokens, part.context) for part in parts]),
        all_of([CurveWork.of(*part[:3], layers) for part in parts]),
        max(1, int(gpu_ns)),
        all_features([FeatureWork.of(part) for part in parts]),
    )


def taught(
    fit: StepFit, machine: Machine, batches: list[list[StepPart]], rng: random.Random
) -> StepFit:
    for parts in batches:
        observe(fit, parts, time_on(machine, parts) * rng.gauss(1, 0.02))
    return fit


def error_of(fit: StepFit, machine: Machine, batches: list[list[StepPart]]) -> float:
    """Return the mean relative error of the model in use."""
    errors = [abs(time_on(fit.model, p) / time_on(machine, p) - 1) for p in batches]
    return sum(errors) / len(errors)


ROOFLINE = StepModel.of_planes(*ROOF)
KERNELS = StepModel.of_curve(DENSE, ServedModel())
EXPERT_KERNELS = StepModel.of_curve(MIXTURE_CURVE, MIXTURE)


@SEEDS
@pytest.mark.parametrize("prior", [NOTHING_KNOWN, prior_of(DENSE)], ids=["none", "of counts"])
def test_a_machine_that_runs_kernel_by_kernel_is_found(seed, prior):
    rng = random.Random(seed)
    fit = taught(StepFit(prior), KERNELS, steps(rng, 2500), rng)
    assert fit.form == CURVE_FORM
    assert error_of(fit, KERNELS, steps(rng, 200)) < 0.01
    assert fit.explained > 0.95
    found = fit.coefficients()
    assert found[FIXED] == pytest.approx(DENSE[FIXED], rel=0.1)
    assert found[READ] == pytest.approx(DENSE[READ], rel=0.1)


@SEEDS
def test_experts_are_found_without_a_prior(seed):
    rng = random.Random(seed)
    fit = taught(StepFit(prior_without_counts(MIXTURE)), EXPERT_KERNELS, steps(rng, 2500), rng)
    assert error_of(fit, EXPERT_KERNELS, steps(rng, 200)) < 0.01
    assert fit.coefficients()[EXPERTS] == pytest.approx(MIXTURE_CURVE[EXPERTS], rel=0.15)


@SEEDS
def test_two_planes_are_used_where_the_whole_step_is_a_maximum(seed):
    rng = random.Random(seed)
    fit = taught(StepFit(prior_of(DENSE)), ROOFLINE, steps(rng, 4200), rng)
    assert fit.form == PLANES_FORM
    assert error_of(fit, ROOFLINE, steps(rng, 200)) < 0.02


def test_a_model_with_experts_never_has_two_planes():
    rng = random.Random(1)
    fit = taught(StepFit(prior_of(DENSE, MIXTURE)), ROOFLINE, steps(rng, 4200), rng)
    assert fit.errors[PLANES_FORM] < 0.8 * fit.errors[CURVE_FORM]
    assert fit.form == CURVE_FORM


@SEEDS
@pytest.mark.parametrize("share", [0.01, 0.05])
def test_steps_that_took_many_times_longer_do_not_bend_the_fit(seed, share):
    rng = random.Random(seed)
    fit = StepFit(prior_of(DENSE))
    for parts in steps(rng, 2500):
        slow = rng.uniform(3, 50) if rng.random() < share else 1.0
        observe(fit, parts, time_on(KERNELS, parts) * slow * rng.gauss(1, 0.02))
    assert error_of(fit, KERNELS, steps(rng, 200)) < 0.02


def test_with_one_shape_of_traffic_the_prior_says_what_the_steps_cannot():
    # 8 decodes in a context of 1000, for ever: their time is known, its parts are not.
    rng = random.Random(1)
    batch = [StepPart(1, 1000, False)] * 8
    fit = taught(StepFit(prior_of(DENSE)), KERNELS, [batch] * 2500, rng)
    assert time_on(fit.model, batch) == pytest.approx(time_on(KERNELS, batch), rel=0.01)
    chunk = [StepPart(2000, 2000, True)]
    assert time_on(fit.model, chunk) == pytest.approx(time_on(KERNELS, chunk), rel=0.3)


def slower(
    coefficients: Coefficients, terms: range | tuple[int, ...], factor: float
) -> Coefficients:
    return tuple(v * factor if term in terms else v for term, v in enumerate(coefficients))


ARITHMETIC = (PAIRS, DECODE_COMPUTE, *range(SLOPES, EXPERTS))


@SEEDS
def test_after_a_change_of_the_machine_steps_are_predicted_again_within_512_steps(seed):
    rng = random.Random(seed)
    fit = taught(StepFit(prior_of(DENSE)), KERNELS, steps(rng, 2600), rng)
    changed = StepModel.of_curve(slower(DENSE, ARITHMETIC, 2.0), ServedModel())
    taught(fit, changed, steps(rng, 512), rng)
    assert error_of(fit, changed, steps(rng, 200)) < 0.05


@SEEDS
@pytest.mark.parametrize(
    ("terms", "factor"),
    [(range(SLOPES, EXPERTS), 4.0), (range(SLOPES, EXPERTS), 0.25), ((READ,), 20.0)],
    ids=["tokens x4", "tokens x0.25", "reading x20"],
)
def test_an_earlier_fit_that_is_wrong_heals(seed, terms, factor):
    rng = random.Random(seed)
    earlier = curve_of_earlier(slower(DENSE, terms, factor))
    fit = taught(StepFit(replace(prior_of(DENSE), curve=earlier)), KERNELS, steps(rng, 2500), rng)
    assert error_of(fit, KERNELS, steps(rng, 200)) < 0.015
    assert fit.coefficients()[FIXED] == pytest.approx(DENSE[FIXED], rel=0.1)


def test_an_earlier_fit_is_used_from_the_first_step_on():
    fit = StepFit(NOTHING_KNOWN)
    fit.adopt(ROOF, DENSE, two_planes=True)
    assert (fit.version, fit.model.compute, fit.model.memory) == (1, *ROOF)
    fit.adopt(ROOF, DENSE, two_planes=False)
    assert fit.model == KERNELS
    assert fit.coefficients() == DENSE


def test_an_earlier_fit_of_nothing_is_no_prior():
    assert curve_of_earlier((0.0,) * len(DENSE)) is None


def test_versions_come_as_steps_grow_by_a_quarter_or_the_model_moved_and_then_no_more():
    rng = random.Random(3)
    fit = StepFit(prior_of(DENSE))
    published = []
    for number, parts in enumerate(steps(rng, 3000), 1):
        if observe(fit, parts, time_on(KERNELS, parts) * rng.gauss(1, 0.02)):
            published.append(number)
    assert published[0] >= FIRST_PUBLISH
    assert fit.version == len(published) <= 30
    assert len([number for number in published if number > 1500]) <= 4


def test_two_planes_must_be_better_for_long_before_they_are_used():
    """A curve errs on traffic of a new kind until it has learnt it. Planes may err less then."""
    rng = random.Random(7)
    fit = StepFit(prior_of(DENSE))
    better_from, forms = 300, []
    for number, parts in enumerate(steps(rng, better_from + 2 * CHOICE_STEPS)):
        observe(fit, parts, time_on(KERNELS, parts) * rng.gauss(1, 0.02))
        if number >= better_from:
            fit.errors[PLANES_FORM] = 0.5 * fit.errors[CURVE_FORM]
        forms.append(fit.form)
    assert set(forms[: better_from + CHOICE_STEPS]) == {CURVE_FORM}
    assert forms[-1] == PLANES_FORM


@pytest.mark.parametrize("gpu_ns", [0, -5])
def test_a_step_without_time_teaches_nothing(gpu_ns):
    fit = StepFit(NOTHING_KNOWN)
    assert fit.observe(Work.of(1, 10), CurveWork(1, 1), gpu_ns) is False
    assert fit.steps == 0


@pytest.mark.parametrize(
    "name",
    [
        *("dense-64", "experts-64-no-prior", "windows-64", "drafts-64"),
        *("lora-64-always", "vision-64", "guided-64"),
    ],
)
def test_native_and_twin_learn_the_same_to_the_last_bit(name):
    trace = SCENARIOS[name].trace(seed=0, steps=1_400)
    prior = SCENARIOS[name].prior(prior_of(DENSE, MIXTURE if "experts" in name else ServedModel()))
    meters = [impl.StepMeter("shapley", prior) for impl in (_native, step_meter_py)]
    ids = [f"cmpl-{number:032x}-0" for number in range(len(trace.tenants))]
    for step in trace.steps:
        found = []
        for meter in meters:
            for number in step.started:
                tenant = trace.tenant_of(number)
                traits = (tenant.adapter > 0, tenant.has_grammar)
                meter.open(ids[number], trace.prompt_tokens[number], *traits)
                meter.position(ids[number], trace.first_positions[number], False)
            names = [ids[number] for number in step.requests]
            tokens = dict(zip(names, step.tokens.tolist(), strict=True))
            encoded = step.features.encoded.tolist() if step.features else [0] * len(names)
            begun = meter.begin(tokens, 0, None, dict(zip(names, encoded, strict=True)))
            meter.settle(begun, step.gpu_time_ns)
            found.append((meter.cut(0), meter.model_version))
            for number in step.ended:
                meter.close(ids[number], 0)
        assert found[0] == found[1]
    assert meters[0].models(-1) == meters[1].models(-1)
    assert meters[0].model_version >= 5
    assert min(meters[0].model().charge_errors) < 1.0, "some errors are known, and compared"
