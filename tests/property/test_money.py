"""Money is a plain decimal, whatever it is worth."""

import re
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from vllm_cost_meter.units.money import figure_text, format_amount, format_rate

PLAIN = re.compile(r"-?[0-9]+(\.[0-9]+)?")
USD = st.one_of(
    st.floats(min_value=-1e18, max_value=1e18, allow_nan=False),
    st.decimals(min_value=-(10**18), max_value=10**18, allow_nan=False),
)


@given(USD)
def test_an_amount_has_cents_or_nano_usd_and_no_exponent(usd: float | Decimal) -> None:
    text = format_amount(usd)
    assert PLAIN.fullmatch(text)
    exact, shown = Decimal(usd), Decimal(text)
    places = 2 if abs(exact) >= 1 else 9
    assert abs(shown - exact) <= Decimal(10) ** -places / 2
    assert 2 <= len(text.partition(".")[2]) <= places
    assert format_amount(text) == text
    assert text != "-0.00"


@given(USD)
def test_a_rate_has_six_significant_digits_and_no_exponent(usd: float | Decimal) -> None:
    text = format_rate(usd)
    assert PLAIN.fullmatch(text)
    exact, shown = Decimal(usd), Decimal(text)
    if exact:
        last = min(exact.adjusted() - 5, 0)
        assert abs(shown - exact) <= Decimal(10) ** last / 2
    else:
        assert text == "0"
    assert "." not in text or not text.endswith("0")


@given(st.sampled_from(["usd", "cost_usd", "usd_per_request", "usd_per_m_output_tokens"]), USD)
def test_no_figure_of_a_table_has_an_exponent(name: str, usd: float | Decimal) -> None:
    assert "e" not in figure_text(name, float(usd)).lower()
