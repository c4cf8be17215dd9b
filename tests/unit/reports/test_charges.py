"""How well a split is known, in figures and in words."""

import pytest

from vllm_cost_meter.reports.charges import (
    NO_CHARGES,
    ChargesKnown,
    charge_error_of,
    charges_cell,
    charges_of_rows,
    charges_text,
    within,
)


def row(gpu_time_ns: int, known_ns: int, error_ns: int) -> dict:
    return {"gpu_time_ns": gpu_time_ns, **ChargesKnown(known_ns, error_ns).as_dict()}


def test_an_error_is_a_part_of_the_time_whose_error_is_known():
    assert row(1000, 400, 10) == {
        "gpu_time_ns": 1000, "charge_known_ns": 400, "charge_error_ns": 10, "charge_error": 0.025,
    }  # fmt: skip


def test_unknown_is_never_0_and_0_is_never_unknown():
    assert row(1000, 0, 0)["charge_error"] is None
    assert row(1000, 1000, 0)["charge_error"] == 0.0
    assert charge_error_of(300, None) is None
    assert charge_error_of(300, 0) == 0.0
    assert charge_error_of(0, 0) is charge_error_of(None, None) is None


def test_rows_add_up_and_rows_that_are_no_usage_add_nothing():
    idle = dict.fromkeys(("charge_known_ns", "charge_error_ns", "charge_error"))
    assert charges_of_rows([row(500, 500, 5), idle, row(900, 300, 35)]) == {
        "charge_known_ns": 800, "charge_error_ns": 40, "charge_error": 0.05,
    }  # fmt: skip
    assert charges_of_rows([idle])["charge_error"] is None


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (row(1000, 1000, 32), "split known to within 3.2%"),
        (row(1000, 1000, 0), "split known to within 0.0%"),
        (row(1000, 500, 16), "split known to within 3.2% for 50.0% of the GPU time"),
        # A bound is rounded up, and so is never 0 if anything may be off.
        (row(3000, 3000, 100), "split known to within 3.4%"),
        (row(10**9, 10**9, 1), "split known to within 0.1%"),
        # What is not all is never called all, nor what is some nothing.
        (row(10**6, 10**6 - 1, 0), "split known to within 0.0% for 99.9% of the GPU time"),
        (row(10**6, 999, 0), "split known to within 0.0% for less than 0.1% of the GPU time"),
        (row(1000, 0, 0), "not known how far the split may be off"),
        (row(0, 0, 0), "no GPU time was split"),
    ],
)
def test_it_is_said_in_words(of, said):
    assert charges_text(of) == said


@pytest.mark.parametrize(
    ("of", "shown"),
    [
        (row(1000, 1000, 32), "3.2%"),
        (row(1000, 500, 16), "3.2% of 50.0%"),
        (row(1000, 1000, 0), "0.0%"),
        (row(1000, 0, 0), "unknown"),
        (row(0, 0, 0), None),
        ({"gpu_time_ns": 1000, **NO_CHARGES}, None),
    ],
)
def test_a_cell_of_a_table_says_of_how_much_it_is(of, shown):
    assert charges_cell(of) == shown


def test_a_bound_that_is_exact_in_tenths_of_a_percent_is_not_rounded_up():
    assert [within(tenths / 1000) for tenths in range(1001)] == [
        f"{tenths // 10}.{tenths % 10}%" for tenths in range(1001)
    ]
