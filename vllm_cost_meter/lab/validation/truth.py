"""The truth that methods are measured against: the Shapley value of each step.

It is the only split of a game's total that adds up, treats equals alike, charges nothing to who
adds nothing, and of two games played at once charges the sum (L. S. Shapley, "A value for n-person
games", 1953). Player i gets the mean, over all orders in which the players can arrive, of what the
total grows by when i arrives.

Up to `ENUMERATED_MAX` requests it is enumerated. Above, the game is taken apart, and only what has
to be is sampled, because most of a step's time lies in parts whose value is known. With C, M, X the
seconds of arithmetic, of memory traffic and of reading experts that a coalition adds, and c, m what
every step takes,

    v(S) = base + M + X + max(c + C - m - M - X, 0) - max(c - m, 0)        S not empty

- the base, launch + max(c, m), is the same for everybody who comes first: base / n each;
- M is a sum over members: each their own;
- X depends on how many tokens there are, so requests with as many tokens get the same;
- what arithmetic takes longer than memory traffic is sampled, if it can be more than nothing.
"""

from functools import lru_cache
from math import factorial

import numpy as np

from vllm_cost_meter.lab.validation.roofline import Floats, Ints, StepGame

# 4,096 coalitions; each further player doubles them.
ENUMERATED_MAX = 12


def shapley(game: StepGame, permutations: int, rng: np.random.Generator) -> Floats:
    """Return each request's share of a step, in seconds; they add up to `total_s`. Shape (n,).

    Exact up to `ENUMERATED_MAX` requests, else from `permutations` orders.
    """
    if len(game) <= ENUMERATED_MAX:
        return enumerated(game)
    return sampled(game, permutations, rng)


def enumerated(game: StepGame) -> Floats:
    """Return the exact value from all 2^n coalitions."""
    members, weights = _coalitions(len(game))
    value = game.value(members @ game.compute_s, members @ game.memory_s, members @ game.tokens)
    above_base = value - game.base_s  # 0 for the empty one
    return game.base_s / len(game) + above_base @ weights


def sampled(game: StepGame, permutations: int, rng: np.random.Generator) -> Floats:
    """Return the mean over random orders of arrival, each with its reverse.

    Antithetic: who comes early in one order comes late in the other, so that what is gained by
    being convex or concave cancels (Mitchell et al., "Sampling permutations for Shapley value
    estimation", JMLR 23, 2022). `permutations` counts both, and is rounded up to an even number.
    """
    machine = game.machine
    count = len(game)
    known = game.base_s / count + game.memory_s
    ahead_s = machine.compute_fixed_s - machine.memory_fixed_s
    is_ridge = ahead_s + np.maximum(game.compute_s - game.memory_s, 0).sum() > 0
    is_even = (game.tokens == game.tokens[0]).all()
    if is_even and not is_ridge:
        return known + machine.experts_s(game.tokens.sum()) / count
    half = rng.permuted(np.tile(np.arange(count), (-(-permutations // 2), 1)), axis=1)
    orders = np.concatenate([half, half[:, ::-1]])
    experts_s = machine.experts_s(np.cumsum(game.tokens[orders], axis=1))
    over_s = np.cumsum((game.compute_s - game.memory_s)[orders], axis=1) + ahead_s - experts_s
    arithmetic = _mean_growth(np.maximum(over_s, 0), max(ahead_s, 0), orders)
    return known + arithmetic + _mean_of_equals(_mean_growth(experts_s, 0, orders), game.tokens)


def _mean_growth(values: Floats, empty: float, orders: Ints) -> Floats:
    """Return by how much each player's arrival raises a game's value, on average over orders.

    Both have a row per order and a column per arrival; `empty` is the value before the first.
    """
    grown = np.diff(values, axis=1, prepend=empty)
    sums = np.bincount(orders.ravel(), weights=grown.ravel(), minlength=orders.shape[1])
    return sums / len(orders)


def _mean_of_equals(values: Floats, keys: Floats) -> Floats:
    """Return each value replaced by the mean of those with the same key."""
    _, groups = np.unique(keys, return_inverse=True)
    means: Floats = (np.bincount(groups, weights=values) / np.bincount(groups))[groups]
    return means


@lru_cache(maxsize=ENUMERATED_MAX)
def _coalitions(count: int) -> tuple[Floats, Floats]:
    """Return all coalitions as rows of 0 and 1, and each one's weight for each player.

    Both have the shape (2^n, n). With s members, v(S) counts for a member with
    (s-1)! (n-s)! / n!, and against another with s! (n-s-1)! / n!.
    """
    rows = np.arange(2**count)
    members = ((rows[:, None] >> np.arange(count)) & 1).astype(np.float64)
    sizes = members.sum(axis=1).astype(int)
    whole = factorial(count)
    gained = [0.0] + [factorial(s - 1) * factorial(count - s) / whole for s in range(1, count + 1)]
    lost = [-factorial(s) * factorial(count - s - 1) / whole for s in range(count)] + [0.0]
    weights = np.where(members, np.array(gained)[sizes][:, None], np.array(lost)[sizes][:, None])
    return members, weights
