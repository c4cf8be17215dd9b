"""Money as people read it."""

from decimal import Decimal
from fractions import Fraction

import pytest

from vllm_cost_meter.reports.statement import format_cents
from vllm_cost_meter.units.money import (
    decimal_text,
    figure_text,
    format_amount,
    format_nano,
    format_rate,
    format_usd,
)
from vllm_cost_meter.units.text import rounded, significant, to_csv


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


# What one token costs on a small GPU, and what nobody will ever owe.
EXTREMES = ["0.000000001", "0.00000123", "0.1", "1", "123456.789", "1000000000000"]


@pytest.mark.parametrize("sign", ["", "-"])
@pytest.mark.parametrize("text", EXTREMES)
def test_no_format_writes_money_in_scientific_notation_or_loses_its_size(text, sign):
    usd = Decimal(sign + text)
    nano = int(usd.scaleb(9))
    written = [
        format_nano(nano),
        format_usd(nano),
        format_amount(usd),
        format_amount(float(usd)),
        format_rate(usd),
        format_rate(float(usd)),
        decimal_text(Fraction(usd)),
        figure_text("cost_usd", float(usd)),
        figure_text("usd_per_m_output_tokens", float(usd)),
        rounded(float(usd)),
    ]
    for shown in written:
        assert "e" not in shown.lower()
        # A cent of 123456.79, or six digits of a rate.
        assert abs(Decimal(shown) - usd) <= max(abs(usd) / 10**5, Decimal(0))


def test_an_amount_of_a_statement_has_the_two_digits_of_its_currency():
    assert [format_cents(cents) for cents in (0, 1, -1, 10**14)] == [
        *("0.00", "0.01", "-0.01", "1000000000000.00")
    ]


def test_the_money_of_a_csv_is_as_it_was_said():
    assert to_csv([{"cost_usd": format_nano(1)}]).split() == ["cost_usd", "0.000000001"]
