"""Windows of a report: from the words people type to whole UTC hours.

Usage is kept by UTC hour, so a window is widened to whole hours; that figures are exact for it is
worth more than the odd minutes. Core: standard library only.

Invariant: the hours returned are half-open, `from_hour <= hour < to_hour`, and not empty.
"""

import re
import time

from vllm_cost_meter.records import NS_PER_HOUR, unix_ns_of

HOURS_PER_DAY = 24
# The hours that RFC 3339 can write: 0001-01-01T00Z to 9999-12-31T23Z.
FIRST_HOUR = -17_259_888
LAST_HOUR = 70_389_527
_LENGTH = re.compile(r"(\d{1,6})([hd])\Z", re.ASCII)
EXPECTED = "today, yesterday, a length such as 24h or 7d, or two RFC 3339 instants with a comma"


def hours_of_window(window: str | None, now_ns: int | None = None) -> tuple[int | None, int | None]:
    """Return a window's (first hour, hour after the last), hours since the epoch.

    (None, None) without a window: everything. Raises ValueError for what is not a window.
    """
    if window is None or window == "":
        return None, None
    now_hour = (time.time_ns() if now_ns is None else now_ns) // NS_PER_HOUR
    midnight = now_hour - now_hour % HOURS_PER_DAY
    if window == "today":
        return midnight, midnight + HOURS_PER_DAY
    if window == "yesterday":
        return midnight - HOURS_PER_DAY, midnight
    if match := _LENGTH.match(window):
        hours = int(match[1]) * (HOURS_PER_DAY if match[2] == "d" else 1)
        if hours < 1:
            raise ValueError(f"window: expected at least one hour, got {window!r}")
        return max(now_hour + 1 - hours, FIRST_HOUR), now_hour + 1
    return _hours_between(window)


def _hours_between(window: str) -> tuple[int, int]:
    start, comma, end = window.partition(",")
    try:
        from_ns, to_ns = unix_ns_of(start.strip()), unix_ns_of(end.strip())
    except (ValueError, OverflowError):
        raise ValueError(f"window: expected {EXPECTED}, got {window!r}") from None
    if to_ns <= from_ns:
        raise ValueError(f"window: expected its end after its start, got {window!r}")
    from_hour = min(max(from_ns // NS_PER_HOUR, FIRST_HOUR), LAST_HOUR - 1)
    return from_hour, min(max(-(-to_ns // NS_PER_HOUR), from_hour + 1), LAST_HOUR)
