"""The judge of a split on a real server, on games whose answer is known.

Goal: the Shapley value, its noise and the verdict are right. Method: a simulated server runs the
steps of bursts, whose times are a formula, and splits each step by the definition of the Shapley
value, an average over all orders. So a true split is known, and wrong ones too.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import permutations
from math import inf
from typing import Any

import pytest

from tests.component.cli.test_cli import run
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.validation import command
from vllm_cost_meter.lab.validation.real_server import burst as burst_module
from vllm_cost_meter.lab.validation.real_server import estimate, players, session, verdict
from vllm_cost_meter.lab.validation.real_server.players import PlayerBill, PlayingRequest
from vllm_cost_meter.lab.validation.real_server.verdict import judge
from vllm_cost_meter.lab.validation.tables import show_server

FIVE = players.players_of(5, 2_000, 32)
PER_STEP_NS = 2_000_000
PER_TOKEN_NS = 40_000
PER_CONTEXT_NS = 900
STARTED = datetime(2026, 11, 30, 7, 0, tzinfo=UTC)

Split = Callable[[Sequence[int], int, Callable[[Sequence[int]], float]], list[float]]


def over_all_orders(members: Sequence[int], value: Callable[[Sequence[int]], float]) -> list[float]:
    """The definition: the mean growth when a member arrives, over all orders of arrival."""
    orders = list(permutations(members))
    grown = dict.fromkeys(members, 0.0)
    for order in orders:
        for place, member in enumerate(order):
            grown[member] += value(order[: place + 1]) - value(order[:place])
    return [grown[member] / len(orders) for member in members]


def step_ns(game: Sequence[PlayingRequest], members: Sequence[int], step: int) -> float:
    """A step is a maximum of two sums, so that no split is right by itself."""
    if not members:
        return 0.0
    tokens = sum(game[member].prompt_tokens if step == 0 else 1 for member in members)
    context = sum(game[member].prompt_tokens + step for member in members)
    return PER_STEP_NS + max(tokens * PER_TOKEN_NS, context * PER_CONTEXT_NS)


def fair(game: Sequence[PlayingRequest], members: Sequence[int], step: int) -> list[float]:
    return over_all_orders(members, lambda some: step_ns(game, some, step))


def in_equal_parts(
    game: Sequence[PlayingRequest], members: Sequence[int], step: int
) -> list[float]:
    return [step_ns(game, members, step) / len(members)] * len(members)


def by_tokens(game: Sequence[PlayingRequest], members: Sequence[int], step: int) -> list[float]:
    tokens = [game[member].prompt_tokens if step == 0 else 1 for member in members]
    return [step_ns(game, members, step) * each / sum(tokens) for each in tokens]


def burst(
    game: Sequence[PlayingRequest], coalition: int, split: Any, slower: float
) -> list[PlayerBill]:
    """Run a burst step by step, as an engine does, and bill its members."""
    members = players.members_of(coalition, len(game))
    used = dict.fromkeys(members, 0.0)
    first = dict.fromkeys(members, 0.0)
    took = dict.fromkeys(members, 0.0)
    for step in range(max(game[member].output_tokens for member in members)):
        there = [member for member in members if game[member].output_tokens > step]
        whole = step_ns(game, there, step) * slower
        for member, ns in zip(there, split(game, there, step), strict=True):
            used[member] += ns * slower
            took[member] += whole
            if step == 0:
                first[member] = ns * slower
    return [
        PlayerBill(round(used[member]), round(first[member]), round(took[member]))
        for member in members
    ]


def played(
    game: Sequence[PlayingRequest],
    split: Any = fair,
    rounds: int = 12,
    noise: float = 0.0,
    seed: int = 1,
    busy: float = 0.0,
) -> list[dict[int, list[PlayerBill]]]:
    """Rounds on a simulated server, each burst slower or faster by a random part.

    In a part `busy` of all bursts other work makes it up to twice as long.
    """
    rng = random.Random(seed)

    def slower() -> float:
        return math.exp(rng.gauss(0, noise)) * (rng.uniform(1, 2) if rng.random() < busy else 1)

    return [
        {
            coalition: burst(game, coalition, split, slower())
            for coalition in range(1, 1 << len(game))
        }
        for _ in range(rounds)
    ]


# -- the estimate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_the_shapley_value_is_the_mean_over_all_orders(count):
    rng = random.Random(count)
    values = [0.0, *(rng.uniform(-1, 10) for _ in range((1 << count) - 1))]
    expected = over_all_orders(
        range(count), lambda some: values[sum(1 << member for member in some)]
    )
    assert estimate.shapley_of(values) == pytest.approx(expected)
    assert sum(estimate.shapley_of(values)) == pytest.approx(values[-1])


def test_the_value_of_a_burst_is_what_a_fair_split_of_each_step_charges():
    # So the comparison means something, though the players end at different steps.
    values = [0.0] + [
        sum(bill.gpu_time_ns for bill in burst(FIVE, coalition, fair, 1.0))
        for coalition in range(1, 32)
    ]
    charged = [bill.gpu_time_ns for bill in burst(FIVE, 31, fair, 1.0)]
    assert estimate.shapley_of(values) == pytest.approx(charged, abs=20)


@pytest.mark.parametrize(
    ("times", "places"),
    [([4.0], [0]), ([9.0, 2.0, 3.0], [1]), ([5.0, 1.0, 4.0, 900.0, 2.0, 7.0], [1, 4])],
)
def test_the_fastest_third_counts(times, places):
    assert estimate.fastest(times) == places


@pytest.mark.parametrize(
    # As printed in tables of the distribution.
    ("degrees", "quantile"),
    [(3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (11, 2.201), (30, 2.042), (120, 1.980)],
)
def test_students_quantile_is_that_of_the_tables(degrees, quantile):
    assert estimate.student_quantile(degrees) == pytest.approx(quantile, rel=0.002)


def test_the_noise_of_a_mean_is_the_textbooks():
    values = [3.0, 5.0, 4.0, 8.0, 6.0, 1.0]
    mean = sum(values) / len(values)
    (width,) = estimate.half_widths(
        lambda some: [sum(values[number] for number in some) / len(some)], len(values)
    )
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    assert width == pytest.approx(
        estimate.student_quantile(len(values) - 1) * math.sqrt(variance / len(values))
    )


@pytest.mark.parametrize("busy", [0.0, 0.4])
def test_the_interval_covers_the_true_share_at_least_as_often_as_it_says(busy):
    game = players.players_of(3, 2_000, 16)
    truth = [bill.gpu_time_ns for bill in burst(game, 7, fair, 1.0)]
    covered = []
    for seed in range(100):
        found = judge(game, played(game, rounds=9, noise=0.03, seed=seed, busy=busy))
        for player, ns in zip(found["players"].values(), truth, strict=True):
            true_ns = found["all_ns"] * ns / sum(truth)
            covered.append(abs(player["measured_ns"] - true_ns) <= player["noise_ns"])
    assert sum(covered) / len(covered) > 0.93


# -- the proof that a burst ran together -----------------------------------------------------------


def part(player: PlayingRequest, batch: int, bill: PlayerBill, **changed: Any) -> dict[str, Any]:
    return {
        "prompt_tokens": player.prompt_tokens,
        "cached_tokens": 0,
        "external_tokens": 0,
        "preemptions": 0,
        "steps": player.output_tokens,
        "batch": batch,
        "gpu_time_ns": bill.gpu_time_ns,
        "prefill_ns": bill.prefill_ns,
        "step_ns": bill.step_ns,
        "finished_at": (STARTED + timedelta(seconds=2)).isoformat().replace("+00:00", "Z"),
        "e2e_ms": 2_000.0,
        "ttft_ms": 100.0,
    } | changed


def parts_of_three(**changed: Any) -> tuple[Sequence[PlayingRequest], list[dict[str, Any]]]:
    """A document (1 step), a long chat and a chat (16 steps); the document's part is changed."""
    game = players.players_of(3, 2_000, 16)
    long_ns, chat_ns, document_ns = 70, 20, 10
    bills = [PlayerBill(document_ns, 10, 30), *(PlayerBill(n, 5, 100) for n in (long_ns, chat_ns))]
    batches = [3, 33, 33]
    parts = [part(*each) for each in zip(game, batches, bills, strict=True)]
    parts[0] |= changed
    return game, parts


