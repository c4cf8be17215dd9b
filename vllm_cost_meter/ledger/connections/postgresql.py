"""How the meter connects to PostgreSQL, wherever it does.

A machine that lost its power, or a firewall that forgot a connection, closes nothing. Linux then
waits for two hours, and so did a sender, without a word in the log. So a peer that is silent for
half a minute is gone.

Invariant: what a URL says itself is left as it is.
"""

from typing import Any

from sqlalchemy import URL

# libpq's names. A query may take any time: the other machine's kernel answers meanwhile.
_PEER = {
    "keepalives_idle": 10,  # s without a word, before the first probe
    "keepalives_interval": 5,  # s between probes
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,  # ms that what was sent may be unanswered
}


def connect_options(url: URL) -> dict[str, Any]:
    """Return what the driver of a PostgreSQL URL is to be given beside the URL."""
    driver = url.get_driver_name()
    if driver == "pg8000":
        return {}  # It knows no parameters of libpq.
    options = {name: value for name, value in _PEER.items() if name not in url.query}
    # A pooler may give each transaction another session, which has none of the statements that
    # were prepared in the one before.
    return {**options, "prepare_threshold": None} if driver == "psycopg" else options
