"""Mixed traffic: a closed loop of clients whose requests are as unlike as those of real tenants.

Each client asks anew when its reply has ended, for a time. Prompts are random tokens, each sent
once, so none comes from the prefix cache.

Invariant: every request that was begun is counted, as answered or as failed.
"""

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.validation.real_server.burst import TOKEN_IDS, JudgedServer

FAILURES_MAX = 20


class TrafficKind(NamedTuple):
    """Requests of one kind: tokens of prompt and output, and their part of all requests."""

    name: str
    prompt_tokens: int
    output_tokens: int
    part: float


KINDS = (
    TrafficKind("chat", 512, 256, 0.60),
    TrafficKind("retrieval", 4096, 64, 0.25),
    TrafficKind("writing", 64, 512, 0.15),
)


@dataclass(slots=True)
class Driven:
    """What a stretch of traffic was: requests answered, their tokens, failures, seconds."""

    clients: int
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def drive(
    server: JudgedServer, clients: int, window_s: float, tokens_part: float, seed: str
) -> Driven:
    """Let so many clients ask for a time, and return what they did once all replies have come.

    Raises ServerError if no request was answered.
    """
    driven = Driven(clients)
    began_s = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        asked = [
            pool.submit(_client, server, began_s + window_s, tokens_part, f"{seed} {number}")
            for number in range(clients)
        ]
    for each in asked:
        answered, failures = each.result()
        driven.requests += len(answered)
        driven.prompt_tokens += sum(kind.prompt_tokens for kind in answered)
        driven.output_tokens += sum(kind.output_tokens for kind in answered)
        driven.failures += failures
    driven.seconds = time.monotonic() - began_s
    if not driven.requests:
        raise ServerError(f"expected answers to mixed traffic, got none: {driven.failures[:2]}")
    return driven


def _client(
    server: JudgedServer, until_s: float, tokens_part: float, seed: str
) -> tuple[list[TrafficKind], list[str]]:
    rng = random.Random(seed)  # noqa: S311 - no secret
    answered: list[TrafficKind] = []
    failures: list[str] = []
    while time.monotonic() < until_s and len(failures) < FAILURES_MAX:
        kind = _scaled(rng.choices(KINDS, [kind.part for kind in KINDS])[0], tokens_part)
        try:
            server.complete(
                f"gpu-check-{seed.replace(' ', '-')}-{len(answered) + len(failures)}",
                random_prompt(rng, kind.prompt_tokens),
                kind.output_tokens,
            )
        except ServerError as error:
            failures.append(str(error))
        else:
            answered.append(kind)
    return answered, failures


def _scaled(kind: TrafficKind, part: float) -> TrafficKind:
    return kind._replace(
        prompt_tokens=max(2, round(kind.prompt_tokens * part)),
        output_tokens=max(2, round(kind.output_tokens * part)),
    )


def random_prompt(rng: random.Random, tokens: int) -> Sequence[int]:
    """Return a prompt of random token ids, which every tokenizer has."""
    return rng.choices(TOKEN_IDS, k=tokens)
