"""What a comparison needs of a simulated machine: the games of its steps, each with its truth.

Invariant: types only; nothing here computes.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Features:
    """What some requests of a step need beside the model; arrays have the shape (n,).

    `adapters` are numbers from 1 on, 0 for none. `grammar_rows` are rows that are sampled by a
    grammar in this step. `encoded` are the tokens of an image that the encoder computes in it.
    """

    adapters: Ints
    grammar_rows: Ints
    encoded: Ints


class SimulatedGame(Protocol):
    """A step as a cooperative game between its n requests: its time with only some of them."""

    @property
    def total_s(self) -> float:
        """The seconds of the step with all of its requests."""

    def __len__(self) -> int:
        """Return n."""

    def shapley(self, permutations: int, rng: np.random.Generator) -> Floats:
        """Return each request's true share in seconds, shape (n,); they add up to `total_s`.

        What is not known exactly is the mean over so many random orders.
        """

    def marginal_s(self) -> Floats:
        """Return the seconds that each request adds; shape (n,)."""

    def alone_s(self) -> Floats:
        """Return the seconds of a step with each request alone; shape (n,)."""


class Simulated(Protocol):
    """A machine that runs a model."""

    def game(
        self, tokens: Ints, positions: Ints, is_prefill: Flags, features: Features | None = None
    ) -> SimulatedGame:
        """Return a step's game. Arguments have the shape (n,), n at least 1.

        `positions` are the requests' places in their contexts where the step starts. More than one
        token of a request that is no prefill are drafts.
        """
