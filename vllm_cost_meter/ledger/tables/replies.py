"""Where the row of an HTTP request is: beside its bill, or in a table of its own.

Nearly every HTTP request has one engine request, and says of it what the bill says: tenant, model,
tokens. So what it adds (status, times, what the client was told) stands in the row of that
bill in `requests`, and needs no second row with indexes of its own. One that comes with several
engine requests or none, one that says something else, and one whose bill came in an earlier batch
have a row in `http_requests`. A reply stays where it is when another bill of it comes later. The
view `replies` has all of them alike.

Invariant: an HTTP request has at most one row in `replies`, wherever its record went.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Dialect,
    MetaData,
    Table,
    and_,
    case,
    cast,
    delete,
    exists,
    func,
    literal,
    or_,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.schema import http_requests, requests

# What of its bill a client was told, as numbers that `reply_told` adds up.
TOLD_TOKENS = {"prompt_tokens": 1, "cached_tokens": 2, "output_tokens": 4}
# These may have been told in a coarser form, which then stands in a column of its own.
TOLD_AMOUNTS = {"gpu_time_ns": 8, "cost_nanousd": 16}
TOLD = {**TOLD_TOKENS, **TOLD_AMOUNTS}
# What a reply beside its bill has in common with it.
SHARED = ("response_id", "tenant", "tenant_rule", "tenant_above", "model", "route")
# Columns of a reply, and where they stand beside a bill.
_BESIDE = {
    "x_request_id": "x_request_id",
    "status": "reply_status",
    "streamed": "reply_streamed",
    "started_at": "reply_started_at",
    "finished_at": "ended_at",
}
# What a bill's row says of its reply; all but `ended_at` are NULL where it has none.
REPLY_COLUMNS = (
    *_BESIDE.values(),
    *("reply_told", "reply_gpu_time_ns", "reply_cost_nanousd"),
)

_h, _r = http_requests.c, requests.c


def _told(name: str) -> ColumnElement[Any]:
    # The cast has the type of the other table's column: SQLite looks into a view by its indexes
    # only if both sides agree.
    is_told = _r.reply_told.bitwise_and(TOLD[name]) != 0
    otherwise = _r[f"reply_{name}"] if name in TOLD_AMOUNTS else None
    return cast(case((is_told, _in_bill(name)), else_=otherwise), BigInteger)


def _in_bill(name: str, *, has_external: bool = True) -> ColumnElement[Any]:
    """Return the SQL for what a bill says of what its client is told."""
    if name == "cached_tokens" and has_external:
        # To its client vLLM calls cached what came over a KV connector too.
        return _r.cached_tokens + func.coalesce(_r.external_tokens, 0)
    return _r[name]


def _beside(name: str) -> ColumnElement[Any]:
    return (_told(name) if name in TOLD else _r[_BESIDE.get(name, name)]).label(name)


# The replies that stand beside their bills, with the columns of `http_requests`.
beside_bills = (
    select(*(_beside(name) for name in _h.keys()))  # noqa: SIM118 - no mapping
    .where(_r.reply_status.is_not(None))
    .subquery("beside_bills")
)
# All replies are in these two.
SOURCES = (http_requests, beside_bills)
# A view: not in the schema's list of tables, which is what can be written.
replies = Table(
    "replies",
    MetaData(),
    *(Column(column.name, column.type, primary_key=column.primary_key) for column in _h),
)


def drop_views(connection: Connection) -> None:
    """Drop the view, so that the tables below it can change."""
    connection.execute(text(f"DROP VIEW IF EXISTS {replies.name}"))


def create_views(connection: Connection) -> None:
    """Create the view over the tables of this version, in place of an older one."""
    drop_views(connection)
    connection.exec_driver_sql(view_statement(connection.dialect))


def view_statement(dialect: Dialect) -> str:
    """Return the statement that creates the view."""
    return f"CREATE VIEW {replies.name} AS {view_query(dialect)}"


def view_query(dialect: Dialect) -> str:
    """Return the query of the view."""
    both = union_all(*map(select, SOURCES))
    return str(both.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))


def is_replied(http_request_id: ColumnElement[Any]) -> ColumnElement[bool]:
    """Return the condition that an id is that of a reply. Each side is looked up by its index."""
    own, bill = http_requests.alias().c, requests.alias().c
    return or_(
        exists().where(own.http_request_id == http_request_id),
        exists().where(bill.http_request_id == http_request_id, bill.reply_status.is_not(None)),
    )


def put_beside_bills(connection: Connection, *, has_external: bool = True) -> None:
    """Move each reply beside its bill that has one alone and says what the bill says.

    Where records come one by one, `inserts.py` puts the reply there at once. `has_external` is
    False for bills that have no column yet for what came over a KV connector.
    """
    in_bill = {name: _in_bill(name, has_external=has_external) for name in TOLD}
    other = requests.alias("other").c
    is_other = or_(other.run_id != _r.run_id, other.seq != _r.seq)
    is_alone = ~exists().where(other.http_request_id == _r.http_request_id, is_other)
    told: ColumnElement[int] = sum(
        (case((_h[name] == in_bill[name], number), else_=0) for name, number in TOLD.items()),
        start=literal(0),
    )
    otherwise = {f"reply_{name}": func.nullif(_h[name], _r[name]) for name in TOLD_AMOUNTS}
    moved = update(requests).values(
        {**{column: _h[name] for name, column in _BESIDE.items()}, "reply_told": told, **otherwise}
    )
    connection.execute(
        moved.where(_h.http_request_id == _r.http_request_id, _says_the_same(in_bill), is_alone)
    )
    beside = exists().where(_r.http_request_id == _h.http_request_id, _r.reply_status.is_not(None))
    connection.execute(delete(http_requests).where(beside))


def _says_the_same(in_bill: Mapping[str, ColumnElement[Any]]) -> ColumnElement[bool]:
    return and_(
        *(_h[name].is_not_distinct_from(_r[name]) for name in SHARED),
        *(or_(_h[name].is_(None), _h[name] == in_bill[name]) for name in TOLD_TOKENS),
    )
