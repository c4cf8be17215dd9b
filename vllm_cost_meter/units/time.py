"""Time as integer nanoseconds, and instants as RFC 3339 text.

Invariant: `unix_ns_of(rfc3339(ns))` is `ns` to the microsecond. The text has a fixed width, so text
order is time order.
"""

from datetime import UTC, datetime
from functools import lru_cache

NS_PER_SECOND = 1_000_000_000
NS_PER_MS = 1_000_000
NS_PER_US = 1_000
NS_PER_HOUR = 3_600 * NS_PER_SECOND
US_PER_HOUR = NS_PER_HOUR // NS_PER_US


def rfc3339(unix_ns: int) -> str:
    """Format a UTC instant given in nanoseconds since the epoch, with microseconds and `Z`.

    The width is fixed, so that text order is time order.
    """
    second, ns = divmod(unix_ns, NS_PER_SECOND)
    return f"{_second_text(second)}.{ns // 1000:06d}Z"


# A bill has two to six instants, and a busy ledger writes thousands of instants per second. Most
# of them fall into the same few seconds.
@lru_cache(maxsize=1024)
def _second_text(unix_s: int) -> str:
    # `strftime` would be slow, and does not pad the year.
    return datetime.fromtimestamp(unix_s, UTC).isoformat()[:19]


def instant_of(hour: int | None) -> str | None:
    """Return the RFC 3339 instant at which an hour since the epoch begins; None for None."""
    return None if hour is None else rfc3339(hour * NS_PER_HOUR)


def hour_text(hour: int) -> str:
    """Return an hour since the epoch for people to read, e.g. "2026-01-01T00Z"."""
    return f"{rfc3339(hour * NS_PER_HOUR)[:13]}Z"


def hour_of(instant: str) -> int:
    """Return the UTC hour, since the epoch, of an RFC 3339 instant. Raises as `unix_ns_of`."""
    return unix_ns_of(instant) // NS_PER_HOUR


def unix_ns_of(text: str) -> int:
    """Return an RFC 3339 instant as nanoseconds since the epoch.

    Raises ValueError for any other text, and for an instant without a time zone.
    """
    instant = datetime.fromisoformat(text)
    if instant.tzinfo is None:
        raise ValueError(
            f"expected an instant with a time zone, e.g. ending in Z, got {text[:200]!r}"
        )
    since_epoch = instant - datetime(1970, 1, 1, tzinfo=UTC)
    seconds = since_epoch.days * 86_400 + since_epoch.seconds
    return seconds * NS_PER_SECOND + since_epoch.microseconds * 1000
