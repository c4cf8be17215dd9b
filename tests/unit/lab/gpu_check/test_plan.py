"""What a check is asked for, what fits into its time and into a server, and small arithmetic."""

import json
import math
import re
import socket
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import pytest

from tests.unit.lab.gpu_check.results import pairs
from vllm_cost_meter.lab.gpu_check.books import COMMENT, ToldCost
from vllm_cost_meter.lab.gpu_check.machine import environment_shown
from vllm_cost_meter.lab.gpu_check.mixed import KINDS
from vllm_cost_meter.lab.gpu_check.model import SHAPES, shape_of
from vllm_cost_meter.lab.gpu_check.plan import ON_CPU, ON_GPU, CheckPlan, OverlapSize, TimeBudget
from vllm_cost_meter.lab.gpu_check.served import own_environment, temporary_files_in
from vllm_cost_meter.lab.gpu_check.throughput import RatioInterval, ratios_of
from vllm_cost_meter.lab.tiny_model import CONTEXT_TOKENS
from vllm_cost_meter.lab.validation.real_server.players import players_of

GIB = 1 << 30


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"budget_s": 59}, "--budget-s: expected 60 or more, got 59"),
        ({"parts": ["games"]}, "--part: expected one of game, energy, .*, got 'games'"),
        ({"budget_s": float("nan")}, "--budget-s: expected 60 or more, got nan"),
        ({"vllm_arguments": ["--port=1"]}, "--port: expected other vLLM arguments"),
        ({"vllm_arguments": ["-tp", "2"]}, "-tp: .* the check is of one GPU"),
        ({"vllm_arguments": ["--data_parallel_size=2"]}, "size: .* the check is of one GPU"),
        ({"vllm_arguments": ["--api-key", "sk-1"]}, "--api-key: .* the page would show it"),
    ],
)
def test_a_wrong_plan_names_the_option(wrong, told):
    with pytest.raises(ValueError, match=told):
        CheckPlan(Path("f"), **wrong)


def test_a_part_is_left_out_if_less_time_is_left_than_it_needs():
    now_s = 100.0
    budget = TimeBudget(300, lambda: now_s)
    now_s = 340.0
    assert (budget.spent_s, budget.left_s) == (240, 60)
    assert budget.why_not(60) is None
    assert budget.why_not(61) == "60 s were left of 300, 61 needed"


@pytest.mark.parametrize("sizes", [ON_GPU, ON_CPU])
def test_a_default_check_fits_into_contexts_steps_and_budget(sizes):
    shapes = ["tiny"] if sizes is ON_CPU else ["8b", "1b"]
    context = min(SHAPES[name].context_tokens for name in shapes)
    step_tokens = 4096 if sizes is ON_CPU else 8192
    game = players_of(sizes.game.players, sizes.game.prompt_tokens, sizes.game.output_tokens)
    assert sum(player.prompt_tokens for player in game) <= step_tokens
    for number, tokens in (sizes.overlap.short, sizes.overlap.long):
        assert tokens + sizes.overlap.output_tokens <= context
        assert number + sizes.overlap.chunk <= step_tokens
    assert sum(kind.part for kind in KINDS) == pytest.approx(1)
    needed_s = (
        3 * sizes.start_s
        + sizes.game.needs_s
        + sizes.energy.needs_s
        + sizes.overlap.needs_s
        + sizes.throughput.needs_s
    )
    assert needed_s < CheckPlan(Path("f")).budget_s


def test_long_contexts_shrink_to_what_a_server_holds():
    size = OverlapSize((32, 500), (4, 60_000), 2048, 16, 512, 0.05, 40)
    assert size.fitting(65_536, 10**6).long == (4, 60_000)
    assert size.fitting(65_536, None).long == (4, 60_000)
    assert size.fitting(32_768, 10**6).long == (4, 32_768 - 512)
    number, tokens = size.fitting(65_536, 100_000).long
    assert number * (tokens + 512) + 2 * 2048 < 100_000
    assert tokens > 20_000


@pytest.mark.parametrize(
    ("name", "memory_gib", "shape"),
    [(None, 80, "8b"), (None, 24, "1b"), ("1b", 80, "1b"), (None, None, "tiny")],
)
def test_the_shape_is_the_one_asked_for_or_fits_the_card(name, memory_gib, shape):
    memory = None if memory_gib is None else memory_gib * GIB
    assert shape_of(name, memory).name == shape