def test_bills_of_a_burst_that_ran_together_are_taken():
    assert players.problem_of(*parts_of_three()) is None


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"steps": 2}, "document had steps 2 instead of 1"),
        ({"batch": 4}, "document had batch 4 instead of 3"),
        ({"cached_tokens": 16}, "document had cached_tokens 16 instead of 0"),
        ({"external_tokens": 16}, "document had external_tokens 16 instead of 0"),
        ({"preemptions": 1}, "document had preemptions 1 instead of 0"),
        ({"ttft_ms": 108.0}, "first tokens came 8.0 ms apart"),
        ({"gpu_time_ns": 11}, "the bills are 101 ns, and the steps took 100 ns"),
    ],
)
def test_a_burst_that_ran_otherwise_is_not(changed, problem):
    assert players.problem_of(*parts_of_three(**changed)) == problem


def test_a_server_without_latencies_cannot_prove_it():
    with pytest.raises(ServerError, match="expected the latencies of requests"):
        players.problem_of(*parts_of_three(ttft_ms=None))


@pytest.mark.parametrize("tokens", [256, 2_000, 8_192])
def test_all_prompts_fit_into_one_step_and_all_players_differ(tokens):
    game = players.players_of(len(players.KINDS), tokens, 32)
    assert sum(player.prompt_tokens for player in game) <= tokens
    assert len({(player.prompt_tokens, player.output_tokens) for player in game}) == len(game)


