"""Keep a fleet's tables small: add up what was sent long ago, and delete what nobody reads.

Each shipment adds rows to the tables of sums, each second an engine tells its totals anew, and each
request was open once. Tidying changes no answer:

- *Sums* of shipments that came some minutes ago are added up, into rows under the number `FOLDED`,
  by hour, and by day, which is what a month's report reads. What came since stays as it is, so
  that whoever follows the shipments of a sender need not begin anew; `folds` says up to where the
  others are gone.
- *States* below a run's latest number go.
- *Open requests* that have their bill go.
- Rows of `shipments` go but for the latest ones: the last one says how far a sender is.

A sender tidies for itself, if it has the right to update and delete. `vllm-cost-meter fleet tidy`
does it for all, also for those whose server is gone.

Invariant: the sums that count are the same before and after, at any instant.
"""

# ruff: noqa: S608 - only names of tables and columns are written into the SQL below
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from operator import itemgetter

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Table,
    Text,
    any_,
    bindparam,
    delete,
    exists,
    func,
    select,
    text,
    tuple_,
)
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.fleet.changes import STATES, SUMS, TableRows
from vllm_cost_meter.ledger.fleet.schema import (
    FOLDED,
    FOLDED_DAYS,
    KEPT_ROWS,
    SENT_SUMS,
    TOLD,
    now_text,
    senders,
    shipments,
    tails,
    told_open_requests,
    told_running,
)
from vllm_cost_meter.ledger.fleet.views import added_up, day_columns
from vllm_cost_meter.ledger.queries.open_requests import is_billed

# Whoever follows shipments looks each few seconds, and may be away for so long.
FOLD_AFTER_S = 600.0
# "sender": a number of our own among PostgreSQL's locks. It and a sender's name are one lock.
_SENDER_LOCK = 0x73656E64
_IDS_AT_ONCE = 10_000

_OF_SHIPMENT = ("sender_id", "first_number")


def lock_sender(connection: Connection, sender_id: str) -> None:
    """Wait until nobody else sends or tidies under this name, until the transaction ends."""
    connection.execute(
        text("SELECT pg_advisory_xact_lock(:kind, hashtext(:sender_id))"),
        {"kind": _SENDER_LOCK, "sender_id": sender_id},
    )


def fold(connection: Connection, sender_id: str, after_s: float = FOLD_AFTER_S) -> None:
    """Add up what a sender sent more than `after_s` ago. Needs the right to update and delete."""
    lock_sender(connection, sender_id)
    c = shipments.c
    last = connection.execute(
        select(func.max(c.first_number)).where(
            c.sender_id == sender_id, c.received_at < now_text(after_s)
        )
    ).scalar()
    if last is None:
        return
    given = {"sender_id": sender_id, "last": last}
    for table in SUMS:
        connection.execute(text(_folding(table)), given)
    connection.execute(
        text(
            "INSERT INTO folds (sender_id, folded_number) VALUES (:sender_id, :last)"
            " ON CONFLICT (sender_id) DO UPDATE SET folded_number = excluded.folded_number"
        ),
        given,
    )
    connection.execute(delete(shipments).where(c.sender_id == sender_id, c.first_number < last))


def _folding(table: Table) -> str:
    """Return the statement that adds up the shipments of a sender in the table of sums."""
    sent = SENT_SUMS[table.name].name
    gone = (
        f"WITH gone AS (DELETE FROM {sent} WHERE sender_id = :sender_id"
        " AND first_number BETWEEN 0 AND :last RETURNING *)"
    )
    folded = _adding(sent, table, {c.name: c.name for c in table.c})
    if table is not schema.rollup_hours:
        return f"{gone} {folded}"
    days = _adding(FOLDED_DAYS.name, schema.rollup_days, day_columns())
    return f"{gone}, days AS ({days}) {folded}"


