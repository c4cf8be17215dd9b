"""Prices as people write them, and money as it is shown."""

from decimal import Decimal

import pytest

from vllm_cost_meter.pricing import cost_nanousd, format_usd, parse_price


@pytest.mark.parametrize("text", ["0", "2.5", "1e-6", "0.000000000000000001", "1000000"])
def test_a_decimal_of_at_least_zero_is_a_price(text):
    assert parse_price(text) == Decimal(text)


@pytest.mark.parametrize("text", ["", "free", "-1", "nan", "inf", "-0.0001", "1,5", "sNaN", "$2"])
def test_anything_else_is_refused_and_shown(text):
    with pytest.raises(ValueError, match="expected a") as caught:
        parse_price(text)
    assert repr(text) in str(caught.value)


def test_no_price_is_no_cost_and_a_price_of_zero_is_a_cost_of_zero():
    assert cost_nanousd(10**12, None) is None
    assert cost_nanousd(10**12, Decimal(0)) == 0
    assert format_usd(None) is None
    assert format_usd(0) == "0.000000000"


@pytest.mark.parametrize(
    ("gpu_time_ns", "usd", "nanousd"),
    [
        (3_600 * 10**9, "2.5", 2_500_000_000),
        (1, "3600", 1),
        # 0.5 and 1.5 and 2.5 nano-USD: to the even one.
        (50, "36", 0),
        (150, "36", 2),
        (250, "36", 2),
        (51, "36", 1),
        (49, "36", 0),
    ],
)
def test_a_cost_is_rounded_once_half_to_even(gpu_time_ns, usd, nanousd):
    assert cost_nanousd(gpu_time_ns, Decimal(usd)) == nanousd


@pytest.mark.parametrize(
    ("nanousd", "text"),
    [
        (1, "0.000000001"),
        (-1, "-0.000000001"),
        (1_000_000_000, "1.000000000"),
        (-1_500_000_000, "-1.500000000"),
        (10**20 + 1, "100000000000.000000001"),
    ],
)
def test_usd_is_written_with_nine_places(nanousd, text):
    assert format_usd(nanousd) == text
