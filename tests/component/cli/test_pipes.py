"""A reader that closes the pipe, as `head` does, ends any command quietly with 141."""

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.component.cli.test_cli import no_settings
from tests.component.cli.test_tables import COMMANDS, files
from tests.support.raw_rows import texts
from tests.unit.cli.test_command_line import LEAVES
from vllm_cost_meter.cli.commands import PIPE_CLOSED, app

__all__ = ["files", "no_settings"]

TENANT_FILE = "TENANTS"
# The others. Words in capitals stand for files and ids that the test makes.
MORE = {
    "explain": ("explain", "REQUEST"),
    "tenants add": ("tenants", "add", "new", "--config", TENANT_FILE),
    "tenants set": ("tenants", "set", "known", "--tag", "team=web", "--config", TENANT_FILE),
    "tenants remove": ("tenants", "remove", "known", "--config", TENANT_FILE),
    "invoice import": ("invoice", "import", "READINGS", "--format", "snapshots", "--dry-run"),
    "saturation import": ("saturation", "import", "CURVE"),
    "calc arrival": (
        *("calc", "arrival", "--usd-per-hour", "2.49", "--requests-per-s", "0.5"),
        *("--output-tokens-per-request", "256"),
    ),
    "calc request": ("calc", "request", "--usd-per-hour", "2.49", "--requests-per-s", "3"),
    "calc blended": (
        *("calc", "blended", "--input-usd-per-m", "0.15", "--output-usd-per-m", "0.6"),
        *("--ratio", "3:1"),
    ),
    "calc slo": ("calc", "slo", "--curve", "CURVE", "--ttft-p99-ms", "500", "--tpot-ms", "50"),
    "calc crossover": (
        *("calc", "crossover", "--usd-per-hour", "2.49", "--api-usd-per-m-output", "0.6"),
        *("--output-tokens-per-request", "256"),
    ),
    "calc serverless": (
        *("calc", "serverless", "--gpu-usd-per-s", "0.001", "--run-s", "2", "--calls", "100"),
    ),
    "demo": ("demo", "--print-model-path"),
    "ledger check": ("ledger", "check"),
    "ledger apply": ("ledger", "apply"),
    "ledger backup": ("ledger", "backup", "NEW"),
    "ledger restore": ("ledger", "restore", "COPY"),
    "ledger merge": ("ledger", "merge", "COPY"),
    "ledger compact": ("ledger", "compact"),
    "ledger repair": ("ledger", "repair"),
    "ledger migrate": ("ledger", "migrate"),
    "ledger drop": ("ledger", "drop", "--before", "2026-01-01"),
}  # fmt: skip
ALL = {**COMMANDS, **MORE}
# They need a server of vLLM, or are one.
WITH_SERVER = {("sweep",), ("gpu-check",), ("server",)}
# They need a PostgreSQL, with which tests/ecosystem/test_fleet_settings.py tries them.
WITH_FLEET = {words for words in LEAVES if words[0] == "fleet"}


def test_every_command_is_tried() -> None:
    tried = {words for words in LEAVES for given in ALL.values() if given[: len(words)] == words}
    assert tried == set(LEAVES) - WITH_SERVER - WITH_FLEET


@pytest.mark.parametrize("name", ALL)
def test_a_reader_that_closes_the_pipe_ends_the_command_quietly(
    files: Path,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text('[[tenants]]\nname = "known"\n')
    with closing(sqlite3.connect(files / "ledger.db")) as connection:
        ((request_id,),) = texts(connection.execute("SELECT http_request_id FROM requests LIMIT 1"))
    shutil.copy(files / "ledger.db", tmp_path / "copy.db")
    places = {
        "COPY": tmp_path / "copy.db",
        "NEW": tmp_path / "new.db",
        "REQUEST": request_id,
        TENANT_FILE: tenants,
        "CURVE": files / "curve.json",
        "READINGS": files / "readings.csv",
    }
    monkeypatch.setenv("COST_METER_CONFIG", str(files / "meter.toml"))
    monkeypatch.setenv("COST_METER_LEDGER", f"sqlite:///{files / 'ledger.db'}")
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody:
        monkeypatch.setattr("sys.stdout", nobody)
        words = [str(places.get(word, word)) for word in ALL[name]]
        with pytest.raises(SystemExit) as end:
            app(args=words, standalone_mode=False)
        monkeypatch.undo()
    assert (end.value.code, capfd.readouterr().err) == (PIPE_CLOSED, "")


@pytest.mark.parametrize("word", ["--help", "--version", "report --help"])
def test_a_list_of_commands_and_the_version_end_so_too(word: str) -> None:
    command = f"{sys.executable} -m vllm_cost_meter.cli {word} | true"
    done = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == (f"{PIPE_CLOSED}\n", "")


# vLLM 0.25 sets up its log when it is imported, later versions when they serve.
LOGGING = """
import vllm_cost_meter.cli.commands as commands
from vllm_cost_meter.cli import app

def answer(args):
    from vllm.logger import _configure_vllm_root_logger, init_logger
    _configure_vllm_root_logger()
    init_logger("vllm.engine").warning("a line of vLLM")
    print("the answer")

commands.app = answer
app(["doctor"])
"""


@pytest.mark.parametrize("chosen", [None, "ext://sys.stdout"])
def test_lines_of_vllms_log_are_no_part_of_an_answer_unless_somebody_wants_them_there(
    monkeypatch, chosen
):
    monkeypatch.delenv("VLLM_LOGGING_STREAM", raising=False)
    if chosen is not None:
        monkeypatch.setenv("VLLM_LOGGING_STREAM", chosen)
    done = subprocess.run(
        [sys.executable, "-c", LOGGING], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("the answer\n")
    assert ("a line of vLLM" in done.stdout) == (chosen is not None)
    assert "a line of vLLM" in done.stdout + done.stderr
