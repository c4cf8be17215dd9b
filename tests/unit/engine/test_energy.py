"""energy.py: what an engine's cards used, or why that is not known.

Goal: every figure is what the counters say, and nothing that went wrong looks like a figure.
Method: the real binding (pynvml) on a library that the tests compile, see `nvml.py`.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pynvml
import pytest

from tests.support.nvml import (
    DRIVER_NOT_LOADED,
    GPU_IS_LOST,
    NOT_SUPPORTED,
    TIMEOUT,
    UNKNOWN,
    A,
    B,
    Card,
    Machine,
    S,
    code,
    compile_library,
    nvmls,
    reader,
)
from vllm_cost_meter.engine.energy.nvml import RETRY_NS, DeviceInfo, EnergyCounter, EnergyReading

ROOT = Path(__file__).parents[3]


# What the cards used


def test_a_card_used_what_its_counter_moved(machine):
    machine.add(Card(A, energy_mj=5_000_000))
    clock = reader([0])
    assert code(clock.read()) == "first"
    machine.use(650_321)
    assert clock.read() == EnergyReading(650_321, None)
    machine.use(70_000)
    assert clock.read() == EnergyReading(70_000, None)


# Counters that go back, jump, or stand still


def test_a_counter_that_wraps_at_32_bits_counts_on(machine):
    machine.add(Card(A, energy_mj=2**32 - 100_000))
    clock = reader([0])
    clock.read()
    machine.cards[0].energy_mj = 550_000
    machine.tell()
    assert clock.read().energy_mj == 650_000


@pytest.mark.parametrize(
    ("before_mj", "now_mj", "wall_ns"),
    [
        (5_000_000, 12_000, S),  # far from 32 bits: the driver was loaded anew
        (2**32 - 100_000, 20_000_000, S),  # a wrap would mean 20 kW
        (2**40, 12_000, S),  # more than 32 bits
        (2**32 - 10**9, 0, 3_600 * S),  # in an hour a wrap may mean anything
    ],
)
def test_a_counter_that_was_reset_makes_one_window_unknown(machine, before_mj, now_mj, wall_ns):
    machine.add(Card(A, energy_mj=before_mj), Card(B))
    clock = reader([0, 1])
    clock.read()
    machine.cards[0].energy_mj = now_mj
    machine.use(0, 300)
    reading = clock.read(wall_ns)
    assert code(reading) == "reset"
    assert A in reading.reason
    machine.use(40, 2)
    assert clock.read() == EnergyReading(42, None)


def test_more_than_a_card_can_use_is_unknown_and_never_billed(machine):
    machine.add(Card(A, energy_mj=1_000))
    clock = reader([0])
    clock.read()
    machine.use(2**40)
    assert code(clock.read()) == "jump"
    machine.cards[0].energy_mj = 500_000
    machine.tell()
    assert code(clock.read()) == "reset"
    machine.use(300_000)
    assert clock.read().energy_mj == 300_000


def test_a_counter_that_has_not_moved_for_a_moment_says_0(machine):
    machine.add(Card(A))
    clock = reader([0])
    clock.read()
    assert clock.read(S // 50).energy_mj == 0


def test_a_counter_that_stands_still_is_unknown_and_not_0(machine):
    machine.add(Card(A, energy_mj=77))
    clock = reader([0])
    clock.read()
    assert [code(clock.read()) for _ in range(3)] == ["still"] * 3
    machine.use(500_000)  # of how long a time, nobody knows
    assert code(clock.read()) == "first"
    machine.use(90_000)
    assert clock.read().energy_mj == 90_000


def test_a_clock_that_goes_back_breaks_nothing(machine):
    machine.add(Card(A))
    clock = reader([0])
    clock.read()
    machine.use(5)
    assert clock.read(-50 * S).energy_mj == 5


# Cards that fail


@pytest.mark.parametrize("result", [TIMEOUT, UNKNOWN])
def test_a_driver_error_makes_its_window_and_the_next_unknown(machine, result):
    machine.add(Card(A), Card(B))
    clock = reader([0, 1])
    clock.read()
    machine.cards[0].energy_result = result
    machine.use(10_000, 300)
    reading = clock.read()
    assert code(reading) == "error"
    machine.cards[0].energy_result = 0
    machine.use(10_000, 300)
    # What it used since the last good reading is of two windows, and nobody knows how much of each.
    assert code(clock.read()) == "first"
    machine.use(10_000, 300)
    assert clock.read() == EnergyReading(10_300, None)


def test_a_lost_card_is_unknown_until_it_is_found_again(machine):
    machine.add(Card(A), Card(B))
    clock = reader([0, 1])
    clock.read()
    inits = machine.inits
    machine.cards[0].energy_result = GPU_IS_LOST
    machine.use(0, 300)
    reading = clock.read()
    assert reading.reason == f"error: NVML says GPU is lost (device {A})"
    machine.cards[0].energy_result = 0
    for expected in ["error"] * 8 + ["first"]:
        machine.use(1_000, 300)
        reading = clock.read()
        assert code(reading) == expected
    machine.use(1_000, 300)
    assert clock.read() == EnergyReading(1_300, None)
    assert machine.inits == inits + 1
    assert clock.counter.devices[0].uuid == A


def test_a_card_that_stays_lost_is_looked_for_now_and_then(machine):
    machine.add(Card(A))
    clock = reader([0])
    clock.read()
    inits = machine.inits
    machine.cards[0].energy_result = machine.cards[0].handle_result = GPU_IS_LOST
    machine.tell()
    assert [code(clock.read()) for _ in range(100)] == ["error"] * 100
    assert 9 <= machine.inits - inits <= 10


def test_a_driver_that_is_gone_for_a_while_makes_up_nothing(machine):
    machine.add(Card(A), Card(B))
    clock = reader([0, 1])
    clock.read()
    machine.cards[0].energy_result = GPU_IS_LOST
    machine.init_result = DRIVER_NOT_LOADED
    machine.tell()
    for _ in range(15):
        clock.read()
    machine.init_result = machine.cards[0].energy_result = 0
    machine.use(1_000, 1_000)
    reading = clock.read(RETRY_NS)
    assert code(reading) == "first"
    machine.use(20, 3)
    assert clock.read() == EnergyReading(23, None)


def test_a_loss_is_logged_once(machine, caplog):
    machine.add(Card(A))
    clock = reader([0])
    clock.read()
    with caplog.at_level(logging.INFO):
        for energy_result in (GPU_IS_LOST, 0) * 20:
            machine.cards[0].energy_result = energy_result
            machine.use(10)
            clock.read()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"GPU is lost (device {A})" in caplog.text


def test_other_users_of_nvml_in_the_process_are_not_disturbed(machine):
    machine.add(Card(A))
    pynvml.nvmlInit()
    clock = reader([0])
    clock.read()
    machine.cards[0].energy_result = UNKNOWN
    machine.tell()
    for _ in range(30):
        clock.read()
    assert pynvml.nvmlDeviceGetCount() == 1
    pynvml.nvmlShutdown()
    assert pynvml.nvmlLib.fake_users() == 1


# What cannot be known


def test_without_a_library_energy_is_unknown_and_that_is_said_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO), nvmls(tmp_path / "none.so", tmp_path / "script"):
        clock = reader([0])
        readings = [clock.read() for _ in range(30)]
    assert {code(reading) for reading in readings} == {"no_library"}
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert clock.counter.devices == (DeviceInfo(None, None),)


@pytest.mark.parametrize("result", [DRIVER_NOT_LOADED, UNKNOWN])
def test_without_a_driver_energy_is_unknown(machine, result):
    machine.add(Card(A))
    machine.init_result = result
    machine.tell()
    clock = reader([0])
    assert [code(clock.read()) for _ in range(3)] == ["error"] * 3


def test_a_driver_that_comes_late_is_found(machine):
    machine.add(Card(A))
    machine.init_result = DRIVER_NOT_LOADED
    machine.tell()
    clock = reader([0])
    clock.read()
    machine.init_result = 0
    machine.tell()
    assert code(clock.read(RETRY_NS)) == "first"


def test_a_card_without_the_counter_is_unknown_and_so_is_the_sum(machine):
    machine.add(Card(A), Card(B, energy_result=NOT_SUPPORTED, name="Tesla P100"))
    clock = reader([0, 1])
    clock.read()
    machine.use(100, 0)
    reading = clock.read()
    assert code(reading) == "no_counter"
    assert clock.counter.devices[1].name == "Tesla P100"


def test_a_driver_older_than_the_counter_is_unknown(tmp_path):
    old = compile_library(tmp_path, "-DNO_ENERGY")
    with nvmls(old, tmp_path / "script") as machine:
        machine.add(Card(A))
        assert code(reader([0]).read()) == "no_counter"


def test_another_package_named_pynvml_is_unknown_with_the_way_out(machine, monkeypatch):
    machine.add(Card(A))
    monkeypatch.delattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption")
    reading = reader([0]).read()
    assert code(reading) == "no_binding"
    assert "pip install nvidia-ml-py" in reading.reason


def test_no_package_named_pynvml_is_unknown_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    reading = reader([0]).read()
    assert code(reading) == "no_binding"
    assert "pip install nvidia-ml-py" in reading.reason


@pytest.mark.parametrize("name", ["nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetCount"])
def test_a_binding_that_breaks_never_raises(machine, monkeypatch, name):
    def broken(*_args: object) -> object:
        raise RuntimeError("no such luck")

    machine.add(Card(A))
    monkeypatch.setattr(pynvml, name, broken)
    clock = reader([0], order="")
    assert [code(clock.read()) for _ in range(3)] == ["error"] * 3


def test_a_time_that_is_none_never_raises(machine):
    machine.add(Card(A))
    clock = reader([0])
    clock.read()
    assert code(clock.counter.read(None)) == "error"
    machine.use(5)
    assert code(clock.read()) == "first"


# The binding as it is, and what it costs


def test_the_binding_loads_the_library_by_itself(nvml_library, tmp_path):
    script = tmp_path / "script"
    machine = Machine(script)
    machine.add(Card(A, energy_mj=123))
    body = (
        "import sys; from vllm_cost_meter.engine.energy.nvml import EnergyCounter;"
        "c = EnergyCounter([0]);"
        "assert 'pynvml' not in sys.modules; c.read(1); r = c.read(2);"
        "print(r.energy_mj, c.devices[0].uuid)"
    )
    environ = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
    environ |= {"LD_LIBRARY_PATH": str(nvml_library.parent), "FAKE_NVML": str(script)}
    command = [sys.executable, "-c", body]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"0 {A}\n", "")


def test_a_counter_that_is_never_read_touches_nothing(machine):
    machine.add(Card(A))
    EnergyCounter([0], {})
    assert pynvml.nvmlLib is None


def test_a_reading_is_an_energy_or_a_reason():
    for energy_mj, reason in ((None, None), (1, "error: both")):
        with pytest.raises(ValueError, match="expected an energy or a reason"):
            EnergyReading(energy_mj, reason)
