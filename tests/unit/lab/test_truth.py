"""The truth that methods are measured against has the properties that define the Shapley value."""

import itertools
import math

import numpy as np
import pytest

from vllm_cost_meter.attribution.priors import Peaks
from vllm_cost_meter.lab.validation.roofline import Gpu, Machine, StepWork
from vllm_cost_meter.lab.validation.truth import (
    ENUMERATED_MAX,
    StepGame,
    enumerated,
    sampled,
    shapley,
)

# A token takes 1 ms of arithmetic and 0.1 ms of reading, a sequence 1 ms of reading; the weights
# take 20 ms. A chunk of prompt with some decodes lies at the ridge.
PER_SECOND = 1e12
GPU = Gpu("test", Peaks(PER_SECOND / 0.6, PER_SECOND / 0.85), 1.0, 4, "made up")


def machine_of(experts: int = 0, expert_ms: float = 0.0, compute: bool = True) -> Machine:
    work = StepWork(
        flops_fixed=0.0,
        flops=(1e9 if compute else 0.0, 0.0, 0.0, 0.0),
        bytes_fixed=20e9,
        bytes_moved=(1e8, 1e9, 0.0, 1e5),
        expert_bytes=expert_ms * 1e9,
        experts=experts,
        experts_per_token=min(experts, 2),
        expected_experts=False,
        kv_bytes=1.0,
    )
    return Machine(GPU, work, launch_s=0.001)


def game_of(machine: Machine, *requests: tuple[int, int]) -> StepGame:
    tokens, positions = np.array(requests).T
    return machine.game(tokens, positions)


RIDGE = [(20, 0), (9, 500), (1, 900), (1, 100), (1, 100)]
MACHINES = {
    "dense": machine_of(),
    "experts": machine_of(experts=8, expert_ms=3.0),
    "memory only": machine_of(compute=False),
}
EACH_MACHINE = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)


def by_definition(game: StepGame) -> list[float]:
    """Return the mean over all n! orders of what each request adds when it arrives."""
    shares = [0.0] * len(game)
    for order in itertools.permutations(range(len(game))):
        before = 0.0
        for place in range(len(game)):
            here = list(order[: place + 1])
            after = float(
                game.value(
                    game.compute_s[here].sum(), game.memory_s[here].sum(), game.tokens[here].sum()
                )
            )
            shares[order[place]] += after - before
            before = after
    return [share / math.factorial(len(game)) for share in shares]


@EACH_MACHINE
def test_the_enumerated_value_is_the_definition(machine):
    game = game_of(machine, *RIDGE)
    assert enumerated(game) == pytest.approx(by_definition(game), rel=1e-12)


@EACH_MACHINE
@pytest.mark.parametrize("count", [1, 2, ENUMERATED_MAX, 40])
def test_the_shares_are_the_step(machine, count):
    rng = np.random.default_rng(1)
    game = game_of(
        machine, *zip(rng.integers(1, 9, count), rng.integers(0, 999, count), strict=True)
    )
    assert shapley(game, 20, rng).sum() == pytest.approx(game.total_s, rel=1e-12)


@EACH_MACHINE
def test_equals_pay_equally_and_who_does_more_pays_more(machine):
    shares = enumerated(game_of(machine, *RIDGE))
    assert shares[3] == pytest.approx(shares[4], rel=1e-12)
    assert shares[0] > shares[2] > shares[3]


def test_who_adds_nothing_to_what_all_share_pays_that_alone():
    nothing = game_of(machine_of(), *RIDGE)
    for values in (nothing.compute_s, nothing.memory_s, nothing.tokens):
        values[2] = 0.0
    assert enumerated(nothing)[2] == pytest.approx(0.021 / 5, rel=1e-12)


def test_where_one_side_is_always_slower_everyone_pays_their_own_and_an_equal_part_of_the_base():
    game = game_of(MACHINES["memory only"], *RIDGE)
    expected = game.base_s / 5 + game.memory_s
    assert enumerated(game) == pytest.approx(expected, rel=1e-12)
    assert sampled(game, 2, np.random.default_rng(1)) == pytest.approx(expected, rel=1e-12)


def test_in_a_linear_game_leave_one_out_is_each_ones_own_part():
    game = game_of(MACHINES["memory only"], *RIDGE)
    assert game.marginal_s() == pytest.approx(game.memory_s, rel=1e-9)
    assert game.marginal_s().sum() == pytest.approx(game.total_s - game.base_s, rel=1e-9)
    assert game.alone_s() == pytest.approx(game.base_s + game.memory_s, rel=1e-12)


def test_a_request_alone_adds_the_whole_step():
    game = game_of(machine_of(), (20, 0))
    assert game.marginal_s() == game.alone_s() == enumerated(game) == pytest.approx([game.total_s])


@EACH_MACHINE
def test_sampling_comes_close_to_enumeration_and_its_two_halves_tell_how_close(machine):
    game = game_of(machine, *RIDGE, *RIDGE)
    exact = enumerated(game)
    rng = np.random.default_rng(1)
    halves = np.array([[sampled(game, 200, rng) for _ in range(2)] for _ in range(30)])
    stated = np.abs(halves[:, 0] - halves[:, 1]) / 2
    wrong = np.abs(halves.mean(axis=1) - exact)
    # Both are samples of the same spread: equal on average, and no figure is far outside.
    assert wrong.mean() == pytest.approx(stated.mean(), rel=0.3, abs=1e-12)
    assert (wrong <= 5 * stated.max() + 1e-12).all()
    assert wrong.mean() < 0.02 * exact.max()


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_a_step_of_decodes_that_memory_bounds_is_exact_without_sampling(name):
    decodes = game_of(MACHINES[name], (1, 90_000), (1, 100_000), (1, 200_000), (1, 300_000))
    shares = sampled(decodes, 0, np.random.default_rng(1))
    assert shares == pytest.approx(enumerated(decodes), rel=1e-12)


def test_a_seed_gives_the_same_truth_again():
    game = game_of(machine_of(), *RIDGE, *RIDGE, *RIDGE)
    first, second = (shapley(game, 10, np.random.default_rng(7)) for _ in range(2))
    assert (first == second).all()
