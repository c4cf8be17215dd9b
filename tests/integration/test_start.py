"""However vLLM is started, a named meter's wrong setting stops it, and its middleware is there.

vLLM's own programs run here, each in a process of its own, up to where their command line is read:
what is wrong stops them there, before a model is loaded. What they parsed is what they hand on.
"""

import json
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


# ---- the middleware, where vLLM has no endpoint plugins

# As vLLM 0.25: without its loading of endpoint plugins. What an API server would be built with.
WITHOUT_PLUGINS = """
import json, sys
import vllm.plugins
if hasattr(vllm.plugins, "load_endpoint_plugins"):
    del vllm.plugins.load_endpoint_plugins
def shown(args):
    print("PARSED" + json.dumps(args.middleware))
    raise SystemExit
"""
SERVE = """
from vllm.entrypoints.cli.serve import ServeSubcommand
ServeSubcommand.cmd = staticmethod(shown)
from vllm.entrypoints.cli.main import main
main()
"""
# What `python -m` parses with; the module that has it moves from version to version.
PARSER = """
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
shown(make_arg_parser(FlexibleArgumentParser()).parse_args())
"""


def parsed(probe: Probe, code: str, *arguments: str, **environment: str) -> list[str]:
    probe.run(WITHOUT_PLUGINS + code, ["vllm", *arguments], **environment)
    assert probe.status == 0, probe.output
    [line] = [line for line in probe.output.splitlines() if line.startswith("PARSED")]
    found: list[str] = json.loads(line.removeprefix("PARSED"))
    return found


@pytest.mark.parametrize("code", [SERVE, PARSER])
@pytest.mark.parametrize("by_hand", [(), ("--middleware", OURS)])
def test_each_api_server_gets_the_middleware_once_in_what_was_parsed(
    probe: Probe, code: str, by_hand: tuple[str, ...]
) -> None:
    arguments = ["serve", str(default_path())] if code is SERVE else []
    more = ["--api-server-count", "2", *by_hand]
    assert parsed(probe, code, *arguments, *more, "--plugins", "cost_meter") == [OURS]
    assert parsed(probe, code, *arguments, *more, VLLM_PLUGINS="cost_meter") == [OURS]


def test_a_configuration_file_may_name_the_meter(probe: Probe, tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(f"model: {default_path()}\nplugins: cost_meter\n")
    assert parsed(probe, SERVE, "serve", "--config", str(config)) == [OURS]
    assert "installed but not named" not in probe.output


def test_not_named_what_was_parsed_is_vllms(probe: Probe) -> None:
    assert parsed(probe, SERVE, "serve", str(default_path())) == []
    assert probe.output.count("installed but not named") == 1


def test_a_command_line_without_the_flag_stops_the_start(probe: Probe) -> None:
    """As a vLLM of which nobody knows yet, with neither of the two."""
    code = """
from vllm.engine.arg_utils import EngineArgs
original = EngineArgs.add_cli_args
def without_flag(parser):
    parser = original(parser)
    action = parser._option_string_actions.pop("--middleware", None)  # Batches have none.
    if action is not None:
        action.container._remove_action(action)
    return parser
EngineArgs.add_cli_args = staticmethod(without_flag)
"""
    arguments = ["vllm", "serve", str(default_path())]
    probe.run(WITHOUT_PLUGINS + code + SERVE, arguments, VLLM_PLUGINS="cost_meter")
    line = the_line(probe)
    assert line.startswith("cost meter: expected vllm.plugins.load_endpoint_plugins or the flag ")
