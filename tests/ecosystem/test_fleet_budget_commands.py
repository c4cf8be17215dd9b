"""What the commands say of budgets over a fleet."""

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.fleet_budgets import FleetServer, away, bill, budget
from vllm_cost_meter.cli.commands import whole
from vllm_cost_meter.cli.doctor.findings import Outcome
from vllm_cost_meter.cli.doctor.fleet import fleet_reached
from vllm_cost_meter.units.time import NS_PER_SECOND

SETTINGS = """
[[tenants]]
name = "acme"
api_key_sha256 = ["{digest}"]
[[budgets]]
name = "b"
tenant = "acme"
gpu_seconds = 1
[[budgets]]
name = "each"
tenant = "acme"
gpu_seconds = 1
each_server = true
"""


def test_the_command_counts_the_whole_fleet_and_says_if_it_cannot(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = FleetServer(tmp_path, "one", url), FleetServer(tmp_path, "two", url)
    for server, ns in ((one, 30), (two, 500)):
        server.write(bill(f"run-{ns}", 1, ns))
        server.send()
        server.stop()
    config = tmp_path / "meter.toml"
    config.write_text(SETTINGS.format(digest="0" * 64))
    monkeypatch.setenv("COST_METER_FLEET", url)
    asked = ["budgets", "--json", "--ledger", one.url, "--config", str(config)]
    found = json.loads(CliRunner().invoke(whole(), asked).stdout)["budgets"]
    shown = [(each["used"], each["used_here"], each["each_server"]) for each in found]
    assert shown == [(530, 30, False), (30, None, True)]
    with away(url):
        refused = CliRunner().invoke(whole(), asked)
    assert refused.exit_code != 0
    assert "not currently accepting connections" in refused.output


def test_doctor_says_when_budgets_have_read_the_fleet(tmp_path: Path, url: str) -> None:
    one = FleetServer(tmp_path, "one", url)
    one.write(bill("a", 1, 30))
    one.send()
    assert "budgets" not in fleet_reached(url, one.url).detail
    one.read(budget())
    finding = fleet_reached(url, one.url)
    assert finding.outcome is Outcome.OK
    assert "budgets know what other servers have used" in finding.detail
    one.stop()
    with closing(sqlite3.connect(f"{one.path}.fleet-0")) as kept, kept:
        kept.execute("UPDATE about SET read_at_ns = ?", [time.time_ns() - 60 * NS_PER_SECOND])
    finding = fleet_reached(url, one.url)
    assert finding.outcome is Outcome.WARN
    assert "budgets count what other servers had used at 20" in finding.detail
