"""A real sweep, by the real client: what it writes, and what Ctrl-C leaves of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.integration.server import TENANT_KEYS, Server

TIMEOUT_S = 200
RATE, INTERRUPTED_RATE = 4, 5
WINDOW_S, WARMUP_S = 4, 1


def clients_of(pid: int) -> list[str]:
    """Return what a sweep has started: its client, whatever that calls itself."""
    told = subprocess.run(["ps", "-eo", "ppid=,args="], capture_output=True, text=True, check=True)
    lines = [line.split(None, 1) for line in told.stdout.splitlines()]
    return [args for ppid, args in lines if int(ppid) == pid]


def test_a_sweep_measures_real_loads_and_ctrl_c_keeps_what_it_has(
    server: Server, tmp_path: Path
) -> None:
    folder, log = tmp_path / "sweep", tmp_path / "log"
    before = server.cost("summary")["requests"]
    words = [
        *("sweep", "--url", server.url, "--side-url", server.side_url, "--shape", "24:8"),
        *(
            "--rates",
            f"{RATE},{INTERRUPTED_RATE}",
            "--measure-s",
            str(WINDOW_S),
            "--warmup",
            str(WARMUP_S),
        ),
        *("--warmup", str(WARMUP_S), "--ledger", server.ledger_url, "--folder", str(folder)),
    ]
    with log.open("w") as out:
        sweep = subprocess.Popen(
            [str(Path(sys.executable).parent / "vllm-cost-meter"), *words],
            env={**os.environ, "OPENAI_API_KEY": TENANT_KEYS["gamma"], "HF_HUB_OFFLINE": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # As at a terminal, also where a shell runs the tests in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        deadline = time.monotonic() + TIMEOUT_S
        second = f"24:8 at {INTERRUPTED_RATE} requests/s"
        while not (second in log.read_text() and clients_of(sweep.pid)):
            assert sweep.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        sweep.send_signal(signal.SIGINT)
        assert sweep.wait(30) == 130, log.read_text()
    finally:
        if sweep.poll() is None:
            os.killpg(sweep.pid, signal.SIGKILL)
            sweep.wait()
    assert not clients_of(sweep.pid)
    assert "interrupted; what was measured until then is kept" in log.read_text()

    curve = json.loads((folder / "curve-24x8.json").read_text())
    (point,) = curve["points"]
    protocol = curve["protocol"]
    (run,) = [run for run in server.cost("summary")["runs"] if run["alive"]]
    assert protocol["interrupted"]
    assert protocol["deployment"]["run_ids"] == [run["run_id"]]
    assert (protocol["deployment"]["model"], curve["usd_per_hour"]) == ("tiny", 2.5)
    assert point["window_s"] == pytest.approx(WINDOW_S, abs=1)
    assert (point["failed"], point["other_requests"]) == (0, 0)
    assert 0 < point["utilization"] < 1
    assert point["output_tokens_per_s"] == pytest.approx(8 * RATE, rel=0.5)
    # 2.50 USD an hour, and so many tokens: the price of a million.
    usd = 2.5 / 3600 / point["output_tokens_per_s"] * 1e6
    assert point["usd_per_m_output_tokens"] == pytest.approx(usd)
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        assert (folder / f"sweep{suffix}").read_bytes().startswith(start)
    server.balanced()
    assert server.cost("summary")["requests"] >= before + RATE * (WARMUP_S + WINDOW_S)
    assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
