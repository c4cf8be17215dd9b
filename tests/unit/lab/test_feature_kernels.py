"""Kernels that only some requests need: their truth is that of the definition."""

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.lab.test_kernel_truth import MACHINES, NINE, by_definition
from vllm_cost_meter.lab.validation.feature_kernels import ADAPTER_KERNEL_S, MASK_ROW_S, MASKS_S
from vllm_cost_meter.lab.validation.games import Features
from vllm_cost_meter.lab.validation.kernel_machine import KernelGame, KernelMachine
from vllm_cost_meter.lab.validation.roofline import GPUS
from vllm_cost_meter.lab.validation.scenarios import DENSE, VISION

SEES = KernelMachine(GPUS["h100"], VISION)
DECODES = [(1, 900, 0)] * 8


def game_of(requests, adapters=(), rows=(), encoded=(), machine=SEES) -> KernelGame:
    tokens, positions, is_prefill = np.array(requests).T
    count = len(requests)
    given = (adapters, rows, encoded)
    columns = [np.array([*column, *[0] * (count - len(column))]) for column in given]
    return machine.game(tokens, positions, is_prefill.astype(bool), Features(*columns))


@pytest.mark.parametrize("seed", range(10))
def test_the_truth_is_the_definition_for_up_to_nine_requests(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 10))
    game = game_of(
        NINE[:count],
        rng.choice([0, 0, 1, 1, 2], count),
        rng.choice([0, 0, 1, 4], count),
        rng.choice([0, 0, 0, 200, 1_024], count),
    )
    for kernels in game.others:
        expected = by_definition(kernels.value, count)
        assert kernels.shares() == pytest.approx(expected, abs=1e-12)
    found = game.shapley(20_000, np.random.default_rng(1))
    assert found == pytest.approx(by_definition(game.value, count), rel=0.01)
    assert found.sum() == pytest.approx(game.total_s, rel=1e-9)


def test_a_step_without_features_is_the_step_of_the_model():
    plain = SEES.game(*(np.array(column) for column in zip(*DECODES, strict=True)))
    game = game_of(DECODES)
    assert game.others == []
    assert game.total_s == plain.total_s


def test_an_adapter_adds_two_kernels_to_each_product_and_a_second_row_adds_little():
    without, one, two = (game_of(DECODES, [1] * rows).total_s for rows in range(3))
    kernels = 2 * 4 * VISION.layers
    assert one - without == pytest.approx(kernels * ADAPTER_KERNEL_S, rel=0.06)
    assert two == pytest.approx(one, rel=1e-6), "both rows are in one block"
    # Another adapter is read once more, and starts nothing.
    other = game_of(DECODES, [1, 2]).total_s
    numbers = 16 * sum(columns + depth for columns, depth in VISION.products) * VISION.layers
    assert other - two >= numbers * 2 / (3.35e12 * 0.85)
    assert other - two < 0.1 * (one - without)


def test_who_has_no_adapter_pays_but_for_being_passed_over():
    game = game_of(DECODES, [1])
    without = game_of(DECODES).shapley(2, np.random.default_rng(1))
    charged = game.shapley(2, np.random.default_rng(1))
    assert charged[0] > 2 * without[0]
    assert charged[1:] == pytest.approx(without[1:], rel=1e-4)
    assert (charged[1:] > without[1:]).all()


def test_an_encoder_reads_its_weights_once_and_attends_within_an_image():
    without = game_of(DECODES).total_s
    one, two, larger = (
        game_of(DECODES, encoded=encoded).total_s - without
        for encoded in ([1_024], [1_024, 1_024], [2_048])
    )
    assert one < two < 2 * one, "the weights are read once, and what begins begins once"
    patches = 4 * 1_024
    pairs_s = 32 * 4 * 1_280 * (4 * patches**2 - 2 * patches**2) / (989e12 * 0.75 * 0.7)
    assert larger - two == pytest.approx(pairs_s, rel=1e-6)


def test_a_model_without_an_encoder_encodes_nothing():
    dense = MACHINES[DENSE.name]
    assert (
        game_of(DECODES, encoded=[1_024], machine=dense).total_s
        == game_of(DECODES, machine=dense).total_s
    )


def test_a_grammar_costs_its_masks_and_something_as_soon_as_there_is_one():
    without, one, two = (game_of(DECODES, rows=[1] * rows).total_s for rows in range(3))
    assert one - without == pytest.approx(MASKS_S + MASK_ROW_S, rel=0.02)
    assert two - one == pytest.approx(MASK_ROW_S, rel=0.03)


def test_two_gpus_share_the_products_of_an_adapter():
    shape = replace(DENSE, gpus=2)
    assert shape.products[0] == (DENSE.products[0][0] // 2, 4_096)
    assert shape.products[3] == (4_096, 14_336 // 2)
