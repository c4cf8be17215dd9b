"""The short form of `make soak`: some seconds of load with kills and faults, on fake engines."""

from pathlib import Path

from tests.soak.run import soak


def test_each_cost_that_a_client_saw_is_there_once_whatever_was_killed(tmp_path: Path) -> None:
    outcome = soak(tmp_path, 20, seed=1, is_real=False)
    assert outcome.is_well, outcome
    assert outcome.seen > 0
    assert outcome.faults
