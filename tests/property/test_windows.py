"""Days, weeks and months of every time zone there is: whole hours, each in exactly one."""

import zoneinfo
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from vllm_cost_meter.units.calendar import (
    hours_of_window,
    month_hours,
    period_name,
    period_of,
    zone_of,
)
from vllm_cost_meter.units.time import NS_PER_HOUR

# Of what a ledger may hold: from before this was written, over three leap days.
FIRST = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp()) // 3600
LAST = int(datetime(2037, 1, 1, tzinfo=UTC).timestamp()) // 3600
hours = st.integers(FIRST, LAST)
zones = st.sampled_from(sorted(zoneinfo.available_timezones())).map(zone_of)
units = st.sampled_from(["day", "week", "month"])


@given(hours, zones, units)
def test_an_hour_is_in_the_one_period_in_which_it_begins(hour, zone, unit):
    low, high = period_of(hour, unit, zone)
    assert low <= hour < high
    for inside in (low, high - 1):
        assert period_of(inside, unit, zone) == (low, high)
        assert period_name(inside, unit, zone) == period_name(hour, unit, zone)
    begins = datetime.fromtimestamp(hour * 3600, zone)
    if unit != "week":
        assert begins.date().isoformat().startswith(period_name(hour, unit, zone))


@given(hours, zones, units)
def test_periods_follow_each_other_without_a_gap(hour, zone, unit):
    low, high = period_of(hour, unit, zone)
    assert period_of(high, unit, zone)[0] == high
    assert period_of(low - 1, unit, zone)[1] == low


@given(hours, zones)
def test_the_days_of_a_month_are_the_month(hour, zone):
    low, high = month_hours(period_name(hour, "month", zone), zone)
    assert (low, high) == period_of(hour, "month", zone)
    day = low
    while day < high:
        start, day = period_of(day, "day", zone)
        assert start >= low
    assert day == high


@given(hours, zones, st.integers(0, NS_PER_HOUR - 1))
def test_today_is_the_local_day_of_now(hour, zone, ns):
    now_ns = hour * NS_PER_HOUR + ns
    low, high = hours_of_window("today", now_ns, zone)
    assert hours_of_window("yesterday", now_ns, zone)[1] == low
    today = datetime.fromtimestamp(now_ns // 10**9, zone).date()
    assert {period_name(h, "day", zone) for h in (low, high - 1)} == {today.isoformat()}
