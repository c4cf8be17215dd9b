"""Results of a check as its parts make them, for tests of the page and of what is found wrong."""

from dataclasses import asdict
from typing import Any

from tests.unit.lab.gpu_check.test_energy import books, samples
from tests.unit.lab.gpu_check.test_overlap import OVERLAPPING, both
from tests.unit.lab.test_real_server import FIVE, played
from vllm_cost_meter.lab.bench_client import ClosedLoop
from vllm_cost_meter.lab.gpu_check.energy import CLASSES, compared
from vllm_cost_meter.lab.gpu_check.findings import MEASURED
from vllm_cost_meter.lab.gpu_check.mixed import Driven
from vllm_cost_meter.lab.gpu_check.overlap import answer
from vllm_cost_meter.lab.gpu_check.throughput import FIGURES, ratios_of
from vllm_cost_meter.lab.sweep.bench import Shape
from vllm_cost_meter.lab.validation.real_server.verdict import judge

AUDIT = {"balanced": True, "reason": None, "runs": [{"wall_ns": 9, "difference_ns": 0}]}


def pairs(*metered: float, unmetered: float = 1000.0) -> list[dict[str, dict[str, float]]]:
    return [
        {
            "metered": dict.fromkeys(FIGURES, value),
            "unmetered": dict.fromkeys(FIGURES, unmetered),
        }
        for value in metered
    ]


def measured(figures: dict[str, Any]) -> dict[str, Any]:
    return {"state": MEASURED, "seconds": 1.0, "figures": figures}


def _game() -> dict[str, Any]:
    about = {"model": "model", "hardware": "h", "vllm_version": "1", "method": "shapley"}
    return {**about, "repeated_bursts": 3, **judge(FIVE, played(FIVE, rounds=6))}


def _energy() -> dict[str, Any]:
    found = compared(samples(10), books(1, 50_000), books(9, 850_000))
    traffic = Driven(8, 40, 20_000, 8_000, [], 8.0)
    return {
        "windows": [
            {
                "clients": 8,
                "traffic": asdict(traffic),
                "energy": asdict(found),
                "meter_by_counter": found.meter_ratio,
                "integral_by_counter": found.integral_ratio,
                **dict.fromkeys(CLASSES, 1),
            }
        ]
    }


def _books() -> dict[str, Any]:
    return {
        "replies": {"asked": 12, "different": []},
        "audit": AUDIT,
        "doctor": {
            "ok": True,
            "findings": [{"name": "books", "ok": True, "state": "ok", "detail": "they balance"}],
        },
        "model": {
            **OVERLAPPING,
            **{"steps": 5000, "prior": "ModelMetrics", "explained": 0.99},
            **{"error_other_form": 0.012, "error_two_planes": 0.043},
            "charge_errors": {"prefill_beyond": 0.021, "decode_beyond": 1.0},
        },
        "totals": {"requests": 400, "own_time_share": 0.004},
    }


def _throughput() -> dict[str, Any]:
    load = ClosedLoop(Shape(512, 256), 192, 64)
    return {
        "load": asdict(load),
        **ratios_of(pairs(990, 1000, 980, 990), 4),
        "own_time_share": 0.004,
        "audit": AUDIT,
        "pairs": [],
    }


def results() -> dict[str, Any]:
    """Return what a check found on a GPU with all parts measured and nothing wrong."""
    gpu = {
        **{"name": "NVIDIA H100 80GB HBM3", "uuid": "GPU-1", "memory_bytes": 80 << 30},
        **{"driver": "580.65.06", "cuda": "13.0", "power_limit_mw": 700_000},
        **{"cards_of_machine": 2, "is_slice": False},
    }
    return {
        "began_at": "2026-11-30T10:05:32+00:00",
        "command": "vllm-cost-meter gpu-check",
        "budget_s": 1200,
        "is_gpu": True,
        "machine": {
            **{"gpu": gpu, "cpu": "Xeon", "cpus": 16, "system": "Linux", "python": "3.12.1"},
            **{"vllm": "0.32.0", "torch": "2.11.0+cu130"},
            **{"meter": "0.1.0", "meter_commit": "44564f3b9ee9"},
            "environment": {"CUDA_VISIBLE_DEVICES": "0"},
        },
        "model": {"shape": "8b", "num_hidden_layers": 32, "hidden_size": 4096},
        "servers": {"alone": {"command": "vllm serve /m", "start_s": 61.2}},
        "seconds": 700.0,
        "parts": {
            "game": measured(_game()),
            "energy": measured(_energy()),
            "overlap": measured(answer(both(overlaps=True), OVERLAPPING, OVERLAPPING)),
            "books": measured(_books()),
            "throughput": measured(_throughput()),
        },
    }
