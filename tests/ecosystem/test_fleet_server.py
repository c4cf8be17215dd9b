"""`vllm-cost-meter server` over a fleet: a process of its own, by its port, as its users ask it."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.component.ledger.test_reader import part, snapshot
from tests.ecosystem.postgresql import Server
from tests.ecosystem.test_fleet import write
from tests.support.fleet import sent
from tests.support.waiting import wait_for
from vllm_cost_meter.records.snapshot import ClassTotals

TOKEN = "a token of the operators"
SETTINGS = f"""
admin_token = "{TOKEN.replace(" ", "-")}"
gpu_hour_usd = "36"

[[tenants]]
name = "alice"
api_key_sha256 = ["{5:064x}"]

[[budgets]]
name = "all of alice"
tenant = "alice"
gpu_seconds = 100
period = "rolling"
days = 366
"""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, server: Server) -> str:
    url = server.new_database()
    folder = tmp_path_factory.mktemp("fleet")
    now_ns = time.time_ns()
    for name in ("one", "two"):
        bills = [part(seq, f"{name}-h{seq}", run_id=name, tenant="alice") for seq in range(1, 4)]
        state = snapshot(
            bills, run_id=name, totals=ClassTotals(requests=900, idle=100), taken_at_ns=now_ns
        )
        own = f"sqlite:///{folder / name}.db"
        write(own, *bills, state)
        sent(own, url, stops=True)
    return url


@pytest.fixture(scope="module")
def base(fleet: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server over the fleet."""
    folder = tmp_path_factory.mktemp("server")
    config = folder / "meter.toml"
    config.write_text(SETTINGS)
    command = [str(Path(sys.executable).parent / "vllm-cost-meter"), "server"]
    command += ["--ledger", fleet, "--config", str(config), "--port", "0"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, env={**os.environ})
    try:
        found = wait_for(
            lambda: re.search(r"(http://\S+)/cost/summary", (folder / "log").read_text()),
            timeout_s=60,
        )
        yield found[1]
    finally:
        process.terminate()
        process.wait(20)


def get(base: str, path: str, token: str | None = TOKEN.replace(" ", "-")) -> Any:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    return httpx.get(f"{base}{path}", headers=headers, timeout=60)


def test_it_answers_for_all_servers_together(base: str) -> None:
    audit = get(base, "/cost/audit").json()
    assert (audit["balanced"], audit["fleet"]["complete_runs"]) == (True, 2)
    (alice,) = [
        row for row in get(base, "/cost/tenants").json()["tenants"] if row["tenant"] == "alice"
    ]
    assert (alice["gpu_time_ns"], alice["cost_nanousd"]) == (1800, 18)
    assert get(base, "/cost/requests/one-h1").json()["gpu_time_ns"] == 300


def test_a_budget_counts_what_all_servers_used(base: str) -> None:
    (budget,) = wait_for(lambda: get(base, "/cost/budgets").json()["budgets"])
    assert (budget["budget"], budget["used"]) == ("all of alice", 1800)


def test_probes_need_no_token_and_figures_do(base: str) -> None:
    for path in ("/livez", "/healthz", "/readyz"):
        assert get(base, path, token=None).text == "ok\n"
    assert "/cost/tenants" in get(base, "/", token=None).text
    assert get(base, "/cost/audit", token=None).status_code == 401


def test_its_metrics_say_whether_the_fleet_is_complete(base: str) -> None:
    text = get(base, "/metrics").text
    assert "cost_meter_fleet_complete_runs 2.0" in text
    assert "cost_meter_books_balanced 1.0" in text
