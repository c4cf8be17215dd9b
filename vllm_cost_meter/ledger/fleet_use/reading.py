"""Read from a fleet's database what its senders have used: all of it once, then what is new.

Each shipment has a number, and each sender's come one after the other. So what is new of a sender
are the rows of higher numbers than were seen. Shipments that are old may be put together, the
oldest first, under a number below all others. What was not seen yet may be in there, and then the
sender is read anew. Two things tell of it: the rows of the last shipment that was seen are gone,
or, where a sender has no such rows, the older ones add up to something else.

It reads sums by hour and by run, and no row of a request, which a fleet need not have. One
transaction sees one state of the database.

Invariant: what was kept, and what a `Look` adds or replaces, is what the database has of each
sender in that state.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Engine,
    Select,
    Table,
    Text,
    and_,
    exists,
    func,
    lateral,
    select,
    true,
)
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from vllm_cost_meter.ledger.database import in_one_state
from vllm_cost_meter.ledger.fleet.opening import failed, open_to_follow, parse_fleet_url
from vllm_cost_meter.ledger.fleet.schema import (
    SENT_SUMS,
    latest_shipment,
    senders,
    shipments,
    told_running,
)
from vllm_cost_meter.ledger.fleet_use.running import told_use
from vllm_cost_meter.ledger.queries.costs import RUN_COLUMNS
from vllm_cost_meter.ledger.schema import bill_sums, prices, rollup_groups, rollup_hours, runs
from vllm_cost_meter.ledger.tables.given import GivenColumn, given_rows

T = TypeVar("T", int, str)

_HOURS = SENT_SUMS[rollup_hours.name]
_BILLS = SENT_SUMS[bill_sums.name]
_GPU_TIME_NS = _HOURS.c.prefill_ns + _HOURS.c.decode_ns
_IDS_AT_ONCE = 1_000
_SENDER_AND_NUMBER: tuple[GivenColumn, ...] = (("sender_id", Text()), ("number", BigInteger()))
# The number of the last shipment with rows, of a sender that has no such rows.
NO_ROWS = -1
# Below the number of any row.
_BEFORE_ALL = -(1 << 62)


class Mark(NamedTuple):
    """How far a sender was read.

    Its last shipment's numbers; and of its hours and its bills the last shipment that has rows of
    them, and what all rows up to now add up to: GPU-nanoseconds and bills.
    """

    sender_id: str
    first_number: int = NO_ROWS
    last_number: int = NO_ROWS
    hours_number: int = NO_ROWS
    gpu_time_ns: int = 0
    bills_number: int = NO_ROWS
    bills: int = 0


class GroupUse(NamedTuple):
    """What a group of a sender's bills used in a UTC hour."""

    sender_id: str
    group_id: int
    hour: int
    gpu_time_ns: int
    kv_block_ms: int


class RunBills(NamedTuple):
    """How many bills a sender has sent of a run."""

    sender_id: str
    run_id: str
    bills: int


class GroupFacts(NamedTuple):
    """Of which run and whose a group is."""

    group_id: int
    run_id: str
    tenant: str
    above: str | None
    tags: str | None


class Known(NamedTuple):
    """What a reader has already: of each sender what was used from `first_hour` on."""

    first_hour: int
    marks: Mapping[str, Mark]
    groups: Collection[int]
    runs: Collection[str]


class Look(NamedTuple):
    """What a look found.

    What was kept of the senders in `anew` is replaced, of others it is added to. `running` are the
    told contents of each sender. `sent` are the last numbers of all senders.
    """

    first_hour: int
    anew: frozenset[str]
    marks: Sequence[Mark]
    uses: Sequence[GroupUse]
    bills: Sequence[RunBills]
    groups: Sequence[GroupFacts]
    runs: Sequence[Mapping[str, Any]]
    running: Mapping[str, str]
    sent: Mapping[str, int]


class FleetReader:
    """Reads one fleet's database, over a connection of its own. Used by one thread."""

    def __init__(self, url: str) -> None:
        """Nothing is opened before the first look."""
        self._url = parse_fleet_url(url)
        self._engine: Engine | None = None

    def look(self, known: Known) -> Look:
        """Return what is new. Blocks for as long as the network does.

        Raises LedgerError where the database cannot be read, or is no fleet's of this version.
        """
        try:
            if self._engine is None:
                self._engine = in_one_state(open_to_follow(self._url))
            with self._engine.connect() as connection, connection.begin():
                return look(connection, known)
        except SQLAlchemyError as error:
            self.close()
            raise failed(self._url, error) from error

    def close(self) -> None:
        """Close the connection; the next look opens another one."""
        if self._engine is not None:
            self._engine.dispose()
        self._engine = None


