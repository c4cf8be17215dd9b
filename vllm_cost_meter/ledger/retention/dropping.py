"""Drop the rows of requests that ended before a UTC midnight, in small transactions.

An exchange goes as a whole: its HTTP row, its bills, their pieces and energies. What these add up
to is put into the tables of retention in the same transaction (`folding.py`), with the bills'
numbers. So all figures are right whatever stops the work, and it may be stopped between any two
transactions. Never dropped are

- an exchange of which anything ended at the midnight or later, or has no bill yet;
- a bill beyond its run's last snapshot: it is known by its row alone what of it was in flight
  (`ends/last_bills.py`). Of a run without any snapshot the sums tell all.

An HTTP row without a bill goes too: it adds nothing to any sum. Free pages of the file are used
again; `ledger compact` gives them back.

Invariant: once a row is dropped, the ledger says from which hour on rows are kept; never before.
"""

import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, NamedTuple

from sqlalchemy import ColumnElement, Engine, and_, delete, exists, func, select, tuple_
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.database import cause_of, writing
from vllm_cost_meter.ledger.inserts import insert_rows
from vllm_cost_meter.ledger.retention.folding import fold
from vllm_cost_meter.ledger.retention.known import NONE_DROPPED, dropped_by_run, kept_from_hour
from vllm_cost_meter.ledger.rollups.adding import read_exchanges, read_parts
from vllm_cost_meter.ledger.rollups.bill_sums import BillSums, dropped_sums, sums_where
from vllm_cost_meter.ledger.rollups.exchanges import PartFacts, ReplyFacts
from vllm_cost_meter.ledger.rollups.upserts import in_chunks, lock_sums
from vllm_cost_meter.ledger.schema import (
    dropped_bills,
    http_requests,
    open_requests,
    request_energy,
    requests,
    row_cutoffs,
    snapshots,
    usage_pieces,
)
from vllm_cost_meter.units.calendar import HOURS_PER_DAY
from vllm_cost_meter.units.text import quoted
from vllm_cost_meter.units.time import NS_PER_HOUR, hour_of, rfc3339, unix_ns_of

# The rows of so many bills, or so many HTTP rows without one, go in one transaction: some 20 ms.
BILLS_AT_ONCE = 100
REPLIES_AT_ONCE = 1_000
PAUSE_S = 0.005
# Rows of today and of the day before stay: bills, energies and replies may still be on their way.
DAYS_KEPT_MIN = 1
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)


def newest_cutoff(now_ns: int) -> int:
    """Return the latest hour before which rows may be dropped: the midnight a day ago, UTC."""
    today = now_ns // NS_PER_HOUR // HOURS_PER_DAY
    return (today - DAYS_KEPT_MIN) * HOURS_PER_DAY


def cutoff_of(date: str, now_ns: int) -> int:
    """Return the hour in which a UTC date such as 2026-08-01 begins.

    Raises ValueError for another text, and for a date whose rows and those before must stay.
    """
    newest = newest_cutoff(now_ns)
    try:
        hour = unix_ns_of(f"{date}T00:00:00Z") // NS_PER_HOUR if _DATE.fullmatch(date) else None
    except ValueError:
        hour = None
    if hour is None or hour > newest:
        raise ValueError(
            f"before: expected a date such as 2026-08-01, {date_of(newest)} at the latest, because"
            f" rows of today and of the day before stay (UTC); got {quoted(date)}"
        )
    return hour


def date_of(hour: int) -> str:
    """Return the UTC date on which an hour is."""
    return _instant(hour)[:10]


class DroppedCounts(NamedTuple):
    """How many rows there are to drop, or were dropped."""

    bills: int = 0
    replies: int = 0

    def __add__(self, other: Any) -> "DroppedCounts":
        return DroppedCounts(self.bills + other.bills, self.replies + other.replies)


