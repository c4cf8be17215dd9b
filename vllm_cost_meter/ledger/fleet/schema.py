"""The tables of a fleet's database, and the views that a ledger's reader finds in their place.

A sender only inserts, so senders never wait for one another. It needs no other right; one that may
delete removes states that it has told anew since.

- *Facts* (bills, replies, runs, ...) are in the ledger's own tables; one that is there stays.
- *States* (a run's totals) are told again and again, each time under its snapshot's number. The
  view of the table's name has the latest one.
- *Sums* are sent as what they grew by. A row of `shipments` says which part of which sender's
  outbox it is; it can be inserted once. The view adds up all shipments.

A ledger that was copied, restored or merged joins anew under another name. Then two senders have
sums of one run. A run in `shared_runs` counts by one sender, the one with most of its bills. Sums
that are of no run count unless their sender is among `retired_senders`.

So a `LedgerReader` answers from a fleet's database as from a ledger. PostgreSQL only.

Invariant: the amounts of one row of a sender's outbox are in one shipment.
"""

# ruff: noqa: S608 - only names of tables and columns are written into the SQL below
from collections.abc import Sequence

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Float,
    Index,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    func,
    inspect,
    text,
)
from sqlalchemy.engine import Connection

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.fleet.changes import STATES, SUMS
from vllm_cost_meter.ledger.migrations import MIGRATIONS
from vllm_cost_meter.ledger.migrations import Column as AddedColumn
from vllm_cost_meter.ledger.tables.base import KeyText
from vllm_cost_meter.ledger.tables.replies import create_views as create_replies
from vllm_cost_meter.ledger.tables.replies import drop_views as drop_replies
from vllm_cost_meter.units.calendar import HOURS_PER_DAY

FLEET_VERSION = 1
# The schema version of the first fleets.
FIRST_WITH_FLEET = 19
# A server sends at least so often. So whoever looks what came lately need not know who sends how.
INTERVAL_MAX_S = 10.0

fleet_metadata = MetaData()

fleet_version = Table(
    "fleet_version", fleet_metadata, Column("version", BigInteger, primary_key=True)
)

# Each ledger that sends, under each name that it has had.
senders = Table(
    "senders",
    fleet_metadata,
    Column("sender_id", KeyText, primary_key=True),
    Column("host", Text, nullable=False),
    Column("meter_version", Text, nullable=False),
    Column("joined_at", KeyText, nullable=False),
)

retired_senders = Table(
    "retired_senders",
    fleet_metadata,
    Column("sender_id", KeyText, primary_key=True),
    # The name under which the same ledger sends since.
    Column("successor_id", KeyText, nullable=False),
    Column("retired_at", KeyText, nullable=False),
)

# Runs of which several senders have sent sums.
shared_runs = Table("shared_runs", fleet_metadata, Column("run_id", KeyText, primary_key=True))

# Which senders have told of a run.
run_senders = Table(
    "run_senders",
    fleet_metadata,
    Column("run_id", KeyText, primary_key=True),
    Column("sender_id", KeyText, primary_key=True),
)

# A transaction of a sender: the rows of its outbox from the first to the last number.
shipments = Table(
    "shipments",
    fleet_metadata,
    Column("sender_id", KeyText, primary_key=True),
    Column("first_number", BigInteger, primary_key=True, autoincrement=False),
    Column("last_number", BigInteger, nullable=False),
    # Of the last row's content: a ledger that was copied or restored goes on otherwise.
    Column("last_digest", Text, nullable=False),
    Column("sent_at", KeyText, nullable=False),
    # By the clock of the database.
    Column("received_at", KeyText, nullable=False),
    # The next one comes so soon, if there is anything to send.
    Column("interval_s", Float, nullable=False),
)

# That a sender had nothing more to send when its server stopped.
sender_ends = Table(
    "sender_ends",
    fleet_metadata,
    Column("sender_id", KeyText, primary_key=True),
    Column("last_number", BigInteger, primary_key=True, autoincrement=False),
    Column("ended_at", KeyText, nullable=False),
)

_OF_SHIPMENT = ("sender_id", "first_number")


