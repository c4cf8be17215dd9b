"""`validate --server` on a real server that runs: what it measures, and when it refuses to.

Goal: bursts run together on a real engine, their bills prove it, and somebody else's requests are
noticed. Method: the command itself against the shared server, in a short form. Whether so few
rounds on a busy machine allow a verdict is not asserted; that it and the exit status agree is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.server import Server
from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.validation.real_server import session
from vllm_cost_meter.lab.validation.real_server.session import ServerPlan, measure
from vllm_cost_meter.lab.validation.real_server.verdict import AGREES, REFUSED

SHORT = {"players": 3, "prompt_tokens": 1_024, "output_tokens": 6, "rounds": 6}


def run_command(server: Server, *more: str) -> subprocess.CompletedProcess[str]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SHORT.items()]
    return subprocess.run(
        [
            *(Path(sys.executable).parent / "vllm-cost-meter", "validate", "--server", "--json"),
            *("--url", server.url, "--side-url", server.side_url, *options, *more),
        ],
        env={**os.environ, "OPENAI_API_KEY": "any-key"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_running_server_is_judged_by_its_own_bills(server: Server) -> None:
    done = run_command(server)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["verdict"] == AGREES else 1)
    if found["verdict"] == REFUSED:
        assert done.stderr.splitlines()[-1] == f"vllm-cost-meter validate: {found['why']}"
    assert list(found["players"]) == ["document", "long chat", "chat"]
    assert len(found["coalitions_ns"]) == 7
    together = " + ".join(found["players"])
    assert found["coalitions_ns"][together] == found["all_ns"] > 0
    measured = sum(player["measured_ns"] for player in found["players"].values())
    assert measured == pytest.approx(found["all_ns"], abs=5)
    assert all(player["charged_ns"]["ours"] > 0 for player in found["players"].values())
    assert found["method"] == "shapley"


def test_a_server_that_serves_others_meanwhile_is_not_judged(server: Server) -> None:
    def others(phase: str) -> None:
        if phase.startswith("round 1 "):
            with server.client() as client:
                body = {"model": "tiny", "prompt": "Somebody else asks", "max_tokens": 4}
                client.post("/v1/completions", json=body).raise_for_status()

    plan = ServerPlan(url=server.url, side_url=server.side_url, **SHORT | {"players": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(session.KEY_ENV, "any-key")
        with pytest.raises(ServerError, match="expected a server that serves nobody else") as told:
            measure(plan, others)
    assert "GPU-seconds of other requests" in str(told.value)


def test_a_wrong_key_or_a_place_without_a_server_is_one_line_and_status_1(server: Server) -> None:
    def ended(**environment: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(Path(sys.executable).parent / "vllm-cost-meter", "validate", "--server"),
                *("--url", server.url, "--side-url", server.side_url),
            ],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    done = ended(OPENAI_API_KEY="wrong")
    assert done.returncode == 1
    assert "/v1/models answered 401" in done.stderr
    assert len(done.stderr.splitlines()) == 1
