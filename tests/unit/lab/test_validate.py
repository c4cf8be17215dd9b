"""The command `validate`: what it prints, and with which status it ends."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.component.cli.test_cli import run
from tests.unit.lab.test_replay import simulated
from vllm_cost_meter.attribution import METHODS
from vllm_cost_meter.lab.validation.command import LEAVE_ONE_OUT, MEAN_BATCHES
from vllm_cost_meter.lab.validation.roofline import GPUS, MODELS
from vllm_cost_meter.lab.validation.tables import _percent

SMALL = (
    "validate",
    "--roofline",
    "--gpu",
    "l4",
    "--model",
    "llama-3.1-8b",
    "--batch",
    60,
    "--steps",
    200,
)
SPREAD = {"median", "p95", "max"}
ERRORS = {
    "request_error",
    "tenant_error",
    "tenants",
    "misplaced_share",
    "outside_interval_share",
    "outside_interval_parts_share",
    "uncharged_share",
    "claimed_error",
    "within_claim_share",
    "claimed_tenants",
}


def small_answer() -> dict[str, Any]:
    """Return what `--json` prints about one small truth."""
    (found,) = json.loads(run(*SMALL, "--json").stdout.splitlines()[-1]).values()
    return found


def test_json_is_one_line_with_every_method_of_every_truth():
    result = run(*SMALL, "--gpu", "h100", "--json")
    assert result.exit_code == 0
    answer = json.loads(result.stdout.splitlines()[-1])
    assert list(answer) == ["l4/llama-3.1-8b/60", "h100/llama-3.1-8b/60"]
    for found in answer.values():
        assert found["mean_batch"] == pytest.approx(60, rel=0.1)
        assert list(found["methods"]) == [*METHODS, LEAVE_ONE_OUT]
        assert set(found["noise"]) == {"request_error", "tenant_error", "misplaced_share"}
        assert set(found["noise"]["request_error"]) == SPREAD
        for errors in found["methods"].values():
            assert set(errors) == ERRORS
            for key in ("request_error", "tenant_error"):
                assert 0 <= errors[key]["median"] <= errors[key]["p95"] <= errors[key]["max"]
        assert found["methods"]["tokens"]["uncharged_share"] == pytest.approx(0, abs=1e-12)
        assert 0 < found["methods"]["shapley"]["claimed_error"]["p95"] <= 1
        assert 0 < found["methods"]["shapley"]["within_claim_share"] <= 1
        assert found["methods"][LEAVE_ONE_OUT]["claimed_error"] is None
        claimed = found["methods"]["shapley"]["claimed_tenants"]
        assert claimed.keys() <= found["methods"]["shapley"]["tenants"].keys()
        assert found["methods"][LEAVE_ONE_OUT]["claimed_tenants"] is None


def test_a_scenario_is_judged_kernel_by_kernel_and_the_last_line_names_the_worst_tenant():
    result = run("validate", "--scenario", "dense-4", "--every", 200)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("dense-4: mean batch 4.")
    assert lines[-3].startswith("shapley, each tenant: chat ")
    form = r"worst tenant error of shapley: ([+-][\d.]+) % \((.*); dense-4\)"
    worst = re.fullmatch(form, lines[-1])
    assert worst is not None
    assert f"{worst[2]} {worst[1]}" in lines[-3]


def test_a_seed_gives_the_same_figures_again():
    first, second, other = (run(*SMALL, "--json", "--seed", n).stdout for n in (1, 1, 2))
    assert first.splitlines()[-1] == second.splitlines()[-1] != other.splitlines()[-1]


def test_a_truth_is_a_table_with_a_row_per_method_and_the_noise():
    result = run(*SMALL)
    assert result.exit_code == 0
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines[0].startswith("l4/llama-3.1-8b/60: mean batch ")
    rows = [line.split("  ")[0] for line in lines[3:] if line]
    assert rows[:5] == [*METHODS, LEAVE_ONE_OUT, "(the truth's noise)"]
    assert rows[5].startswith("shapley, each tenant: chat ")
    assert rows[6].startswith("weights and KV cache need ")
    assert rows[6].endswith("it could not hold this batch, and is simulated as if it could")
    assert rows[7].startswith("worst tenant error of shapley: ")
    assert "…" not in result.stdout


def test_help_names_every_gpu_model_and_batch():
    shown = " ".join(run("validate", "--help", COLUMNS="200").stdout.split())
    for name in (*GPUS, *MODELS, *map(str, MEAN_BATCHES)):
        assert name in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scenario", "sparse"), "--scenario: expected one of dense-4, dense-64, "),
        (("--roofline", "--gpu", "b200"), "--gpu: expected one of h100, a100, l4, got 'b200'"),
        (("--roofline", "--model", "gpt"), "--model: expected one of llama-3.1-8b, "),
        (("--step-log", "nowhere"), "step log nowhere: cannot be read: No such file"),
        (("--step-log", __file__), "expected a first line with the format"),
        (
            ("--step-log", "x", "--gpu", "l4"),
            "--gpu, --batch and --steps: expected with --roofline only",
        ),
        (
            ("--scenario", "dense-4", "--steps", "1000"),
            "--gpu, --batch and --steps: expected with --roofline only",
        ),
        (
            ("--step-log", "x", "--scenario", "dense-4"),
            "expected one of --scenario, --roofline, --gaming, --step-log and --server",
        ),
        (("--model", "tiny"), "--model: expected with --roofline or --server only"),
        (("--url", "http://x"), "arguments of vLLM: expected with --server only"),
        (("--", "--max-model-len", "64"), "arguments of vLLM: expected with --server only"),
        (("--server", "--players", 1), "--players: expected 2 to 7, got 1"),
        (("--server", "--players", 8), "--players: expected 2 to 7, got 8"),
        (("--server", "--rounds", 5), "--rounds: expected 6 or more, got 5"),
        (("--server", "--prompt-tokens", 255), "--prompt-tokens: expected 256 or more, got 255"),
        (("--server", "--output-tokens", 1), "--output-tokens: expected 2 or more, got 1"),
        (("--server", "--model", "a", "--model", "b"), "--model: expected one model with --server"),
        (("--server", "--side-url", "http://x"), "--side-url: expected with --url only"),
        (("--server", "--url", "x:8000"), "--url: expected a URL such as http://127.0.0.1:8000"),
        (("--server", "--url", "http://x", "--model", "tiny"), "--url: expected without --model"),
        (("--server", "--url", "http://x", "--", "--seed", 1), "--url: expected without --model"),
        (("--server", "--", "--port=80"), "--port: expected other vLLM arguments"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments, message):
    result = run("validate", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize("missing", ["numpy", "vllm"])
def test_without_vllm_or_numpy_it_says_so_in_one_line(missing):
    program = (
        f"import sys; sys.modules[{missing!r}] = None;"
        "from vllm_cost_meter.cli import app; app(['validate'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("vllm-cost-meter: validate: expected vLLM, for its counts")
    assert missing in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_replay_loads_neither_numpy_nor_vllm(tmp_path):
    program = (
        "import sys; from vllm_cost_meter.cli.commands import app;"
        f"app(['validate', '--step-log', {str(simulated(tmp_path / 'steps'))!r}],"
        " standalone_mode=False);"
        "assert not {'numpy', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True)


def test_a_replay_is_a_table_of_totals_and_differences(tmp_path):
    path = simulated(tmp_path / "steps")
    result = run("validate", "--step-log", path)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0][:5] == ["tiny", "on", "vLLM", "0.32.0,", "run"]
    whole = lines[0][-2]
    rows = [line for line in lines[3:] if line and line[0] in METHODS]
    assert {row[1] for row in rows} == {whole}
    assert len(rows) == len(METHODS) * (len(METHODS) - 1)


def test_a_replay_as_json_has_the_log_the_methods_and_the_requests(tmp_path):
    path = simulated(tmp_path / "steps")
    answer = json.loads(run("validate", "--step-log", path, "--json").stdout)
    assert answer["step_log"]["model"] == "tiny"
    assert set(answer["methods"]) == set(METHODS)
    for method, found in answer["methods"].items():
        assert found["charged_ns"] == answer["step_log"]["gpu_time_ns"]
        assert set(found["differences"]) == set(METHODS) - {method}
    assert all(set(by_method) == set(METHODS) for by_method in answer["requests"].values())


def test_an_id_in_a_log_cannot_steer_the_terminal(tmp_path):
    path = simulated(tmp_path / "steps")
    text = path.read_text().replace('"request-1"', r'"\u001b[2J"')
    path.write_text(text)
    assert "\x1b[2J" not in run("validate", "--step-log", path).stdout


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "-"), (0.0, "0.00"), (-1e-17, "0.00"), (0.12345, "12.35")]
)
def test_fractions_are_shown_in_percent(value, shown):
    assert _percent(value) == shown