def look(connection: Connection, known: Known) -> Look:
    """Return what is new in the state that the connection sees."""
    latest = _latest(connection)
    anew = _to_read_anew(connection, known, latest)
    new = [
        mark
        for sender_id, mark in known.marks.items()
        if sender_id in latest
        and sender_id not in anew
        and latest[sender_id][0] > mark.first_number
    ]
    marks = {mark.sender_id: mark for mark in new} | {id: Mark(id, _BEFORE_ALL) for id in anew}
    uses: list[GroupUse] = []
    bills: list[RunBills] = []
    begun = tuple(marks.values())
    for number, use in _uses(connection, begun, known.first_hour):
        mark = marks[use.sender_id]
        marks[use.sender_id] = mark._replace(
            hours_number=max(mark.hours_number, number),
            gpu_time_ns=mark.gpu_time_ns + use.gpu_time_ns,
        )
        uses.append(use)
    for number, each in _bills(connection, begun):
        mark = marks[each.sender_id]
        marks[each.sender_id] = mark._replace(
            bills_number=max(mark.bills_number, number), bills=mark.bills + each.bills
        )
        bills.append(each)
    groups = _groups(connection, {use.group_id for use in uses} - set(known.groups))
    running = _running(connection)
    named = {group.run_id for group in groups} | {each.run_id for each in bills}
    named |= {told.run_id for content in running.values() for told in told_use(content)}
    return Look(
        first_hour=known.first_hour,
        anew=frozenset(anew),
        marks=[
            mark._replace(first_number=latest[id][0], last_number=latest[id][1])
            for id, mark in marks.items()
        ],
        uses=uses,
        bills=bills,
        groups=groups,
        runs=_runs(connection, named - set(known.runs)),
        running=running,
        sent={sender_id: last for sender_id, (_, last) in latest.items()},
    )


def _latest(connection: Connection) -> dict[str, tuple[int, int]]:
    """Return the first and the last number of each sender's latest shipment."""
    s, c = senders.c, shipments.c
    last = lateral(latest_shipment(s.sender_id, c.first_number, c.last_number))
    asked = select(s.sender_id, last.c.first_number, last.c.last_number).join(last, true())
    return {sender_id: (first, last) for sender_id, first, last in connection.execute(asked)}


# -- what was put together since ------------------------------------------------------------


class _Seen(NamedTuple):
    """What was seen of a sender's rows in one table."""

    sender_id: str
    # The last shipment that has any.
    number: int
    # What they add up to, up to the last shipment of all.
    amount: int
    upto: int


def _to_read_anew(
    connection: Connection, known: Known, latest: Mapping[str, tuple[int, int]]
) -> set[str]:
    """Return the senders that are new, and those of which something may be unseen.

    A database that was restored from a backup has less of a sender than was seen. Of a sender that
    has sent nothing more, nothing is unseen.
    """
    marks = known.marks
    anew = {id for id, (first, _) in latest.items() if id not in marks or first < marks[id][1]}
    more = [marks[id] for id, (first, _) in latest.items() if id in marks and first > marks[id][1]]
    hours = [_Seen(m.sender_id, m.hours_number, m.gpu_time_ns, m.first_number) for m in more]
    bills = [_Seen(m.sender_id, m.bills_number, m.bills, m.first_number) for m in more]
    in_hours = _HOURS.c.hour >= known.first_hour
    return (
        anew
        | _without_rows(connection, _HOURS, hours, in_hours)
        | _without_rows(connection, _BILLS, bills, true())
        | _with_others(connection, _HOURS, hours, func.sum(_GPU_TIME_NS), in_hours)
        | _with_others(connection, _BILLS, bills, func.sum(_BILLS.c.bills), true())
    )


