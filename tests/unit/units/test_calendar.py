"""Windows as people type them, at 2026-09-21 14:13:20 UTC, a Monday; days of time zones."""

from datetime import UTC

import pytest

from vllm_cost_meter.units.calendar import (
    LAST_HOUR,
    hours_of_window,
    month_hours,
    period_name,
    period_of,
    zone_of,
)
from vllm_cost_meter.units.time import NS_PER_HOUR, unix_ns_of

NOW = 1_790_000_000 * 10**9
HOUR = NOW // NS_PER_HOUR
MIDNIGHT = HOUR - 14


def hour(text: str) -> int:
    """The hour that begins at an instant."""
    hours, rest = divmod(unix_ns_of(text), NS_PER_HOUR)
    assert rest == 0
    return hours


@pytest.mark.parametrize(
    ("window", "hours"),
    [
        (None, (None, None)),
        ("", (None, None)),
        ("today", (MIDNIGHT, MIDNIGHT + 24)),
        ("yesterday", (MIDNIGHT - 24, MIDNIGHT)),
        ("1h", (HOUR, HOUR + 1)),
        ("24h", (HOUR - 23, HOUR + 1)),
        ("7d", (HOUR - 167, HOUR + 1)),
        ("30m", (HOUR, HOUR + 1)),
        ("60m", (HOUR, HOUR + 1)),
        ("90m", (HOUR - 1, HOUR + 1)),
        ("week", (MIDNIGHT - 24, MIDNIGHT + 6 * 24)),
        ("lastweek", (MIDNIGHT - 8 * 24, MIDNIGHT - 24)),
        ("month", (MIDNIGHT - 20 * 24, MIDNIGHT + 10 * 24)),
        ("lastmonth", (MIDNIGHT - 51 * 24, MIDNIGHT - 20 * 24)),
        ("2026-09", (MIDNIGHT - 20 * 24, MIDNIGHT + 10 * 24)),
        ("2026-08", (MIDNIGHT - 51 * 24, MIDNIGHT - 20 * 24)),
        ("2026-09-21T00:00:00Z,2026-09-21T01:00:00Z", (MIDNIGHT, MIDNIGHT + 1)),
        ("2026-09-21T00:59:59Z, 2026-09-21T01:00:01Z", (MIDNIGHT, MIDNIGHT + 2)),
        ("2026-09-21T02:00:00+02:00,2026-09-21T01:00:00Z", (MIDNIGHT, MIDNIGHT + 1)),
    ],
)
def test_a_window_is_whole_utc_hours(window, hours):
    assert hours_of_window(window, NOW) == hours


@pytest.mark.parametrize(
    "window",
    [
        "0h",
        "0d",
        "0m",
        "24",
        "lastyear",
        "2026-13",
        "2026-00",
        "0000-01",
        "2026-1",
        "h",
        "-1h",
        "1w",
        "1.5h",
        "TODAY",
        "٣h",
        "1234567h",
        ",",
        "today,",
        "x,y",
    ]
    + ["2026-09-21,2026-09-22", "2026-09-21T00:00:00Z", "1h\n"],
)
def test_what_is_no_window_is_refused_with_what_was_expected(window):
    with pytest.raises(ValueError, match=r"^window: expected .*, got ") as caught:
        hours_of_window(window, NOW)
    assert repr(window) in str(caught.value)


@pytest.mark.parametrize(
    "window",
    ["2026-09-21T01:00:00Z,2026-09-21T01:00:00Z", "2026-09-21T01:00:00Z,2026-09-20T01:00:00Z"],
)
def test_a_window_ends_after_it_starts(window):
    with pytest.raises(ValueError, match="its end after its start"):
        hours_of_window(window, NOW)


@pytest.mark.parametrize(
    "window",
    [
        "999999d",
        "0001-01-01T00:00:00Z,9999-12-31T23:59:59Z",
        "0001-01-01T00:00:00+14:00,0001-01-01T00:00:00Z",
        "9999-12-31T23:00:00Z,9999-12-31T23:30:00-12:00",
        "1960-01-01T00:00:00Z,1961-01-01T00:00Z",
    ],
)
def test_the_widest_windows_are_hours_that_can_be_written(window):
    from vllm_cost_meter.ledger.queries.cut import Window

    low, high = hours_of_window(window, NOW)
    assert low < high
    assert Window(low, high).as_dict()["from"] < Window(low, high).as_dict()["to"]


