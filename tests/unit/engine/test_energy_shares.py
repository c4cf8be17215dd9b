"""energy_shares.py: who pays for a window's energy, on cards whose power is known exactly.

Goal: busy time pays for the power of busy time, and quiet time for that of quiet time.
Method: windows made of a true idle power and a true busy power, so that the right answer is known.
"""

import pytest

from vllm_cost_meter.engine.energy.shares import (
    POWER_WINDOW_NS_MIN,
    QUIET_CLASSES,
    EnergyShares,
    PowerBounds,
    split_energy,
)
from vllm_cost_meter.records.snapshot import OTHER_CLASSES

MS, S = 10**6, 10**9
IDLE_W, BUSY_W, MAX_W = 70, 600, 700


def used_mj(busy_ns: int, quiet_ns: int) -> int:
    """Return what cards of these powers use, in mJ."""
    return (BUSY_W * busy_ns + IDLE_W * quiet_ns) * 1000 // S


def knowing(gpus: int = 1, max_w: int | None = MAX_W) -> PowerBounds:
    """Return the bounds of an engine that has been idle for a second."""
    bounds = PowerBounds(gpus, None if max_w is None else max_w * 1000 * gpus)
    return bounds.after(used_mj(0, gpus * S), gpus * S)


def test_a_window_of_steps_alone_is_the_requests():
    shares = split_energy(600_001, {"A": 3 * S // 4, "B": S // 4}, {}, knowing())
    assert shares == EnergyShares({"A": 450_000, "B": 150_001}, {})


def test_an_idle_window_is_idle_and_host_and_sleep():
    shares = split_energy(
        80_000, {}, {"idle": 500 * MS, "sleep": 250 * MS, "host": 250 * MS}, knowing()
    )
    assert shares == EnergyShares({}, {"idle": 40_000, "sleep": 20_000, "host": 20_000})


def test_a_mixed_window_charges_idle_time_with_idle_power():
    busy_ns, quiet_ns = 100 * MS, 900 * MS
    shares = split_energy(used_mj(busy_ns, quiet_ns), {"A": busy_ns}, {"idle": quiet_ns}, knowing())
    assert shares == EnergyShares({"A": 60_000}, {"idle": 63_000})


def test_an_engine_never_seen_idle_charges_idle_time_at_most_the_mean_power():
    busy_ns, quiet_ns = 950 * MS, 50 * MS
    energy_mj = used_mj(busy_ns, quiet_ns)
    bounds = PowerBounds(1, MAX_W * 1000).after(energy_mj, S)
    shares = split_energy(energy_mj, {"A": busy_ns}, {"host": quiet_ns}, bounds)
    assert shares.quiet_mj == {"host": energy_mj // 20}
    # A window with more quiet time teaches that quiet time is cheaper.
    bounds = bounds.after(used_mj(500 * MS, 500 * MS), S)
    shares = split_energy(energy_mj, {"A": busy_ns}, {"host": quiet_ns}, bounds)
    assert shares.quiet_mj == {"host": 16_750}


def test_noise_of_an_idle_window_does_not_land_on_one_short_request():
    # 10 W more than the quietest second, and 1 ms of work: which cannot have used 10 J.
    shares = split_energy(80_000, {"A": MS}, {"idle": 999 * MS}, knowing())
    assert shares == EnergyShares({"A": 700}, {"idle": 79_300})
    shares = split_energy(80_000, {"A": MS}, {"idle": 999 * MS}, knowing(max_w=None))
    assert shares.busy_mj == {"A": 80_000 - 69_930}


def test_a_window_below_idle_power_is_split_by_time():
    assert split_energy(60_000, {"A": S // 2}, {"idle": S // 2}, knowing()) == EnergyShares(
        {"A": 30_000}, {"idle": 30_000}
    )


def test_the_power_of_several_cards_is_that_of_all_of_them():
    busy_ns, quiet_ns = 8 * 100 * MS, 8 * 900 * MS
    energy_mj = used_mj(busy_ns, quiet_ns)
    shares = split_energy(energy_mj, {"A": busy_ns}, {"idle": quiet_ns}, knowing(gpus=8))
    assert shares == EnergyShares({"A": 480_000}, {"idle": 504_000})
    shares = split_energy(640_000, {"A": 8 * MS}, {"idle": 8 * 999 * MS}, knowing(gpus=8))
    assert shares.busy_mj == {"A": 8 * 700}


def test_short_windows_teach_nothing_about_power():
    bounds = PowerBounds(2, None)
    assert bounds.after(0, 2 * POWER_WINDOW_NS_MIN - 1) is bounds
    assert bounds.after(5, 2 * POWER_WINDOW_NS_MIN).low_mj == 5


def test_only_a_lower_power_is_learned():
    bounds = knowing()
    assert bounds.after(70_001, S) is bounds
    assert bounds.after(140_000, 2 * S) is bounds
    assert bounds.after(139_999, 2 * S).low_gpu_ns == 2 * S


def test_a_day_in_one_window_is_split_in_one_go():
    day_ns = 86_400 * S * 8
    shares = split_energy(10**12, {"A": day_ns // 4, "B": day_ns - day_ns // 4}, {}, knowing(8))
    assert sum(shares.busy_mj.values()) == 10**12
    assert shares.busy_mj["A"] == pytest.approx(250 * 10**9, rel=1e-8)


def test_a_window_of_no_time_and_no_energy_is_nothing():
    assert split_energy(0, {}, {"idle": 0}, PowerBounds(1)) == EnergyShares({}, {"idle": 0})


@pytest.mark.parametrize(
    ("energy_mj", "busy", "quiet"),
    [(5, {}, {}), (5, {"A": 0}, {"idle": 0}), (-5, {"A": S}, {}), (5, {"A": -1, "B": 2}, {})],
)
def test_what_cannot_be_split_is_refused(energy_mj, busy, quiet):
    with pytest.raises(ValueError, match="split"):
        split_energy(energy_mj, busy, quiet, knowing())


def test_the_quiet_classes_are_classes_of_the_books():
    assert set(QUIET_CLASSES) < set(OTHER_CLASSES)