def test_where_others_came_late_the_request_ahead_is_longer_as_far_as_a_step_goes():
    start = burst_module._Start(tokens=512, alone_s=0.005)
    alone = {"steps": 1, "batch": 1}
    assert start.after(alone, 2_000) == burst_module._Start(1_024, 0.005)
    assert start.after(alone, 800) == burst_module._Start(800, 0.005)


def test_where_others_came_first_the_request_ahead_gets_a_longer_start():
    start = burst_module._Start(tokens=512, alone_s=0.005)
    joined = {"steps": 1, "batch": 3}
    assert start.after(joined, 2_000) == burst_module._Start(512, 0.010)


@pytest.mark.parametrize(
    ("url", "side_url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:9477"),
        ("https://gpu-1.example:8443/", "http://gpu-1.example:9477"),
        ("http://[::1]:8000", "http://[::1]:9477"),
    ],
)
def test_the_side_endpoint_is_looked_for_at_its_default_port(url, side_url):
    assert session.side_url_of(url) == side_url
    assert Settings.model_fields["port"].default == session.SIDE_PORT


# -- the verdict -----------------------------------------------------------------------------------


def test_a_fair_split_agrees_and_all_splits_add_up():
    found = judge(FIVE, played(FIVE, noise=0.02))
    assert found["verdict"] == verdict.AGREES
    assert found["splits"]["ours"]["misplaced_share"] < 0.02
    for split in found["splits"]:
        charged = sum(player["charged_ns"][split] for player in found["players"].values())
        assert charged == pytest.approx(found["all_ns"], abs=5)
    assert len(found["coalitions_ns"]) == 31


@pytest.mark.parametrize("split", [in_equal_parts, by_tokens])
def test_a_server_that_splits_wrongly_differs(split):
    found = judge(FIVE, played(FIVE, split, noise=0.02))
    assert found["verdict"] == verdict.DIFFERS
    assert found["splits"]["ours"]["outside"]


@pytest.mark.parametrize(("split", "name"), [(in_equal_parts, "equal"), (by_tokens, "tokens")])
def test_other_splits_follow_from_the_bills_of_any(split, name):
    charges = players.charges_of(FIVE, burst(FIVE, 31, fair, 1.0))[name]
    assert charges == pytest.approx(
        [bill.gpu_time_ns for bill in burst(FIVE, 31, split, 1.0)], abs=20
    )


def test_equal_parts_do_not_pass_where_they_are_wrong():
    assert not judge(FIVE, played(FIVE, noise=0.02))["splits"]["equal"]["passes"]


def test_wide_noise_is_no_verdict_and_says_how_many_rounds_it_takes():
    found = judge(FIVE, played(FIVE, in_equal_parts, noise=0.5))
    assert found["noise_share"] > verdict.NOISE_SHARE_MAX
    assert found["verdict"] == verdict.REFUSED
    assert found["why"].startswith("expected noise of at most 10% of GPU time, measured ")
    assert "--rounds" in found["why"]


