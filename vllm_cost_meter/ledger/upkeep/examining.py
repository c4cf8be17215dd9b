"""Look at a ledger as a server would use it, and leave it as it was.

Nothing tells better whether a row can be written than writing it. So a row of each table is written
and taken back, in one transaction that is never committed. A write that is taken back does not
reach the disk, so the free bytes are looked at too.

Invariant: the ledger's files are the same before and after, to the byte.
"""

import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    Engine,
    Float,
    Integer,
    LargeBinary,
    create_engine,
    insert,
    text,
)
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.connections.postgresql import postgresql_engine
from vllm_cost_meter.ledger.database import cause_of, parse_url, recorded_version, sqlite_path
from vllm_cost_meter.ledger.faults import is_busy
from vllm_cost_meter.ledger.schema import metadata
from vllm_cost_meter.ledger.tables.packed import InstantColumn
from vllm_cost_meter.ledger.untouched import connect_by_uri, connect_to_read, has_log
from vllm_cost_meter.ledger.upkeep.copies import faults
from vllm_cost_meter.ledger.upkeep.sqlite_files import (
    BUSY_TIMEOUT_S,
    interrupted_after,
    sqlite_errors,
)


@dataclass(frozen=True, slots=True)
class WriteTrial:
    """Whether rows could be written: why not, and whether only others held the ledger."""

    refused: str | None = None
    is_busy: bool = False


def version_in(url: str) -> int | None:
    """Return the version of an existing ledger's schema; None if it has none. Raises LedgerError.

    Any version is fine, whatever this cost meter knows.
    """
    engine = _engine(url, BUSY_TIMEOUT_S, writes=False)
    try:
        return recorded_version(engine)
    except SQLAlchemyError as error:
        shown = engine.url.render_as_string(hide_password=True)
        raise LedgerError(f"ledger {shown}: cannot be read: {cause_of(error)}") from error


def try_writing(url: str, busy_timeout_s: float) -> WriteTrial:
    """Write a row into each table of an existing ledger of this version, and take it back."""
    trial = _tried(url, busy_timeout_s)
    # Others may have been at work on it for a moment.
    return _tried(url, busy_timeout_s) if trial.is_busy else trial


def _tried(url: str, busy_timeout_s: float) -> WriteTrial:
    engine = _engine(url, busy_timeout_s, writes=True)
    try:
        with _log_kept(url), engine.connect() as connection:
            _write_rows(connection, busy_timeout_s)
    except SQLAlchemyError as error:
        return WriteTrial(cause_of(error), isinstance(error, DBAPIError) and is_busy(error))
    finally:
        engine.dispose()
    return WriteTrial()


def damage_of(path: Path, limit_s: float) -> list[str] | None:
    """Return what SQLite finds wrong with a file's pages; None if that takes longer than a limit.

    Pages of indexes are not read. Raises LedgerError.
    """
    with (
        sqlite_errors(path, "read"),
        closing(connect_to_read(path, BUSY_TIMEOUT_S)) as connection,
        interrupted_after(connection, limit_s) as cut_short,
    ):
        try:
            found = faults(connection, full=False)
        except sqlite3.OperationalError:
            if not cut_short.is_set():
                raise
    return None if cut_short.is_set() else found


def _engine(url: str, busy_timeout_s: float, *, writes: bool) -> Engine:
    parsed = parse_url(url)
    path = sqlite_path(parsed)
    if path is None:
        return postgresql_engine(parsed, poolclass=NullPool)
    real = path.resolve()

    def connect() -> Any:
        if writes:
            return connect_by_uri(real, "rw", busy_timeout_s)
        return connect_to_read(real, busy_timeout_s)

    return create_engine(parsed, creator=connect, poolclass=NullPool)


@contextmanager
def _log_kept(url: str) -> Iterator[None]:
    """Keep the log that a killed server left: the last one that may write would take it up."""
    path = sqlite_path(parse_url(url))
    with ExitStack() as stack:
        if path is not None and has_log(path.resolve()):
            reader = stack.enter_context(closing(connect_to_read(path, BUSY_TIMEOUT_S)))
            # With a transaction open nobody can be the last one.
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM sqlite_master").fetchone()
        yield


def _write_rows(connection: Connection, busy_timeout_s: float) -> None:
    """Write a row of each table. Whoever closes the connection takes them back."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.execute(text(f"SET LOCAL lock_timeout = {int(busy_timeout_s * 1000)}"))
    try:
        for table in metadata.sorted_tables:
            row = {column.name: _value(column) for column in table.c}
            connection.execute(insert(table).values(row))
    finally:
        connection.rollback()


def _value(column: Column[Any]) -> bool | int | float | str | bytes:
    """Return what no row of a ledger has in this column."""
    match column.type:
        case Boolean():
            return False
        case Integer() | InstantColumn():
            return -1
        case Float():
            return 0.0
        case LargeBinary():
            return b""
        case _:
            return f"doctor {secrets.token_hex(8)}"