@pytest.mark.parametrize(("name", "memory"), [("8b", None), ("tiny", 80 * GIB), ("70b", 80 * GIB)])
def test_a_shape_that_is_not_for_this_machine_is_refused(name, memory):
    with pytest.raises(ValueError, match="--shape: expected"):
        shape_of(name, memory)


def test_a_model_is_a_configuration_and_a_tokenizer_without_weights(tmp_path):
    folder = SHAPES["8b"].write(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    # Llama 3 8B: 32 layers of attention (with 8 of 32 heads for keys and values) and an MLP.
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    attention = 2 * hidden * hidden * (1 + config["num_key_value_heads"] / heads)
    layer = attention + 3 * hidden * config["intermediate_size"]
    parameters = config["num_hidden_layers"] * layer + 2 * config["vocab_size"] * hidden
    assert parameters == pytest.approx(8.03e9, rel=1e-3)
    assert (folder / "tokenizer.json").exists()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1 << 20
    assert SHAPES["tiny"].context_tokens == CONTEXT_TOKENS


def test_the_interval_of_a_ratio_is_students_on_logarithms():
    # Student's quantile for 3 degrees is 3.182.
    logs = [0.01, 0.03, -0.01, 0.01]
    found = RatioInterval.of([math.exp(value) for value in logs])
    half = 3.182 * math.sqrt(0.0008 / 3) / 2
    assert found.ratio == pytest.approx(math.exp(0.01))
    assert math.log(found.high) - 0.01 == pytest.approx(half, rel=3e-3)
    assert 0.01 - math.log(found.low) == pytest.approx(half, rel=3e-3)


def test_a_ratio_is_metered_by_unmetered_and_needs_pairs():
    found = ratios_of(pairs(900, 900, 900, 900, unmetered=1000), 4)
    assert found["ratios"]["gap_p99_ms"] == pytest.approx({"ratio": 0.9, "low": 0.9, "high": 0.9})
    assert found["means"]["gap_p99_ms"] == {"metered": 900, "unmetered": 1000}
    for few in (pairs(), pairs(900, 900, 900), pairs(900, 900, 900, 0)):
        assert set(ratios_of(few, 4)["ratios"].values()) == {None}


def test_a_reply_agrees_with_the_ledger_to_the_nanosecond_and_nanodollar():
    row = {"gpu_time_ns": 39_911_639, "cost_nanousd": 27_716}
    comment = ": cost-meter cost_usd=0.000027716 gpu_seconds=0.039911639 request_id=cost-01a"
    cost_usd, gpu_seconds = re.search(COMMENT, f"data: x\n\n{comment}\n\ndata: [DONE]").groups()
    assert ToldCost(gpu_seconds, cost_usd).agrees(row)
    assert not ToldCost("0.039911640", cost_usd).agrees(row)
    assert not ToldCost(gpu_seconds, "0.000027717").agrees(row)
    assert not ToldCost(None, cost_usd).agrees(row)


def test_the_environment_is_shown_without_secrets():
    environ = {
        "VLLM_USE_V1": "1",
        "VLLM_API_KEY": "secret",
        "TORCH_COMPILE_DISABLE": "1",
        "HF_TOKEN": "secret",
        "HOME": "/root",
    }
    assert environment_shown(environ) == {"TORCH_COMPILE_DISABLE": "1", "VLLM_USE_V1": "1"}


def test_servers_get_no_settings_keys_or_plugins_of_the_users_other_servers(monkeypatch):
    for name in ("COST_METER_CONFIG", "COST_METER_ADMIN_TOKEN", "VLLM_PLUGINS", "VLLM_API_KEY"):
        monkeypatch.setenv(name, "theirs")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found = own_environment()
    assert "theirs" not in found.values()
    assert found["CUDA_VISIBLE_DEVICES"] == "1"
    assert found["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_temporary_files_of_servers_stand_in_their_folder_where_a_path_may_be_so_long():
    with TemporaryDirectory() as folder:
        assert temporary_files_in(Path(folder)) == {"TMPDIR": folder}
    with socket.socket(socket.AF_UNIX) as unix:
        for characters, is_used in ((70, True), (71, False)):
            path = Path("/" + "d" * (characters - 1))
            assert bool(temporary_files_in(path)) is is_used
            with pytest.raises(FileNotFoundError if is_used else OSError) as refused:
                unix.connect(str(path / str(UUID(int=0))))
            assert isinstance(refused.value, FileNotFoundError) is is_used
