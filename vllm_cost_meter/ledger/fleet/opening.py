"""Open a fleet's database: make its tables in an empty one, and refuse what is none of ours.

Invariant: a process has one connection to it, and keeps nothing in its session.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine, text
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import SQLAlchemyError

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.connections.postgresql import postgresql_engine
from vllm_cost_meter.ledger.database import cause_of, parse_url
from vllm_cost_meter.ledger.fleet.migrating import migrate
from vllm_cost_meter.ledger.fleet.schema import FLEET_VERSION, has_fleet
from vllm_cost_meter.ledger.fleet.shared_settings import SharedStore
from vllm_cost_meter.ledger.schema import schema_version

_CONNECT_TIMEOUT_S = 10
# "fleet": a number of our own among PostgreSQL's locks.
_SCHEMA_LOCK = 0x666C656574


def parse_fleet_url(url: str) -> URL:
    """Return a fleet's URL. Raises LedgerError unless it is one of PostgreSQL."""
    parsed = parse_url(url)
    if parsed.get_backend_name() != "postgresql":
        shown = parsed.render_as_string(hide_password=True)
        raise LedgerError(
            f"fleet {shown}: expected a PostgreSQL database, such as"
            " postgresql+psycopg://user@host/name"
        )
    return parsed


def shown_url(url: URL) -> str:
    """Return a URL without its password."""
    return url.render_as_string(hide_password=True)


def failed(url: URL, error: SQLAlchemyError) -> LedgerError:
    """Return the error of a fleet's database, without its password."""
    return LedgerError(f"fleet {shown_url(url)}: {cause_of(error)}")


def fleet_there(url: str | URL) -> bool:
    """Return whether a fleet's database has its tables; False if it is empty. Changes nothing.

    Raises LedgerError if it cannot be opened, is a ledger, or is of another version.
    """
    parsed = parse_fleet_url(url) if isinstance(url, str) else url
    shown = shown_url(parsed)
    engine = fleet_engine(parsed)
    try:
        with engine.connect() as connection:
            is_there = has_fleet(connection)
            if is_there:
                check_version(connection, shown)
            else:
                refuse_ledger(connection, shown)
    except SQLAlchemyError as error:
        raise failed(parsed, error) from error
    finally:
        engine.dispose()
    return is_there


@contextmanager
def shared_store(url: str, *, creates: bool = False) -> Iterator[SharedStore]:
    """Open the shared settings of a fleet; with `creates` an empty database gets its tables.

    Raises LedgerError unless it is the database of a fleet.
    """
    parsed = parse_fleet_url(url)
    engine = open_fleet(parsed) if creates else fleet_engine(parsed)
    try:
        yield store_in(parsed, engine)
    finally:
        engine.dispose()


def store_in(url: URL, engine: Engine) -> SharedStore:
    """Return the shared settings of a fleet's database."""
    return SharedStore(engine, functools.partial(failed, url))


def fleet_name(url: str) -> str:
    """Return which database a fleet's is, whoever asks it and with which options."""
    parsed = parse_fleet_url(url)
    host = parsed.host or parsed.query.get("host") or ""
    return f"{host}:{parsed.port or parsed.query.get('port') or ''}/{parsed.database or ''}"


def fleet_engine(url: URL) -> Engine:
    """Return an engine with one connection, which is opened when it is needed."""
    timeout = {"connect_timeout": _CONNECT_TIMEOUT_S}
    return postgresql_engine(
        url, pool_size=1, max_overflow=0, pool_pre_ping=True, connect_args=timeout
    )


def open_fleet(url: URL) -> Engine:
    """Open a fleet's database with one connection; an empty database gets its tables.

    Raises LedgerError if it cannot be opened, is a ledger, or is of another version.
    """
    engine = fleet_engine(url)
    try:
        with engine.begin() as connection:
            _ensure_fleet(connection, shown_url(url))
    except SQLAlchemyError as error:
        engine.dispose()
        raise failed(url, error) from error
    except BaseException:
        engine.dispose()
        raise
    return engine


def open_to_follow(url: URL) -> Engine:
    """Open a fleet's database that is there, with one connection, to read it again and again.

    Raises LedgerError if it cannot be opened, has no tables yet, or is of another version.
    """
    if not fleet_there(url):
        raise LedgerError(
            f"fleet {shown_url(url)}: expected its tables, got an empty database; the first server"
            " that sends makes them",
            is_missing=True,
        )
    return fleet_engine(url)


def _ensure_fleet(connection: Connection, shown: str) -> None:
    if not has_fleet(connection):
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SCHEMA_LOCK})
    if not has_fleet(connection):
        refuse_ledger(connection, shown)
        migrate(connection)
    check_version(connection, shown)


def refuse_ledger(connection: Connection, shown: str) -> None:
    """Raise LedgerError if a database has a ledger."""
    if connection.dialect.has_table(connection, schema_version.name):
        raise LedgerError(
            f"fleet {shown}: expected an empty database or a fleet's, got one with a ledger;"
            " name another database"
        )


def check_version(connection: Connection, shown: str) -> None:
    """Raise LedgerError unless a server of this version may send to these tables."""
    found = connection.exec_driver_sql("SELECT * FROM fleet_version").mappings().one()
    version, oldest = found["version"], found.get("oldest_sender", found["version"])
    if version < FLEET_VERSION:
        raise LedgerError(
            f"fleet {shown}: expected tables of version {FLEET_VERSION}, got version {version}; an"
            " administrator runs `vllm-cost-meter fleet migrate`, and then everything is sent"
        )
    if oldest > FLEET_VERSION:
        raise LedgerError(
            f"fleet {shown}: expected tables that version {FLEET_VERSION} can send to, got version"
            f" {version}; upgrade vllm-cost-meter, and then everything is sent"
        )