def _without_rows(
    connection: Connection, table: Table, seen: Iterable[_Seen], which: ColumnElement[bool]
) -> set[str]:
    """Return the senders whose last rows are not under their number any more."""
    rows = [(each.sender_id, each.number) for each in seen if each.number != NO_ROWS]
    if not rows:
        return set()
    at = given_rows("seen", _SENDER_AND_NUMBER, rows).c
    c = table.c
    is_there = exists().where(c.sender_id == at.sender_id, c.first_number == at.number, which)
    return set(connection.execute(select(at.sender_id).where(~is_there)).scalars())


def _with_others(
    connection: Connection,
    table: Table,
    seen: Iterable[_Seen],
    total: ColumnElement[int],
    which: ColumnElement[bool],
) -> set[str]:
    """Return the senders without a last row whose older rows add up to something else."""
    changed = set()
    for each in seen:
        if each.number != NO_ROWS:
            continue
        c = table.c
        mine = and_(c.sender_id == each.sender_id, c.first_number <= each.upto, which)
        if int(connection.execute(select(total).where(mine)).scalar() or 0) != each.amount:
            changed.add(each.sender_id)
    return changed


# -- rows -----------------------------------------------------------------------------------


def _uses(
    connection: Connection, marks: Iterable[Mark], first_hour: int
) -> Iterator[tuple[int, GroupUse]]:
    """Yield what these senders have used after their marks, with the last shipment's number."""
    c = _HOURS.c
    sums = (func.max(c.first_number), func.sum(_GPU_TIME_NS), func.sum(c.kv_block_ms))
    asked = _after_marks(marks, _HOURS, (c.group_id, c.hour), sums, c.hour >= first_hour)
    for sender_id, group_id, hour, number, ns, block_ms in connection.execute(asked):
        yield number, GroupUse(sender_id, group_id, hour, int(ns), int(block_ms))


def _bills(connection: Connection, marks: Iterable[Mark]) -> Iterator[tuple[int, RunBills]]:
    """Yield how many bills these senders have sent after their marks, with such a number."""
    c = _BILLS.c
    sums = (func.max(c.first_number), func.sum(c.bills))
    asked = _after_marks(marks, _BILLS, (c.run_id,), sums, true())
    for sender_id, run_id, number, bills in connection.execute(asked):
        yield number, RunBills(sender_id, run_id, int(bills))


def _after_marks(
    marks: Iterable[Mark],
    table: Table,
    keys: Sequence[ColumnElement[Any]],
    sums: Sequence[ColumnElement[Any]],
    which: ColumnElement[bool],
) -> Select[Any]:
    """Return the query of the sums of rows after marks: sender, keys, sums.

    One look into the table's key for each sender: joined otherwise, PostgreSQL may read it all.
    """
    at = given_rows("mark", _SENDER_AND_NUMBER, [mark[:2] for mark in marks]).c
    c = table.c
    named = [each.label(f"sum_{place}") for place, each in enumerate(sums)]
    new = lateral(
        select(*keys, *named)
        .where(c.sender_id == at.sender_id, c.first_number > at.number, which)
        .group_by(*keys)
    )
    return select(at.sender_id, *new.c).join(new, true())


def _some_at_once(ids: Collection[T]) -> Iterator[list[T]]:
    left = iter(ids)
    while some := list(islice(left, _IDS_AT_ONCE)):
        yield some


def _groups(connection: Connection, ids: Collection[int]) -> list[GroupFacts]:
    g = rollup_groups.c
    asked = select(g.group_id, g.run_id, g.tenant, g.tenant_above, g.tags)
    return [
        GroupFacts(*row)
        for some in _some_at_once(ids)
        for row in connection.execute(asked.where(g.group_id.in_(some)))
    ]


def _runs(connection: Connection, ids: Collection[str]) -> list[Mapping[str, Any]]:
    """Return what prices depend on, of these runs."""
    asked = select(*RUN_COLUMNS).join(prices, prices.c.price_id == runs.c.price_id, isouter=True)
    return [
        {str(name): value for name, value in row._asdict().items()}
        for some in _some_at_once(ids)
        for row in connection.execute(asked.where(runs.c.run_id.in_(some)))
    ]


def _running(connection: Connection) -> dict[str, str]:
    """Return what each sender told last of what runs at its server."""
    s, t = senders.c, told_running.c
    last = lateral(
        select(t.content).where(t.sender_id == s.sender_id).order_by(t.number.desc()).limit(1)
    )
    asked = select(s.sender_id, last.c.content).join(last, true())
    return dict(tuple(row) for row in connection.execute(asked))
