"""Definitions, computed the long way, that faster code is held against."""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TypeVar

Player = TypeVar("Player")


def shapley_values(
    value: Callable[[tuple[Player, ...]], float], players: Sequence[Player]
) -> list[float]:
    """Return the average over all orders of what each player adds to the value of those before."""
    n = len(players)
    values = []
    for i, player in enumerate(players):
        others = [*players[:i], *players[i + 1 :]]
        total = 0.0
        for size in range(n):
            orders = math.factorial(size) * math.factorial(n - 1 - size) / math.factorial(n)
            for before in combinations(others, size):
                total += orders * (value((*before, player)) - value(before))
        values.append(total)
    return values
