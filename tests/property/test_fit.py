"""Goal: the cost model finds what steps cost from the steps alone, and is not led astray.

Method: steps of a machine whose planes are known, with noise, in random traffic of chunks and
decodes. What is asked of the fit is what splits need: that it predicts steps, that its planes are
those of the machine, and that outliers, a single shape of traffic or a wrong prior do not bend it.
"""

import random

import pytest

from vllm_cost_meter.attribution.cost_model_py import (
    COMPUTE,
    FIRST_PUBLISH,
    MEMORY,
    ZERO,
    Plane,
    StepFit,
    Work,
    time_of,
    total_of,
)

SEEDS = pytest.mark.parametrize("seed", range(3))
# A GPU: 1 us fixed + 20 us a token against 8 ms of weights + 40 ns a token of context.
ROOF = ((1e6, 2e4, 0.0, 1.0, 0.0), (8e6, 1e3, 0.0, 0.0, 40.0))
ROOF_PRIOR = (*ROOF, tuple(a + b for a, b in zip(*ROOF, strict=True)))
# Only ever compute, as a CPU.
FLAT = ((2e6, 1e5, 5e4, 5.0, 0.0), ZERO)


def steps(rng: random.Random, count: int) -> list[Work]:
    """Return the work of some steps: mostly decodes, a chunk now and then, varying batches."""
    found = []
    batch = 20.0
    for _ in range(count):
        batch = min(80.0, max(2.0, batch + rng.gauss(0, 3)))
        works = [Work.of(1, rng.randint(50, 6000)) for _ in range(int(batch))]
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            tokens = rng.choice([64, 300, 512, 900])
            works.append(Work.of(tokens, tokens + rng.randint(0, 3000)))
        found.append(total_of(works))
    return found


def time_on(machine: tuple[Plane, Plane], work: Work) -> float:
    compute, memory = machine
    return max(compute[0] + time_of(compute, work), memory[0] + time_of(memory, work))


def taught(
    fit: StepFit, machine: tuple[Plane, Plane], works: list[Work], rng: random.Random
) -> StepFit:
    for work in works:
        fit.observe(work, max(1, int(time_on(machine, work) * rng.gauss(1, 0.02))))
    return fit


def error_of(fit: StepFit, machine: tuple[Plane, Plane], works: list[Work]) -> float:
    """Return the mean relative error of the planes in use."""
    in_use = (fit.compute, fit.memory)
    errors = [abs(time_on(in_use, work) / time_on(machine, work) - 1) for work in works]
    return sum(errors) / len(errors)


@SEEDS
def test_two_planes_are_found_from_a_prior_that_is_wrong_by_half(seed):
    rng = random.Random(seed)
    prior = tuple(tuple(1.5 * c for c in plane) for plane in ROOF_PRIOR)
    fit = taught(StepFit(prior, trusted=True), ROOF, steps(rng, 2500), rng)
    assert fit.two_planes
    assert error_of(fit, ROOF, steps(rng, 200)) < 0.01
    assert fit.explained > 0.95
    assert fit.compute[1] == pytest.approx(ROOF[COMPUTE][1], rel=0.1)
    assert fit.memory[0] == pytest.approx(ROOF[MEMORY][0], rel=0.1)
    assert fit.memory[4] == pytest.approx(ROOF[MEMORY][4], rel=0.15)


@SEEDS
def test_two_planes_are_found_from_no_prior_at_all(seed):
    rng = random.Random(seed)
    fit = taught(StepFit(None, trusted=False), ROOF, steps(rng, 4000), rng)
    assert fit.two_planes
    assert error_of(fit, ROOF, steps(rng, 200)) < 0.03


@SEEDS
def test_one_plane_is_used_where_the_machine_has_one(seed):
    rng = random.Random(seed)
    fit = taught(StepFit(None, trusted=False), FLAT, steps(rng, 2500), rng)
    assert not fit.two_planes
    assert fit.memory == ZERO
    assert error_of(fit, FLAT, steps(rng, 200)) < 0.01


@SEEDS
@pytest.mark.parametrize("share", [0.01, 0.05])
def test_steps_that_took_many_times_longer_do_not_bend_the_fit(seed, share):
    rng = random.Random(seed)
    fit = StepFit(ROOF_PRIOR, trusted=True)
    for work in steps(rng, 2500):
        slow = rng.uniform(3, 50) if rng.random() < share else 1.0
        fit.observe(work, int(time_on(ROOF, work) * slow * rng.gauss(1, 0.02)))
    assert error_of(fit, ROOF, steps(rng, 200)) < 0.02


def test_with_one_shape_of_traffic_the_prior_says_what_the_steps_cannot():
    # 8 decodes in a context of 1000, for ever: their time is known, its parts are not.
    rng = random.Random(1)
    work = total_of([Work.of(1, 1000)] * 8)
    fit = taught(StepFit(ROOF_PRIOR, trusted=True), ROOF, [work] * 3000, rng)
    assert time_on((fit.compute, fit.memory), work) == pytest.approx(time_on(ROOF, work), rel=0.01)
    assert fit.memory[0] == pytest.approx(ROOF[MEMORY][0], rel=0.1)
    assert fit.memory[4] == pytest.approx(ROOF[MEMORY][4], rel=0.1)
    assert fit.compute[1] == pytest.approx(ROOF[COMPUTE][1], rel=0.1)


@SEEDS
def test_a_machine_that_changes_is_followed(seed):
    rng = random.Random(seed)
    fit = taught(StepFit(ROOF_PRIOR, trusted=True), ROOF, steps(rng, 1500), rng)
    slower = tuple(tuple(2.0 * c for c in plane) for plane in ROOF)
    taught(fit, slower, steps(rng, 6000), rng)
    assert error_of(fit, slower, steps(rng, 200)) < 0.12


def test_an_earlier_fit_is_used_from_the_first_step_on():
    fit = StepFit(None, trusted=False)
    fit.adopt((*ROOF, ZERO), two_planes=True)
    assert (fit.version, fit.compute, fit.memory) == (1, *ROOF)


def test_a_version_is_published_when_the_steps_have_doubled():
    rng = random.Random(3)
    fit = StepFit(None, trusted=False)
    published = []
    for number, work in enumerate(steps(rng, 1100), 1):
        if fit.observe(work, int(time_on(ROOF, work))):
            published.append(number)
    assert published[0] >= FIRST_PUBLISH
    assert fit.version == len(published) <= 7
    assert all(later >= 2 * sooner for sooner, later in zip(published, published[1:], strict=False))


@pytest.mark.parametrize("gpu_ns", [0, -5])
def test_a_step_without_time_teaches_nothing(gpu_ns):
    fit = StepFit(None, trusted=False)
    assert fit.observe(Work.of(1, 10), gpu_ns) is False
    assert fit.steps == 0