def _adding(into: str, table: Table, made: Mapping[str, str]) -> str:
    """Return the insert that adds the rows of `gone` to the folded ones of a table.

    `made` says how each column is made of those of `gone`.
    """
    keys = {c.name: made[c.name] for c in table.primary_key}
    amounts = {name: how for name, how in made.items() if name not in keys}
    names = [*_OF_SHIPMENT, *keys, *amounts]
    values = [*keys.values(), *(added_up(table, name, how) for name, how in amounts.items())]
    known = [
        f"{name} = (SELECT {added_up(table, name, 'amount')}"
        f" FROM (VALUES ({into}.{name}), (excluded.{name})) AS two (amount))"
        for name in amounts
    ]
    return (
        f"INSERT INTO {into} ({', '.join(names)})"
        f" SELECT :sender_id, {FOLDED}, {', '.join(values)} FROM gone"
        f" GROUP BY {', '.join(keys.values())}"
        f" ON CONFLICT ({', '.join([*_OF_SHIPMENT, *keys])}) DO UPDATE SET {', '.join(known)}"
    )


def tidy_sender(connection: Connection, sender_id: str) -> None:
    """Tidy what one sender has sent under its name. Needs the right to update and delete."""
    fold(connection, sender_id)
    for table, keys in (
        (told_running, ["sender_id"]),
        (told_open_requests, ["sender_id"]),
        (tails, ["sender_id", "run_id"]),
    ):
        _delete_older(connection, table, keys, table.c.sender_id == sender_id)


def forget_older_states(connection: Connection, run_ids: Collection[str] | None = None) -> None:
    """Delete what was told of these runs, or of all, before what was told last.

    Needs the right to delete.
    """
    by_name = {table.name: table for table in STATES}
    for name, table in TOLD.items():
        keys = [column.name for column in by_name[name].primary_key]
        mine = [] if run_ids is None else [table.c.run_id.in_(run_ids)]
        _delete_older(connection, table, keys, *mine)


def _delete_older(
    connection: Connection, table: Table, keys: Iterable[str], *mine: ColumnElement[bool]
) -> None:
    """Delete rows of which another one with the same keys has a higher number."""
    told, newer = table.c, table.alias("newer").c
    same = [newer[key] == told[key] for key in keys]
    is_older = exists().where(*same, newer.number > told.number)
    connection.execute(delete(table).where(*mine, is_older))


def forget_billed(connection: Connection, request_ids: Iterable[str] | None = None) -> None:
    """Delete those of these open requests, or of all, that have their bill.

    Needs the right to delete.
    """
    o, kept = schema.open_requests.c, KEPT_ROWS[schema.open_requests.name]
    key = tuple_(kept.c.request_id, kept.c.started_at)
    billed = select(o.request_id, o.started_at).where(is_billed())
    if request_ids is None:
        connection.execute(delete(kept).where(key.in_(billed)))
        return
    left = iter(request_ids)
    while some := list(islice(left, _IDS_AT_ONCE)):
        mine = o.request_id == any_(bindparam("ids", some, ARRAY(Text())))
        connection.execute(delete(kept).where(key.in_(billed.where(mine))))


class SentSince:
    """What a sender has sent since it tidied last, as far as tidying must know it."""

    def __init__(self) -> None:
        self._sender_ids: set[str] = set()
        self._told: set[str] = set()
        self._billed: set[str] = set()

    def note(self, sender_id: str, tables: Iterable[TableRows]) -> None:
        """Note the rows of a shipment."""
        self._sender_ids.add(sender_id)
        for name, columns, rows in tables:
            if name in TOLD:
                self._told.update(map(itemgetter(columns.index("run_id")), rows))
            elif name == schema.requests.name:
                self._billed.update(map(itemgetter(columns.index("request_id")), rows))

    def tidy(self, connection: Connection) -> None:
        """Tidy that. Needs the right to update and delete."""
        for sender_id in sorted(self._sender_ids):
            tidy_sender(connection, sender_id)
        forget_older_states(connection, self._told)
        forget_billed(connection, self._billed)


def sender_ids(connection: Connection) -> Sequence[str]:
    """Return the names of all senders."""
    return connection.execute(select(senders.c.sender_id)).scalars().all()
