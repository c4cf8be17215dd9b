"""Goal: least squares find the optimum without a negative coefficient, wherever they begin."""

import numpy as np
import pytest

from vllm_cost_meter.attribution.cost_model import FIT_TERMS
from vllm_cost_meter.attribution.least_squares_py import nonnegative


@pytest.mark.parametrize("begins", ["from nothing", "from anything"])
@pytest.mark.parametrize("seed", range(40))
def test_the_least_squares_are_an_optimum_with_no_negative_term(seed, begins):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, FIT_TERMS))
    matrix = rng.random((60, count)) * rng.choice([1e-6, 1.0, 1e6], count)
    if seed % 4 == 0 and count > 2:
        matrix[:, 0] = matrix[:, 1] + matrix[:, 2]  # determined by others
    wanted = matrix @ (rng.random(count) - 0.3) + rng.normal(0, 0.1, 60)
    moments, right = matrix.T @ matrix, matrix.T @ wanted
    before = [] if begins == "from nothing" else (rng.random(count) - 0.5).tolist()
    found = np.array(nonnegative(moments.tolist(), right.tolist(), before))
    gradient = (right - moments @ found) / np.sqrt(np.diag(moments))
    assert (found >= 0).all()
    assert (gradient <= 1e-6 * np.sqrt(wanted @ wanted)).all(), "no term would gain by growing"
    assert np.abs(gradient[found > 0]).max(initial=0) <= 1e-6 * np.sqrt(wanted @ wanted)