class BillPlace(NamedTuple):
    """How far a pass has looked at the bills, in the order in which their exchanges ended."""

    ended_at: str = rfc3339(0)
    run_id: str = ""
    seq: int = 0


# Before the first reply, in the order of (end, id).
FIRST_REPLY = (rfc3339(0), "")


@dataclass(slots=True)
class Dropper:
    """A pass over the rows that ended before an hour. Used by one thread."""

    # Each step does what there is to do.
    is_waiting: ClassVar[bool] = False

    engine: Engine
    before_hour: int
    bills_at_once: int = BILLS_AT_ONCE
    # No row of these runs goes.
    held_runs: frozenset[str] = frozenset()
    counts: DroppedCounts = DroppedCounts()
    is_done: bool = False
    _bills: BillPlace | None = BillPlace()
    _replies: tuple[str, str] = FIRST_REPLY

    def __post_init__(self) -> None:
        if self.before_hour % HOURS_PER_DAY:
            raise ValueError(f"expected the hour of a UTC midnight, got {self.before_hour}")

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Give a transaction in which nobody else adds to sums."""
        with writing(self.engine).begin() as connection:
            lock_sums(connection)
            yield connection

    def step(self) -> DroppedCounts:
        """Drop some rows in one transaction; return how many. `is_done` says if it was the last.

        Raises what the database raises, with nothing changed.
        """
        with self.transaction() as connection:
            place, replies, done, counts = self._bills, self._replies, False, DroppedCounts()
            if place is not None:
                place, counts = self._drop_bills(connection, place)
            else:
                replies, done, counts = self._drop_replies(connection)
            if any(counts) and not any(self.counts):
                say_kept_from(connection, self.before_hour)
        self._bills, self._replies = place, replies
        self.is_done, self.counts = done, self.counts + counts
        return counts

    def steps(self) -> Iterator[DroppedCounts]:
        """Yield how many rows went at each step, until all are done."""
        while not self.is_done:
            yield self.step()

    def _drop_bills(
        self, connection: Connection, after: BillPlace
    ) -> tuple[BillPlace | None, DroppedCounts]:
        found = old_bills(connection, self.before_hour, after, self.bills_at_once)
        if not found:
            return None, DroppedCounts()
        exchanges = [
            whole
            for whole in droppable(connection, self.before_hour, *exchanges_of(found))
            if self.held_runs.isdisjoint(part.run_id for part in whole.parts)
        ]
        counts = drop_exchanges(connection, exchanges)
        last = found[-1]
        return BillPlace(last.ended_at, last.run_id, last.seq), counts

    def _drop_replies(self, connection: Connection) -> tuple[tuple[str, str], bool, DroppedCounts]:
        rows = old_replies(connection, self.before_hour, self._replies, REPLIES_AT_ONCE)
        delete_replies(connection, [id for _, id in rows])
        if not rows:
            return self._replies, True, DroppedCounts()
        at, id = rows[-1]
        return (at, id), len(rows) < REPLIES_AT_ONCE, DroppedCounts(0, len(rows))


def drop_rows(engine: Engine, before_hour: int) -> DroppedCounts:
    """Drop all rows that may go, and give way to other writers for as long as each step takes.

    Raises LedgerError if the ledger cannot be written; what was dropped before that is dropped.
    """
    return all_of(Dropper(engine, before_hour).steps())


def all_of(steps: Iterator[DroppedCounts]) -> DroppedCounts:
    """Go through the steps of a pass, as `drop_rows` does; return how many rows went."""
    counts = DroppedCounts()
    try:
        for some in giving_way(steps):
            counts += some
    except SQLAlchemyError as error:
        raise LedgerError(
            f"ledger: {counts.bills:,} bills were dropped, and then it could not be written:"
            f" {cause_of(error)}"
        ) from error
    return counts


def giving_way(steps: Iterator[DroppedCounts]) -> Iterator[DroppedCounts]:
    """Yield the steps of a pass; after each one wait for as long as it took."""
    began_s = time.monotonic()
    for some in steps:
        yield some
        time.sleep(max(time.monotonic() - began_s, PAUSE_S))
        began_s = time.monotonic()


def count_rows(connection: Connection, before_hour: int) -> DroppedCounts:
    """Return how many bills and HTTP rows ended before an hour; some of them may have to stay."""
    at, r, h = _instant(before_hour), requests.c, http_requests.c
    bills, beside = connection.execute(
        select(func.count(), func.count(r.reply_status)).where(r.ended_at < at)
    ).one()
    alone = connection.execute(select(func.count()).where(h.finished_at < at)).scalar_one()
    return DroppedCounts(int(bills), int(beside) + int(alone))


def oldest_hour(connection: Connection, since_hour: int) -> int | None:
    """Return the hour in which the oldest request ended that rows are kept for.

    Rows from before an hour are passed over: they were tried, and have to stay.
    """
    since = _instant(max(kept_from_hour(connection) or 0, since_hour))
    found = [
        connection.execute(select(func.min(at)).where(at >= since)).scalar()
        for at in (requests.c.ended_at, http_requests.c.finished_at)
    ]
    return min((hour_of(at) for at in found if at is not None), default=None)


def _instant(hour: int) -> str:
    return rfc3339(hour * NS_PER_HOUR)


def say_kept_from(connection: Connection, before_hour: int) -> None:
    """Write from which hour on rows are kept; an earlier hour than before changes nothing."""
    row = {"kept_from_hour": before_hour, "decided_at": rfc3339(time.time_ns())}
    insert_rows(connection, row_cutoffs, [row])


def old_bills(
    connection: Connection, before_hour: int, after: BillPlace, limit: int
) -> Sequence[Any]:
    """Return (end, run, number, exchange) of bills from before an hour, in the order of places."""
    r = requests.c
    return connection.execute(
        select(r.ended_at, r.run_id, r.seq, r.http_request_id)
        .where(
            # The first condition is what the index of ends takes.
            r.ended_at >= after.ended_at,
            tuple_(r.ended_at, r.run_id, r.seq) > after,
            r.ended_at < _instant(before_hour),
        )
        .order_by(r.ended_at, r.run_id, r.seq)
        .limit(limit)
    ).all()


def old_replies(
    connection: Connection, before_hour: int, after: tuple[str, str], limit: int
) -> Sequence[Any]:
    """Return (end, id) of HTTP requests without a bill from before an hour, the oldest first."""
    h = http_requests.c
    return connection.execute(
        select(h.finished_at, h.http_request_id)
        .where(
            h.finished_at >= after[0],
            tuple_(h.finished_at, h.http_request_id) > after,
            h.finished_at < _instant(before_hour),
            is_unbilled(),
        )
        .order_by(h.finished_at, h.http_request_id)
        .limit(limit)
    ).all()


def is_unbilled() -> ColumnElement[bool]:
    """Return the condition that an HTTP request has no bill and waits for none."""
    h, r, o = http_requests.c, requests.c, open_requests.c
    return and_(
        ~exists().where(r.http_request_id == h.http_request_id),
        ~exists().where(o.http_request_id == h.http_request_id),
    )


# ---- which exchanges may go


def exchanges_of(bills: Sequence[Any]) -> tuple[list[str], list[tuple[str, int]]]:
    """Return the exchanges of old bills, and the keys of those without one."""
    ids = sorted({bill.http_request_id for bill in bills if bill.http_request_id is not None})
    return ids, [(bill.run_id, bill.seq) for bill in bills if bill.http_request_id is None]


class Whole(NamedTuple):
    """An exchange with all its rows; `id` is None for a bill without one."""

    id: str | None
    reply: ReplyFacts | None
    parts: Sequence[PartFacts]


def droppable(
    connection: Connection, before_hour: int, ids: Sequence[str], alone: Sequence[tuple[str, int]]
) -> list[Whole]:
    """Return those of these exchanges, and bills without one, that may be dropped."""
    opened = _open(connection, ids)
    found = [
        Whole(id, *exchange)
        for id, exchange in read_exchanges(connection, ids).items()
        if id not in opened
    ]
    found += [Whole(None, None, [part]) for part in _lone_parts(connection, alone)]
    run_ids = {part.run_id for whole in found for part in whole.parts}
    counted = _last_counted(connection, run_ids)
    return [whole for whole in found if _is_past(whole, before_hour, counted)]


def _is_past(whole: Whole, before_hour: int, counted: Mapping[str, int]) -> bool:
    if whole.reply is not None and whole.reply.hour >= before_hour:
        return False
    return all(
        part.hour < before_hour and part.seq <= counted.get(part.run_id, part.seq)
        for part in whole.parts
    )


def _open(connection: Connection, ids: Sequence[str]) -> set[str]:
    """Return those exchanges that have an engine request without a bill."""
    o = open_requests.c.http_request_id
    return {
        id for some in in_chunks(ids) for (id,) in connection.execute(select(o).where(o.in_(some)))
    }


def _lone_parts(connection: Connection, keys: Sequence[tuple[str, int]]) -> list[PartFacts]:
    r = requests.c
    return [
        part
        for run_id, seqs in keys_by_run(keys).items()
        for some in in_chunks(seqs)
        for _, part in read_parts(connection, and_(r.run_id == run_id, r.seq.in_(some)))
    ]


def keys_by_run(keys: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    """Return the numbers of bills by run, both in order."""
    found: dict[str, list[int]] = {}
    for run_id, seq in sorted(keys):
        found.setdefault(run_id, []).append(seq)
    return found


def _last_counted(connection: Connection, run_ids: Collection[str]) -> dict[str, int]:
    """Return the number of the last bill that each run's last snapshot counts, if it has any."""
    s = snapshots.c
    return {
        run_id: int(seq)
        for some in in_chunks(sorted(run_ids))
        for run_id, seq in connection.execute(
            select(s.run_id, s.last_seq).where(s.run_id.in_(some))
        )
    }


