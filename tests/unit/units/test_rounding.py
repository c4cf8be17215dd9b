"""Largest remainder, on figures small enough to do by hand."""

from fractions import Fraction

import pytest

from vllm_cost_meter.units.rounding import (
    half_even,
    largest_remainder,
    rounded_alike,
    rounded_known,
    rounded_pair,
)

THIRD = Fraction(1, 3)


@pytest.mark.parametrize(
    ("amounts", "units"),
    [
        ([], []),
        ([Fraction(7)], [7]),
        ([THIRD, THIRD, THIRD], [1, 0, 0]),
        ([Fraction(12, 10), Fraction(27, 10), Fraction(1, 10)], [1, 3, 0]),
        # Equal remainders: the first gets it. 0.5 and 1.5 make 2, rounded by themselves 0 and 2.
        ([Fraction(1, 2), Fraction(3, 2)], [1, 1]),
        # 2.5 is rounded half to even.
        ([Fraction(1, 2), Fraction(2)], [0, 2]),
        ([Fraction(-3, 2), Fraction(3, 2)], [-1, 1]),
        ([Fraction(-1, 3), Fraction(1, 3)], [0, 0]),
    ],
)
def test_the_lines_that_lost_most_are_rounded_up(amounts, units):
    assert largest_remainder(amounts) == units


@pytest.mark.parametrize(
    ("dividend", "divisor", "quotient"),
    [(5, 2, 2), (7, 2, 4), (-5, 2, -2), (-7, 2, -4), (8, 3, 3), (-8, 3, -3), (0, 7, 0)],
)
def test_a_quotient_is_rounded_half_to_even(dividend, divisor, quotient):
    assert half_even(dividend, divisor) == quotient == round(Fraction(dividend, divisor))


def test_a_total_may_be_given():
    assert largest_remainder([THIRD, THIRD], 0) == [0, 0]
    assert largest_remainder([THIRD, THIRD], 1) == [1, 0]
    assert largest_remainder([THIRD, THIRD], 2) == [1, 1]


@pytest.mark.parametrize("total", [-1, 3])
def test_a_total_that_a_line_would_move_too_far_for_is_refused(total):
    with pytest.raises(ValueError, match=f"got {total}"):
        largest_remainder([THIRD, THIRD], total)
    with pytest.raises(ValueError, match="near the sum"):
        largest_remainder([Fraction(1)], 2)


def test_what_is_unknown_stays_so_and_the_others_add_up():
    assert rounded_known([THIRD, None, Fraction(2, 3)]) == [0, None, 1]
    assert rounded_known([None]) == [None]


def test_a_part_that_lacks_whole_units_of_its_whole_is_rounded_the_same_way():
    half = Fraction(1, 2)
    assert rounded_pair(3 * half, half) == (2, 1)
    assert rounded_pair(half, half) == (0, 0)
    assert rounded_pair(None, 3 * half) == (None, 2)
    assert rounded_pair(Fraction(8, 5), Fraction(7, 5)) == (2, 1)


def test_parts_that_are_their_wholes_are_rounded_with_them_and_both_columns_add_up():
    tenths = [Fraction(4, 10)] * 3
    wholes = [*tenths, Fraction(5), Fraction(5), Fraction(5)]
    parts = [*tenths, *[Fraction(3, 10)] * 3]
    assert rounded_alike(wholes, parts) == ([1, 0, 0, 5, 5, 5], [1, 0, 0, 1, 0, 0])
    assert rounded_alike([None, Fraction(1, 2)], [Fraction(1, 2), None]) == ([None, 0], [0, None])
