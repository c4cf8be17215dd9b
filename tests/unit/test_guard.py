"""The error account: what is counted, what is logged, and when the meter gives up."""

import logging

import pytest

from vllm_cost_meter.guard import ERRORS_IN_A_ROW_MAX, Guard


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.ERROR, logger="vllm.cost_meter")
    # vLLM's logger does not hand its records on to the root, where caplog listens.
    logger = logging.getLogger("vllm.cost_meter")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def messages(caplog) -> list[str]:
    return list(dict.fromkeys(record.getMessage() for record in caplog.records))


def test_each_failure_is_counted_and_each_hook_is_logged_once(logged):
    guard = Guard("engine")
    for _ in range(3):
        guard.failed("schedule", ValueError("boom"))
    guard.failed("sleep", KeyError("x"))
    assert guard.errors == 4
    assert not guard.off
    first, second = messages(logged)
    assert first.startswith(
        "cost meter (engine): schedule failed and was contained: ValueError('boom')"
    )
    assert "sleep failed" in second


def test_ten_failures_of_one_hook_in_a_row_switch_it_off_and_say_so_once(logged):
    guard = Guard("engine")
    for _ in range(ERRORS_IN_A_ROW_MAX - 1):
        guard.failed("schedule", ValueError())
    assert not guard.off
    guard.failed("schedule", ValueError())
    assert guard.off
    guard.failed("schedule", ValueError())
    said = [m for m in messages(logged) if "switched itself off after 10 failures of schedule" in m]
    assert len(said) == 1
    guard.succeeded("schedule")
    assert guard.off, "off is for ever"


def test_a_success_of_that_hook_ends_its_row_and_no_other(logged):
    guard = Guard("engine")
    for _ in range(3):
        for _ in range(ERRORS_IN_A_ROW_MAX - 1):
            guard.failed("schedule", ValueError())
        guard.succeeded("sleep")
        guard.succeeded("schedule")
    assert not guard.off
    for _ in range(ERRORS_IN_A_ROW_MAX):
        guard.failed("schedule", ValueError())
        guard.succeeded("sleep")
    assert guard.off


def test_failures_of_different_hooks_are_no_row(logged):
    guard = Guard("engine")
    for number in range(100):
        guard.failed(f"hook {number}", ValueError())
    assert (guard.errors, guard.off) == (100, False)
