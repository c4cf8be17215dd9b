"""A failing ledger is spoken of where vLLM's own lines are, whatever the root logger's level."""

import subprocess
import sys

# What a server's process does: vLLM sets up its log, a router sets the root logger to ERROR, and
# the ledger cannot be opened until something is done about it.
CODE = """
import logging, sys, time
from pathlib import Path
from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging
configure_logging(LoggingConfig())
logging.getLogger().setLevel(logging.ERROR)
from tests.support.builders import make_part
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.journal.places import folder_of_ledger
from vllm_cost_meter.journal.writer import JournalWriter
from vllm_cost_meter.ledger.apply_loop import ApplyLoop
path = Path(sys.argv[1])
path.mkdir()
writer = JournalWriter(folder_of_ledger(path))
writer.start()
writer.append(make_part()).result(30)
loop = ApplyLoop(f"sqlite:///{path}")
for _ in range(3):
    try:
        loop.run_pass(is_asked=True)
    except LedgerError:
        pass
path.rmdir()
loop.run_pass(is_asked=True)
loop.close()
writer.close()
"""


def lines_with(tmp_path, monkeypatch, **environment) -> list[str]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "ledger.db")],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (done.stdout + done.stderr).splitlines()
    return [line.partition("cost meter: ")[2] for line in lines if "cost meter: the ledger" in line]


def test_a_server_whose_root_logger_is_at_error_says_when_the_ledger_fails_and_when_it_works(
    tmp_path, monkeypatch
):
    fails, works = lines_with(tmp_path, monkeypatch)
    assert fails.startswith("the ledger cannot be written, trying again: LedgerError: ")
    assert "Costs are told as before, and their bills wait in the journal" in fails
    assert works.startswith("the ledger can be written again, after ")


def test_the_failure_is_said_also_where_vllm_leaves_logging_to_others(tmp_path, monkeypatch):
    fails, *_ = lines_with(tmp_path, monkeypatch, VLLM_CONFIGURE_LOGGING="0")
    assert fails.startswith("the ledger cannot be written, trying again: ")
