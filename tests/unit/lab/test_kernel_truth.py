"""The second truth is the Shapley value by its definition, of a step that runs kernel by kernel."""

from dataclasses import replace
from math import factorial

import numpy as np
import pytest

from vllm_cost_meter.lab.validation.kernel_machine import KernelGame, KernelMachine
from vllm_cost_meter.lab.validation.kernel_truth import total_shares
from vllm_cost_meter.lab.validation.roofline import GPUS
from vllm_cost_meter.lab.validation.scenarios import DENSE, DRAFTS, EXPERTS, LATENT, WINDOWED

MACHINES = {
    shape.name: KernelMachine(GPUS[gpu], shape)
    for gpu, shape in (
        ("h100", DENSE),
        ("l4", replace(DENSE, name="prefills apart", separate_prefills=True)),
        ("a100", replace(DENSE, name="two GPUs", gpus=2)),
        ("h100", WINDOWED),
        ("h100", EXPERTS),
        ("h100", LATENT),
        ("h100", DRAFTS),
    )
}
EACH_MACHINE = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
# (tokens, position, whether it is of a prefill): decodes, chunks, the end of a long prompt.
NINE = [
    *((1, 500, 0), (1, 60_000, 0), (1, 500, 0), (1, 3_000, 0), (1, 17, 0)),
    *((300, 0, 1), (64, 40_000, 1), (300, 0, 1), (1, 2_047, 1)),
]
ORDERS = 20_000


def game_of(machine: KernelMachine, *requests: tuple[int, int, int]) -> KernelGame:
    tokens, positions, is_prefill = np.array(requests).T
    return machine.game(tokens, positions, is_prefill.astype(bool))


def by_definition(value, count: int) -> np.ndarray:
    """Return the Shapley value from all 2^n coalitions, each a row of 0 and 1."""
    members = ((np.arange(2**count)[:, None] >> np.arange(count)) & 1).astype(np.float64)
    values, sizes = value(members), members.sum(axis=1).astype(int)
    weights = [factorial(s) * factorial(count - 1 - s) / factorial(count) for s in range(count)]
    shares = np.zeros(count)
    for place in range(count):
        without = np.flatnonzero(members[:, place] == 0)
        growth = values[without | (1 << place)] - values[without]
        shares[place] = (np.array(weights)[sizes[without]] * growth).sum()
    return shares


@EACH_MACHINE
def test_the_truth_is_the_definition_for_up_to_nine_requests(machine):
    for count in range(1, 10):
        game = game_of(machine, *NINE[:count])
        found = game.shapley(ORDERS if count > 5 else 2_000, np.random.default_rng(1))
        assert found == pytest.approx(by_definition(game.value, count), rel=0.01)


@EACH_MACHINE
@pytest.mark.parametrize("count", [1, 9, 200])
def test_the_shares_are_the_step_and_equals_pay_equally(machine, count):
    rng = np.random.default_rng(2)
    game = game_of(machine, *(NINE + [(1, 700, 0)] * 191)[:count])
    shares = game.shapley(200, rng)
    assert shares.sum() == pytest.approx(game.total_s, rel=1e-9)
    if count == 9:
        assert game.shapley(ORDERS, rng)[5] == pytest.approx(game.shapley(ORDERS, rng)[7], rel=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_a_table_over_a_sum_has_its_exact_value(seed):
    rng = np.random.default_rng(seed)
    weights = rng.choice([1, 1, 2, 5, 40], size=int(rng.integers(1, 10)))
    table = np.concatenate([[0], rng.random(weights.sum())])  # as unsteady as can be
    expected = by_definition(lambda members: table[(members @ weights).astype(int)], len(weights))
    assert total_shares(weights, table) == pytest.approx(expected, abs=1e-9)


def test_a_straight_table_gives_each_its_part_and_a_first_step_is_shared_equally():
    weights = np.array([1] * 300 + [500, 3])
    straight = np.arange(1_000.0)
    assert total_shares(weights, straight) == pytest.approx(weights)
    at_once = (np.arange(1_000) > 0).astype(float)
    assert total_shares(weights, at_once) == pytest.approx(np.full(302, 1 / 302), rel=1e-6)
    # Only who comes last brings the sum to its end.
    assert total_shares(weights, (np.arange(1_000) >= 803).astype(float)) == pytest.approx(
        np.full(302, 1 / 302), rel=1e-6
    )


def test_equal_decodes_share_a_step_equally():
    machine = MACHINES[DENSE.name]
    game = game_of(machine, *[(1, 900, 0)] * 50)
    assert game.shapley(2, np.random.default_rng(1)) == pytest.approx(game.total_s / 50)


@EACH_MACHINE
def test_what_a_request_adds_and_what_it_takes_alone_are_values_of_coalitions(machine):
    game = game_of(machine, *NINE)
    nobody, everyone = np.zeros((1, 9)), np.ones((1, 9))
    assert game.value(nobody) == 0
    assert game.value(everyone) == game.total_s
    for place in range(9):
        others = np.delete(np.array(NINE), place, axis=0)
        without = game_of(machine, *(tuple(row) for row in others.tolist()))
        assert game.marginal_s()[place] == pytest.approx(game.total_s - without.total_s)
        alone = game_of(machine, NINE[place])
        assert game.alone_s()[place] == pytest.approx(alone.total_s)


def test_a_decode_reads_the_weights_and_its_context_and_a_chunk_computes():
    machine = MACHINES[DENSE.name]
    reached = 3.35e12 * 0.85
    weights_s = 2 * 7.5e9 / reached
    short, long = (game_of(machine, (1, context, 0)).total_s for context in (0, 100_000))
    assert short == pytest.approx(weights_s + 200e-6, rel=0.1)
    assert long - short == pytest.approx(100_000 * 32 * 2 * 8 * 128 * 2 / reached, rel=0.01)
    chunk = game_of(machine, (2_048, 0, 1)).total_s
    assert chunk == pytest.approx(2 * 2_048 * 6.98e9 / (989e12 * 0.75), rel=0.25)


def test_a_window_bounds_what_a_decode_reads():
    machine = MACHINES[WINDOWED.name]
    times = [game_of(machine, (1, context, 0)).total_s for context in (10_000, 20_000)]
    # 8 of 48 layers see all of it: 8 heads x 256 numbers x keys and values x 2 bytes.
    assert times[1] - times[0] == pytest.approx(
        10_000 * 8 * 8 * 256 * 2 * 2 / (3.35e12 * 0.85), rel=0.01
    )


def test_the_last_tokens_of_a_long_prompt_take_as_long_as_their_longest_tile():
    machine = MACHINES[DENSE.name]
    chunk = [game_of(machine, (tokens, 60_000, 1)).total_s for tokens in (33, 64)]
    assert chunk[0] == pytest.approx(chunk[1], rel=0.01)


def test_drafts_cost_their_tokens_and_their_model():
    plain, drafts = (MACHINES[shape.name] for shape in (DENSE, DRAFTS))
    one, four = (1, 900, 0), (4, 900, 0)
    without_model = game_of(plain, *[four] * 8).total_s
    assert game_of(plain, *[one] * 8).total_s < without_model < game_of(drafts, *[four] * 8).total_s
