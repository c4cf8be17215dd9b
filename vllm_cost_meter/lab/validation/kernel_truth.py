"""Shapley values of the games that a step of kernels consists of: the second truth.

The value is additive over games, so each kind of kernel is a game of its own:

- A table over a sum of whole numbers (tokens, logits) has an exact value: at the instant s of
  arrivals that are uniform on [0, 1] each other request is there with the probability s, so their
  sum has a known distribution, the product of each one's. Its Fourier transform takes one of them
  out by a division. What the request adds is a polynomial in s, integrated by Gauss and Legendre.
- A maximum of sums, as attention is: its traffic is shared by itself, and the rest is the mean over
  random orders and their reverses.

Invariant: the shares of each game add up to its value.
"""

from functools import lru_cache

import numpy as np

from vllm_cost_meter.lab.validation.games import Floats, Ints

# Enough for the polynomials of hundreds of requests. Even, as s = 1/2 can make a division by 0.
NODES_MAX = 128


def total_shares(weights: Ints, table: Floats) -> Floats:
    """Return the Shapley value of the game table[sum of the members' weights]; shape (n,).

    `weights` are positive whole numbers. `table` begins with the value of nobody.
    """
    classes, whose, counts = np.unique(weights, return_inverse=True, return_counts=True)
    total = int(weights.sum())
    size = 1 << (total + 1).bit_length()
    growths = np.zeros((len(classes), size))
    for place, weight in enumerate(classes):
        growths[place, : total - weight + 1] = (
            table[weight : total + 1] - table[: total + 1 - weight]
        )
    spectra = np.fft.rfft(growths)
    frequencies = np.arange(size // 2 + 1)
    # The half that is left out is the complex conjugate.
    spectra *= np.where((frequencies == 0) | (frequencies == size // 2), 1, 2) / size
    turns = np.exp(2j * np.pi * frequencies * classes[:, None] / size)
    shares = np.zeros(len(classes))
    for s, weight in _nodes(min(NODES_MAX, 2 * (len(weights) // 4 + 1))):
        there = 1 - s + s * turns
        others = np.prod(there ** counts[:, None], axis=0) / there
        shares += weight * (others * spectra).real.sum(axis=1)
    found: Floats = shares[whose]
    return found


@lru_cache(maxsize=NODES_MAX)
def _nodes(count: int) -> list[tuple[float, float]]:
    """Return nodes on [0, 1] and their weights, exact for polynomials below degree 2 * count."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return list(zip(((nodes + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))


def overlap_shares(
    arithmetic_s: Floats,
    memory_s: Floats,
    longest_s: Floats,
    permutations: int,
    rng: np.random.Generator,
) -> Floats:
    """Return the Shapley value of the largest of two sums and of the longest; shape (n,).

    It is the mean over so many random orders, and exact where memory traffic is the limit of all.
    """
    over_s = arithmetic_s - memory_s
    if not (over_s > 0).any() and not longest_s.any():
        return memory_s
    count = len(over_s)
    half = rng.permuted(np.tile(np.arange(count), (-(-permutations // 2), 1)), axis=1)
    orders = np.concatenate([half, half[:, ::-1]])
    over_s = np.cumsum(over_s[orders], axis=1)
    longest = np.maximum.accumulate(longest_s[orders], axis=1)
    beyond = np.maximum(np.maximum(over_s, longest - np.cumsum(memory_s[orders], axis=1)), 0)
    grown = np.diff(beyond, axis=1, prepend=0)
    sums = np.bincount(orders.ravel(), weights=grown.ravel(), minlength=count)
    return memory_s + sums / len(orders)
