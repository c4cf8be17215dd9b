"""Keep the rows of requests of a fleet in partitions by UTC day, where an administrator wants that.

A day that was dropped then gives its disk space back at once, and indexes stay as small as a day.
What was in a table before is its default partition, as is a row of a day without a partition. Days
to come get theirs by tidying, so whoever sends needs no right to make one.

PostgreSQL wants the partition's column in each unique key. A bill says when it ended, and a piece
of it in which hour it is, so a row that comes again meets the one that is there.

Invariant: no answer depends on whether there are partitions.
"""

# ruff: noqa: S608 - only names of our own are written into the SQL below
from collections.abc import Iterator
from typing import NamedTuple

from sqlalchemy import Table, make_url, text
from sqlalchemy.engine import Connection
from sqlalchemy.schema import CreateIndex

from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.fleet.grants import grants_kept
from vllm_cost_meter.ledger.fleet.migrating import drop_views, make_views
from vllm_cost_meter.ledger.fleet.schema import KEPT_ROWS
from vllm_cost_meter.ledger.retention.dropping import date_of
from vllm_cost_meter.units.calendar import HOURS_PER_DAY
from vllm_cost_meter.units.time import NS_PER_HOUR, NS_PER_US

# Partitions are made for so many days to come.
DAYS_AHEAD = 7
_DAY_US = HOURS_PER_DAY * NS_PER_HOUR // NS_PER_US
_POSTGRESQL = make_url("postgresql+psycopg://").get_dialect()()
_NAMES = text(
    "SELECT child.relname FROM pg_inherits"
    " JOIN pg_class child ON child.oid = inhrelid JOIN pg_class parent ON parent.oid = inhparent"
    " WHERE parent.relname = :table AND parent.relnamespace = current_schema()::regnamespace"
)


class Partitioned(NamedTuple):
    """A table, the column that says in which partition a row is, and how much of it is a day."""

    table: Table
    column: str
    per_day: int

    @property
    def rest(self) -> str:
        """The name of the default partition."""
        return f"{self.table.name}_rest"

    def of_day(self, day: int) -> str:
        """Return the name of a day's partition; days are counted since the epoch."""
        return f"{self.table.name}_{date_of(day * HOURS_PER_DAY).replace('-', '')}"


PARTITIONED = (
    Partitioned(KEPT_ROWS[schema.requests.name], "finished_at", _DAY_US),
    Partitioned(KEPT_ROWS[schema.usage_pieces.name], "hour", HOURS_PER_DAY),
    Partitioned(KEPT_ROWS[schema.request_energy.name], "hour", HOURS_PER_DAY),
)


def is_partitioned(connection: Connection) -> bool:
    """Return whether a fleet's rows of requests are in partitions."""
    known = (_names(connection, each) for each in PARTITIONED)
    return any(names for names in known)


def partition(connection: Connection) -> None:
    """Put the rows of requests into partitions, within the connection's transaction.

    What is there stays in place, as the default partition. Nobody can read or send meanwhile: it
    takes as long as one index of each table. Needs the right of the tables' owner.
    """
    with grants_kept(connection):
        for statement in _statements():
            connection.exec_driver_sql(statement)


def partition_sql() -> str:
    """Return the statements that `partition` executes, but for rights: those are to be given."""
    return "".join(f"{statement};\n\n" for statement in _statements())


def _statements() -> list[str]:
    found: list[str] = []
    drop_views(found.append)
    for each in PARTITIONED:
        found.extend(_partitioning(each))
    make_views(found.append)
    return found


def _partitioning(each: Partitioned) -> Iterator[str]:
    table, name = each.table, each.table.name
    keys = [column.name for column in table.primary_key]
    key = ", ".join([*keys, *([] if each.column in keys else [each.column])])
    yield f"ALTER TABLE {name} RENAME TO {each.rest}"
    yield f"ALTER TABLE {each.rest} DROP CONSTRAINT {name}_pkey"
    yield f"ALTER TABLE {each.rest} ADD PRIMARY KEY ({key})"
    for index in sorted(table.indexes, key=lambda index: str(index.name)):
        yield f"ALTER INDEX {index.name} RENAME TO {str(index.name).replace('ix_', 'ix_rest_', 1)}"
    yield (
        f"CREATE TABLE {name} (LIKE {each.rest} INCLUDING DEFAULTS)"
        f" PARTITION BY RANGE ({each.column})"
    )
    yield f"ALTER TABLE {name} ADD CONSTRAINT {name}_pkey PRIMARY KEY ({key})"
    for index in sorted(table.indexes, key=lambda index: str(index.name)):
        yield str(CreateIndex(index).compile(dialect=_POSTGRESQL))
    yield f"ALTER TABLE {name} ATTACH PARTITION {each.rest} DEFAULT"


def make_partitions(connection: Connection, each: Partitioned, today: int) -> None:
    """Make a table's partitions of a day and of those after it, within the transaction.

    Whoever locked several tables in one transaction could wait for a sender that waits for it.

    Days are counted since the epoch. Rows of them that came before are moved. Needs the right of
    the tables' owner.
    """
    known = _names(connection, each)
    for day in range(today, today + DAYS_AHEAD + 1):
        if each.of_day(day) not in known:
            _make(connection, each, day)


def _make(connection: Connection, each: Partitioned, day: int) -> None:
    name, table = each.of_day(day), each.table.name
    first, end = day * each.per_day, (day + 1) * each.per_day
    for statement in (
        # In the order in which an insert takes them.
        f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE",
        f"CREATE TABLE {name} (LIKE {table} INCLUDING DEFAULTS)",
        f"WITH moved AS (DELETE FROM {each.rest} WHERE {each.column} >= {first}"
        f" AND {each.column} < {end} RETURNING *) INSERT INTO {name} SELECT * FROM moved",
        f"ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES FROM ({first}) TO ({end})",
    ):
        connection.exec_driver_sql(statement)


def drop_empty(connection: Connection, each: Partitioned, before_hour: int) -> None:
    """Drop a table's partitions of days before an hour in which no row is left.

    Needs the right of the tables' owner. Raises what the database raises if others use them for
    long; the transaction is then undone, and the next time is early enough.
    """
    connection.exec_driver_sql("SET LOCAL lock_timeout = '2s'")
    last = each.of_day(before_hour // HOURS_PER_DAY - 1)
    for name in sorted(_names(connection, each) - {each.rest}):
        if name <= last:
            connection.exec_driver_sql(f"LOCK TABLE {name} IN ACCESS EXCLUSIVE MODE")
            is_empty = f"SELECT NOT EXISTS (SELECT 1 FROM {name})"
            if connection.exec_driver_sql(is_empty).scalar_one():
                connection.exec_driver_sql(f"DROP TABLE {name}")


def _names(connection: Connection, each: Partitioned) -> set[str]:
    return set(connection.execute(_NAMES, {"table": each.table.name}).scalars())
