"""Report windows and calendar periods: words such as `lastmonth` become whole UTC hours.

The ledger keeps usage by UTC hour, so a window is widened to whole hours: exact figures are worth
more than the odd minutes. The words are OpenCost's, and so is the week, which begins on Sunday.
Days, weeks and months follow a time zone: an hour belongs to the local day in which it begins. In a
zone that is off by half an hour, the first half hour of a day therefore counts to the day before.

Invariant: the hours returned are half-open, `from_hour <= hour < to_hour`, and not empty. The
periods of one unit follow each other without a gap, so each hour is in exactly one day and month.
"""

import re
import time
from datetime import UTC, date, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import Literal
from zoneinfo import ZoneInfo

from vllm_cost_meter.units.text import quoted
from vllm_cost_meter.units.time import NS_PER_HOUR, unix_ns_of

HOURS_PER_DAY = 24
# RFC 3339 can write these hours only: 0001-01-01T00Z to 9999-12-31T23Z.
FIRST_HOUR = -17_259_888
LAST_HOUR = 70_389_527
Unit = Literal["hour", "day", "week", "month"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_HOUR = timedelta(hours=1)
_DAY = timedelta(days=1)
_LENGTH = re.compile(r"(\d{1,6})([mhd])\Z", re.ASCII)
_MONTH = re.compile(r"(\d{4})-(\d{2})\Z", re.ASCII)
# Each word means a unit, and how many units ago.
_WORDS: dict[str, tuple[Unit, int]] = {
    "today": ("day", 0),
    "yesterday": ("day", 1),
    "week": ("week", 0),
    "lastweek": ("week", 1),
    "month": ("month", 0),
    "lastmonth": ("month", 1),
}
# The default window of economics: the trailing week.
WEEK = "7d"
EXPECTED = (
    f"{', '.join(_WORDS)}, a month such as 2026-11, a length such as 30m, 24h or 7d, or two "
    "RFC 3339 instants with a comma"
)


def zone_of(name: str | None) -> tzinfo:
    """Return the time zone with an IANA name, UTC without a name. Raises ValueError if unknown."""
    if name is None or name in ("", "UTC"):
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(
            f"tz: expected the name of a time zone, such as Europe/Berlin, got {quoted(name)}"
        ) from None


def hours_of_window(
    window: str | None, now_ns: int | None = None, zone: tzinfo = UTC
) -> tuple[int | None, int | None]:
    """Return a window's (first hour, hour after the last), in hours since the epoch.

    No window gives (None, None), which means all hours. Words such as `today` and lengths such as
    `24h` count back from `now_ns`; its default is the present. Raises ValueError for a text that
    is not a window.
    """
    if window is None or window == "":
        return None, None
    now_ns = time.time_ns() if now_ns is None else now_ns
    if window in _WORDS:
        unit, ago = _WORDS[window]
        today = (_EPOCH + timedelta(microseconds=now_ns // 1000)).astimezone(zone).date()
        start = _start(today, unit)
        for _ in range(ago):
            start = _start(start - _DAY, unit)
        return _hours_of_days(start, unit, zone)
    if match := _LENGTH.match(window):
        hours = -(-int(match[1]) * {"m": 1, "h": 60, "d": 60 * HOURS_PER_DAY}[match[2]] // 60)
        if hours < 1:
            raise ValueError(f"window: expected at least one hour, got {quoted(window)}")
        now_hour = now_ns // NS_PER_HOUR
        return max(now_hour + 1 - hours, FIRST_HOUR), now_hour + 1
    if first := _first_of_month(window):
        return _hours_of_days(first, "month", zone)
    return _hours_between(window)


def month_hours(month: str, zone: tzinfo = UTC) -> tuple[int, int]:
    """Return the (first hour, hour after the last) in a month such as 2026-11.

    Raises ValueError for a text that is not a month.
    """
    first = _first_of_month(month)
    if first is None:
        raise ValueError(f"month: expected a month such as 2026-11, got {quoted(month)}")
    return _hours_of_days(first, "month", zone)


def period_of(hour: int, unit: Unit, zone: tzinfo = UTC) -> tuple[int, int]:
    """Return the local period that contains an hour: its (first hour, hour after the last)."""
    if unit == "hour":
        return hour, hour + 1
    return _hours_of_days(_start(_day_of(hour, zone), unit), unit, zone)


def period_name(hour: int, unit: Unit, zone: tzinfo = UTC) -> str:
    """Return the name of the local period that contains an hour.

    An hour is named by its RFC 3339 beginning, a day as 2026-11-24, a week by its first day, and a
    month as 2026-11.
    """
    if unit == "hour":
        return (_EPOCH + hour * _HOUR).astimezone(zone).isoformat().replace("+00:00", "Z")
    day = _start(_day_of(hour, zone), unit)
    return day.isoformat()[:7] if unit == "month" else day.isoformat()


@lru_cache(maxsize=10_000)
def _day_of(hour: int, zone: tzinfo) -> date:
    return (_EPOCH + hour * _HOUR).astimezone(zone).date()


def _first_of_month(text: str) -> date | None:
    match = _MONTH.match(text)
    try:
        return date(int(match[1]), int(match[2]), 1) if match else None
    except ValueError:
        return None


def _start(day: date, unit: Unit) -> date:
    """Return the first day in the period that contains a day."""
    if unit == "week":
        return day - _DAY * (day.isoweekday() % 7)
    return day.replace(day=1) if unit == "month" else day


@lru_cache(maxsize=10_000)
def _hours_of_days(start: date, unit: Unit, zone: tzinfo) -> tuple[int, int]:
    """Return the hours in the period that begins with a day."""
    try:
        # 31 days reach into the next month from every month, and never past it.
        end = _start(start + {"day": 1, "week": 7, "month": 31}[unit] * _DAY, unit)
    except OverflowError:
        return _first_hour(start, zone), LAST_HOUR
    return _first_hour(start, zone), _first_hour(end, zone)


def _first_hour(day: date, zone: tzinfo) -> int:
    """Return the first hour that begins in a local day, or the next hour if none does."""
    # If clocks go back over midnight, this is the first midnight; if they skip it, the jump.
    midnight = datetime(day.year, day.month, day.day, tzinfo=zone)
    return min(max(-((_EPOCH - midnight) // _HOUR), FIRST_HOUR), LAST_HOUR)


def _hours_between(window: str) -> tuple[int, int]:
    start, comma, end = window.partition(",")
    try:
        from_ns, to_ns = unix_ns_of(start.strip()), unix_ns_of(end.strip())
    except (ValueError, OverflowError):
        raise ValueError(f"window: expected {EXPECTED}, got {quoted(window)}") from None
    if to_ns <= from_ns:
        raise ValueError(f"window: expected its end after its start, got {quoted(window)}")
    from_hour = min(max(from_ns // NS_PER_HOUR, FIRST_HOUR), LAST_HOUR - 1)
    return from_hour, min(max(-(-to_ns // NS_PER_HOUR), from_hour + 1), LAST_HOUR)
