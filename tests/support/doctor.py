"""What tests of the doctor share: an environment without other servers, a ledger, its findings."""

from pathlib import Path
from typing import Any

import pytest

from tests.component.ledger.test_reader import part, snapshot
from tests.support.ledger_writer import LedgerWriter
from vllm_cost_meter.cli.doctor import examine


@pytest.fixture(autouse=True)
def named(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "cost_meter,other")
    # Another server may run on this machine.
    monkeypatch.setenv("COST_METER_PORT", "off")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.db"
    bills = [part(1)]
    writer = LedgerWriter(f"sqlite:///{path}")
    writer.start()
    writer.commit(*bills, snapshot(bills)).result(10)
    writer.close(5)
    return path


def findings(path: Path, **options: Any) -> dict[str, tuple[bool, str]]:
    return {f.name: (f.ok, f.detail) for f in examine(f"sqlite:///{path}", **options)}


def state_of_check(path: Path, name: str, **options: Any) -> tuple[str, str]:
    (found,) = [f for f in examine(f"sqlite:///{path}", **options) if f.name == name]
    return found.outcome.name.lower(), found.detail
