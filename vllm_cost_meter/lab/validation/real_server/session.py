"""Play all rounds on a server that is started for it, or on one that runs, and return the verdict.

Each round plays every coalition once, in a new random order, so that what changes over minutes
meets all coalitions alike. A first round only warms up: caches fill, and the meter's cost model
learns what steps of these requests take.

Invariant: a server that was started here ends with the session.
"""

import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.client import get_json
from vllm_cost_meter.lab.server import (
    CPU_ARGUMENTS,
    Server,
    environment_of,
    is_cpu_build,
    meter_arguments,
)
from vllm_cost_meter.lab.tiny_model import default_path, make_tiny_model
from vllm_cost_meter.lab.validation.real_server.burst import (
    SIDE_TIMEOUT_S,
    BurstPlayer,
    JudgedServer,
)
from vllm_cost_meter.lab.validation.real_server.estimate import ROUNDS_MIN
from vllm_cost_meter.lab.validation.real_server.players import (
    KINDS,
    PLAYERS_MIN,
    PROMPT_TOKENS_MIN,
    PlayingRequest,
    players_of,
)
from vllm_cost_meter.lab.validation.real_server.verdict import judge

T = TypeVar("T")

KEY_ENV, TOKEN_ENV = "OPENAI_API_KEY", "COST_METER_ADMIN_TOKEN"
SIDE_PORT = 9477
# Models that need no download: the demo's, and one of its shape whose steps on a CPU are mostly
# products of matrices and not Python. Its weights are random.
TINY, SMALL = "tiny", "small"
SMALL_ARGUMENTS = (
    *("--load-format", "dummy", "--hf-overrides"),
    '{"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,'
    ' "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}',
)
# These belong to the session.
OWN_ARGUMENTS = ("--host", "--port", "--plugins", "--uds")


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """What to play, and where: on a new server of `model` (`small` if None), or at `url`."""

    model: str | None = None
    vllm_arguments: Sequence[str] = ()
    url: str | None = None
    side_url: str | None = None
    players: int = 5
    prompt_tokens: int = 2_000
    output_tokens: int = 32
    rounds: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError, naming the option, if it does not fit the others or its bounds."""
        if self.url is None and self.side_url is not None:
            raise ValueError("--side-url: expected with --url only")
        if self.url is not None:
            if self.model is not None or self.vllm_arguments:
                raise ValueError(
                    "--url: expected without --model and arguments of vLLM: that server has its own"
                )
            side_url_of(self.url)
        for option, least, value, most in (
            ("--players", PLAYERS_MIN, self.players, len(KINDS)),
            ("--prompt-tokens", PROMPT_TOKENS_MIN, self.prompt_tokens, None),
            ("--output-tokens", 2, self.output_tokens, None),
            ("--rounds", ROUNDS_MIN, self.rounds, None),
        ):
            if value < least or (most is not None and value > most):
                bounds = f"{least} or more" if most is None else f"{least} to {most}"
                raise ValueError(f"{option}: expected {bounds}, got {value}")
        for argument in self.vllm_arguments:
            if (name := argument.partition("=")[0]) in OWN_ARGUMENTS:
                raise ValueError(f"{name}: expected other vLLM arguments, this one is set here")


def measure(plan: ServerPlan, on_phase: Callable[[str], None]) -> dict[str, Any]:
    """Play all rounds and return the verdict with its figures, ready for JSON.

    `on_phase` is called with a text for each phase. Raises ServerError if the server or a request
    fails, the server works for others, or a burst cannot be held together.
    """
    with _server(plan, on_phase) as server:
        return play(server, plan, on_phase)


def play(
    server: JudgedServer,
    plan: ServerPlan,
    on_phase: Callable[[str], None],
    left_s: Callable[[], float] = lambda: inf,
) -> dict[str, Any]:
    """Play the rounds of a plan on a server that runs, and return as `measure`; raises as it does.

    `left_s` says how many seconds are left. Rounds that would take longer are not begun, but for
    the first ones, without which there is no verdict: if these would, it raises ServerError.
    """
    players = players_of(plan.players, plan.prompt_tokens, plan.output_tokens)
    _refuse_long(server, players)
    on_phase("warm-up")
    burst = BurstPlayer(server, players, plan.prompt_tokens, plan.seed)
    coalitions = range(1, 1 << plan.players)
    rounds = rounds_in_time(lambda: burst.play_round(coalitions), plan.rounds, on_phase, left_s)
    about = server.run(burst.run_id)
    return {
        **{name: about[name] for name in ("model", "hardware", "vllm_version", "method")},
        "repeated_bursts": burst.repeated,
        **judge(players, rounds),
    }


def rounds_in_time(
    play_round: Callable[[], T],
    rounds: int,
    on_phase: Callable[[str], None],
    left_s: Callable[[], float],
) -> list[T]:
    """Return what so many rounds bring after one that warms up, or as many as there is time for.

    A round is expected to take as long as the one before. Raises ServerError if there is no time
    for `ROUNDS_MIN`.
    """
    took_s = _seconds_of(play_round)
    played: list[T] = []
    while len(played) < rounds:
        if took_s * max(ROUNDS_MIN - len(played), 1) > left_s():
            if len(played) < ROUNDS_MIN:
                raise ServerError(
                    f"expected time for {ROUNDS_MIN} rounds of {took_s:.0f} s, got time for"
                    f" {len(played)} and {left_s():.0f} s: no verdict; allow more time"
                )
            break
        took_s = _seconds_of(lambda: played.append(play_round()))
        left = took_s * (rounds - len(played))
        on_phase(f"round {len(played)} of {rounds} in {took_s:.0f} s, about {left:.0f} s left")
    return played


def _seconds_of(work: Callable[[], object]) -> float:
    started_s = time.monotonic()
    work()
    return time.monotonic() - started_s


@contextmanager
def _server(plan: ServerPlan, on_phase: Callable[[str], None]) -> Iterator[JudgedServer]:
    if plan.url is None:
        with _started(plan, on_phase) as server:
            yield server
    else:
        side_url = plan.side_url or side_url_of(plan.url)
        yield _reached(plan.url, side_url.rstrip("/"), os.environ.get(TOKEN_ENV))


@contextmanager
def _started(plan: ServerPlan, on_phase: Callable[[str], None]) -> Iterator[JudgedServer]:
    """Start a metered server of the plan's model; it ends with the block."""
    model, arguments = plan.model or SMALL, tuple(plan.vllm_arguments)
    if model in (TINY, SMALL):
        make_tiny_model(default_path())
        named = ("--served-model-name", model)
        arguments = (*named, *(SMALL_ARGUMENTS if model == SMALL else ()), *arguments)
        model = str(default_path())
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="vllm-cost-meter-validate-") as name:
        folder = Path(name)
        environment = environment_of(folder, offline=Path(model).is_dir())
        environment |= {
            "COST_METER_LEDGER": f"sqlite:///{folder / 'ledger.db'}",
            TOKEN_ENV: token,
        }
        server = Server(
            model,
            # The user's arguments come last: of one that is given twice vLLM takes the last.
            [*meter_arguments(), *(CPU_ARGUMENTS if is_cpu_build() else ()), *arguments],
            environment,
            folder / "vllm.log",
            ends_with_us=True,
        )
        try:
            server.launch()
            server.wait(on_stage=changes(on_phase))
            yield _reached(server.url, server.side_url, token)
        finally:
            server.stop()


