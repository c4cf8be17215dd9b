"""The page on validation says what is simulated and measured as the code does it."""

import re

import pytest

from tests.support.pages import DOCS, names, section, table_rows
from vllm_cost_meter.attribution import METHODS
from vllm_cost_meter.engine.step_log import _Line
from vllm_cost_meter.lab.validation import roofline, traffic
from vllm_cost_meter.lab.validation.command import (
    LEAVE_ONE_OUT,
    MEAN_BATCHES,
    WARM_UP_PART,
    KernelPlan,
    RooflinePlan,
)
from vllm_cost_meter.lab.validation.compare import Errors
from vllm_cost_meter.lab.validation.real_server.players import KINDS, PLAYERS_MIN, players_of
from vllm_cost_meter.lab.validation.real_server.session import ServerPlan
from vllm_cost_meter.lab.validation.real_server.verdict import (
    AGREES,
    DIFFERS,
    NOISE_SHARE_MAX,
    REFUSED,
    TOLERANCE_SHARE,
    judge,
)
from vllm_cost_meter.lab.validation.scenarios import JUDGED, LEARNT, SCENARIOS
from vllm_cost_meter.lab.validation.truth import ENUMERATED_MAX

PAGE = DOCS / "explanation" / "validation.md"
TEXT = " ".join(PAGE.read_text().split())
ROWS = {row[0].strip("`"): row[1:] for row in table_rows(PAGE.read_text())}


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


def test_the_gpus_are_those_that_are_simulated():
    for name, gpu in roofline.GPUS.items():
        peaks = gpu.peaks
        units = [peaks.flops_per_s / 1e12, peaks.bytes_per_s / 1e12, gpu.memory_bytes / 1e9]
        assert [number(cell) for cell in ROWS[name]] == pytest.approx(units)


def test_the_tables_list_all_gpus_models_tenants_and_keys():
    assert names(PAGE, "The scenarios") == [
        *(tenant.name for tenant in traffic.SEVEN_TENANTS),
        "--scenario",
        *SCENARIOS,
    ]
    assert names(PAGE, "The roofline") == [
        "--gpu",
        *roofline.GPUS,
        "--model",
        *roofline.MODELS,
        *(tenant.name for tenant in traffic.TENANTS),
    ]
    assert names(PAGE, "What is measured") == list(Errors.__dataclass_fields__)
    assert names(PAGE, "Your own traffic") == list(_Line.__struct_fields__)


@pytest.mark.parametrize(
    ("heading", "tenants"),
    [("The scenarios", traffic.SEVEN_TENANTS), ("The roofline", traffic.TENANTS)],
)
def test_the_tenants_are_those_that_are_simulated(heading, tenants):
    rows = {row[0].strip("`"): row[1:] for row in table_rows(section(PAGE, heading))}
    for tenant in tenants:
        prompt, output, share = rows[tenant.name]
        assert (number(prompt), number(output)) == (tenant.prompt_tokens, tenant.output_tokens)
        assert share == f"{tenant.requests_share:.0%}".replace("%", " %")


def test_the_experts_are_those_of_the_model():
    shape = roofline.MODELS["qwen3-30b-a3b"]
    assert f"{shape.experts} experts of which each token chooses {shape.experts_per_token}" in TEXT
    assert f"min({shape.experts_per_token} T, {shape.experts})" in TEXT


def test_figures_in_the_text_are_those_of_the_code():
    plan = RooflinePlan()
    *batches, last = MEAN_BATCHES
    for words in (
        f"Up to {ENUMERATED_MAX} requests",
        f"2 x {plan.permutations:,} random orders",
        f"step time = {roofline.LAUNCH_S * 1e3:g} ms",
        f"peak x {roofline.COMPUTE_EFFICIENCY}",
        f"bandwidth x {roofline.MEMORY_EFFICIENCY}",
        f"noise of {traffic.NOISE_SIGMA:.0%}".replace("%", " %"),
        f"{', '.join(map(str, batches))} and {last} otherwise",
        f"to about {traffic.CALIBRATION_TOLERANCE:.0%}".replace("%", " %"),
        f"within {traffic.TOKEN_BUDGET:,} tokens",
        f"every {plan.every}th step",
        f"2 x {KernelPlan().permutations:,} random orders",
        f"first {LEARNT:,} steps",
        f"{JUDGED:,} steps that follow",
    ):
        assert words in TEXT
    assert "first third" in TEXT
    assert WARM_UP_PART == 1 / 3


def test_the_results_are_of_all_truths_and_methods():
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section(
            PAGE.with_name("attribution.md"), "Where the whole step is a maximum"
        ).splitlines()
        if line.startswith("|")
    ]
    rows = [row for row in rows if row[0].count("/") == 2]
    assert header[2:] == [*METHODS, LEAVE_ONE_OUT]
    assert [row[0] for row in rows] == [
        f"{gpu} / {model} / {batch}"
        for model in roofline.MODELS
        for gpu in roofline.GPUS
        for batch in MEAN_BATCHES
    ]


def test_the_answer_that_is_shown_has_the_keys_of_the_answer():
    from tests.unit.lab.test_validate import small_answer

    found = small_answer()
    shown = section(PAGE, "What is measured").partition('    {"h100')[2]
    assert set(re.findall(r'"(\w+)":', shown)) == {
        *found,
        *found["memory"],
        *found["noise"],
        *found["truth"],
        "tokens",
        *found["noise"]["request_error"],
    }


def test_the_players_on_a_real_server_are_those_that_are_sent():
    plan = ServerPlan()
    assert table_rows(section(PAGE, "The game")) == [
        [
            f"`{player.name}`",
            f"{player.prompt_tokens}",
            f"{player.output_tokens}",
            player.does,
        ]
        for player in players_of(len(KINDS), plan.prompt_tokens, plan.output_tokens)
    ]
    for words in (
        f"the first {PLAYERS_MIN} to {len(KINDS)} of them, {plan.players} otherwise",
        f"`--prompt-tokens` ({plan.prompt_tokens:,})",
        f"`--output-tokens` ({plan.output_tokens})",
        f"Each of `--rounds` ({plan.rounds})",
    ):
        assert words in TEXT


def test_the_verdicts_are_those_of_the_code():
    assert names(PAGE, "The noise") == [AGREES, DIFFERS, REFUSED]
    for words in (
        f"within its noise and {TOLERANCE_SHARE:.0%} of GPU time",
        f"the noise is above {NOISE_SHARE_MAX:.0%} of GPU time",
        f"{TOLERANCE_SHARE:.0%} of all GPU time is much",
    ):
        assert words.replace("%", " %") in TEXT


def test_the_keys_of_a_real_servers_answer_are_listed():
    from tests.unit.lab.test_real_server import FIVE, played

    found = judge(FIVE, played(FIVE, rounds=6))
    listed = re.findall(r"`(\w+)`", section(PAGE, "The answer").partition("A server that")[0])
    about = {"model", "hardware", "vllm_version", "method", "repeated_bursts"}
    assert about | set(found) <= set(listed)
    for part in (found["players"]["tiny"], found["splits"]["ours"], found["splits"]):
        assert set(part) <= set(listed)
