"""`gpu-check` on a real server: on the CPU build, where all of it runs but what only a GPU shows.

Goal: its parts measure a real engine, a check that is killed leaves what it had and no server, and
one whose server does not start says so. Method: the command itself, in a short form. Figures of a
CPU are not judged, only that they are those of what ran.
"""

import gzip
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.integration.server import MODEL, TENANT_KEYS, Server
from tests.support.waiting import wait_for
from vllm_cost_meter.attribution.cost_model import CURVE, TWO_PLANES
from vllm_cost_meter.lab.bench_client import ClosedLoop
from vllm_cost_meter.lab.gpu_check.plan import ON_CPU
from vllm_cost_meter.lab.gpu_check.sections import NO_GPU
from vllm_cost_meter.lab.gpu_check.served import METERED, UNMETERED, Checked
from vllm_cost_meter.lab.gpu_check.throughput import FIGURES, measure_throughput
from vllm_cost_meter.lab.sweep.bench import Shape, Target
from vllm_cost_meter.lab.validation.real_server.burst import JudgedServer

TIMEOUT_S = 240
COMMAND = Path(sys.executable).parent / "vllm-cost-meter"


def processes_with(text: str) -> list[int]:
    """Return the processes whose command line has a text."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if text.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it has ended meanwhile
    return found


def test_a_check_that_is_killed_leaves_what_it_measured_and_no_server(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    asked = [f"--part={part}" for part in ("overlap", "books", "throughput")]
    command = [COMMAND, "gpu-check", "--allow-cpu", "--folder", folder, "--budget-s=600", *asked]

    def found() -> Any:
        return json.loads((folder / "gpu-check.json").read_text())

    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stderr=log) as check:
        try:
            wait_for(
                (tmp_path / "log").read_text,
                lambda log: check.poll() is not None or "starting the server unmetered" in log,
                timeout_s=TIMEOUT_S,
            )
            assert check.poll() is None, (tmp_path / "log").read_text()
            model = found()["servers"]["alone"]["command"].split()[2]
            wait_for(
                lambda: processes_with(model), timeout_s=TIMEOUT_S, what="the unmetered server"
            )
        finally:
            check.send_signal(signal.SIGKILL)
    wait_for(
        lambda: not processes_with(model), timeout_s=TIMEOUT_S, what="the unmetered server ends"
    )
    parts = found()["parts"]
    states = {name: part["state"] for name, part in parts.items()}
    assert states == {"overlap": "measured", "books": "measured", "throughput": "left out"}, parts
    assert parts["throughput"]["why"] == "the check ended before"

    steps = parts["overlap"]["figures"]["steps"]
    for kind, (decodes, context) in (
        ("short", ON_CPU.overlap.short),
        ("long", ON_CPU.overlap.long),
    ):
        assert steps[kind]["decodes"] == decodes
        assert context < steps[kind]["context"] <= context + ON_CPU.overlap.output_tokens
        assert steps[kind]["with"]["median_ns"] > steps[kind]["without"]["median_ns"] > 0
    forms = parts["overlap"]["figures"]["predicted"]["after"]["forms"]
    assert all(forms[name]["long"]["with"] > 0 for name in (CURVE, TWO_PLANES))
    books = parts["books"]["figures"]
    assert books["audit"]["balanced"] is True
    assert books["replies"] == {"asked": 12, "different": []}
    assert books["doctor"]["ok"], books["doctor"]
    page = (folder / "gpu-check.txt").read_text().splitlines()
    assert page[2:5] == [
        NO_GPU,
        "Not measured:",
        "- throughput (left out): the check ended before",
    ]


def test_a_check_whose_server_does_not_start_says_so_and_keeps_its_log(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(COMMAND, "gpu-check", "--allow-cpu", "--folder", tmp_path / "results"),
            *("--part", "books", "--", "--no-such-argument"),
        ],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1
    assert "- books (failed): the server alone did not start: vLLM ended with" in done.stdout
    log = gzip.decompress((tmp_path / "results" / "logs.txt.gz").read_bytes()).decode()
    assert log.startswith("== alone/vllm.log\n")
    assert "--no-such-argument" in log


def test_pairs_of_runs_measure_both_servers_with_the_same_requests(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are the one server that runs here: their ratio is noise, and there is one."""
    monkeypatch.setenv("OPENAI_API_KEY", TENANT_KEYS["beta"])
    judged = JudgedServer(server.url, TENANT_KEYS["beta"], server.side_url, None, MODEL)
    target = Target(server.url, MODEL, str(server.model_path))
    both = [
        Checked(name, server, judged, target, tmp_path, None)  # type: ignore[arg-type]
        for name in (METERED, UNMETERED)
    ]
    before = server.cost("tenants")["tenants"]
    size = replace(
        ON_CPU.throughput,
        load=ClosedLoop(Shape(12, 6), 5, 2),
        warmup_requests=3,
        pairs_min=4,
        pairs_max=4,
    )
    told: list[str] = []
    found = measure_throughput(*both, size, 0, tmp_path, lambda: 1e6, told.append)
    assert found["number_of_pairs"] == 4
    for figure in FIGURES:
        ratio = found["ratios"][figure]
        assert 0 < ratio["low"] <= ratio["ratio"] <= ratio["high"]
        assert found["means"][figure][METERED] > 0
    assert found["audit"]["balanced"] is True
    assert told == ["warm-up of both servers", *told[1:]]

    def of_beta(tenants: Any) -> int:
        return sum(row["requests"] for row in tenants if row["tenant"] == "beta")

    sent = 2 * (3 + 4 * 5)
    wait_for(
        lambda: of_beta(server.cost("tenants")["tenants"]),
        lambda billed: billed == of_beta(before) + sent,
        timeout_s=TIMEOUT_S,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["client.log"]
