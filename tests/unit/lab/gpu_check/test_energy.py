"""Energy of one window in three ways, from samples whose energy is known by arithmetic."""

import pytest

from vllm_cost_meter.lab.gpu_check.card import PowerSample
from vllm_cost_meter.lab.gpu_check.energy import CLASSES, BooksAt, books_of, compared

S = 10**9
NO_TIME = dict.fromkeys(CLASSES, 0)


def books(at_s: float, energy_mj: int | None, unknown_ns: int = 0, reason: str | None = None):
    return BooksAt(int(at_s * S), energy_mj, unknown_ns, reason, NO_TIME)


def samples(until_s: float, watts: float = 100.0, start_mj: int = 5_000, every_s: float = 0.02):
    """A card of constant power whose counter moves every 100 ms."""
    found = []
    for number in range(round(until_s / every_s) + 1):
        at_s = number * every_s
        counted_s = int(at_s * 10 + 1e-9) / 10
        counter_mj = start_mj + round(counted_s * watts * 1000)
        found.append(PowerSample(round(at_s * S), counter_mj, round(watts * 1000)))
    return found


def test_all_three_agree_where_the_power_is_constant():
    found = compared(samples(10), books(1, 50_000), books(9, 850_000))
    assert found.seconds == 8
    assert found.meter_mj == 800_000
    assert found.integral_mj == pytest.approx(800_000)
    # Both ends of the window are in the middle of two jumps, of 100 W x 100 ms each.
    assert found.counter_noise_mj == 2 * 10_000
    assert found.counter_mj == pytest.approx(800_000, abs=found.counter_noise_mj)
    assert found.integral_noise_mj == 0
    assert found.meter_ratio == pytest.approx(1, abs=0.025)
    assert found.why_not is None


def test_a_power_that_changes_is_integrated_between_the_two_snapshots():
    ramp = [PowerSample(s * S, None, 100_000 * s) for s in range(11)]
    found = compared(ramp, books(2.5, None, reason="no_counter: none"), books(7.5, None))
    # 100 W more each second, from 250 W to 750 W: 500 W on average.
    assert found.integral_mj == pytest.approx(2_500_000)
    # Power changed by 1 kW in all, and is averaged over a second.
    assert found.integral_noise_mj == 1_000_000
    assert (found.counter_mj, found.meter_mj, found.why_not) == (None, None, "no_counter: none")
    assert found.meter_ratio is None


def test_a_meter_that_is_off_shows_by_how_much():
    found = compared(samples(10), books(1, 0), books(9, 880_000))
    assert found.meter_ratio == pytest.approx(1.1, rel=0.03)


def test_a_counter_of_32_bits_that_wraps_goes_on():
    wrapping = [
        PowerSample(at, None if mj is None else mj % 2**32, mw)
        for at, mj, mw in samples(10, start_mj=2**32 - 300_000)
    ]
    found = compared(wrapping, books(1, 0), books(9, 800_000))
    assert found.counter_mj == pytest.approx(800_000, abs=20_000)


def test_a_counter_that_was_reset_gives_no_energy():
    reset = samples(10)
    reset[300:] = [each._replace(counter_mj=each.counter_mj - 500_000) for each in reset[300:]]
    found = compared(reset, books(1, 0), books(9, 800_000))
    assert found.counter_mj is None
    assert found.why_not == "the counter went back: its driver was loaded anew"


def test_a_window_that_the_samples_do_not_cover_has_no_energy_of_them():
    for before, after in ((-1, 9), (1, 11)):
        found = compared(samples(10), books(before, 0), books(after, 800_000))
        assert (found.counter_mj, found.integral_mj) == (None, None)
        assert found.why_not is not None


def test_a_window_with_a_part_unknown_to_the_books_has_no_energy_of_theirs():
    after = books(9, 700_000, unknown_ns=S, reason="error: NVML says Timeout")
    found = compared(samples(10), books(1, 0), after)
    assert found.meter_mj is None
    assert found.counter_mj is not None
    assert found.why_not == (
        "a part of the window has no energy in the books: error: NVML says Timeout"
    )


def test_the_books_are_of_the_instant_of_the_snapshot_to_the_microsecond():
    run = {
        "alive": True,
        "taken_at": "2026-11-30T09:53:33.856381Z",
        "energy_mj": 7,
        "energy_unknown_ns": 0,
        "energy_reason": None,
    }
    found = books_of({"runs": [{**run, "alive": False, "energy_mj": 9}, run], **NO_TIME})
    assert found.unix_ns == 1_796_032_413_856_381_000
    assert found.energy_mj == 7