# ---- dropping them


def drop_exchanges(connection: Connection, exchanges: Sequence[Whole]) -> DroppedCounts:
    """Drop exchanges with all their rows, and keep what they add up to."""
    r = requests.c
    fold(connection, [(whole.reply, whole.parts) for whole in exchanges]).write(connection)
    keys = keys_by_run((part.run_id, part.seq) for whole in exchanges for part in whole.parts)
    numbers, sums = dropped_by_run(connection, keys), dropped_sums(connection)
    for run_id, seqs in keys.items():
        more = [
            one
            for some in in_chunks(seqs)
            for one in sums_where(connection, (r.run_id == run_id) & r.seq.in_(some))
        ]
        now = reduce(BillSums.with_more, [*more, *([sums[run_id]] if run_id in sums else [])])
        rest = numbers.get(run_id, NONE_DROPPED).and_also(seqs).rest_text()
        connection.execute(delete(dropped_bills).where(dropped_bills.c.run_id == run_id))
        insert_rows(connection, dropped_bills, [{**now._asdict(), "rest": rest}])
        for table in (request_energy, usage_pieces, requests):
            for some in in_chunks(seqs):
                mine = table.c.run_id == run_id, table.c.seq.in_(some)
                connection.execute(delete(table).where(*mine))
    replies = [whole.id for whole in exchanges if whole.id is not None and whole.reply is not None]
    delete_replies(connection, replies)
    return DroppedCounts(sum(map(len, keys.values())), len(replies))


def delete_replies(connection: Connection, ids: Sequence[str]) -> None:
    """Delete the rows of HTTP requests that have one of their own."""
    for some in in_chunks(ids):
        connection.execute(delete(http_requests).where(http_requests.c.http_request_id.in_(some)))
