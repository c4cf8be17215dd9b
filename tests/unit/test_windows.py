"""Windows as people type them, at 2026-09-21 14:13:20 UTC."""

import pytest

from vllm_cost_meter.records import NS_PER_HOUR
from vllm_cost_meter.windows import hours_of_window

NOW = 1_790_000_000 * 10**9
HOUR = NOW // NS_PER_HOUR
MIDNIGHT = HOUR - 14


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
        ("2026-09-21T00:00:00Z,2026-09-21T01:00:00Z", (MIDNIGHT, MIDNIGHT + 1)),
        ("2026-09-21T00:59:59Z, 2026-09-21T01:00:01Z", (MIDNIGHT, MIDNIGHT + 2)),
        ("2026-09-21T02:00:00+02:00,2026-09-21T01:00:00Z", (MIDNIGHT, MIDNIGHT + 1)),
    ],
)
def test_a_window_is_whole_utc_hours(window, hours):
    assert hours_of_window(window, NOW) == hours


@pytest.mark.parametrize(
    "window",
    ["0h", "0d", "24", "h", "-1h", "1w", "1.5h", "TODAY", "٣h", "1234567h", ",", "today,", "x,y"]
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
    from vllm_cost_meter.ledger.cut import Window

    low, high = hours_of_window(window, NOW)
    assert low < high
    assert Window(low, high).as_dict()["from"] < Window(low, high).as_dict()["to"]