def _reached(url: str, side_url: str, token: str | None) -> JudgedServer:
    key = os.environ.get(KEY_ENV)
    return JudgedServer(url.rstrip("/"), key, side_url, token, _model_of(url, key)["id"])


def _model_of(url: str, key: str | None) -> dict[str, Any]:
    at = f"{url.rstrip('/')}/v1/models"
    models = get_json(at, key, "vLLM", SIDE_TIMEOUT_S, dict[str, Any]).get("data")
    if not models:
        raise ServerError(f"expected a model at {at}, got none")
    first: dict[str, Any] = models[0]
    return first


def side_url_of(url: str) -> str:
    """Return where the side endpoint of the server at `url` is by default. Raises ValueError."""
    host = urlsplit(url).hostname
    if host is None:
        raise ValueError(f"--url: expected a URL such as http://127.0.0.1:8000, got {url!r}")
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{SIDE_PORT}"


def _refuse_long(server: JudgedServer, players: Sequence[PlayingRequest]) -> None:
    """Raise ServerError if a player's context is longer than the model allows."""
    most = _model_of(server.url, server.key).get("max_model_len")
    longest = max(player.prompt_tokens + player.output_tokens for player in players)
    if most is not None and longest > most:
        raise ServerError(
            f"expected a model with a context of {longest} tokens or more, got {most}; lower"
            " --prompt-tokens or --output-tokens"
        )


def changes(on_phase: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function that passes a stage on when it is another than before."""
    last = ""

    def told(stage: str) -> None:
        nonlocal last
        if stage != last:
            on_phase(stage)
        last = stage

    return told
