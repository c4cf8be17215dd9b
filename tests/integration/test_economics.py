"""Economics of real traffic: the side endpoint, the summary, and the SQL run by hand, agree."""

import contextlib
import json
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.integration.server import Server
from tests.integration.traffic import ask


def test_an_engine_carries_its_labels_to_the_summary_and_the_reports(server: Server) -> None:
    with server.client() as client:
        ask(client, "/v1/completions")
    server.balanced()
    of_pod = {"namespace": "models", "node": "gpu-3", "pod": "chat-0"}
    assert [run["labels"] for run in server.cost("summary")["runs"]] == [
        {**of_pod, "pool": "spot", "zone": "a"}
    ]
    answer = server.cost("report?aggregate=label:pool&filter=label:zone%3Da")
    (row,) = [row for row in answer["series"][0]["rows"] if row["class"] == "requests"]
    assert row["label:pool"] == "spot"
    assert row["requests"] > 0
    of_pod_alone = server.cost("report?filter=label:pod%3Dchat-0")
    assert of_pod_alone["adds_up"] is True
    assert of_pod_alone["wall_gpu_ns"] >= answer["wall_gpu_ns"] > 0
    assert server.cost("report?filter=label:pod%3Dchat-1")["wall_gpu_ns"] == 0


def test_figures_of_real_traffic_are_the_summarys_and_their_sql_gives_them(server: Server) -> None:
    with server.client() as client:
        for _ in range(3):
            ask(client, "/v1/completions")
    server.balanced()
    answer, summary = server.cost("economics?window=24h"), server.cost("summary?window=24h")
    figures = answer["figures"]
    for name in ("requests", "prompt_tokens", "output_tokens"):
        assert figures[name] == summary[name] > 0
    assert figures["arrivals"] == figures["requests"]
    assert 0 < figures["utilization"] < 1
    # The later snapshot of the two holds a moment more.
    assert figures["cost_usd"] == pytest.approx(float(summary["cost_usd"]), rel=0.05)
    assert figures["littles_law"] == pytest.approx(figures["concurrency"], rel=0.1)
    assert figures["ttft_p50_ms"] < figures["e2e_p50_ms"] < figures["e2e_p99_ms"]
    (deployment,) = answer["deployments"]
    assert (deployment["model"], deployment["precision"]) == ("tiny", "float32")
    with contextlib.closing(sqlite3.connect(f"file:{server.ledger_file}?mode=ro", uri=True)) as by:
        for step in server.cost("economics/method?window=24h")["figures"]:
            (value,) = by.execute(step["sql"]).fetchone()
            if step["unit"] in ("", None, "ms") and "share" not in step["figure"]:
                told = figures[step["figure"]]
                is_blank = told is None  # the penalty: nobody declared what full load is
                assert value == (None if is_blank else pytest.approx(told, rel=0.05)), step


def test_a_bill_that_is_imported_while_the_server_runs_stands_against_what_was_metered(
    server: Server, tmp_path: Path
) -> None:
    hour = int(time.time()) // 3600
    read = [datetime.fromtimestamp(3600 * at, UTC).isoformat() for at in (hour - 1, hour + 3)]
    bill = tmp_path / "readings.csv"
    bill.write_text(
        "resource,timestamp,cumulative_usd,kind\n"
        f"node-1,{read[0]},100,gpu\nnode-1,{read[1]},112,gpu\n"
        f"vol-1,{read[0]},5,disk\nvol-1,{read[1]},5.40,disk\n"
    )
    command = [str(Path(sys.executable).parent / "vllm-cost-meter"), "invoice", "import"]
    words = [str(bill), "--format", "snapshots", "--ledger", server.ledger_url, "--json"]
    for new in (4, 0):
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["snapshots"] == new
    # 3 USD an hour of GPU and 0.10 of disk, of the four hours that were read.
    window = f"{read[0]},{read[1]}".replace("+00:00", "Z")
    total = server.cost(f"invoices?window={window}")["total"]
    assert (total["billed_gpu_usd"], total["billed_disk_usd"]) == ("12.000000000", "0.400000000")
    assert float(total["metered_usd"]) == pytest.approx(12 * total["capture_rate"])
    figures = server.cost(f"economics?window={window}")["figures"]
    assert figures["blended_cost_usd"] == pytest.approx(12.4)
    assert 0 < figures["capture_rate"] < 1
    assert server.cost(f"summary?window={window}")["billed"]["billed_gpu_usd"] == "12.000000000"
    server.balanced()
