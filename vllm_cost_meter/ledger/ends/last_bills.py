"""The last bills of a dead run: those after its last snapshot, which no snapshot will count.

A run's totals are those of its last snapshot; the engine then went on until it died, and billed
what it had told its clients. Part of that time is in the totals already, as in flight:

- a bill's request had used a known time at the snapshot, and it was used first: this part of the
  bill was in flight then;
- the step that ran at the snapshot ended before the next bill, so bills hold its time as far as
  they go. Where the ledger does not know what each request had used, all that was in flight is
  taken as such a step.

So the rest of these bills is time after the snapshot. It is the least that the engine worked on: of
what it did for others until it died, nobody knows.

Invariant: in each hour the part in flight is at most what the bills hold and at most what the
snapshot had in flight. So nothing is counted twice, and no class gets below 0.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, Text, and_, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.rows import live_requests
from vllm_cost_meter.ledger.schema import live_usage, requests, usage_pieces
from vllm_cost_meter.ledger.tables.given import GivenColumn, given_rows
from vllm_cost_meter.ledger.tables.pieces import PIECE_HOUR, PIECE_NS, PIECES_OF_BILL

_RUNS_AT_ONCE = 1_000


class LastSnapshot(NamedTuple):
    """What a dead run's last snapshot says; `in_flight` has the GPU-ns in flight by hour."""

    number: int
    last_seq: int
    in_flight: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class LastBills:
    """The bills of a dead run after its last snapshot.

    `billed` has their GPU-ns by hour, and `in_flight` the part of it that the snapshot had in
    flight; `step_ns` is how much of that was the step that ran. `finished_at` is when the last one
    came, and `request_ids` are vLLM's internal ids.
    """

    last_seq: int = 0
    count: int = 0
    billed: Mapping[int, int] = field(default_factory=dict)
    in_flight: Mapping[int, int] = field(default_factory=dict)
    step_ns: int = 0
    finished_at: str | None = None
    request_ids: frozenset[str] = frozenset()

    @property
    def billed_ns(self) -> int:
        return sum(self.billed.values())

    @property
    def in_flight_ns(self) -> int:
        return sum(self.in_flight.values())


NO_LAST_BILLS = LastBills()


class _Bill(NamedTuple):
    """A bill with its GPU-ns by hour."""

    seq: int
    request_id: str
    finished_at: str
    hours: Mapping[int, int]


class _Live(NamedTuple):
    """What each open request had used at the last snapshot, and the step that ran, in GPU-ns."""

    used: Mapping[str, int]
    step_ns: int


def read_last_bills(
    connection: Connection, dead: Mapping[str, LastSnapshot], highest: Mapping[str, int]
) -> dict[str, LastBills]:
    """Return the last bills of those dead runs that have any; `highest` is each run's last one."""
    beyond = [
        (run_id, told.last_seq, highest[run_id])
        for run_id, told in dead.items()
        if highest.get(run_id, 0) > told.last_seq
    ]
    found: dict[str, LastBills] = {}
    left = iter(beyond)
    while some := list(islice(left, _RUNS_AT_ONCE)):
        live = _live(connection, {run_id: dead[run_id].number for run_id, *_ in some})
        for run_id, bills in _bills(connection, some):
            found[run_id] = _last_bills(bills, dead[run_id], live.get(run_id))
    return found


def _last_bills(bills: Sequence[_Bill], told: LastSnapshot, live: _Live | None) -> LastBills:
    """Return what the bills hold, and how much of it was in flight at the snapshot."""
    used = {} if live is None else dict(live.used)
    step_ns = sum(told.in_flight.values()) if live is None else live.step_ns
    room = dict(told.in_flight)
    billed: dict[int, int] = {}
    rest: dict[int, int] = {}
    for bill in bills:
        # An id may come again; the request that was in flight is the first one.
        left = used.pop(bill.request_id, 0)
        for hour, ns in sorted(bill.hours.items()):
            taken = min(ns, left, room.get(hour, 0))
            left -= taken
            room[hour] = room.get(hour, 0) - taken
            billed[hour] = billed.get(hour, 0) + ns
            rest[hour] = rest.get(hour, 0) + ns - taken
    of_step = 0
    for hour in sorted(rest):
        taken = min(rest[hour], step_ns - of_step, room[hour])
        of_step += taken
        room[hour] -= taken
    return LastBills(
        last_seq=bills[-1].seq,
        count=len(bills),
        billed=billed,
        in_flight={hour: told.in_flight.get(hour, 0) - room[hour] for hour in billed},
        step_ns=of_step,
        finished_at=max(bill.finished_at for bill in bills),
        request_ids=frozenset(bill.request_id for bill in bills),
    )


def _live(connection: Connection, numbers: Mapping[str, int]) -> dict[str, _Live]:
    """Return what was in flight at these snapshots, by run; nothing for those of an old meter."""
    u = live_usage.c
    asked = select(u.run_id, u.number, u.step_ns, u.requests).where(u.run_id.in_(numbers))
    return {
        run_id: _Live({id: used.gpu_time_ns for id, used in live_requests(text).items()}, step_ns)
        for run_id, number, step_ns, text in connection.execute(asked)
        if number == numbers[run_id]
    }


def _bills(
    connection: Connection, ranges: Iterable[tuple[str, int, int]]
) -> Iterator[tuple[str, list[_Bill]]]:
    """Yield the bills of each run with numbers in (low, high], in their order.

    The outer join has a range of each run looked up in the key of the bills.
    """
    columns: list[GivenColumn] = [("run_id", Text()), ("low", BigInteger()), ("high", BigInteger())]
    ranged, r = given_rows("ranges", columns, ranges).c, requests.c
    inside = and_(r.run_id == ranged.run_id, r.seq > ranged.low, r.seq <= ranged.high)
    rows = connection.execute(
        select(
            *(ranged.run_id, r.seq, r.request_id, r.finished_at),
            *(PIECE_HOUR, PIECE_NS),
        )
        .join(requests, inside, isouter=True)
        .join(usage_pieces, PIECES_OF_BILL, isouter=True)
        .order_by(ranged.run_id, r.seq)
    )
    for run_id, of_run in groupby((row for row in rows if row.seq is not None), itemgetter(0)):
        yield run_id, [_bill(seq, list(some)) for seq, some in groupby(of_run, itemgetter(1))]


def _bill(seq: int, rows: Sequence[Sequence[Any]]) -> _Bill:
    """Return a bill by its rows, one for each piece; a bill without a piece has one row."""
    hours = {int(hour): int(ns) for *_, hour, ns in rows if hour is not None}
    return _Bill(seq, rows[0][2], rows[0][3], hours)
