"""Money as people read it."""

from decimal import Decimal

import pytest

from vllm_cost_meter.units.money import figure_text, format_amount, format_rate
from vllm_cost_meter.units.text import significant


@pytest.mark.parametrize(
    ("usd", "text"),
    [
        (None, "-"),
        (0.0, "0.00"),
        (12.3456, "12.35"),
        (1234567.891, "1234567.89"),
        ("0.5", "0.50"),
        (0.0000123, "0.0000123"),
        (1e-12, "0.00"),
        (-1e-12, "0.00"),
        (Decimal("-0.25"), "-0.25"),
        (float("inf"), "inf"),
    ],
)
def test_an_amount_has_cents_and_below_one_usd_up_to_nine_places(usd, text):
    assert format_amount(usd) == text


@pytest.mark.parametrize(
    ("usd", "text"),
    [
        (None, "-"),
        ("0", "0"),
        (0.276666666, "0.276667"),
        (0.0000123456789, "0.0000123457"),
        (1234567.891, "1234568"),
        (9.9999999, "10"),
        (30000.0, "30000"),
        (-2.5, "-2.5"),
    ],
)
def test_a_rate_has_six_digits_and_all_before_the_point(usd, text):
    assert format_rate(usd) == text


def test_what_is_an_amount_says_the_name_of_the_figure():
    assert figure_text("cost_usd", 12.3456789) == "12.35"
    assert figure_text("usd_per_month", 1817.7) == "1817.70"
    assert figure_text("usd_per_m_output_tokens", 0.0000123456789) == "0.0000123457"
    assert figure_text("requests", 3) == "3"
    assert figure_text("cost_usd", None) == "-"


def test_any_other_figure_has_no_exponent_either():
    assert significant(1e-7) == "0.0000001"
    assert significant(1e20) == "1" + 20 * "0"
    assert significant(float("nan")) == "nan"
