"""Money against exact fractions: one rounding, half to even, and nothing else is lost."""

from decimal import Decimal
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from vllm_cost_meter.prices.book import (
    GpuHourPrice,
    PriceEntry,
    kv_nanousd,
    time_nanousd,
    total_nanousd,
)
from vllm_cost_meter.prices.cost import (
    NO_QUANTITIES,
    Quantities,
    cost_nanousd,
    exact_cost_nanousd,
    parse_price,
)
from vllm_cost_meter.units.money import NANOUSD_PER_USD, format_usd
from vllm_cost_meter.units.time import NS_PER_HOUR

times = st.integers(0, 10**18)
prices = st.decimals(
    0, 1_000_000, allow_nan=False, allow_infinity=False, places=9
) | st.sampled_from(
    [Decimal("36"), Decimal("0.36"), Decimal("1.8"), Decimal("1e-18"), Decimal("3.6e6")]
)


def exact(gpu_time_ns: int, price: Decimal) -> Fraction:
    return Fraction(gpu_time_ns) * Fraction(price) * NANOUSD_PER_USD / NS_PER_HOUR


@given(times, prices)
def test_a_cost_is_the_exact_one_rounded_half_to_even(gpu_time_ns, price):
    # Python rounds a Fraction exactly, half to even.
    assert cost_nanousd(gpu_time_ns, price) == round(exact(gpu_time_ns, price))


@given(st.integers(0, 10**9), st.integers(1, 10**6))
def test_halves_go_to_the_even_side(whole, hundreds):
    # At 36 USD an hour a nanosecond costs 0.01: 50, 150, 250 ... ns cost so many and a half.
    half = whole * 100 + 50
    assert cost_nanousd(half, Decimal(36)) == whole + whole % 2


@given(st.lists(times, max_size=30), prices)
def test_parts_add_up_to_the_whole_within_half_a_nano_each(parts, price):
    whole = exact(sum(parts), price)
    added = sum(cost_nanousd(part, price) for part in parts)
    assert abs(added - whole) <= Fraction(len(parts), 2)
    assert abs(added - cost_nanousd(sum(parts), price)) <= Fraction(len(parts) + 1, 2)


@given(times, prices)
def test_twice_the_price_is_twice_the_cost_within_one_nano(gpu_time_ns, price):
    once, twice = (cost_nanousd(gpu_time_ns, factor * price) for factor in (1, 2))
    assert abs(twice - 2 * once) <= 1


@given(times, times, prices)
def test_more_time_never_costs_less(one, other, price):
    less, more = sorted((one, other))
    assert cost_nanousd(less, price) <= cost_nanousd(more, price)


quantities = st.builds(Quantities, times, st.integers(0, 10**15))


def priced(of_time: Decimal, of_blocks: Decimal | None) -> GpuHourPrice:
    entry = PriceEntry("p", of_time, "s", None, usd_per_kv_block_hour=of_blocks)
    return GpuHourPrice.of(entry)


@given(quantities, prices, prices)
def test_time_and_blocks_add_up_each_rounded_once(used, of_time, of_blocks):
    spent = {priced(of_time, of_blocks): used}
    blocks = Fraction(used.kv_block_ms) * Fraction(of_blocks) * NANOUSD_PER_USD / 3_600_000
    assert time_nanousd(spent) == round(exact(used.gpu_time_ns, of_time))
    assert kv_nanousd(spent) == round(blocks)
    assert total_nanousd(spent) == time_nanousd(spent) + kv_nanousd(spent)
    rates = next(iter(spent)).rates
    assert exact_cost_nanousd(used, rates) == exact(used.gpu_time_ns, of_time) + blocks


@given(quantities, prices)
def test_blocks_without_a_price_and_at_a_price_of_zero_cost_nothing(used, of_time):
    without, zero = ({priced(of_time, blocks): used} for blocks in (None, Decimal(0)))
    assert total_nanousd(without) == total_nanousd(zero) == cost_nanousd(used.gpu_time_ns, of_time)


@given(st.lists(quantities, max_size=20), prices, prices)
def test_exact_costs_of_parts_are_that_of_their_sum(parts, of_time, of_blocks):
    rates = priced(of_time, of_blocks).rates
    whole = exact_cost_nanousd(sum(parts, NO_QUANTITIES), rates)
    assert sum((exact_cost_nanousd(part, rates) for part in parts), Fraction(0)) == whole


@given(st.integers(-(10**24), 10**24))
def test_usd_text_is_exact(nanousd):
    text = format_usd(nanousd)
    assert Fraction(text) * NANOUSD_PER_USD == nanousd
    assert len(text.partition(".")[2]) == 9


@given(prices)
def test_a_price_survives_its_text(price):
    assert parse_price(format(price, "f")) == price
