"""The command line as a whole: its help, its speed by what it loads, its pipes and completion."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.testing import CliRunner

from tests.component.cli.test_cli import ledger, no_settings, run
from vllm_cost_meter.cli.commands import COMMANDS, app, whole
from vllm_cost_meter.version import __version__

__all__ = ["ledger", "no_settings"]

EXAMPLE = "Example: vllm-cost-meter "
# What a list of commands must not load: rooms of ours with a domain, and what those need.
HEAVY = {
    *("pydantic", "sqlalchemy", "fastapi", "msgspec", "orjson", "vllm", "numpy"),
    *(
        f"vllm_cost_meter.{room}"
        for room in (
            *("api_server", "attribution", "config", "economics", "endpoint", "engine"),
            *("invoices", "lab", "ledger", "metrics", "plugin", "prices", "records", "reports"),
            *("tenants", "vllm_hooks"),
        )
    ),
}


def leaves(group: TyperGroup, *before: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from leaves(command, *before, name)
        else:
            yield (*before, name), command


LEAVES = dict(leaves(whole()))
EACH = pytest.mark.parametrize("words", LEAVES, ids=" ".join)


def loaded_by(*arguments: str) -> set[str]:
    program = (
        "import sys\nfrom vllm_cost_meter.cli import app\n"
        f"sys.argv = ['vllm-cost-meter', *{arguments!r}]\n"
        "try:\n    app()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print('loaded:', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split("loaded:")[1].split())


def is_heavy(module: str) -> bool:
    return any(module == heavy or module.startswith(f"{heavy}.") for heavy in HEAVY)


def test_the_version_loads_neither_typer_nor_any_domain():
    loaded = loaded_by("--version")
    assert "vllm_cost_meter.version" in loaded
    assert not {"typer", "click", "rich"} & loaded
    assert [module for module in loaded if is_heavy(module)] == []


def test_the_list_of_commands_loads_no_domain():
    loaded = loaded_by("--help")
    assert "typer" in loaded
    assert [module for module in loaded if is_heavy(module)] == []


def test_version_and_help():
    assert run("--version").stdout == f"{__version__}\n"
    shown = run("--help").stdout
    assert all(command in shown for command in ("report", "audit", "doctor", "demo"))


def test_commands_are_listed_by_panel_each_with_one_line():
    shown = run("--help", COLUMNS="80").stdout
    panels = ["See:", "Money:", "Plan:", "Check:"]
    assert [line for line in shown.splitlines() if line in panels] == panels
    for name, entry in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(entry.help)}$", shown, re.M), name
    assert max(map(len, shown.splitlines())) <= 80


@EACH
def test_each_help_says_what_the_command_does_with_an_example_in_80_columns(words):
    shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"}).stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert EXAMPLE.strip() in shown
    first = (LEAVES[words].help or "").split("\n")[0]
    assert 10 < len(first) <= 72
    assert not first.startswith(("Return", "Print"))
    if len(words) == 1:
        assert first == COMMANDS[words[0]].help


@EACH
def test_each_example_is_one_that_the_command_takes(words):
    _, _, example = (LEAVES[words].help or "").partition(EXAMPLE)
    said = shlex.split(example)
    assert tuple(said[: len(words)]) == words
    LEAVES[words].make_context(" ".join(words), said[len(words) :])


@EACH
def test_no_help_text_loses_its_brackets(words):
    shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"}).stdout
    texts = [LEAVES[words].help, *(getattr(one, "help", None) for one in LEAVES[words].params)]
    brackets = [found for text in texts for found in re.findall(r"\[+[a-z_]+\]+", text or "")]
    for found in brackets:
        assert found in shown
    if words == ("invoice", "import"):
        assert "[[invoices]]" in brackets


@EACH
def test_options_that_commands_share_mean_the_same(words):
    helps = {
        "--ledger": "The ledger: ",
        "--config": "The settings file; ",
        "--json": "Print one JSON object.",
        "--csv": "Print CSV.",
        "--tz": "Time zone ",
    }
    for one in LEAVES[words].params:
        for name in helps.keys() & set(one.opts):
            assert one.help.startswith(helps[name])
    names = {name for one in LEAVES[words].params for name in one.opts}
    assert "--ledger" not in names or "--config" in names


def test_no_module_is_masked_by_a_command_of_its_name():
    for entry in COMMANDS.values():
        name = entry.place.partition(":")[0]
        module = import_module(f"vllm_cost_meter.cli.{name}")
        assert getattr(import_module("vllm_cost_meter.cli"), name) is module


def test_the_settings_file_of_the_option_goes_before_that_of_the_environment(tmp_path):
    named, other = tmp_path / "named.toml", tmp_path / "other.toml"
    named.write_text("gpu_hour_usd = 1.5")
    other.write_text("gpu_hour_usd = 9")
    shown = run("prices", "--config", named, COST_METER_CONFIG=str(other)).stdout
    assert "1.5" in shown
    assert "9" not in shown.splitlines()[1].split()


# ---- pipes and completion


@pytest.mark.parametrize("arguments", ["report --json", "report", "audit", "economics"])
def test_a_reader_that_closes_the_pipe_is_no_error(ledger: Path, arguments: str):
    """`true` ends before the command writes, which then ends as SIGPIPE would have ended it."""
    command = f"{sys.executable} -m vllm_cost_meter.cli {arguments} --ledger {ledger} | true"
    done = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_the_shell_completes_commands_and_options():
    """Bash runs the script that `--show-completion` prints, as after a press of Tab."""
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = f"""
vllm-cost-meter() {{
  {sys.executable} -c 'import sys; sys.argv[0] = "vllm-cost-meter"
from vllm_cost_meter.cli import app; app()' "$@"
}}
eval "$(vllm-cost-meter --show-completion bash)"
declare -F _vllm_cost_meter_completion
complete_words() {{
  COMP_WORDS=(vllm-cost-meter "$@"); COMP_CWORD=$#; COMPREPLY=()
  _vllm_cost_meter_completion vllm-cost-meter
  echo "${{COMPREPLY[@]}}"
}}
complete_words st
complete_words report --win
complete_words invoice im
"""
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, env=environment
    )
    assert done.stdout.split() == [
        *("_vllm_cost_meter_completion", "statement", "--window", "import")
    ], done.stderr