@pytest.mark.parametrize("month", ["0001-01", "9999-12"])
def test_the_first_and_the_last_month_are_hours_too(month):
    for name in ("UTC", "Asia/Tokyo", "America/New_York"):
        low, high = month_hours(month, zone_of(name))
        assert low < high <= LAST_HOUR


@pytest.mark.parametrize("month", ["", "2026", "2026-13", "november", "2026-11-01", "2026-11\n"])
def test_what_is_no_month_is_refused(month):
    with pytest.raises(ValueError, match=r"^month: expected a month such as 2026-11, got "):
        month_hours(month)


@pytest.mark.parametrize(
    ("month", "zone", "low", "high"),
    [
        ("2026-11", "UTC", "2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z"),
        ("2026-12", "UTC", "2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z"),
        ("2028-02", "Europe/Berlin", "2028-01-31T23:00:00Z", "2028-02-29T23:00:00Z"),
        ("2026-10", "Europe/Berlin", "2026-09-30T22:00:00Z", "2026-10-31T23:00:00Z"),
        ("2026-11", "America/New_York", "2026-11-01T04:00:00Z", "2026-12-01T05:00:00Z"),
        # 5:30 ahead: the hour from 18:00 UTC begins at 23:30, and is the month before's.
        ("2026-11", "Asia/Kolkata", "2026-10-31T19:00:00Z", "2026-11-30T19:00:00Z"),
        ("2026-11", "Asia/Kathmandu", "2026-10-31T19:00:00Z", "2026-11-30T19:00:00Z"),
    ],
)
def test_a_month_is_that_of_its_time_zone(month, zone, low, high):
    assert month_hours(month, zone_of(zone)) == (hour(low), hour(high))
    assert hours_of_window(month, NOW, zone_of(zone)) == (hour(low), hour(high))


def test_words_are_days_of_the_time_zone_at_the_instant_asked():
    tokyo = zone_of("Asia/Tokyo")
    late = unix_ns_of("2026-09-21T23:59:59+09:00")
    today = (hour("2026-09-21T00:00:00+09:00"), hour("2026-09-22T00:00:00+09:00"))
    assert hours_of_window("today", late, tokyo) == today
    assert hours_of_window("yesterday", late + 10**9, tokyo) == today
    assert hours_of_window("today", late, UTC) == (MIDNIGHT, MIDNIGHT + 24)


def test_a_day_has_as_many_hours_as_its_clocks_make_it():
    berlin, lord_howe = zone_of("Europe/Berlin"), zone_of("Australia/Lord_Howe")
    days = [
        ("2026-03-29T12:00:00Z", berlin, 23),
        ("2026-10-25T12:00:00Z", berlin, 25),
        ("2026-10-26T12:00:00Z", berlin, 24),
        # Half an hour is taken away and given back, and hours begin at half past before.
        ("2026-10-03T20:00:00Z", lord_howe, 23),
        ("2027-04-03T20:00:00Z", lord_howe, 25),
    ]
    for instant, zone, hours in days:
        low, high = period_of(hour(instant), "day", zone)
        assert high - low == hours


def test_periods_are_named_by_their_local_beginning():
    new_york, at = zone_of("America/New_York"), hour("2026-11-01T05:00:00Z")
    assert period_name(at, "hour", new_york) == "2026-11-01T01:00:00-04:00"
    assert period_name(at + 1, "hour", new_york) == "2026-11-01T01:00:00-05:00"
    assert period_name(at, "hour") == "2026-11-01T05:00:00Z"
    assert period_name(at - 2, "day", new_york) == "2026-10-31"
    assert period_name(at, "week", new_york) == "2026-11-01"
    assert period_name(at - 2, "week", new_york) == "2026-10-25"
    assert period_name(at, "month", new_york) == "2026-11"


@pytest.mark.parametrize("name", [None, "", "UTC"])
def test_without_a_time_zone_it_is_utc(name):
    assert zone_of(name) is UTC


@pytest.mark.parametrize(
    "name", ["Berlin", "+01:00", "../etc/passwd", "/etc/passwd", "Europe", "\0"]
)
def test_what_is_no_time_zone_is_refused(name):
    with pytest.raises(
        ValueError, match=r"^tz: expected the name of a time zone, .*, got "
    ) as caught:
        zone_of(name)
    assert repr(name) in str(caught.value)
