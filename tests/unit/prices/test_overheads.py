"""Overhead lines: percent of a cost, a month's share by its hours, and when they hold."""

from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction

import pytest

from vllm_cost_meter.prices.overheads import Overhead, months_between, overhead_lines


def hour(*date: int) -> int:
    return int(datetime(*date, tzinfo=UTC).timestamp()) // 3600


JANUARY, FEBRUARY, MARCH = hour(2027, 1, 1), hour(2027, 2, 1), hour(2027, 3, 1)
RENT = Overhead("o0", "rent", "the lease", usd_per_month=Decimal("744"))
STAFF = Overhead("o1", "staff", "the plan", percent=Decimal("12.5"))


def lines(*overheads: Overhead, begin: int = JANUARY, end: int = FEBRUARY, cost=lambda *_: 800):
    return overhead_lines(overheads, begin, end, cost)


@pytest.mark.parametrize(
    ("begin", "end", "months"),
    [
        (JANUARY, FEBRUARY, 1),
        (JANUARY, MARCH, 2),
        (JANUARY, JANUARY + 1, Fraction(1, 744)),
        (FEBRUARY - 1, FEBRUARY + 1, Fraction(1, 744) + Fraction(1, 672)),
        (hour(2028, 2, 29), hour(2028, 3, 1), Fraction(1, 29)),
        (hour(2026, 12, 31, 23), hour(2027, 1, 1), Fraction(1, 744)),
        (JANUARY, JANUARY, 0),
        (hour(1969, 12, 1), hour(1970, 2, 1), 2),
        (hour(9999, 12, 31), hour(9999, 12, 31, 23), Fraction(23, 744)),
    ],
)
def test_months_are_counted_by_their_hours(begin, end, months):
    assert months_between(begin, end) == months


def test_a_fixed_amount_is_shared_among_the_hours_of_its_month():
    [line] = lines(RENT, end=JANUARY + 24)
    assert line.nanousd == 24 * 10**9
    assert line.as_dict() == {
        "name": "rent", "percent": None, "usd_per_month": "744", "source": "the lease",
        "from": "2027-01-01T00:00:00.000000Z", "to": "2027-01-02T00:00:00.000000Z",
        "cost_nanousd": 24 * 10**9, "cost_usd": "24.000000000", "cost_reason": None,
    }  # fmt: skip


def test_a_percentage_is_of_the_cost_of_the_hours_in_which_it_holds():
    asked = []

    def cost(begin: int, end: int) -> int:
        asked.append((begin, end))
        return 100

    since = Overhead("o", "staff", "s", percent=Decimal("10"), effective_from_hour=JANUARY + 5)
    until = Overhead("o", "more", "s", percent=Decimal("1"), effective_until_hour=JANUARY + 5)
    assert [line.nanousd for line in lines(since, until, cost=cost)] == [10, 1]
    assert asked == [(JANUARY + 5, FEBRUARY), (JANUARY, JANUARY + 5)]


def test_a_line_is_exact_and_rounded_half_to_even_when_it_is_shown():
    [line] = lines(STAFF, cost=lambda *_: 20)
    assert (line.nanousd, line.cost_nanousd) == (Fraction(5, 2), 2)


def test_a_percentage_of_an_unknown_cost_is_unknown_with_a_reason():
    staff, rent = lines(STAFF, RENT, cost=lambda *_: None)
    assert (staff.nanousd, staff.cost_nanousd, rent.cost_nanousd) == (None, None, 744 * 10**9)
    shown = staff.as_dict()
    assert (shown["cost_nanousd"], shown["cost_usd"]) == (None, None)
    assert shown["cost_reason"] == "the cost it is a part of is null"


def test_an_overhead_that_does_not_hold_in_the_window_has_no_line():
    over = Overhead("o", "x", "s", percent=Decimal(1), effective_until_hour=JANUARY)
    later = Overhead("o", "x", "s", percent=Decimal(1), effective_from_hour=FEBRUARY)
    assert lines(over, later) == []
