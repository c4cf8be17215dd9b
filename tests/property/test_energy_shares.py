"""energy_shares.py: whatever the window, its parts add up to its energy.

Goal: no millijoule is made or lost, and the theory's bounds hold in windows nobody thought of.
Method: Hypothesis, with times from nanoseconds to days, on one to sixteen cards.
"""

from hypothesis import given
from hypothesis import strategies as st

from vllm_cost_meter.engine.energy.shares import PowerBounds, split_energy

TIMES = st.dictionaries(
    st.text(max_size=2), st.integers(0, 10**9) | st.integers(0, 10**15), max_size=8
)
ENERGIES = st.integers(0, 10**6) | st.integers(0, 2**50)


@st.composite
def bounds(draw: st.DrawFn) -> PowerBounds:
    found = PowerBounds(draw(st.integers(1, 16)), draw(st.none() | st.integers(0, 10**7)))
    for _ in range(draw(st.integers(0, 3))):
        found = found.after(draw(ENERGIES), draw(st.integers(0, 10**11)))
    return found


@given(ENERGIES, TIMES, TIMES, bounds())
def test_the_parts_add_up_and_each_is_within_its_bounds(energy_mj, busy, quiet, bounds):
    busy_ns, quiet_ns = sum(busy.values()), sum(quiet.values())
    if not busy_ns + quiet_ns:
        energy_mj = 0
    shares = split_energy(energy_mj, busy, quiet, bounds)
    busy_mj, quiet_mj = sum(shares.busy_mj.values()), sum(shares.quiet_mj.values())
    assert busy_mj + quiet_mj == energy_mj
    assert (shares.busy_mj.keys(), shares.quiet_mj.keys()) == (busy.keys(), quiet.keys())
    assert min([0, *shares.busy_mj.values(), *shares.quiet_mj.values()]) == 0
    # Working draws no less than waiting.
    assert busy_mj * quiet_ns >= quiet_mj * busy_ns - (busy_ns + quiet_ns)
    for energy, time_ns, given_mj, ns in (
        (busy_mj, busy_ns, shares.busy_mj, busy),
        (quiet_mj, quiet_ns, shares.quiet_mj, quiet),
    ):
        for key, share_mj in given_mj.items():
            if time_ns:
                due_mj = energy * ns[key] / time_ns
                assert abs(share_mj - due_mj) <= 1.001 + energy * len(ns) * 2e-9


@given(ENERGIES, st.integers(1, 10**12), bounds())
def test_the_lowest_power_only_falls(energy_mj, gpu_ns, bounds):
    after = bounds.after(energy_mj, gpu_ns)
    if bounds.low_gpu_ns:
        assert after.low_mj * bounds.low_gpu_ns <= bounds.low_mj * after.low_gpu_ns
