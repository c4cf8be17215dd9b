"""What was billed when, from readings and lines small enough to do by hand."""

from fractions import Fraction

import pytest

from tests.support.bills import spend
from vllm_cost_meter.invoices.timeline import (
    GAP,
    RESET,
    BilledHour,
    InvoiceLine,
    Reading,
    billed_hours,
    stretches,
)
from vllm_cost_meter.units.time import NS_PER_HOUR as H

DAY = 24 * H


def counter(*readings: tuple[int, int]) -> list[Reading]:
    """Readings of a counter at hours."""
    return [Reading("gpu-1", "gpu", hour * H, usd) for hour, usd in readings]


def rates(*readings: tuple[int, int]) -> list[Reading]:
    return [Reading("gpu-1", "gpu", hour * H, nanousd_per_hour=usd) for hour, usd in readings]


def line(from_hour: int, to_hour: int, nanousd: int, **more: str) -> InvoiceLine:
    return InvoiceLine("gpu-1", "gpu", from_hour * H, to_hour * H, nanousd, **more)


def of(*facts, gap_ns: int = DAY):
    snapshots = [fact for fact in facts if isinstance(fact, Reading)]
    lines = [fact for fact in facts if isinstance(fact, InvoiceLine)]
    return stretches(snapshots, lines, gap_ns)


def unobserved(found):
    return [
        (one.from_ns // H, one.to_ns // H, one.unobserved) for one in found if one.unobserved
    ]  # fmt: skip


def test_spend_is_the_sum_of_increments_and_a_counter_that_fell_takes_nothing_away():
    found = of(*counter((0, 10), (1, 12), (2, 1), (3, 3)))
    assert [spend(found, hour * H, (hour + 1) * H) for hour in range(3)] == [2, 0, 2]
    assert spend(found, 0, 3 * H) == 4
    assert unobserved(found) == [(1, 2, RESET)]
    assert billed_hours(found) == [
        BilledHour(0, 2, H, 0, 0, "counter"),
        BilledHour(1, 0, 0, H, 1, "counter"),
        BilledHour(2, 2, H, 0, 0, "counter"),
    ]


def test_the_order_of_readings_is_irrelevant():
    readings = counter((0, 10), (1, 12), (2, 1), (3, 3))
    assert of(*reversed(readings)) == of(*readings)


def test_an_increment_is_spread_evenly_and_its_hours_add_up_to_it():
    found = of(*counter((0, 0), (3, 100)))
    assert [one.nanousd for one in billed_hours(found)] == [33, 34, 33]
    half = spend(found, H // 2, H)
    assert half == Fraction(100, 6)


def test_nothing_is_claimed_before_the_first_and_after_the_last_reading():
    found = of(*counter((5, 10), (6, 12)))
    assert spend(found, 0, 5 * H) == spend(found, 6 * H, 100 * H) == 0
    assert [one.hour for one in billed_hours(found)] == [5]
    assert of(*counter((5, 10))) == []


def test_the_money_of_a_counter_over_a_gap_is_real_and_its_hours_are_unobserved():
    found = of(*counter((0, 0), (48, 480)))
    assert spend(found, 0, 48 * H) == 480
    assert unobserved(found) == [(0, 48, GAP)]
    assert billed_hours(found)[7] == BilledHour(7, 10, H, H, 0, "counter")
    assert unobserved(of(*counter((0, 0), (24, 480)))) == []


def test_a_rate_holds_until_the_next_reading_and_over_a_gap_no_longer_than_that():
    found = of(*rates((0, 7), (2, 9), (50, 1)))
    assert spend(found, 0, 2 * H) == 14
    assert spend(found, 0, 50 * H) == 14 + 24 * 9
    assert unobserved(found) == [(26, 50, GAP)]
    assert billed_hours(found)[26] == BilledHour(26, 0, 0, H, 0, "rate")


def test_what_a_counter_that_became_a_rate_spent_between_is_unknown():
    found = of(*counter((0, 5)), *rates((1, 7), (2, 7)))
    assert (spend(found, 0, 2 * H), unobserved(found)) == (7, [(0, 1, GAP)])


def test_lines_of_an_invoice_stand_in_place_of_the_counter_for_their_time():
    found = of(*counter((0, 0), (4, 40)), line(1, 3, 100), line(1, 3, 11, item="fee"))
    assert [spend(found, hour * H, (hour + 1) * H) for hour in range(4)] == [
        10, Fraction(111, 2), Fraction(111, 2), 10,
    ]  # fmt: skip
    assert [(one.covered_ns, one.basis) for one in billed_hours(found)] == [
        (H, "counter"), (H, "invoice"), (H, "invoice"), (H, "counter"),
    ]  # fmt: skip


def test_a_credit_is_added_and_replaces_nothing():
    found = of(*counter((0, 0), (2, 20)), line(0, 2, -6, charge_class="Credit"))
    assert spend(found, 0, 2 * H) == 14
    assert billed_hours(found)[0] == BilledHour(0, 7, H, 0, 0, "counter+invoice")
    alone = billed_hours(of(line(0, 1, -6, charge_class="Credit")))
    assert alone == [BilledHour(0, -6, 0, 0, 0, "invoice")]


def test_time_that_lines_share_is_covered_once():
    found = billed_hours(of(line(0, 2, 10), line(1, 3, 10)))
    assert [(one.nanousd, one.covered_ns) for one in found] == [(5, H), (10, H), (5, H)]


def test_a_reset_that_an_invoice_covers_in_part_is_one_reset():
    found = of(*counter((0, 9), (4, 1)), line(1, 2, 3))
    assert unobserved(found) == [(0, 1, RESET), (2, 4, RESET)]
    assert sum(one.resets for one in billed_hours(found)) == 1


@pytest.mark.parametrize("part", [1, 1_800, 3_599])
def test_what_is_covered_of_an_hour_is_told_to_the_nanosecond(part):
    ns = part * 10**9
    found = billed_hours(stretches([], [InvoiceLine("r", "gpu", 0, ns, 7)], DAY))
    assert found == [BilledHour(0, 7, ns, 0, 0, "invoice")]