def now_text(earlier_s: float | ColumnElement[float] = 0.0) -> ColumnElement[str]:
    """Return the database's own instant, or one before it, as the ledger writes instants."""
    now = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, earlier_s)
    return func.to_char(func.timezone("UTC", now), 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')


def told_name(table: Table) -> str:
    """Return the name of the table with every state that was told of a ledger's table."""
    return f"told_{table.name}"


def sent_name(table: Table) -> str:
    """Return the name of the table with what a ledger's table of sums grew by."""
    return f"sent_{table.name}"


def _told(table: Table) -> Table:
    keys = [column.name for column in table.primary_key]
    return Table(
        told_name(table),
        fleet_metadata,
        *(Column(c.name, c.type, nullable=c.nullable) for c in table.c),
        # By the clock of the database: those of other machines may be off.
        Column("told_at", KeyText, server_default=now_text(), nullable=False),
        PrimaryKeyConstraint(*keys, "number"),
        # Which runs were told of lately.
        *([Index(f"ix_{told_name(table)}_told_at", "told_at")] if len(keys) == 1 else []),
    )


def _sent(table: Table) -> Table:
    keys = [column.name for column in table.primary_key]
    looked_up = [name for name in ("hour", "run_id") if name in table.c]
    return Table(
        sent_name(table),
        fleet_metadata,
        Column("sender_id", KeyText, nullable=False),
        Column("first_number", BigInteger, nullable=False),
        *(Column(c.name, c.type, nullable=c.nullable) for c in table.c),
        PrimaryKeyConstraint(*_OF_SHIPMENT, *keys),
        *(Index(f"ix_{sent_name(table)}_{name}", name) for name in looked_up),
    )


# By the name of the ledger's table.
TOLD = {table.name: _told(table) for table in STATES}
SENT_SUMS = {table.name: _sent(table) for table in SUMS}
_VIEWED = {*TOLD, *SENT_SUMS, schema.rollup_days.name}
# The ledger's tables that a fleet's database has as they are.
KEPT = [table for table in schema.metadata.sorted_tables if table.name not in _VIEWED]


def has_fleet(connection: Connection) -> bool:
    """Return whether a database is a fleet's."""
    return inspect(connection).has_table(fleet_version.name)


def create_fleet(connection: Connection) -> None:
    """Make the tables and views of a fleet in an empty database."""
    for table in KEPT:
        table.create(connection)
    fleet_metadata.create_all(connection)
    for statement in view_statements():
        connection.execute(text(statement))
    create_replies(connection)
    connection.execute(schema.schema_version.insert().values(version=schema.SCHEMA_VERSION))
    connection.execute(fleet_version.insert().values(version=FLEET_VERSION))


def upgrade_fleet(connection: Connection, found: int) -> None:
    """Bring the tables of a fleet from an earlier schema version to this one.

    Needs the right to change tables, as making them did.
    """
    drop_replies(connection)
    for name in _view_queries():
        connection.execute(text(f"DROP VIEW IF EXISTS {name} CASCADE"))
    steps = (
        step for version in range(found, schema.SCHEMA_VERSION) for step in MIGRATIONS[version]
    )
    for step in steps:
        if not isinstance(step, AddedColumn):
            raise LedgerError(
                f"fleet: expected one of schema version {FIRST_WITH_FLEET} or later, got {found}"
            )
        # Days are a view, of the hours.
        if step.table != schema.rollup_days.name:
            table = _table_in_fleet(step.table)
            added = f"ADD COLUMN IF NOT EXISTS {step.name} {step.kind}"
            connection.execute(text(f"ALTER TABLE {table} {added}"))
    for statement in view_statements():
        connection.execute(text(statement))
    create_replies(connection)
    connection.execute(schema.schema_version.update().values(version=schema.SCHEMA_VERSION))


def _table_in_fleet(name: str) -> str:
    """Return the table of a fleet's database that holds the rows of a ledger's table."""
    found = TOLD.get(name, SENT_SUMS.get(name))
    return name if found is None else found.name


def view_statements() -> list[str]:
    """Return the statements that make the views in place of a ledger's tables."""
    return [f"CREATE VIEW {name} AS {query}" for name, query in _view_queries().items()]


def _view_queries() -> dict[str, str]:
    return {
        "uncounted_runs": _uncounted_runs(),
        "uncounted_groups": (
            "SELECT uncounted_runs.sender_id, group_id FROM uncounted_runs"
            f" JOIN {schema.rollup_groups.name} USING (run_id)"
        ),
        **{name: _latest(schema.metadata.tables[name]) for name in TOLD},
        schema.rollup_hours.name: _of_groups([c.name for c in schema.rollup_hours.c]),
        schema.rollup_days.name: _days(),
        schema.rollup_latencies.name: _of_no_run(schema.rollup_latencies),
        schema.rollup_arrivals.name: _of_no_run(schema.rollup_arrivals),
        schema.bill_sums.name: _bill_sums(),
        schema.energy_sums.name: _energy_sums(),
    }


def _latest(table: Table) -> str:
    """Return the query of the latest state of each key: one look into the key's index for each."""
    told = told_name(table)
    keys = [column.name for column in table.primary_key]
    columns = ", ".join(f"latest.{column.name}" for column in table.c)
    same = " AND ".join(f"each.{key} = known.{key}" for key in keys)
    known = (
        f"SELECT {schema.runs.name}.run_id FROM {schema.runs.name}"
        if keys == ["run_id"]
        else f"SELECT DISTINCT {', '.join(keys)} FROM {told}"
    )
    return (
        f"SELECT {columns} FROM ({known}) AS known CROSS JOIN LATERAL ("
        f"SELECT * FROM {told} AS each WHERE {same} ORDER BY each.number DESC LIMIT 1) AS latest"
    )


def _uncounted_runs() -> str:
    """Return the query of the senders by which a shared run does not count."""
    of_each = (
        f"SELECT sender_id, run_id, SUM(bills) AS bills FROM {sent_name(schema.bill_sums)}"
        f" WHERE run_id IN (SELECT run_id FROM {shared_runs.name}) GROUP BY sender_id, run_id"
    )
    ranked = (
        "SELECT sender_id, run_id, RANK() OVER (PARTITION BY run_id ORDER BY bills DESC,"
        f" sender_id) AS place FROM ({of_each}) AS of_each"
    )
    return f"SELECT sender_id, run_id FROM ({ranked}) AS ranked WHERE place > 1"


def _of_groups(columns: Sequence[str]) -> str:
    """Return the query of the sums by hour and group that count."""
    return (
        f"SELECT {', '.join(columns)} FROM {sent_name(schema.rollup_hours)}"
        " WHERE (sender_id, group_id) NOT IN (SELECT sender_id, group_id FROM uncounted_groups)"
    )


def _of_runs(table: Table, columns: Sequence[str]) -> str:
    """Return the query of the sums by run that count, added up by run."""
    return (
        f"SELECT {', '.join(columns)} FROM {sent_name(table)}"
        " WHERE (sender_id, run_id) NOT IN (SELECT sender_id, run_id FROM uncounted_runs)"
        " GROUP BY run_id"
    )


def _of_no_run(table: Table) -> str:
    """Return the query of the sums that are of no run and count."""
    return (
        f"SELECT {', '.join(table.c.keys())} FROM {sent_name(table)}"
        f" WHERE sender_id NOT IN (SELECT sender_id FROM {retired_senders.name})"
    )


def _days() -> str:
    amounts = [c.name for c in schema.rollup_hours.c if not c.primary_key]
    used = " OR ".join(f"{name} <> 0" for name in schema.SUMMED_AMOUNTS)
    columns = [
        f"hour / {HOURS_PER_DAY} AS day",
        "group_id",
        f"CASE WHEN {used} THEN hour END AS first_hour",
        *amounts,
    ]
    return _of_groups(columns)


def _bill_sums() -> str:
    columns = [
        "run_id",
        "CAST(SUM(bills) AS BIGINT) AS bills",
        "MAX(last_seq) AS last_seq",
        "CAST(SUM(gpu_time_ns) AS BIGINT) AS gpu_time_ns",
        # Two digests add up modulo 2^62.
        f"CAST(MOD(SUM(digest), {1 << 62}) AS BIGINT) AS digest",
        "MIN(method) AS method",
        "MIN(started_at) AS started_at",
        "MAX(finished_at) AS finished_at",
    ]
    return _of_runs(schema.bill_sums, columns)


def _energy_sums() -> str:
    total = "CAST(SUM(energy_mj) AS BIGINT) AS energy_mj"
    return _of_runs(schema.energy_sums, ["run_id", total])
