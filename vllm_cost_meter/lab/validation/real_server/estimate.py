"""The Shapley value of a measured game, and how well repeats of the measurement know it.

Player i gets the mean, over all orders in which the players can arrive, of the growth of the value
when i arrives. With n players and a value for each of the 2^n coalitions that is a weighted sum. A
coalition's value is the mean over the fastest third of its bursts: other work on the machine makes
a burst longer and never shorter. If it meets all coalitions alike, this lowers all values by about
the same part, and shares stay: an assumption. The noise comes from the jackknife: the estimate
is made once without each round, and the spread of these estimates gives the standard error. Rounds
stay whole, so what is common to a round, such as a slower clock, is not taken for noise of its
parts. Student's quantile makes the standard error an interval of 95 %.

Invariant: the Shapley values of all players add up to the value of the coalition of all.
"""

from collections.abc import Callable, Sequence
from math import factorial, sqrt
from statistics import NormalDist, fmean

# With fewer, a third is one burst, and the jackknife does not know the spread of a minimum.
ROUNDS_MIN = 6
FASTEST_PART = 1 / 3
CONFIDENCE = 0.95


def shapley_of(values: Sequence[float]) -> list[float]:
    """Return each player's Shapley value from the values of all coalitions, in their unit.

    `values` is indexed by coalition, a bit for each player, and has 0 for nobody.
    """
    players = len(values).bit_length() - 1
    orders = factorial(players)
    weights = [factorial(size) * factorial(players - size - 1) / orders for size in range(players)]
    return [
        sum(
            weights[coalition.bit_count()] * (values[coalition | 1 << player] - value)
            for coalition, value in enumerate(values)
            if not coalition >> player & 1
        )
        for player in range(players)
    ]


def fastest(times: Sequence[float]) -> list[int]:
    """Return the places of the shortest third of some times, at least one."""
    count = max(1, round(FASTEST_PART * len(times)))
    return sorted(range(len(times)), key=times.__getitem__)[:count]


def half_widths(estimate: Callable[[Sequence[int]], Sequence[float]], rounds: int) -> list[float]:
    """Return, for each figure of an estimate, half the width of its 95 % interval.

    `estimate` computes the figures from the rounds with these numbers. There are at least
    `ROUNDS_MIN` rounds.
    """
    without_one = [
        estimate([number for number in range(rounds) if number != left]) for left in range(rounds)
    ]
    quantile = student_quantile(rounds - 1)
    return [quantile * _standard_error(figures) for figures in zip(*without_one, strict=True)]


def student_quantile(degrees: int) -> float:
    """Return Student's quantile for a two-sided interval of 95 %, to 0.2 % from 3 degrees on.

    It is the expansion of Cornish and Fisher around the normal quantile (Abramowitz and Stegun,
    26.7.5).
    """
    z: float = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(degrees) ** (power + 1) for power, term in enumerate(terms))


def _standard_error(figures: Sequence[float]) -> float:
    mean = fmean(figures)
    spread = sum((figure - mean) ** 2 for figure in figures)
    return sqrt(spread * (len(figures) - 1) / len(figures))
