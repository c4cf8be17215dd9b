"""Goal: a curve that is learnt from steps predicts them and splits them, also where few are told.

Method: curves that are known, with noise; random equations against the conditions of an optimum;
and the second truth's own simulated servers, which have no curve.
"""

import random

import numpy as np
import pytest

from vllm_cost_meter.attribution.curve_fit_py import (
    EXPERTS,
    FIT_TERMS,
    RAMPS,
    CurveSums,
    Experts,
    curve_of,
    fit_curve,
    nonnegative,
    row_of,
    usual_parts,
)
from vllm_cost_meter.attribution.curve_py import (
    SLOPES,
    CurveWork,
    Layers,
    all_of,
    height,
    solve_curve,
    step_ns,
)
from vllm_cost_meter.lab.validation.scenarios import SCENARIOS

DENSE, MIXTURE = Experts(), Experts(128, 8)


def work_of(rng: random.Random, decodes: int, chunks: int) -> CurveWork:
    works = [CurveWork.of(1, rng.randint(50, 6000), False, Layers()) for _ in range(decodes)]
    for _ in range(chunks):
        tokens = rng.choice([30, 200, 900, 2000])
        works.append(CurveWork.of(tokens, tokens + rng.randint(0, 4000), True, Layers()))
    return all_of(works)


@pytest.mark.parametrize("seed", range(40))
def test_the_least_squares_are_an_optimum_with_no_negative_term(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, FIT_TERMS))
    matrix = rng.random((60, count)) * rng.choice([1e-6, 1.0, 1e6], count)
    if seed % 4 == 0 and count > 2:
        matrix[:, 0] = matrix[:, 1] + matrix[:, 2]  # determined by others
    wanted = matrix @ (rng.random(count) - 0.3) + rng.normal(0, 0.1, 60)
    moments, right = matrix.T @ matrix, matrix.T @ wanted
    found = np.array(nonnegative(moments.tolist(), right.tolist()))
    gradient = (right - moments @ found) / np.sqrt(np.diag(moments))
    assert (found >= 0).all()
    assert (gradient <= 1e-6 * np.sqrt(wanted @ wanted)).all(), "no term would gain by growing"
    assert np.abs(gradient[found > 0]).max(initial=0) <= 1e-6 * np.sqrt(wanted @ wanted)


@pytest.mark.parametrize("experts", [DENSE, MIXTURE], ids=["dense", "experts"])
def test_a_row_times_coefficients_is_the_time_of_a_step_by_their_curve(experts):
    rng = random.Random(1)
    heights = experts.heights()
    for _ in range(100):
        coefficients = [rng.uniform(0, 1e5) for _ in range(FIT_TERMS)]
        work = work_of(rng, rng.randint(1, 300), rng.randint(0, 3))
        by_row = sum(c * x for c, x in zip(coefficients, row_of(work, heights), strict=True))
        assert step_ns(curve_of(coefficients, heights), work) == pytest.approx(by_row, rel=1e-9)


def test_distinct_experts_are_those_of_a_draw():
    heights = MIXTURE.heights()
    curve = curve_of([0.0] * EXPERTS + [1.0], heights)
    assert height(curve, 1.0) == pytest.approx(8)
    assert height(curve, 2.0) == pytest.approx(128 * (1 - (15 / 16) ** 2))
    assert height(curve, 4096.0) == pytest.approx(128)


@pytest.mark.parametrize("seed", range(3))
def test_a_machine_whose_curve_is_known_is_found_without_a_prior(seed):
    rng = random.Random(seed)
    true = [6e6, 2e5, 1e3, 45.0, 0.9, 0.0] + [0.0] * 5 + [2e4] * 7 + [1.5e5]
    heights, sums = MIXTURE.heights(), CurveSums()
    curve = curve_of(true, heights)
    for _ in range(1500):
        work = work_of(rng, rng.randint(1, 90), rng.choice([0, 0, 0, 1, 2]))
        sums.add(row_of(work, heights), step_ns(curve, work) * rng.gauss(1, 0.02))
    found = curve_of(fit_curve(sums, usual_parts(MIXTURE)), heights)
    errors = []
    for _ in range(200):
        work = work_of(rng, rng.randint(1, 90), rng.choice([0, 1]))
        errors.append(abs(step_ns(found, work) / step_ns(curve, work) - 1))
    assert np.mean(errors) < 0.01
    assert found[0] == pytest.approx(true[0], rel=0.1)
    assert height(found, 64.0) == pytest.approx(height(curve, 64.0), rel=0.05)


def test_with_one_shape_of_traffic_no_term_is_made_up():
    rng, sums = random.Random(1), CurveSums()
    heights = DENSE.heights()
    work = all_of([CurveWork.of(1, 1000, False, Layers())] * 8)
    for _ in range(1000):
        sums.add(row_of(work, heights), 8e6 * rng.gauss(1, 0.02))
    found = fit_curve(sums, usual_parts(DENSE))
    assert step_ns(curve_of(found, heights), work) == pytest.approx(8e6, rel=0.01)
    assert all(coefficient == 0.0 for coefficient in found[SLOPES + RAMPS.index(64) : EXPERTS])


@pytest.mark.parametrize(
    ("name", "experts", "most"),
    [("dense-64-no-prior", DENSE, 0.05), ("experts-64-no-prior", MIXTURE, 0.2)],
)
def test_servers_that_run_kernel_by_kernel_are_split_well_without_a_prior(name, experts, most):
    trace = SCENARIOS[name].trace(seed=0, steps=2_000)
    heights, sums = experts.heights(), CurveSums()
    works = [
        [
            CurveWork.of(int(tokens), int(position + tokens), bool(is_prefill), Layers())
            for tokens, position, is_prefill in zip(
                step.tokens, step.positions, step.is_prefill, strict=True
            )
        ]
        for step in trace.steps
    ]
    for step, each in zip(trace.steps[:1_500], works[:1_500], strict=True):
        sums.add(row_of(all_of(each), heights), float(step.gpu_time_ns))
    curve = curve_of(fit_curve(sums, usual_parts(experts)), heights)
    given, true = np.zeros(7), np.zeros(7)
    rng = np.random.default_rng(1)
    tenants = np.array(trace.tenants)
    for number in range(1_500, 2_000, 10):
        step, game = trace.steps[number], trace.game(number)
        weights = np.array(solve_curve(curve, works[number]).weigh(curve, works[number]))
        whose = tenants[step.requests]
        np.add.at(given, whose, weights / weights.sum() * game.total_s)
        np.add.at(true, whose, game.shapley(100, rng))
    errors = dict(zip((t.name for t in trace.load.tenants), given / true - 1, strict=True))
    assert max(map(abs, errors.values())) < most, errors
