"""Times of single kernels are what a hand computation gives."""

import numpy as np
import pytest

from vllm_cost_meter.lab.validation.kernels import (
    GAP_S,
    Chip,
    chosen_experts,
    exchange_s,
    experts_s,
    matmul_s,
    streaming_s,
)
from vllm_cost_meter.lab.validation.roofline import GPUS

# 100 multiprocessors of 10 GFLOP/s each.
CHIP = Chip(1e12, 1e10, 100)


def rows(*counts: int) -> np.ndarray:
    return np.array(counts, dtype=np.float64)


def test_a_product_of_one_row_takes_as_long_as_reading_the_weights():
    found = matmul_s(CHIP, rows(1), 4096, 4096)
    assert found == pytest.approx(2 * (4096 + 4096**2 + 4096) / 1e10 + GAP_S)


def test_a_product_of_many_rows_takes_as_long_as_its_arithmetic():
    # 128 x 50 tiles of 128 x 256: 64 waves of 100 without a rest.
    found = matmul_s(CHIP, rows(128 * 128), 256 * 50, 1024)
    assert found == pytest.approx(2 * 128 * 128 * 256 * 50 * 1024 / 1e12 + GAP_S)


def test_a_tile_that_is_not_full_costs_as_much_as_a_full_one():
    # So wide that arithmetic is the limit, and all tiles of 64 rows are computed.
    few = Chip(1e12, 1e14, 100)
    found = matmul_s(few, rows(1, 63, 64, 65, 128, 129, 192), 64_000, 256)
    assert found[0] == found[1] == found[2] < found[3] == found[4] < found[5] == found[6]


def test_a_product_never_takes_less_for_more_rows():
    for name in ("h100", "l4"):
        found = matmul_s(Chip.of(GPUS[name]), np.arange(4_096.0), 4096, 14_336)
        assert (np.diff(found) >= -1e-12).all()
        assert found[0] == 0


def test_slower_arithmetic_leaves_reading_as_it_is():
    fast, slow = (Chip.of(GPUS["h100"], slower) for slower in (1.0, 2.0))
    assert matmul_s(fast, rows(1), 4096, 4096) == matmul_s(slow, rows(1), 4096, 4096)
    times = [matmul_s(chip, rows(8192), 4096, 4096)[0] - GAP_S for chip in (fast, slow)]
    assert times[1] == pytest.approx(2 * times[0])


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_chosen_experts_are_those_of_a_draw(exponent):
    assert chosen_experts(rows(0, 1, 10**6), 16, 2, exponent) == pytest.approx([0, 2, 16])
    rng = np.random.default_rng(1)
    popular = np.arange(1, 17.0) ** -exponent
    chance = popular / popular.sum() * 2
    while (chance > 1).any():
        full = chance >= 1
        chance = np.where(full, 1, popular * ~full / (popular * ~full).sum() * (2 - full.sum()))
    drawn = (rng.random((20_000, 6, 16)) < chance).any(axis=1).sum(axis=1).mean()
    assert chosen_experts(rows(6), 16, 2, exponent) == pytest.approx([drawn], rel=0.02)


def test_few_tokens_read_their_experts_and_many_compute_them():
    shape = {"experts": 16, "per_token": 2, "hidden": 512, "intermediate": 1024}
    weights = 3 * 512 * 1024
    one, many = experts_s(CHIP, rows(1, 100_000), **shape)
    assert one == pytest.approx(2 * (2 * weights + 2 * 2 * 1536) / 1e10 + 4 * GAP_S)
    assert many == pytest.approx(2 * 2 * 100_000 * weights / (1e12 * 0.75), rel=0.01)
    assert experts_s(CHIP, rows(0), **shape) == 0


def test_one_gpu_exchanges_nothing_and_two_half_of_twice_the_bytes():
    assert exchange_s(rows(0, 3e11), 1).tolist() == [0, 0]
    assert exchange_s(rows(0, 3e11), 2) == pytest.approx([0, 1 + 8e-6])


def test_streaming_takes_its_bytes_and_its_starts():
    assert streaming_s(CHIP, rows(0, 1e10), kernels=3) == pytest.approx([0, 1 + 3 * GAP_S])
