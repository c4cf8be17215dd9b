"""Which engines live: by whether their snapshots go on, whatever any machine's clock says."""

import pytest

from vllm_cost_meter.ledger.queries.cut import DEAD_AFTER_NS
from vllm_cost_meter.ledger.queries.heard import Heard, Instant, LatestSnapshot
from vllm_cost_meter.units.time import NS_PER_HOUR, NS_PER_SECOND, rfc3339

T0 = 1_800_000_000 * NS_PER_SECOND


def told(number: int, taken_at_s: float, run_id: str = "run") -> LatestSnapshot:
    return LatestSnapshot(run_id, number, rfc3339(T0 + round(taken_at_s * NS_PER_SECOND)), "on")


def at(seconds: float, clock_off_s: float = 0) -> Instant:
    """Return an instant; `clock_off_s` is how far this machine's wall clock is ahead."""
    monotonic_ns = round(seconds * NS_PER_SECOND)
    return Instant(T0 + monotonic_ns + round(clock_off_s * NS_PER_SECOND), monotonic_ns)


def heard_s(heard: Heard, snapshot: LatestSnapshot, when: Instant, **more) -> float | None:
    """Return when the run was heard of, in seconds; None if it does not live."""
    living = heard.look([snapshot], when, **more)
    return living[0].heard_ns / NS_PER_SECOND if living else None


def test_a_snapshot_is_as_old_as_it_says_where_the_clocks_agree():
    heard = Heard()
    assert heard_s(heard, told(1, 0), at(0.2)) == 0
    assert heard_s(heard, told(2, 1), at(1.2)) == 1
    assert heard_s(heard, told(2, 1), at(2.2)) == 1


def test_an_engine_is_dead_once_it_was_silent_for_too_long():
    heard, silent_s = Heard(), DEAD_AFTER_NS / NS_PER_SECOND
    assert heard_s(heard, told(1, 0), at(0)) == 0
    assert heard_s(heard, told(1, 0), at(silent_s)) == 0
    assert heard_s(heard, told(1, 0), at(silent_s + 1)) is None
    # Unless somebody knows better; it is as old as it is all the same.
    assert heard_s(heard, told(1, 0), at(silent_s + 2), alive={"run"}) == 0
    assert heard_s(heard, told(2, silent_s + 3), at(silent_s + 3)) == silent_s + 3


@pytest.mark.parametrize("off_s", [-86_400, -3_600, -60, -20, 20, 60, 3_600, 86_400])
def test_a_machine_whose_clock_is_off_lives_as_long_as_its_snapshots_go_on(off_s):
    heard = Heard()
    heard_s(heard, told(1, 0 + off_s), at(0))
    for second in range(1, 5):
        assert heard_s(heard, told(1 + second, second + off_s), at(second)) == second
    assert heard_s(heard, told(5, 4 + off_s), at(19)) == 4
    assert heard_s(heard, told(5, 4 + off_s), at(20)) is None


@pytest.mark.parametrize("step_s", [-86_400, -3_600, -5, 5, 3_600, 86_400])
def test_when_this_machines_clock_is_set_nothing_gets_older_or_younger(step_s):
    heard = Heard()
    assert heard_s(heard, told(1, 0), at(0)) == 0
    assert heard_s(heard, told(1, 0), at(1, step_s)) == 0
    assert heard_s(heard, told(2, 2), at(2, step_s)) == 2
    assert heard_s(heard, told(2, 2), at(17, step_s)) == 2
    assert heard_s(heard, told(2, 2), at(18, step_s)) is None


def test_after_a_pause_of_the_machine_what_was_written_before_it_is_old():
    heard = Heard()
    assert heard_s(heard, told(1, 0), at(0)) == 0
    # The last snapshot came a second later; then this process stood still for an hour.
    assert heard_s(heard, told(2, 1), at(3_600)) is None
    assert heard_s(heard, told(3, 3_601), at(3_601)) == 3_601


def test_at_the_first_look_old_runs_are_dead_and_those_of_a_clock_far_off_are_too():
    hour_s = NS_PER_HOUR / NS_PER_SECOND
    for taken_at_s in (-hour_s, hour_s):
        heard = Heard()
        assert heard_s(heard, told(1, taken_at_s), at(0)) is None
        assert heard_s(heard, told(1, taken_at_s), at(1)) is None
        assert heard_s(heard, told(2, taken_at_s), at(2)) == 2
