"""Any lines: rounded they add up, and none moves by a unit."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from vllm_cost_meter.units.rounding import largest_remainder

amounts = st.lists(st.fractions(-(10**12), 10**12), max_size=40)


@given(amounts)
def test_lines_add_up_to_the_rounded_sum(lines):
    units = largest_remainder(lines)
    assert sum(units) == round(sum(lines, Fraction(0)))
    assert all(abs(unit - line) < 1 for unit, line in zip(units, lines, strict=True))


@given(amounts)
def test_who_lost_less_never_gains_before_who_lost_more(lines):
    units = largest_remainder(lines)
    up = [line % 1 for unit, line in zip(units, lines, strict=True) if unit > line]
    down = [line % 1 for unit, line in zip(units, lines, strict=True) if unit < line]
    assert not up or not down or min(up) >= max(down)


@given(st.lists(amounts, max_size=8))
def test_rounded_from_the_top_down_every_level_adds_up(groups):
    sums = [sum(lines, Fraction(0)) for lines in groups]
    totals = largest_remainder(sums)
    for lines, exact, total in zip(groups, sums, totals, strict=True):
        units = largest_remainder(lines, total)
        assert sum(units) == total
        assert abs(total - exact) < 1
        assert all(abs(unit - line) < 1 for unit, line in zip(units, lines, strict=True))
