"""A real server's energy, from a counter that the tests move to its reports.

The engine runs on the CPU; the driver's library is the one that the tests compile, and its GPU uses
100 W all the time, whatever the engine does.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.server import MODEL, TENANT_KEYS, Server
from tests.integration.traffic import ask
from tests.support.nvml import TIMEOUT, A, Card, Machine, compile_library, nvmls
from tests.support.waiting import wait_for
from vllm_cost_meter.lab.gpu_check.card import NvidiaCard
from vllm_cost_meter.lab.gpu_check.energy import measure_energy
from vllm_cost_meter.lab.gpu_check.plan import EnergySize
from vllm_cost_meter.lab.gpu_check.served import Checked
from vllm_cost_meter.lab.server import meter_arguments
from vllm_cost_meter.lab.sweep.bench import Target
from vllm_cost_meter.lab.validation.real_server.burst import JudgedServer

TICK_S = 0.05
TOLD_TIMEOUT_S = 15


class Gpu(Machine):
    """A machine with one GPU that uses power until the end."""

    def __init__(self, script: Path) -> None:
        super().__init__(script)
        self.add(Card(A, energy_mj=2**32 - 3_000_000))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(TICK_S):
            # In 32 bits, so that it wraps once the server is up.
            self.cards[0].energy_mj = (self.cards[0].energy_mj + int(TICK_S * 100_000)) % 2**32
            self.tell()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


@pytest.fixture(scope="module")
def gpu(work: Path) -> Iterator[Gpu]:
    gpu = Gpu(work / "gpu")
    yield gpu
    gpu.end()


@pytest.fixture(scope="module")
def powered(work: Path, gpu: Gpu) -> Iterator[Server]:
    folder = work / "nvml"
    folder.mkdir()
    paths = [str(compile_library(folder).parent), os.environ.get("LD_LIBRARY_PATH", "")]
    server = Server(
        work / "powered",
        arguments=meter_arguments(),
        environment={
            "CMT_NVML": str(gpu.script),
            "LD_LIBRARY_PATH": ":".join(filter(None, paths)),
        },
    )
    try:
        yield server.start()
    finally:
        server.stop()


def row_once(server: Server, response_id: str, is_there: Callable[[Any], bool]) -> Any:
    """Return a request's row once it is as a test waits for."""
    return wait_for(lambda: server.bill_of(response_id), is_there, timeout_s=TOLD_TIMEOUT_S)


def test_a_request_has_its_energy_soon_after_its_end_and_all_of_it_adds_up(
    powered: Server,
) -> None:
    with powered.client() as client:
        for _ in range(3):
            reply = ask(client, "/v1/completions", max_tokens=100, ignore_eos=True)
    row = row_once(powered, reply.response_id, lambda row: row["energy_reason"] != "pending")
    assert row["energy_reason"] is None
    # Of a window of a second or two at 100 W, in which others ran too.
    assert 0 < row["energy_mj"] < 1_000_000
    assert row["parts"][0]["energy_mj"] == row["energy_mj"]
    (run,) = powered.balanced()["runs"]
    assert run["energy_difference_mj"] == 0
    assert run["energy_mj"] > 0
    summary = powered.cost("summary")
    tenants = powered.cost("tenants")
    classes = ("requests", "unattributed", "in_flight", "idle", "sleep", "tail")
    classes += ("dummy", "recomputed", "host", "lost")
    assert summary["energy_mj"] == sum(summary[f"{name}_mj"] for name in classes)
    assert summary["startup_mj"] is None
    assert tenants["requests_mj"] == tenants["tenants"][0]["energy_mj"]
    assert tenants["tenants"][0]["energy_unknown_requests"] == 0
    (run,) = tenants["runs"]
    assert run["devices"] == [{"name": "NVIDIA H100 80GB HBM3", "uuid": A}]
    metrics = httpx.get(f"{powered.side_url}/metrics").text
    assert 'cost_meter_engine_energy_joules{class="idle",engine="0"}' in metrics


def test_the_books_have_the_energy_that_a_watch_of_the_card_sees_in_the_same_window(
    powered: Server, gpu: Gpu, tmp_path: Path
) -> None:
    size = EnergySize(clients=(2,), window_s=2, tokens_part=1 / 32)
    judged = JudgedServer(powered.url, TENANT_KEYS["alpha"], powered.side_url, None, MODEL)
    checked = Checked("alone", powered, judged, Target("", "", ""), tmp_path, None)  # type: ignore[arg-type]
    library = compile_library(tmp_path)
    with nvmls(library, tmp_path / "empty"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_NVML", str(gpu.script))
        found = measure_energy(checked, NvidiaCard({}), size, lambda _line: None)
    for window in found["windows"]:
        energy = window["energy"]
        assert energy["why_not"] is None
        # A window is a little longer than asked for: it begins and ends with a snapshot.
        assert 1 < energy["seconds"] < 30
        assert energy["meter_mj"] == pytest.approx(
            energy["counter_mj"], abs=energy["counter_noise_mj"]
        )
        assert energy["integral_mj"] == pytest.approx(100_000 * energy["seconds"])
    assert found["windows"][1]["traffic"]["requests"] > 0
    assert found["windows"][1]["requests_ns"] > 0


def test_a_request_that_runs_while_the_driver_fails_has_no_energy_and_the_next_has(
    powered: Server, gpu: Gpu
) -> None:
    gpu.cards[0].energy_result = TIMEOUT
    time.sleep(2 * TICK_S)  # until the library was told
    with powered.client() as client:
        reply = ask(client, "/v1/completions", max_tokens=20)
        row = row_once(powered, reply.response_id, lambda row: row["energy_reason"] == "error")
        assert row["energy_mj"] is None
        assert row["gpu_time_ns"] > 0
        gpu.cards[0].energy_result = 0

        def reads_again() -> bool:
            reply = ask(client, "/v1/completions", max_tokens=20)
            row = row_once(powered, reply.response_id, lambda r: r["energy_reason"] != "pending")
            return row["energy_mj"] is not None

        wait_for(reads_again, timeout_s=TOLD_TIMEOUT_S)
    (run,) = powered.balanced()["runs"]
    assert run["energy_difference_mj"] == 0
    tenants = powered.cost("tenants")
    assert tenants["tenants"][0]["energy_unknown_requests"] >= 1
    assert tenants["runs"][0]["energy_unknown_ns"] > 0
