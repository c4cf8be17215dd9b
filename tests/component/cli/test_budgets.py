"""The command `budgets` over a real ledger."""

import json
import time
from pathlib import Path

import pytest

from tests.component.cli.test_cli import no_settings, run
from tests.component.ledger.test_reader import part, snapshot
from tests.support.ledger_writer import LedgerWriter
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.units.time import NS_PER_HOUR

__all__ = ["no_settings"]

BUDGETS = """
[[tenants]]
name = "alice"

[[budgets]]
name = "alice, all time"
tenant = "alice"
gpu_seconds = 0.0000005
period = "rolling"
days = 366

[[budgets]]
name = "in money"
tenant = "alice"
usd = 1
period = "rolling"
days = 366

[[prices]]
amount = 3600
currency = "USD"
scope = "gpu"
kind = "on_demand"
effective_from = 2026-01-01T00:00:00Z
source = "invoice 9"
"""


@pytest.fixture
def recent(tmp_path: Path) -> Path:
    """A ledger of two exchanges that ended in this hour."""
    now_ns = time.time_ns()
    pieces = (UsagePiece(now_ns // NS_PER_HOUR, 100, 200, 8, 5),)
    bills = [part(n, f"h{n}", finished_at_ns=now_ns, pieces=pieces) for n in (1, 2)]
    path = tmp_path / "recent.db"
    writer = LedgerWriter(f"sqlite:///{path}")
    writer.start()
    writer.commit(*bills, snapshot(bills, taken_at_ns=now_ns, started_at_ns=now_ns)).result(10)
    writer.close(5)
    return path


def test_budgets_say_what_was_used_of_each_and_when_it_resets(recent, tmp_path):
    settings = tmp_path / "meter.toml"
    settings.write_text(BUDGETS)
    shown = run("budgets", "--ledger", recent, COST_METER_CONFIG=str(settings))
    assert (shown.exit_code, shown.stderr) == (0, "")
    _, in_time, in_money = shown.stdout.splitlines()
    assert in_time.split()[4:10] == [
        "with_children",
        "spent",
        "0.0000006",
        "0.0000005",
        "GPU-s",
        "0.0000001",
    ]
    assert " within " in in_money
    assert in_money.split()[5:8] == ["0.0000006", "1.00", "USD"]
    listed = run("budgets", "--ledger", recent, "--json", COST_METER_CONFIG=str(settings))
    assert [row["used"] for row in json.loads(listed.stdout)["budgets"]] == [600, 600]


def test_no_budget_and_no_ledger_are_said(recent, tmp_path):
    assert run("budgets", "--ledger", recent).stdout.startswith("no budget: declare")
    missing = run("budgets", "--ledger", tmp_path / "none.db")
    assert (missing.exit_code, missing.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "none.db").exists()
