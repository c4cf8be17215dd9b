"""How the meter connects to PostgreSQL, wherever it does.

A machine that lost its power, or a firewall that forgot a connection, closes nothing. Linux then
waits for two hours, and so did a sender, without a word in the log. So a peer that is silent for
half a minute is gone.

A view of a fleet is a large query, and PostgreSQL takes it for an expensive one: to compile it
takes half a minute, and to run it a tenth of a second. So nothing is compiled.

Invariant: what a URL says itself is left as it is.
"""

from typing import Any

from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.engine import Connection

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


def postgresql_engine(url: URL, **options: Any) -> Engine:
    """Return an engine for a PostgreSQL URL; `options` are those of `create_engine`."""
    arguments = {**connect_options(url), **options.pop("connect_args", {})}
    engine = create_engine(url, connect_args=arguments, **options)
    event.listen(engine, "begin", _without_compiler)
    return engine


def _without_compiler(connection: Connection) -> None:
    # For this transaction alone: a pooler gives the next one another session.
    connection.exec_driver_sql("SET LOCAL jit = off")
