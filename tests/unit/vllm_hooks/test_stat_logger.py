"""vLLM's stat logger: an exception in it stops the server, so none may leave it."""

from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY

from vllm_cost_meter.vllm_hooks.stat_logger import CostStatLogger


@pytest.fixture
def stat_logger() -> CostStatLogger:
    return CostStatLogger(None, [0])


def iteration(**changes) -> SimpleNamespace:
    values = {
        "time_to_first_tokens_iter": [],
        "inter_token_latencies_iter": [],
        "finished_requests": [],
        **changes,
    }
    return SimpleNamespace(**values)


def value(name: str) -> float:
    return REGISTRY.get_sample_value(name) or 0.0


def test_the_latencies_of_an_iteration_are_observed(stat_logger):
    names = ("cost_meter_ttft_seconds_sum", "cost_meter_e2e_seconds_sum")
    before = [value(name) for name in names]
    request = SimpleNamespace(e2e_latency=2.5)
    stat_logger.record(
        None,
        iteration(
            time_to_first_tokens_iter=[0.25, 0.5],
            inter_token_latencies_iter=[0.01] * 3,
            finished_requests=[request],
        ),
    )
    assert [value(name) - b for name, b in zip(names, before, strict=True)] == [0.75, 2.5]
    assert stat_logger.guard.errors == 0


def test_a_clock_that_was_set_back_takes_nothing_from_the_histograms(stat_logger):
    names = ("cost_meter_ttft_seconds_sum", "cost_meter_e2e_seconds_count")
    before = [value(name) for name in names]
    ended = SimpleNamespace(e2e_latency=-3_599.0)
    stat_logger.record(
        None, iteration(time_to_first_tokens_iter=[-3_599.5], finished_requests=[ended])
    )
    assert [value(name) for name in names] == before
    assert stat_logger.guard.errors == 0


def test_it_is_called_as_vllm_calls_it(stat_logger):
    """By keyword, with what older and newer versions pass; None for what there is not."""
    stat_logger.record(scheduler_stats=None, iteration_stats=None, engine_idx=1)
    stat_logger.record(None, iteration(), None, 0)
    stat_logger.record(scheduler_stats=None, iteration_stats=iteration(), mm_cache_stats=None)
    stat_logger.record(None, iteration(), what_a_newer_one_passes=1)
    stat_logger.log_engine_initialized()
    stat_logger.log()
    assert stat_logger.guard.errors == 0


def test_no_error_leaves_it_and_ten_in_a_row_switch_it_off(stat_logger):
    for _ in range(9):
        stat_logger.record(None, SimpleNamespace())
    stat_logger.record(None, iteration())
    assert not stat_logger.guard.off
    for _ in range(12):
        stat_logger.record(None, iteration(inter_token_latencies_iter=["soon"]))
    assert stat_logger.guard.off
    assert stat_logger.guard.errors == 19
    before = value("cost_meter_ttft_seconds_count")
    stat_logger.record(None, iteration(time_to_first_tokens_iter=[1.0]))
    assert value("cost_meter_ttft_seconds_count") == before


def test_the_sleep_state_is_shown(stat_logger):
    # vLLM's own words: record_sleep_state(1, level) at sleep, (0, 0) at wake-up.
    stat_logger.record_sleep_state(1, 1)
    assert value("cost_meter_engine_awake") == 0
    stat_logger.record_sleep_state(0, 0)
    assert value("cost_meter_engine_awake") == 1
