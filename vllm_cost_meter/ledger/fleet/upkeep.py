"""What an administrator does to a fleet's database: make, migrate, partition and tidy its tables.

Invariant: none of it changes a figure.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from sqlalchemy import Engine
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from vllm_cost_meter.ledger.fleet.migrating import migrate
from vllm_cost_meter.ledger.fleet.opening import (
    check_version,
    failed,
    fleet_engine,
    parse_fleet_url,
    refuse_ledger,
    shown_url,
)
from vllm_cost_meter.ledger.fleet.rows.dropping import FleetDropper
from vllm_cost_meter.ledger.fleet.rows.partitions import (
    PARTITIONED,
    drop_empty,
    is_partitioned,
    make_partitions,
    partition,
)
from vllm_cost_meter.ledger.fleet.schema import FLEET_VERSION, has_fleet
from vllm_cost_meter.ledger.fleet.tidying import (
    forget_billed,
    forget_older_states,
    sender_ids,
    tidy_sender,
)
from vllm_cost_meter.ledger.retention.dropping import DroppedCounts, all_of
from vllm_cost_meter.units.calendar import HOURS_PER_DAY

_DAY_S = 86_400


class Tidied(NamedTuple):
    """Of how many ledgers tables were tidied, and how many rows of requests were dropped."""

    senders: int
    dropped: DroppedCounts


def migrate_fleet(url: str, *, by_day: bool = False) -> tuple[int | None, int]:
    """Bring a fleet's tables to this version; return their version before, and now.

    The version before is None for an empty database, which gets the tables. `by_day` is whether
    the rows of requests go into partitions by day, if they are in none yet. Raises LedgerError.
    """
    with _administered(url) as engine, engine.begin() as connection:
        before = _version(connection) if has_fleet(connection) else None
        if before is None:
            refuse_ledger(connection, shown_url(parse_fleet_url(url)))
        if before is None or before < FLEET_VERSION:
            migrate(connection)
        if by_day and not is_partitioned(connection):
            partition(connection)
            for each in PARTITIONED:
                make_partitions(connection, each, _today(connection))
        return before, _version(connection)


def tidy_fleet(url: str, keep_rows_days: int | None = None) -> Tidied:
    """Tidy what all ledgers have sent to a fleet. Raises LedgerError.

    Of the rows of requests those of today and of `keep_rows_days` days before it (UTC) stay, at
    least one; None keeps all. Each sender has a transaction of its own: while it is tidied, it
    waits to send.
    """
    with _administered(url) as engine:
        with engine.begin() as connection:
            check_version(connection, shown_url(parse_fleet_url(url)))
            known, today = sender_ids(connection), _today(connection)
        for sender_id in known:
            with engine.begin() as connection:
                tidy_sender(connection, sender_id)
        with engine.begin() as connection:
            forget_older_states(connection)
            forget_billed(connection)
        with engine.connect() as connection:
            tables = PARTITIONED if is_partitioned(connection) else ()
        for each in tables:
            with engine.begin() as connection:
                make_partitions(connection, each, today)
        if keep_rows_days is None:
            return Tidied(len(known), DroppedCounts())
        before_hour = (today - keep_rows_days) * HOURS_PER_DAY
        counts = all_of(FleetDropper.of(engine, before_hour).steps())
        for each in tables:
            with engine.begin() as connection:
                drop_empty(connection, each, before_hour)
        return Tidied(len(known), counts)


def _today(connection: Connection) -> int:
    """Return the UTC day by the database's clock, counted since the epoch."""
    seconds = connection.exec_driver_sql("SELECT EXTRACT(EPOCH FROM clock_timestamp())")
    return int(seconds.scalar_one() // _DAY_S)


@contextmanager
def _administered(url: str) -> Iterator[Engine]:
    """Open a fleet's database for an administrator."""
    parsed = parse_fleet_url(url)
    engine = fleet_engine(parsed)
    try:
        yield engine
    except SQLAlchemyError as error:
        raise failed(parsed, error) from error
    finally:
        engine.dispose()


def _version(connection: Connection) -> int:
    return int(connection.exec_driver_sql("SELECT version FROM fleet_version").scalar_one())
