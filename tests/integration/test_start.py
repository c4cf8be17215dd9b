"""However vLLM is started, a wrong setting of a meter that is named stops it with one line.

vLLM's own programs run here, each in a process of its own, up to where their command line is read:
what is wrong stops them there, before a model is loaded.
"""

from pathlib import Path

import pytest

from tests.integration.probe import Probe
from vllm_cost_meter.lab.tiny_model import default_path

VLLM = "from vllm.entrypoints.cli.main import main; main()"
MODULE = """
import runpy
runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
"""
OURS = "vllm_cost_meter.middleware.CostMiddleware"
FORMS = {
    "vllm serve": (VLLM, ["serve"]),
    "several API servers": (VLLM, ["serve", "--api-server-count", "2"]),
    "several engines": (VLLM, ["serve", "--data-parallel-size", "2"]),
    "a node without API server": (VLLM, ["serve", "--headless", "--data-parallel-size", "2"]),
    "an engine of a balancer's": (
        VLLM,
        ["serve", "--data-parallel-size", "2", "--data-parallel-rank", "0"],
    ),
    "python -m": (MODULE, []),
    "python -m, several engines": (MODULE, ["--data-parallel-size", "2"]),
    "run-batch": (VLLM, ["run-batch", "-i", "in.jsonl", "-o", "out.jsonl"]),
}


def start(probe: Probe, form: str, *more: str, **environment: str) -> None:
    code, arguments = FORMS[form]
    probe.run(code, ["vllm", *arguments, "--model", str(default_path()), *more], **environment)


def the_line(probe: Probe) -> str:
    """Return the only line of the meter; the start has ended with it, and without a traceback."""
    assert probe.status == 1, probe.output
    assert "Traceback" not in probe.output
    lines = [line for line in probe.output.splitlines() if "cost meter" in line]
    # Whom only the middleware names is told first that its engines are not metered.
    (line,) = [line for line in lines if "installed but not named" not in line]
    return line


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_setting_stops_the_start_with_one_line(probe: Probe, form: str) -> None:
    start(probe, form, VLLM_PLUGINS="cost_meter", COST_METER_GPU_HOUR_USD="cheap")
    assert the_line(probe).startswith("cost meter: COST_METER_GPU_HOUR_USD (environment): expected")


@pytest.mark.parametrize("form", ["vllm serve", "python -m"])
def test_so_does_one_in_a_file_that_a_flag_names(probe: Probe, form: str, tmp_path: Path) -> None:
    file = tmp_path / "meter.toml"
    file.write_text("gpu_hour_usd = -1")
    start(probe, form, "--cost-meter-config", str(file), "--plugins", "cost_meter")
    assert the_line(probe).startswith(f"cost meter: gpu_hour_usd ({file}): expected")


@pytest.mark.parametrize("form", ["vllm serve", "python -m"])
def test_so_does_one_where_only_the_middleware_is_named(probe: Probe, form: str) -> None:
    start(probe, form, "--middleware", OURS, COST_METER_REPLY="loud")
    assert the_line(probe).startswith("cost meter: COST_METER_REPLY (environment): expected")


@pytest.mark.parametrize("form", ["vllm serve", "python -m", "run-batch"])
def test_so_does_a_ledger_that_has_no_place(probe: Probe, form: str) -> None:
    start(probe, form, VLLM_PLUGINS="cost_meter", COST_METER_LEDGER="sqlite:////proc/no/ledger.db")
    assert "the folder /proc/no cannot be created" in the_line(probe)


def test_a_command_that_starts_no_engine_is_not_stopped(probe: Probe) -> None:
    wrong = {"VLLM_PLUGINS": "cost_meter", "COST_METER_GPU_HOUR_USD": "cheap"}
    probe.run(VLLM, ["vllm", "--version"], **wrong)
    assert probe.status == 0, probe.output
    assert "cost meter" not in probe.output
