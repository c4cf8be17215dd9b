"""Bring all that a ledger holds to the fleet: when it joins, and when it was restored or merged.

Bills and replies come first, some thousand at a time: they have keys, so they may come twice, and
they change no sum. Then one transaction brings the sums and the latest totals as they are at one
instant of the ledger, with the bills and replies that came in the meantime, and from then on the
sender counts. What the ledger gets after that instant is in its outbox, behind it.

Invariant: the sums that count for a ledger are those that it had when its last join ended, and what
its outbox brought since.
"""

from collections.abc import Collection, Iterator

from sqlalchemy import Table, select, tuple_
from sqlalchemy.engine import Connection, Engine

from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.fleet.changes import STATES, SUMS, TableRows, unpacked
from vllm_cost_meter.ledger.fleet.shipment import FACT_TABLES, OF_FIRST_JOINING
from vllm_cost_meter.ledger.tables.outbox import outbox

# Tables with a row for each request.
_LARGE = (
    *(schema.requests, schema.usage_pieces, schema.http_requests, schema.request_energy),
    schema.open_requests,
)
_ROWS_AT_ONCE = 2_000


def large_facts(ledger: Engine) -> Iterator[TableRows]:
    """Yield the rows of bills and replies, in the order of their keys, some thousand at a time."""
    for table in _LARGE:
        yield from _chunks(ledger, table)


def _chunks(ledger: Engine, table: Table) -> Iterator[TableRows]:
    keys = list(table.primary_key)
    places = [list(table.c).index(key) for key in keys]
    after: tuple[object, ...] | None = None
    while True:
        asked = select(table).order_by(*keys).limit(_ROWS_AT_ONCE)
        if after is not None:
            asked = asked.where(tuple_(*keys) > after)
        with ledger.connect() as connection:
            rows = [tuple(row) for row in connection.execute(asked)]
        if rows:
            yield TableRows(table.name, tuple(table.c.keys()), rows)
        if len(rows) < _ROWS_AT_ONCE:
            return
        after = tuple(rows[-1][place] for place in places)


def large_facts_since(connection: Connection) -> Iterator[TableRows]:
    """Yield the rows of bills and replies that the ledger got since its sender began.

    They may have come behind the place where `large_facts` was.
    """
    names = {table.name for table in _LARGE}
    for content in connection.execute(select(outbox.c.content)).scalars():
        yield from (each for each in unpacked(content) if each.table in names)


def all_else(
    connection: Connection, *, is_first: bool, left_out: Collection[str] = ()
) -> Iterator[TableRows]:
    """Yield the rows of all other tables that are sent, from the connection's transaction.

    A ledger that joins for the first time says which rows it had dropped before: of those that it
    dropped since, the fleet has the rows. The tables named `left_out` are not sent.
    """
    others = () if is_first else OF_FIRST_JOINING
    small = [
        table
        for table in FACT_TABLES.values()
        if table not in (*_LARGE, *others) and table.name not in left_out
    ]
    for table in (*small, *STATES, *SUMS):
        rows = connection.execution_options(yield_per=_ROWS_AT_ONCE).execute(select(table))
        for some in rows.partitions():
            yield TableRows(table.name, tuple(table.c.keys()), [tuple(row) for row in some])
