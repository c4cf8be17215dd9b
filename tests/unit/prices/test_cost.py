"""Prices as people write them, and money as it is shown."""

from decimal import Decimal
from fractions import Fraction

import pytest

from vllm_cost_meter.prices.cost import (
    cost_nanousd,
    exact_energy_nanousd,
    parse_price,
)
from vllm_cost_meter.units.money import decimal_text, format_usd


@pytest.mark.parametrize("text", ["0", "2.5", "1e-6", "0.000000000000000001", "1000000"])
def test_a_decimal_of_at_least_zero_is_a_price(text):
    assert parse_price(text) == Decimal(text)


@pytest.mark.parametrize("text", ["", "free", "-1", "nan", "inf", "-0.0001", "1,5", "sNaN", "$2"])
def test_anything_else_is_refused_and_shown(text):
    with pytest.raises(ValueError, match="expected a") as caught:
        parse_price(text)
    assert repr(text) in str(caught.value)


def test_minus_zero_is_the_price_zero():
    assert str(parse_price("-0.00")) == "0.00"


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


def test_a_price_may_be_a_fraction_that_no_decimal_is():
    third = Fraction(10, 3)
    assert cost_nanousd(3 * 3_600 * 10**9, third) == 10_000_000_000
    assert cost_nanousd(3_600 * 10**9, third) == 3_333_333_333


@pytest.mark.parametrize(
    ("energy_mj", "usd", "nanousd"),
    [(3_600_000_000, "0.30", 300_000_000), (18, "0.30", 2), (6, "0.30", 0), (0, "1", 0)],
)
def test_energy_costs_its_kilowatt_hours_rounded_half_to_even(energy_mj, usd, nanousd):
    assert round(exact_energy_nanousd(energy_mj, Decimal(usd))) == nanousd


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Fraction(5, 2), "2.5"),
        (Fraction(100), "100"),
        (Fraction(0), "0"),
        (Fraction(1, 3), "0." + "3" * 18),
        (Fraction(-2, 3), "-0." + "6" * 17 + "7"),
        (Fraction(1, 10**18), "0." + "0" * 17 + "1"),
        (Fraction(1, 10**19), "0"),
    ],
)
def test_a_fraction_is_shown_with_at_most_18_places(value, text):
    assert decimal_text(value) == text


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
