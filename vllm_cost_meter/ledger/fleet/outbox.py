"""The outbox in the ledger: begin it, put in what a transaction wrote, take out what is sent.

Whoever applies journals puts in, also a command beside a server: the row of the sender in the
ledger itself says that there is a fleet, and not somebody's settings.

Invariant: what the ledger got since the sender began is in the outbox, or the fleet has it.
"""

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.fleet.changes import Changes, noting, packed
from vllm_cost_meter.ledger.schema import fleet_sender, outbox
from vllm_cost_meter.units.time import rfc3339

_ID_BYTES = 16
# In place of a sender: the ledger has sent, and does not any more.
_NOBODY = ""


class Sender(NamedTuple):
    """Who sends to the fleet from this ledger; the fields are columns of `fleet_sender`."""

    sender_id: str
    retired: tuple[str, ...]
    began_at: str
    last_number: int
    sent_number: int
    joined_at: str | None


class Waiting(NamedTuple):
    """What the fleet is still to be sent: rows of the outbox, and their bytes."""

    rows: int
    content_bytes: int


def read_sender(connection: Connection) -> Sender | None:
    """Return who sends to the fleet from this ledger; None without a fleet."""
    known = _stored(connection)
    return known if known is not None and known.sender_id != _NOBODY else None


def begin(connection: Connection) -> Sender:
    """Return who sends from this ledger; from now on what it gets is put into the outbox."""
    known = _stored(connection)
    if known is not None and known.sender_id != _NOBODY:
        return known
    return _begun(connection, _names_of(known), 0 if known is None else known.last_number)


def begin_again(connection: Connection) -> Sender:
    """Begin under another name, with an empty outbox: the fleet then gets all of the ledger anew.

    A run of which it has sent sums under both names counts by the one with more of its bills.
    """
    end(connection)
    return begin(connection)


def join_anew(connection: Connection) -> None:
    """Have the fleet get all of the ledger anew, if it sends to one: its rows came otherwise."""
    if read_sender(connection) is not None:
        begin_again(connection)


def end(connection: Connection) -> None:
    """Put nothing into the outbox any more, and empty it.

    The ledger keeps the names under which it has sent, in case it begins again.
    """
    known = _stored(connection)
    if known is None or known.sender_id == _NOBODY:
        return
    _store(connection, known._replace(sender_id=_NOBODY, retired=_names_of(known)))


def _begun(connection: Connection, retired: tuple[str, ...], last_number: int) -> Sender:
    made = Sender(
        sender_id=secrets.token_hex(_ID_BYTES),
        retired=retired,
        began_at=rfc3339(time.time_ns()),
        last_number=last_number,
        sent_number=last_number,
        joined_at=None,
    )
    _store(connection, made)
    return made


def _names_of(sender: Sender | None) -> tuple[str, ...]:
    """Return all names under which a ledger has sent."""
    if sender is None:
        return ()
    return tuple(name for name in (*sender.retired, sender.sender_id) if name != _NOBODY)


def _stored(connection: Connection) -> Sender | None:
    row = connection.execute(select(*(fleet_sender.c[name] for name in Sender._fields))).first()
    return None if row is None else Sender(*row)._replace(retired=tuple(json.loads(row.retired)))


def _store(connection: Connection, sender: Sender) -> None:
    """Write the row of a sender, and empty the outbox."""
    connection.execute(delete(fleet_sender))
    connection.execute(delete(outbox))
    values = {**sender._asdict(), "retired": json.dumps(sender.retired)}
    connection.execute(insert(fleet_sender).values(values))


@contextmanager
def putting_in(connection: Connection) -> Iterator[None]:
    """Put what is written inside into the outbox at the end, in the same transaction.

    Does nothing without a fleet.
    """
    if connection.execute(select(fleet_sender.c.sender_id)).scalar() in (None, _NOBODY):
        yield
        return
    changes = Changes()
    noting(connection, changes)
    yield
    put_in(connection, changes)


def put_in(connection: Connection, changes: Changes) -> None:
    """Put what was noted into the outbox; without any, nothing."""
    if not (tables := changes.by_table()):
        return
    c = fleet_sender.c
    connection.execute(update(fleet_sender).values(last_number=c.last_number + 1))
    number = connection.execute(select(c.last_number)).scalar_one()
    connection.execute(insert(outbox).values(number=number, content=packed(tables)))


def next_rows(connection: Connection, after: int, bytes_max: int) -> list[tuple[int, bytes]]:
    """Return the rows after a number, in order, up to so many bytes but at least one."""
    c = outbox.c
    found: list[tuple[int, bytes]] = []
    size = 0
    rows = connection.execute(
        select(c.number, c.content)
        .where(c.number > after)
        .order_by(c.number)
        .execution_options(yield_per=100)
    )
    for number, content in rows:
        size += len(content)
        if found and size > bytes_max:
            break
        found.append((number, content))
    rows.close()
    return found


def note_sent(connection: Connection, number: int, filed: int | None = None) -> None:
    """Note that the fleet has all up to a number, and take that out.

    Where rows go into files too, only what is `filed`.
    """
    forget_up_to(connection, number if filed is None else min(number, filed))
    connection.execute(update(fleet_sender).values(sent_number=number))


def forget_up_to(connection: Connection, number: int) -> None:
    """Take rows out up to a number: nobody needs them any more."""
    connection.execute(delete(outbox).where(outbox.c.number <= number))


def note_joined(connection: Connection, number: int, filed: int | None = None) -> None:
    """Note that the fleet has all that the ledger held when `number` was the last in the outbox."""
    note_sent(connection, number, filed)
    connection.execute(update(fleet_sender).values(joined_at=rfc3339(time.time_ns())))


def waiting(connection: Connection) -> Waiting:
    """Return what the fleet is still to be sent."""
    size = func.coalesce(func.sum(func.length(outbox.c.content)), 0)
    sent = select(fleet_sender.c.sent_number).scalar_subquery()
    asked = select(func.count(), size).where(outbox.c.number > func.coalesce(sent, 0))
    rows, content_bytes = connection.execute(asked).one()
    return Waiting(rows, int(content_bytes))


def held_bytes(connection: Connection) -> int:
    """Return how many bytes the outbox holds, sent or not."""
    size = func.coalesce(func.sum(func.length(outbox.c.content)), 0)
    return int(connection.execute(select(size)).scalar_one())
