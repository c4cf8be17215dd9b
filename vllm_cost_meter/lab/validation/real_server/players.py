"""Who plays: requests as unlike as those of real tenants, and the proof that they ran together.

All prompts fit into one step, so each player computes its prompt in the first step of a burst and
one token in each further step, as long as it has tokens to make. Its bill counts its steps and the
requests in them. If all members start together, player i is in exactly T(i) steps, and shares these
with player j in min(T(i), T(j)) of them; a stranger in any of them would count too. A short player
that starts later than a long one has the same counts, but not the same instant of its first token:
vLLM notes one instant for all tokens of a step.

Invariant: `problem_of` is None only if all members ran in the same steps and nobody else did.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from vllm_cost_meter.errors import ServerError

PLAYERS_MIN = 2
# A prompt below 256 tokens in all would leave the short players nothing to differ by.
PROMPT_TOKENS_MIN = 256
# First tokens of one step are noted at one instant, or nearly so by several API servers. A step of
# any engine takes longer.
TOGETHER_MS = 1.0


class PlayerKind(NamedTuple):
    """A player's part of all prompt tokens, and of the longest output."""

    name: str
    does: str
    prompt_part: float
    output_part: float


# The order is that in which `--players` takes them. The prompts add up to less than the whole.
KINDS = (
    PlayerKind("document", "prefill of a long prompt, one token", 0.40, 0.0),
    PlayerKind("long chat", "the same prompt, and decodes of long context", 0.40, 1.0),
    PlayerKind("chat", "decodes of short context", 0.06, 1.0),
    PlayerKind("short answer", "a question and a few tokens", 0.03, 0.25),
    PlayerKind("tiny", "almost nothing", 0.004, 0.0625),
    PlayerKind("agent", "a tool's result, and half as many decodes", 0.08, 0.5),
    PlayerKind("second chat", "decodes of shorter context", 0.02, 1.0),
)


@dataclass(frozen=True, slots=True)
class PlayingRequest:
    """One request of the game: what it does, its prompt tokens and its output tokens."""

    name: str
    does: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class PlayerBill:
    """One player's bill in one burst, in GPU-ns. `step_ns` is what its steps took in all."""

    gpu_time_ns: int
    prefill_ns: int
    step_ns: int


def players_of(count: int, prompt_tokens: int, output_tokens: int) -> tuple[PlayingRequest, ...]:
    """Return the first `count` players: all prompts together have at most `prompt_tokens`.

    The longest output has `output_tokens`.
    """
    return tuple(
        PlayingRequest(
            kind.name,
            kind.does,
            max(2, int(kind.prompt_part * prompt_tokens)),
            max(1, round(kind.output_part * output_tokens)),
        )
        for kind in KINDS[:count]
    )


def members_of(coalition: int, count: int) -> list[int]:
    """Return the numbers of the players in a coalition, which is a bit for each player."""
    return [number for number in range(count) if coalition >> number & 1]


def problem_of(members: Sequence[PlayingRequest], parts: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why these bills are not those of one burst, None if they are.

    `parts` has the part of each member's request row, in the same order.
    """
    for player, part in zip(members, parts, strict=True):
        batch = sum(min(player.output_tokens, other.output_tokens) for other in members)
        wanted = {
            "prompt_tokens": player.prompt_tokens,
            "cached_tokens": 0,
            "external_tokens": 0,
            "preemptions": 0,
            "steps": player.output_tokens,
            "batch": batch,
        }
        if different := [
            f"{name} {part[name]} instead of {number}"
            for name, number in wanted.items()
            if part[name] != number
        ]:
            return f"{player.name} had {', '.join(different)}"
    instants_ms = [first_token_ms(part) for part in parts]
    if (apart_ms := max(instants_ms) - min(instants_ms)) > TOGETHER_MS:
        return f"first tokens came {apart_ms:.1f} ms apart"
    charged_ns = sum(part["gpu_time_ns"] for part in parts)
    longest_ns = max(part["step_ns"] for part in parts)
    if charged_ns != longest_ns:
        return f"the bills are {charged_ns} ns, and the steps took {longest_ns} ns"
    return None


def first_token_ms(part: Mapping[str, Any]) -> float:
    """Return the Unix time in ms at which a part's first token came, as vLLM noted it.

    Raises ServerError if the server keeps no latencies.
    """
    if part["ttft_ms"] is None or part["e2e_ms"] is None:
        raise ServerError(
            "expected the latencies of requests (ttft_ms), got none: this server keeps none, and"
            " nothing else proves that requests started together"
        )
    # The bill's instant less the time since arrival is the arrival, as vLLM noted it.
    billed_ms = datetime.fromisoformat(part["finished_at"]).timestamp() * 1e3
    return float(billed_ms - part["e2e_ms"] + part["ttft_ms"])


def charges_of(
    players: Sequence[PlayingRequest], bills: Sequence[PlayerBill]
) -> dict[str, list[float]]:
    """Return what a split by tokens, and one in equal parts, charges in a burst of all, in GPU-ns.

    Both follow from the bills, which have the time of the first step and that of all steps up to
    each player's end. After the first step everybody computes one token, so the two agree there.
    """
    first_ns = sum(bill.prefill_ns for bill in bills)
    tokens = sum(player.prompt_tokens for player in players)
    by_tokens = [first_ns * player.prompt_tokens / tokens for player in players]
    equal = [first_ns / len(players) for _ in players]
    until = {p.output_tokens: b.step_ns for p, b in zip(players, bills, strict=True)}
    before_ns = first_ns
    for output_tokens, step_ns in sorted(until.items()):
        still = [n for n, player in enumerate(players) if player.output_tokens >= output_tokens]
        for number in still:
            by_tokens[number] += (step_ns - before_ns) / len(still)
            equal[number] += (step_ns - before_ns) / len(still)
        before_ns = step_ns
    return {"tokens": by_tokens, "equal": equal}