def test_where_equal_parts_would_pass_there_is_no_verdict():
    twins = [PlayingRequest(name, "", 100, 8) for name in ("one", "other", "third")]
    found = judge(twins, played(twins, noise=0.01))
    assert found["splits"]["equal"]["passes"]
    assert found["verdict"] == verdict.REFUSED


def test_a_round_in_which_the_machine_worked_for_others_counts_little():
    rounds = played(FIVE, rounds=12, noise=0.005)
    disturbed = [dict(one) for one in rounds]
    for coalition in (3, 17, 31):
        disturbed[5][coalition] = burst(FIVE, coalition, fair, 4.0)
    calm, other = (judge(FIVE, each) for each in (rounds, disturbed))
    assert other["all_ns"] == pytest.approx(calm["all_ns"], rel=0.01)
    assert other["verdict"] == verdict.AGREES


# -- what the command shows ------------------------------------------------------------------------

ABOUT = {"model": "m", "hardware": "a GPU", "vllm_version": "0.32.0", "method": "shapley"}


@pytest.mark.parametrize("split", [fair, by_tokens])
def test_the_table_has_a_row_for_each_player_and_the_verdict_is_the_last_line(split, capsys):
    found = ABOUT | judge(FIVE, played(FIVE, split, noise=0.01))
    show_server(found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("m on a GPU, vLLM 0.32.0, in GPU-ms: 5 requests together take ")
    for player in FIVE:
        (row,) = [line for line in lines if line.startswith(f"{player.name} ")]
        assert player.does in row
        assert f"{player.prompt_tokens}:{player.output_tokens}" in row
        assert row.count(" %)") == len(found["splits"])
    assert lines[-1] == f"verdict: {found['verdict']}: {found['why']}"


@pytest.mark.parametrize(
    ("split", "noise", "status"), [(fair, 0.01, 0), (by_tokens, 0.01, 1), (fair, 0.5, 1)]
)
def test_the_exit_status_is_that_of_the_verdict(split, noise, status, monkeypatch):
    found = ABOUT | judge(FIVE, played(FIVE, split, noise=noise))
    monkeypatch.setattr(command, "measured", lambda plan: found)
    result = run("validate", "--server")
    assert result.exit_code == status
    refused = found["verdict"] == verdict.REFUSED
    assert result.stderr.splitlines() == (
        [f"vllm-cost-meter validate: {found['why']}"] if refused else []
    )
    assert ("verdict: " in result.stdout) != refused


def test_rounds_that_would_take_longer_than_is_left_are_not_begun():
    phases: list[str] = []

    def left_s() -> float:
        return 0.0 if len(phases) == estimate.ROUNDS_MIN else inf

    counter = itertools.count()
    found = session.rounds_in_time(lambda: next(counter), 9, phases.append, left_s)
    assert found == list(range(1, estimate.ROUNDS_MIN + 1))  # The first one warms up.
    assert phases[-1].startswith(f"round {estimate.ROUNDS_MIN} of 9 in ")


def test_without_time_for_a_verdict_no_round_is_played():
    phases: list[str] = []
    asked = f"expected time for {estimate.ROUNDS_MIN} rounds of .* no verdict"
    with pytest.raises(ServerError, match=asked):
        session.rounds_in_time(lambda: None, 9, phases.append, lambda: -1.0)
    assert phases == []


class _Asked:
    """Notes the prompts that it is asked."""

    def __init__(self) -> None:
        self.prompts: list[tuple[int, ...]] = []

    def complete(self, _request_id: str, prompt: Sequence[int], _output_tokens: int) -> None:
        self.prompts.append(tuple(prompt))

    def part_of(self, _request_id: str) -> dict[str, Any]:
        return {"run_id": "run"}

    def used_ns(self, _run_id: str) -> int:
        return 0


def test_another_run_with_the_same_seed_asks_what_no_cache_has():
    asked = [_Asked(), _Asked()]
    for server in asked:
        burst_module.BurstPlayer(server, FIVE, 2_000, seed=0)
    first, second = (set(server.prompts) for server in asked)
    assert len(first) == len(second) == len(FIVE) + 1
    assert not first & second
