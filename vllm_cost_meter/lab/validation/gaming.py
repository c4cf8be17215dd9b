"""What a client gains by asking for the same work in another way, by the fair split itself.

A split that is fair step by step can still be played over steps: work can be cut in other pieces,
or moved to steps where others pay for more of what is shared. Each game here is played on a
simulated server with an 8B model on an H100, kernel by kernel, beside 63 replies of others. The
charges are the true Shapley values, so what is gained is gained by the rule and not by an error of
the meter.

Invariant: both ways of a game do the work that the client wanted; its name says what differs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vllm_cost_meter.lab.validation.kernel_machine import KernelMachine
from vllm_cost_meter.lab.validation.roofline import GPUS
from vllm_cost_meter.lab.validation.scenarios import DENSE

PERMUTATIONS = 400
Requests = Sequence[tuple[int, int, bool]]  # tokens, position, whether it is a prefill

OTHERS: Requests = [(1, 1_500, False)] * 63
FEW: Requests = OTHERS[:7]
CHUNK, PROMPT, REPLY, CONTEXT = 2_048, 8_192, 256, 1_500


@dataclass(frozen=True, slots=True)
class Steps:
    """So many steps with these requests of the client and of others."""

    mine: Requests
    others: Requests
    times: int = 1


@dataclass(frozen=True, slots=True)
class Played:
    """A game: what both ways cost the client and the others, in GPU-ms."""

    usual_ms: float
    played_ms: float
    others_usual_ms: float
    others_played_ms: float

    @property
    def change(self) -> float:
        """Return the change of the client's charge, as a fraction."""
        return self.played_ms / self.usual_ms - 1


def _replies(requests: int, others: Requests) -> list[Steps]:
    """Return the steps of some replies at once; every 64th stands for 64."""
    return [Steps([(1, CONTEXT + at, False)] * requests, others, 64) for at in range(0, REPLY, 64)]


def _prompt(tokens: int, others: Requests) -> list[Steps]:
    return [Steps([(CHUNK, at, True)], others) for at in range(0, tokens, CHUNK)]


GAMES: dict[str, tuple[list[Steps], list[Steps]]] = {
    "one prompt of 8,192 tokens as four of 2,048, one after another": (
        _prompt(PROMPT, OTHERS),
        _prompt(CHUNK, OTHERS) * 4,
    ),
    "one prompt of 2,048 tokens as eight of 256 at once": (
        [Steps([(CHUNK, 0, True)], OTHERS)],
        [Steps([(256, 0, True)] * 8, OTHERS)],
    ),
    "64 samples as one request with n=64, not as 64 requests": (
        _replies(64, ()),
        _replies(64, ()),
    ),
    "a reply when 63 others run, not alone": (_replies(1, ()), _replies(1, OTHERS)),
    "a reply when 63 others run, not 7": (_replies(1, FEW), _replies(1, OTHERS)),
    "the prefix of 8,192 tokens when somebody else has computed it": (
        [*_prompt(PROMPT, OTHERS), *_replies(1, OTHERS)],
        [Steps([(16, PROMPT, True)], OTHERS), *_replies(1, OTHERS)],
    ),
    "two replies as one of twice the length": (
        _replies(2, OTHERS[:62]),
        _replies(1, OTHERS) * 2,
    ),
}


def play(seed: int = 0) -> dict[str, Played]:
    """Return what each game brings, by its name."""
    rng = np.random.default_rng(seed)
    machine = KernelMachine(GPUS["h100"], DENSE)
    found = {}
    for name, (usual, played) in GAMES.items():
        mine, others = _charged(machine, usual, rng)
        mine_played, others_played = _charged(machine, played, rng)
        found[name] = Played(mine, mine_played, others, others_played)
    return found


def answer(seed: int = 0) -> dict[str, Any]:
    """Return what `validate --gaming --json` prints."""
    return {name: {**asdict(game), "change": game.change} for name, game in play(seed).items()}


def _charged(
    machine: KernelMachine, steps: Sequence[Steps], rng: np.random.Generator
) -> tuple[float, float]:
    """Return the charges of the client and of the others, in GPU-ms."""
    mine_ms = others_ms = 0.0
    for step in steps:
        requests = [*step.mine, *step.others]
        tokens, positions, is_prefill = (np.array(column) for column in zip(*requests, strict=True))
        shares_ms = machine.game(tokens, positions, is_prefill).shapley(PERMUTATIONS, rng) * 1e3
        mine = float(shares_ms[: len(step.mine)].sum())
        mine_ms += step.times * mine
        others_ms += step.times * (float(shares_ms.sum()) - mine)
    return mine_ms, others_ms
