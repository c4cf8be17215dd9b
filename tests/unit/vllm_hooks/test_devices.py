"""devices.py: an engine's GPUs are those that vLLM's workers take, or none with a reason.

Goal: no engine is charged with another's energy.
Method: vLLM's rule for workers, stated again in the table; vLLM's platform is told what it is.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import vllm.platforms

from vllm_cost_meter.vllm_hooks import devices, identity
from vllm_cost_meter.vllm_hooks.devices import gpu_ordinals


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    uuids = {"GPU-a": 4, "GPU-b": 6}
    platform = SimpleNamespace(
        is_cuda=lambda: True,
        device_name="cuda",
        device_control_id_to_physical_device_id=lambda entry: uuids.get(entry) or int(entry),
    )
    monkeypatch.setattr(vllm.platforms, "current_platform", platform, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def config(**changes: Any) -> SimpleNamespace:
    """Return the parallel configuration of the only engine of a host, with two GPUs."""
    values = {
        "world_size": 2,
        "data_parallel_rank": 0,
        "data_parallel_index": 0,
        "data_parallel_rank_local": 0,
        "distributed_executor_backend": "mp",
        "data_parallel_backend": "mp",
        "nnodes_within_dp": 1,
        "assigned_physical_gpu_ids": None,
    }
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "visible", "ordinals"),
    [
        ({}, None, [0, 1]),
        ({"world_size": 1, "distributed_executor_backend": "uni"}, "3,5", [0]),
        ({"data_parallel_rank_local": 1}, None, [2, 3]),
        ({"data_parallel_rank_local": 1}, "7,6,5,4", [2, 3]),
        # On the second host of two with two engines each.
        ({"data_parallel_index": 2, "data_parallel_rank_local": 0}, None, [0, 1]),
        ({"data_parallel_index": 1, "data_parallel_rank_local": None}, None, [2, 3]),
        # An earlier vLLM, or a launcher, that shows each engine its own GPUs only.
        ({"data_parallel_rank_local": 1}, "6,7", [0, 1]),
        ({"assigned_physical_gpu_ids": [5, 2]}, None, [5, 2]),
        ({"assigned_physical_gpu_ids": [6, 4]}, "3,4,6", [2, 1]),
        ({"assigned_physical_gpu_ids": [6, 4]}, "GPU-a,GPU-b,3", [1, 0]),
        (
            {"assigned_physical_gpu_ids": [0, 1, 4, 5], "data_parallel_rank_local": 1},
            None,
            [4, 5],
        ),
    ],
)
def test_an_engine_takes_the_gpus_that_its_workers_take(monkeypatch, changes, visible, ordinals):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_ordinals(config(**changes)) == (ordinals, None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"distributed_executor_backend": "ray"}, "chosen by the backend ray"),
        ({"data_parallel_backend": "ray"}, "chosen by the backend ray"),
        ({"distributed_executor_backend": "external_launcher"}, "external_launcher"),
        ({"nnodes_within_dp": 2}, "on other hosts"),
    ],
)
def test_gpus_that_the_engine_process_cannot_know_are_none(changes, reason):
    ordinals, why = gpu_ordinals(config(**changes))
    assert ordinals == []
    assert reason in why


def test_an_engine_on_the_cpu_has_no_gpu(monkeypatch):
    monkeypatch.setattr(vllm.platforms.current_platform, "is_cuda", lambda: False)
    monkeypatch.setattr(vllm.platforms.current_platform, "device_name", "cpu")
    counter = identity._energy_counter(config())
    reason = "no_device: vLLM runs on cpu, not on NVIDIA GPUs"
    assert counter.read(0).reason == reason


def test_gpus_that_cannot_be_found_out_make_an_engine_without_energy(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    counter = identity._energy_counter(config(assigned_physical_gpu_ids=[6, 7]))
    assert "no_device: the engine's GPUs could not be found out" in counter.read(0).reason


def test_the_counter_is_of_the_gpus_that_were_found(monkeypatch):
    monkeypatch.setattr(devices, "gpu_ordinals", lambda _config: ([1, 0], None))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    assert len(identity._energy_counter(config()).devices) == 2
