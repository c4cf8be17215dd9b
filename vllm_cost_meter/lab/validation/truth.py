"""The Shapley value of a step: the true share of each request, which methods are measured against.

It is the only split of a game's total that adds up, treats equals alike, charges nothing to a
player who adds nothing, and is additive over games (L. S. Shapley, "A value for n-person games",
1953). Player i gets the mean, over all orders in which the players can arrive, of the growth in the
total when i arrives.

With up to `ENUMERATED_MAX` requests the value is enumerated. With more, the game is split into
terms. Most of a step's time lies in terms with a known value, and only the rest is sampled. Let C,
M and X be the seconds that a coalition adds for arithmetic, memory traffic and reading experts, and
let c and m be the seconds that every step takes for arithmetic and memory traffic:

    v(S) = base + M + X + max(c + C - m - M - X, 0) - max(c - m, 0)        S not empty

- The base, launch + max(c, m), is the same for whoever comes first: base / n for each.
- M is a sum over members: each gets its own part.
- X depends on the number of tokens, so requests with equally many tokens get the same.
- The excess of arithmetic over memory traffic is sampled, if it can be above 0.
"""

from functools import lru_cache
from math import factorial
from typing import Protocol

import numpy as np

from vllm_cost_meter.lab.validation.games import Floats, Ints

# 12 players have 4,096 coalitions; each further player doubles them.
ENUMERATED_MAX = 12


class Times(Protocol):
    """What a machine takes for a step before its first token, and for reading experts."""

    launch_s: float
    compute_fixed_s: float
    memory_fixed_s: float
    expert_s: float

    def experts_s(self, tokens: Floats) -> Floats:
        """Return the seconds to read the experts that so many tokens choose; shape as `tokens`."""


class StepGame:
    """A step as a cooperative game: its time with only some of its requests in it.

    `compute_s`, `memory_s` and `tokens`, each with the shape (n,), are the parts that requests add.
    The sums over its members define a coalition. The empty coalition takes no time; `base_s` is the
    time that every other coalition takes before its first token.
    """

    def __init__(self, machine: Times, compute_s: Floats, memory_s: Floats, tokens: Floats):
        self.machine = machine
        self.compute_s = compute_s
        self.memory_s = memory_s
        self.tokens = tokens
        nothing = np.zeros(())
        self.base_s = float(self.value(nothing, nothing, nothing))
        self.total_s = float(self.value(compute_s.sum(), memory_s.sum(), tokens.sum()))

    def __len__(self) -> int:
        return len(self.tokens)

    def value(self, compute_s: Floats, memory_s: Floats, tokens: Floats) -> Floats:
        """Return the seconds of non-empty coalitions from their members' sums; shapes as given."""
        machine = self.machine
        read_s = memory_s + machine.memory_fixed_s
        if machine.expert_s:
            read_s = read_s + machine.experts_s(tokens)
        slower: Floats = np.maximum(compute_s + machine.compute_fixed_s, read_s)
        return slower + machine.launch_s

    def shapley(self, permutations: int, rng: np.random.Generator) -> Floats:
        """Return each request's true share in seconds; shape (n,)."""
        return shapley(self, permutations, rng)

    def marginal_s(self) -> Floats:
        """Return the seconds that each request adds, v(N) - v(N without it); shape (n,)."""
        if len(self) == 1:
            return np.array([self.total_s])
        without = self.value(
            self.compute_s.sum() - self.compute_s,
            self.memory_s.sum() - self.memory_s,
            self.tokens.sum() - self.tokens,
        )
        return self.total_s - without

    def alone_s(self) -> Floats:
        """Return the seconds of a step with each request alone; shape (n,)."""
        return self.value(self.compute_s, self.memory_s, self.tokens)


def shapley(game: StepGame, permutations: int, rng: np.random.Generator) -> Floats:
    """Return each request's share in seconds, shape (n,); the shares add up to `total_s`.

    They are exact up to `ENUMERATED_MAX` requests, else estimated from `permutations` orders.
    """
    if len(game) <= ENUMERATED_MAX:
        return enumerated(game)
    return sampled(game, permutations, rng)


def enumerated(game: StepGame) -> Floats:
    """Return the exact shares in seconds from all 2^n coalitions; shape (n,)."""
    members, weights = _coalitions(len(game))
    value = game.value(members @ game.compute_s, members @ game.memory_s, members @ game.tokens)
    above_base = value - game.base_s  # 0 for the empty coalition
    return game.base_s / len(game) + above_base @ weights


def sampled(game: StepGame, permutations: int, rng: np.random.Generator) -> Floats:
    """Return the shares in seconds, as means over random orders of arrival and their reverses.

    The sampling is antithetic: a player who comes early in one order comes late in its reverse, so
    the effects of convexity and concavity cancel (Mitchell et al., "Sampling permutations for
    Shapley value estimation", JMLR 23, 2022). `permutations` counts orders and reverses, rounded up
    to an even number. Shape (n,).
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
    """Return the mean growth in a game's value when each player arrives; shape (n,).

    `values` and `orders` have a row per order and a column per arrival. `empty` is the value before
    the first arrival.
    """
    grown = np.diff(values, axis=1, prepend=empty)
    sums = np.bincount(orders.ravel(), weights=grown.ravel(), minlength=orders.shape[1])
    return sums / len(orders)


def _mean_of_equals(values: Floats, keys: Floats) -> Floats:
    """Return each value replaced by the mean over values with the same key."""
    _, groups = np.unique(keys, return_inverse=True)
    means: Floats = (np.bincount(groups, weights=values) / np.bincount(groups))[groups]
    return means


@lru_cache(maxsize=ENUMERATED_MAX)
def _coalitions(count: int) -> tuple[Floats, Floats]:
    """Return all coalitions as rows of 0 and 1, and their weight for each player.

    Both have the shape (2^n, n). If S has s members, v(S) counts for each member with the weight
    (s-1)! (n-s)! / n!, and against each other player with s! (n-s-1)! / n!.
    """
    rows = np.arange(2**count)
    members = ((rows[:, None] >> np.arange(count)) & 1).astype(np.float64)
    sizes = members.sum(axis=1).astype(int)
    whole = factorial(count)
    gained = [0.0] + [factorial(s - 1) * factorial(count - s) / whole for s in range(1, count + 1)]
    lost = [-factorial(s) * factorial(count - s - 1) / whole for s in range(count)] + [0.0]
    weights = np.where(members, np.array(gained)[sizes][:, None], np.array(lost)[sizes][:, None])
    return members, weights
