"""What a check measures, how much of it, and what is left of its time.

The parts stand in the order in which they are worth having. The ones that need a server of their
own come last, because a start of a server takes a minute or more.

Invariant: a part is begun only if as much time is left as it needs at least.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

from vllm_cost_meter.lab.bench_client import ClosedLoop
from vllm_cost_meter.lab.sweep.bench import Shape
from vllm_cost_meter.lab.validation.real_server.session import OWN_ARGUMENTS

GAME, ENERGY, OVERLAP, BOOKS, THROUGHPUT = "game", "energy", "overlap", "books", "throughput"
PARTS = (GAME, ENERGY, OVERLAP, BOOKS, THROUGHPUT)
# Of vLLM's arguments, what the check sets itself; what takes more than its one GPU, whose energy is
# read; and secrets, which a page would show.
SET_HERE = (*OWN_ARGUMENTS, "--served-model-name", "--load-format")
SEVERAL_GPUS = (
    *("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp"),
    *("--data-parallel-size", "-dp"),
)
SECRETS = ("--api-key", "--hf-token")
REFUSED = (
    (SET_HERE, "this one is set here"),
    (SEVERAL_GPUS, "the check is of one GPU"),
    (SECRETS, "its servers need no key, and the page would show it"),
)
# Seconds that a budget has at least: a server starts in half a minute at best.
BUDGET_S_MIN = 60


@dataclass(frozen=True, slots=True)
class GameSize:
    """The game of all coalitions; the names are those of `ServerPlan`.

    It may take `budget_part` of the whole time.
    """

    players: int
    prompt_tokens: int
    output_tokens: int
    rounds: int
    needs_s: float
    budget_part: float = 0.4


@dataclass(frozen=True, slots=True)
class EnergySize:
    """Mixed traffic: a window of `window_s` for each number of clients, and one without any.

    Prompts and outputs have `tokens_part` of the tokens of the kinds in `requests`.
    """

    clients: tuple[int, ...]
    window_s: float
    tokens_part: float

    @property
    def needs_s(self) -> float:
        return (len(self.clients) + 1) * (self.window_s + 5)


@dataclass(frozen=True, slots=True)
class OverlapSize:
    """Decodes of short and of long context, (number, tokens) each, and a chunk beside them.

    While `output_tokens` are decoded, `chunks` prompts of `chunk` tokens come, `pause_s` apart.
    """

    short: tuple[int, int]
    long: tuple[int, int]
    chunk: int
    chunks: int
    output_tokens: int
    pause_s: float
    needs_s: float

    def fitting(self, context_max: int, kv_tokens: int | None) -> "OverlapSize":
        """Return the size with contexts that a server has room for."""
        number, tokens = self.long
        room = context_max - self.output_tokens
        if kv_tokens is not None:
            # What the chunks and a margin need beside the long contexts.
            left = kv_tokens - 2 * self.chunk - number * self.output_tokens
            room = min(room, int(0.9 * left / number))
        tokens = max(self.short[1], min(tokens, room))
        return replace(self, long=(number, tokens))


@dataclass(frozen=True, slots=True)
class ThroughputSize:
    """Runs of `load` in pairs, as many as fit into `measure_s`, at least `pairs_min`."""

    load: ClosedLoop
    warmup_requests: int
    pairs_min: int
    pairs_max: int
    measure_s: float
    needs_s: float


@dataclass(frozen=True, slots=True)
class CheckSizes:
    """How much of each part."""

    game: GameSize
    energy: EnergySize
    overlap: OverlapSize
    throughput: ThroughputSize
    # Seconds that a start of a server needs at least.
    start_s: float


# A step takes 5 to 80 ms. All prompts of a game fit into one step of 8,192 tokens.
ON_GPU = CheckSizes(
    GameSize(players=5, prompt_tokens=8000, output_tokens=32, rounds=12, needs_s=60),
    EnergySize(clients=(8, 32, 96), window_s=20, tokens_part=1),
    OverlapSize((32, 500), (4, 60_000), 2048, 16, 512, pause_s=0.05, needs_s=40),
    ThroughputSize(ClosedLoop(Shape(512, 256), 192, 64), 128, 4, 12, measure_s=240, needs_s=80),
    start_s=60,
)
# A tiny model on few cores: the same parts, so that all but the GPU is seen to work.
ON_CPU = CheckSizes(
    GameSize(players=3, prompt_tokens=512, output_tokens=8, rounds=6, needs_s=15),
    EnergySize(clients=(2, 8), window_s=5, tokens_part=1 / 16),
    # On a busy machine a client hears of the first token when an engine is 100 steps further.
    OverlapSize((16, 200), (4, 3000), 512, 6, 640, pause_s=0.05, needs_s=20),
    ThroughputSize(ClosedLoop(Shape(64, 32), 32, 8), 16, 4, 6, measure_s=40, needs_s=20),
    start_s=20,
)


@dataclass(frozen=True, slots=True)
class CheckPlan:
    """What to check: `shape` is a name of `model.SHAPES`, None chooses one that fits the card.

    The results go to `folder`. `vllm_arguments` come last on each server's command line.
    """

    folder: Path
    shape: str | None = None
    parts: Sequence[str] = PARTS
    budget_s: float = 1200
    allow_cpu: bool = False
    seed: int = 0
    vllm_arguments: Sequence[str] = ()
    sizes: CheckSizes | None = None

    def __post_init__(self) -> None:
        """Raise ValueError, naming the option, for a value out of its bounds."""
        if not BUDGET_S_MIN <= self.budget_s < inf:
            raise ValueError(
                f"--budget-s: expected {BUDGET_S_MIN} or more, got {self.budget_s:g}: a server"
                " takes that long to start and to measure anything"
            )
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"--part: expected one of {', '.join(PARTS)}, got {part!r}")
        for argument in self.vllm_arguments:
            name = argument.partition("=")[0]
            for refused, why in REFUSED:
                # vLLM takes underscores too.
                if name.replace("_", "-") in refused:
                    raise ValueError(f"{name}: expected other vLLM arguments, {why}")


class TimeBudget:
    """Seconds of a check: how many are left, and whether they are enough."""

    def __init__(self, budget_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget_s = budget_s
        self._clock = clock
        self._began_s = clock()

    @property
    def spent_s(self) -> float:
        """Seconds since the check began."""
        return self._clock() - self._began_s

    @property
    def left_s(self) -> float:
        """Seconds left; less than 0 if there are none."""
        return self.budget_s - self.spent_s

    def why_not(self, needs_s: float) -> str | None:
        """Return why a part that needs so many seconds is left out, None if it is not."""
        if self.left_s >= needs_s:
            return None
        return f"{max(0, self.left_s):.0f} s were left of {self.budget_s:.0f}, {needs_s:.0f} needed"
