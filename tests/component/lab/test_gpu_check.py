"""What a check reads of a card, by a library for NVML of the tests; when it does not start."""

import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.nvml import NOT_SUPPORTED, A, B, Card, Machine, nvmls
from vllm_cost_meter.cli.commands import app
from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.gpu_check.card import NvidiaCard, PowerWatch
from vllm_cost_meter.lab.gpu_check.check import LOGS, GpuCheck
from vllm_cost_meter.lab.gpu_check.page import JSON_FILE
from vllm_cost_meter.lab.gpu_check.plan import CheckPlan


def test_the_card_is_the_first_that_cuda_shows(machine: Machine):
    machine.add(Card(A, name="NVIDIA A100"), Card(B, name="NVIDIA H100", energy_mj=7))
    card = NvidiaCard({"CUDA_VISIBLE_DEVICES": "1,0"})
    assert (card.facts.name, card.facts.uuid) == ("NVIDIA H100", B)
    assert (card.facts.driver, card.facts.cuda) == ("580.65.06", "13.0")
    assert (card.facts.memory_bytes, card.facts.power_limit_mw) == (80 << 30, 700_000)
    assert card.facts.cards_of_machine == 2
    assert NvidiaCard({"CUDA_VISIBLE_DEVICES": A}).facts.uuid == A


def test_a_sample_has_what_the_card_says_and_none_for_what_it_does_not(machine: Machine):
    machine.add(Card(A, energy_mj=1_234, power_mw=350_000))
    card = NvidiaCard({})
    before_ns = time.time_ns()
    sample = card.sample()
    assert before_ns <= sample.unix_ns <= time.time_ns()
    assert sample[1:] == (1_234, 350_000)
    machine.cards[0].energy_result, machine.cards[0].power_mw = NOT_SUPPORTED, 0
    machine.tell()
    assert card.sample()[1:] == (None, None)


def test_a_slice_of_a_card_has_no_energy_or_memory_of_its_own(machine: Machine):
    machine.add(Card(A, energy_mj=1_234, power_mw=350_000, mig_mode=1))
    card = NvidiaCard({})
    assert card.facts.is_slice
    assert card.facts.memory_bytes is None
    assert card.sample()[1:] == (None, None)


def test_a_watch_samples_from_its_beginning_to_its_end(machine: Machine):
    machine.add(Card(A))
    began_ns = time.time_ns()
    with PowerWatch(NvidiaCard({}), every_s=0.001) as watch:
        inside_ns = time.time_ns()
        machine.use(500)
        while watch.samples[-1].counter_mj != 500:
            time.sleep(0.001)
        end_ns = time.time_ns()
    assert began_ns <= watch.samples[0].unix_ns <= inside_ns
    assert watch.samples[0].counter_mj == 0
    assert watch.samples[-1].unix_ns >= end_ns


def test_a_machine_without_a_driver_or_card_is_one_line_that_says_what_to_do(tmp_path, machine):
    with pytest.raises(ServerError, match="expected an NVIDIA GPU that NVML can read, got:"):
        NvidiaCard({})
    machine.add(Card(A))
    with pytest.raises(ServerError, match="CUDA_VISIBLE_DEVICES"):
        NvidiaCard({"CUDA_VISIBLE_DEVICES": ""})


def test_without_a_gpu_the_command_ends_with_2_and_one_line_and_makes_nothing(tmp_path):
    folder = tmp_path / "results"
    with nvmls(tmp_path / "none.so", tmp_path / "script"):
        done = CliRunner().invoke(app, ["gpu-check", "--folder", str(folder)])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "vllm-cost-meter: expected an NVIDIA GPU that NVML can read, got: NVML Shared Library Not"
        " Found; run it on a machine with an NVIDIA GPU"
    )
    assert "--allow-cpu" in line
    assert not folder.exists()


def test_a_gpu_with_a_vllm_for_cpus_is_another_line(tmp_path, machine: Machine):
    machine.add(Card(A))
    done = CliRunner().invoke(app, ["gpu-check", "--folder", str(tmp_path)])
    assert done.exit_code == 2
    assert "expected vLLM for GPUs, got its CPU build" in done.stderr


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder in which temporary folders are made."""
    folder = tmp_path / "temporary files"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_servers_leave_no_folder_even_if_their_logs_cannot_be_kept(tmp_path, temporary: Path):
    results = tmp_path / "my results"
    (results / LOGS).mkdir(parents=True)
    told: list[str] = []
    check = GpuCheck(CheckPlan(results, parts=(), allow_cpu=True), told.append)
    check.run()
    assert list(temporary.iterdir()) == []
    assert [line for line in told if line.startswith("the logs of the servers cannot be kept")]
    assert (results / JSON_FILE).exists()


def test_a_disk_without_room_for_the_model_is_one_line_and_status_1(tmp_path, temporary: Path):
    temporary.rmdir()
    arguments = ["gpu-check", "--allow-cpu", "--part", "books", "--folder", str(tmp_path / "r")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    first, *_ = done.stderr.splitlines()
    assert first.startswith("vllm-cost-meter gpu-check: FileNotFoundError: ")
