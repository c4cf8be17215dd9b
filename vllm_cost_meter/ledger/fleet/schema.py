"""The tables of a fleet's database; `views.py` has the views that stand in place of a ledger's.

A sender only inserts, so senders never wait for one another. It needs no other right; one that may
update and delete tidies up (`tidying.py`).

- *Facts* (bills, replies, runs, ...) are in the ledger's own tables, or in `kept_` ones; one that
  is there stays.
- *States* (a run's totals) are told again and again, each time under its snapshot's number.
- *What runs* at a sender it tells with each shipment that brings the fleet up to its ledger, by
  run and owner. Budgets count it.
- *Sums* are sent as what they grew by. A row of `shipments` says which part of which sender's
  outbox it is; it can be inserted once. Older ones are added up under the number `FOLDED`.

A ledger that was copied, restored or merged joins anew under another name. Then two senders have
sums of one run. A run in `shared_runs` counts by one sender, the one with most of its bills. Sums
that are of no run count unless their sender is among `retired_senders`.

A sender may keep the rows of requests to itself (`senders.rows`): the fleet then has its sums, and
of its bills those that no snapshot counts yet, as a state of its own (`rows/rowless.py`).
PostgreSQL only.

Invariant: the amounts of one row of a sender's outbox are in one shipment.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Float,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Select,
    Table,
    Text,
    func,
    inspect,
    select,
    text,
)
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.fleet.changes import STATES, SUMS
from vllm_cost_meter.ledger.tables.base import KeyText
from vllm_cost_meter.units.time import rfc3339

FLEET_VERSION = 2
# Servers of an older version cannot send to these tables.
OLDEST_SENDER = 2
# A server sends at least so often. So whoever looks what came lately need not know who sends how.
INTERVAL_MAX_S = 10.0
# In `shipments.sent_at`, before the fleet ever had all that a ledger held.
NEVER = rfc3339(0)

# What `senders.rows` says of a sender that sends the rows of requests here.
WITH_ROWS = "fleet"

fleet_metadata = MetaData()

fleet_version = Table(
    "fleet_version",
    fleet_metadata,
    Column("version", BigInteger, primary_key=True),
    Column("oldest_sender", BigInteger, nullable=False),
)

# Each ledger that sends, under each name that it has had.
senders = Table(
    "senders",
    fleet_metadata,
    Column("sender_id", KeyText, primary_key=True),
    Column("host", Text, nullable=False),
    Column("meter_version", Text, nullable=False),
    Column("joined_at", KeyText, nullable=False),
    # Where the rows of its requests go: "fleet", "files" or "none".
    Column("rows", Text, nullable=False),
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
    # Until then the fleet has with it all that the ledger held: the instant of sending, or, if more
    # waited, what the shipment before says. By the clock of the sender.
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

# Up to which shipment the sums of a sender are added up.
folds = Table(
    "folds",
    fleet_metadata,
    Column("sender_id", KeyText, primary_key=True),
    Column("folded_number", BigInteger, nullable=False),
)

# The bills of a run that no snapshot counts yet, of a sender that sends no rows.
tails = Table(
    "tails",
    fleet_metadata,
    Column("sender_id", KeyText, primary_key=True),
    Column("run_id", KeyText, primary_key=True),
    # Of the shipment; the latest one counts.
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    # JSON: a list of rows of `requests`, and one of `usage_pieces`.
    Column("bills", Text, nullable=False),
    Column("pieces", Text, nullable=False),
)

# Whose the requests are that run, of a sender that sends no rows.
told_open_requests = Table(
    "told_open_requests",
    fleet_metadata,
    Column("sender_id", KeyText, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    # JSON: a list of rows of `open_requests`.
    Column("opened", Text, nullable=False),
)

# What runs at a sender's server: a JSON list of `fleet_use/running.py`. The highest number counts.
told_running = Table(
    "told_running",
    fleet_metadata,
    Column("sender_id", KeyText, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("content", Text, nullable=False),
)

# Bills that have no rows here: a ledger dropped those before they were sent (`rows/unsent.py`).
unsent_bills = Table(
    "unsent_bills",
    fleet_metadata,
    Column("run_id", KeyText, primary_key=True),
    # Their numbers, both in it.
    Column("first_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("last_seq", BigInteger, primary_key=True, autoincrement=False),
    # The machine of the ledger, and from which hour on it has rows.
    Column("host", Text, nullable=False),
    Column("kept_from_hour", Integer, nullable=False),
    Column("noticed_at", KeyText, nullable=False),
)

_OF_SHIPMENT = ("sender_id", "first_number")
# In place of a shipment's number: sums of many shipments.
FOLDED = -1


def latest_shipment(
    sender_id: ColumnElement[str] | str, *columns: ColumnElement[Any]
) -> Select[Any]:
    """Return the query of columns of a sender's last shipment: one look into the key's index."""
    c = shipments.c
    asked = select(*columns).where(c.sender_id == sender_id)
    return asked.order_by(c.first_number.desc()).limit(1)


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
        *(_index_of_new(table) if table is schema.rollup_hours else ()),
    )


def _index_of_new(table: Table) -> list[Index]:
    """Return the index of what is not added up yet: days are made of it at each question."""
    is_new = text(f"first_number > {FOLDED}")
    return [Index(f"ix_{sent_name(table)}_new", "first_number", postgresql_where=is_new)]


def kept_name(table: Table) -> str:
    """Return the name of the table with the rows of a ledger's table that senders have sent."""
    return f"kept_{table.name}"


# By the name of the ledger's table.
TOLD = {table.name: _told(table) for table in STATES}
SENT_SUMS = {table.name: _sent(table) for table in SUMS}
KEPT_ROWS = {
    table.name: table.to_metadata(fleet_metadata, name=kept_name(table))
    for table in (
        *(schema.requests, schema.usage_pieces, schema.request_energy, schema.open_requests),
        *(schema.row_cutoffs, schema.dropped_bills, schema.dropped_unknown_energy),
    )
}
# Of the shipments that are added up, by day.
FOLDED_DAYS = _sent(schema.rollup_days)
_VIEWED = {*TOLD, *SENT_SUMS, *KEPT_ROWS, schema.rollup_days.name}
# The ledger's tables that a fleet's database has as they are.
KEPT = [table for table in schema.metadata.sorted_tables if table.name not in _VIEWED]


def has_fleet(connection: Connection) -> bool:
    """Return whether a database is a fleet's."""
    return inspect(connection).has_table(fleet_version.name)
