"""Coarse figures: what a tenant is shown where exact ones would tell of other tenants."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cost_meter.reports.coarse import HIDDEN, coarse, coarse_ns, coarse_phases

MS = 1_000_000


@pytest.mark.parametrize(
    ("exact", "shown"),
    [(0, 0), (1, MS), (400_000, MS), (1_400_000, MS), (1_600_000, 2 * MS), (2_500_000, 2 * MS)],
)
def test_a_time_is_rounded_to_a_millisecond_and_never_to_nothing(exact, shown):
    assert coarse_ns(exact) == shown


@given(st.integers(0, 10**15), st.integers(0, 10**15))
def test_shown_phases_add_up_to_the_shown_time(prefill, decode):
    gpu, shown_prefill, shown_decode = coarse_phases(prefill + decode, prefill)
    assert (gpu, gpu % MS) == (shown_prefill + shown_decode, 0)
    assert min(shown_prefill, shown_decode) >= 0
    assert abs(gpu - prefill - decode) < MS


ROW = {
    "tenant": "acme",
    "prompt_tokens": 100,
    "cached_tokens": 96,
    "external_tokens": 3,
    "external_known_tokens": 100,
    "output_tokens": 5,
    "gpu_time_ns": 10_600_000,
    "idle_share_ns": 0,
    "prefill_ns": 300_000,
    "decode_ns": 10_300_000,
    "marginal_ns": 8_000_000,
    "charge_known_ns": 10_600_000,
    "charge_error_ns": 0,
    "charge_error": 0.0,
    "cost_nanousd": 1_060,
    "cost_usd": "0.000001060",
    "cost_reason": None,
    "energy_mj": 7_420,
    "energy_cost_nanousd": 742,
    "ttft_ms": 12.345,
    "started_at": "2026-11-29T01:02:03.456789Z",
    "parts": [{"steps": 7, "batch": 21, "step_ns": 31_000_000, "gpu_time_ns": None}],
}


def test_a_row_keeps_its_own_tokens_and_loses_what_tells_of_others():
    assert coarse(ROW) == {
        "tenant": "acme",
        "prompt_tokens": 100,
        "cached_tokens": None,
        "external_tokens": None,
        "external_known_tokens": None,
        "output_tokens": 5,
        "gpu_time_ns": 11 * MS,
        "idle_share_ns": 0,
        "prefill_ns": MS,
        "decode_ns": 10 * MS,
        "marginal_ns": None,
        # 0 would tell that nobody else was there.
        "charge_known_ns": None,
        "charge_error_ns": None,
        "charge_error": None,
        "cost_nanousd": 1_100,
        "cost_usd": "0.000001100",
        "cost_reason": None,
        "energy_mj": 7_000,
        "energy_cost_nanousd": 700,
        "ttft_ms": 12.0,
        "started_at": "2026-11-29T01:02:03.456Z",
        "parts": [{"steps": None, "batch": None, "step_ns": None, "gpu_time_ns": None}],
    }


@given(st.integers(1, 10**12), st.integers(1, 10**9))
def test_money_is_the_price_of_the_shown_time_whatever_the_price(gpu_time_ns, nanousd_per_ns):
    """A tenant may suppose a price in a report, and must not learn the exact time from the cost."""
    exact = {"gpu_time_ns": gpu_time_ns, "usage_cost_nanousd": gpu_time_ns * nanousd_per_ns}
    shown = coarse(exact)
    assert shown["usage_cost_nanousd"] == shown["gpu_time_ns"] * nanousd_per_ns
    assert shown["gpu_time_ns"] % MS == 0


def test_a_cost_with_idle_time_is_that_of_both_shown_times():
    shown = coarse({"gpu_time_ns": 1_600_000, "idle_share_ns": 400_000, "cost_nanousd": 2_000})
    assert shown == {"gpu_time_ns": 2 * MS, "idle_share_ns": MS, "cost_nanousd": 3_000}


def test_an_unknown_cost_stays_unknown_and_a_cost_without_time_stays():
    assert coarse({"gpu_time_ns": 1, "cost_nanousd": None})["cost_nanousd"] is None
    assert coarse({"gpu_time_ns": 0, "cost_nanousd": 0})["cost_nanousd"] == 0


def test_the_use_of_a_budget_is_shown_to_a_millisecond_or_a_thousandth_of_its_limit():
    seconds = {"unit": "gpu_seconds", "limit": 10**9, "used": 1_600_000, "over": None}
    assert coarse(seconds) == {**seconds, "used": 2 * MS}
    usd = {"unit": "usd", "limit": 10**9, "used": 123_456_789, "over": 0}
    assert coarse(usd) == {**usd, "used": 123_000_000}


def test_hidden_figures_are_null_wherever_they_stand():
    assert coarse([dict.fromkeys(HIDDEN, 1)]) == [dict.fromkeys(HIDDEN)]
