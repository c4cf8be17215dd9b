"""What a sender without rows sends in place of them: sums, and what no sum can say of this moment.

Sums tell all that a snapshot counts. Two things are known by rows alone, and both are few:

- The *tail* of a run: its bills beyond its latest snapshot. A report at that snapshot takes them
  off the sums again; when the engine died, they are its last ones.
- Whose the requests are that run: the totals of a run have them by id only.

Both are sent as states: with each shipment in which they change, all of them, and the latest one
counts. A new sender process finds the tails in the fleet, and the open requests in the ledger.

Invariant: the tail in a shipment has each bill that the fleet has of a run and no snapshot there
counts, if the run has a snapshot.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Self

from sqlalchemy import Table, and_, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.fleet.changes import RowTuple, TableRows, unpacked
from vllm_cost_meter.ledger.fleet.cleaning import storable
from vllm_cost_meter.ledger.fleet.outbox import Sender
from vllm_cost_meter.ledger.fleet.schema import TOLD, run_senders, tails, told_open_requests
from vllm_cost_meter.ledger.rows import live_requests
from vllm_cost_meter.ledger.tables.outbox import outbox
from vllm_cost_meter.ledger.tables.packed import InstantColumn, instant_us
from vllm_cost_meter.ledger.tables.pieces import PIECES_OF_BILL

# Of the ledger's tables these are not sent.
LEFT_OUT = frozenset(
    table.name
    for table in (
        *(schema.requests, schema.usage_pieces, schema.http_requests, schema.request_energy),
        *(schema.open_requests, schema.dropped_bills, schema.row_cutoffs),
        *(schema.dropped_hours, schema.dropped_latencies, schema.dropped_unknown_energy),
    )
)
# A run without a snapshot has no tail. If it gets one, it has had fewer bills than this.
_BEFORE_SNAPSHOT_MAX = 10_000

_Row = dict[str, Any]


class _Tail:
    """The bills of a run that its latest snapshot does not count, by number, and their pieces."""

    def __init__(self, last_seq: int | None = None) -> None:
        # Of the latest snapshot; None before the first one.
        self.last_seq = last_seq
        self.bills: dict[int, _Row] = {}
        self.pieces: dict[int, dict[int, _Row]] = {}
        self.has_changed = False

    def add(self, bill: _Row) -> None:
        if self.last_seq is None and len(self.bills) >= _BEFORE_SNAPSHOT_MAX:
            return
        if bill["seq"] > (self.last_seq or 0):
            self.bills[bill["seq"]] = bill
            self.has_changed = True

    def add_piece(self, piece: _Row) -> None:
        if piece["seq"] in self.bills:
            self.pieces.setdefault(piece["seq"], {})[piece["hour"]] = piece
            self.has_changed = True

    def count_up_to(self, last_seq: int) -> None:
        """Take a snapshot's word that it counts the bills up to a number."""
        if self.last_seq is not None and last_seq <= self.last_seq:
            return
        self.has_changed |= self.last_seq is None
        self.last_seq = last_seq
        for seq in [seq for seq in self.bills if seq <= last_seq]:
            del self.bills[seq]
            self.pieces.pop(seq, None)
            self.has_changed = True


class Rowless:
    """Makes what is sent of the shipments of one sender. Used by one thread."""

    def __init__(self) -> None:
        self._tails: dict[str, _Tail] = {}
        # By vLLM's internal id; and the ids of those that run, by run.
        self._opened: dict[str, _Row] = {}
        self._live: dict[str, Sequence[str]] = {}

    @classmethod
    def recovered(cls, fleet: Connection, ledger: Connection, sender: Sender) -> Self:
        """Return it as it was after the last shipment of a sender."""
        found = cls()
        s, told, t = run_senders.c, TOLD[schema.snapshots.name].c, tails.c
        mine = and_(s.run_id == told.run_id, s.sender_id == sender.sender_id)
        counted = select(told.run_id, told.last_seq).join(run_senders, mine)
        latest = counted.order_by(told.run_id, told.number.desc()).distinct(told.run_id)
        for run_id, last_seq in fleet.execute(latest):
            found._tails[run_id] = _Tail(int(last_seq))
        own = select(t.run_id, t.bills, t.pieces).where(t.sender_id == sender.sender_id)
        for _, bills, pieces in fleet.execute(
            own.order_by(t.run_id, t.number.desc()).distinct(t.run_id)
        ):
            found._add(json.loads(bills), json.loads(pieces))
        found._add_before_snapshot(ledger, _waiting_bills(ledger, sender.sent_number))
        for tail in found._tails.values():
            tail.has_changed = False
        found._take_running(ledger)
        return found

    @classmethod
    def of_ledger(cls, ledger: Connection) -> Self:
        """Return it as a ledger's transaction shows it, and all of it still to be sent."""
        found = cls()
        s, r, p = schema.snapshots.c, schema.requests, schema.usage_pieces
        for run_id, last_seq in ledger.execute(select(s.run_id, s.last_seq)):
            found._tails[run_id] = _Tail(int(last_seq))
        beyond = and_(s.run_id == r.c.run_id, r.c.seq > s.last_seq)
        bills = _stored_rows(ledger, select(r).join(schema.snapshots, beyond), r)
        pieces = select(p).join(r, PIECES_OF_BILL).join(schema.snapshots, beyond)
        found._add(bills, _stored_rows(ledger, pieces, p))
        found._add_before_snapshot(ledger, frozenset())
        found._take_running(ledger)
        return found

    def states(self) -> list[TableRows]:
        """Return what is still to be sent, with whose the requests are that run."""
        return [*self._changed_tails(), self._told_open()]

    def _add_before_snapshot(
        self, ledger: Connection, waiting: Collection[tuple[str, int]]
    ) -> None:
        """Add the bills of runs without a snapshot, but those that wait in the outbox."""
        r, p = schema.requests, schema.usage_pieces
        known = [run_id for run_id, tail in self._tails.items() if tail.last_seq is not None]
        runs = ledger.execute(select(schema.bill_sums.c.run_id)).scalars().all()
        for run_id in sorted(set(runs).difference(known)):
            mine = r.c.run_id == run_id, r.c.seq <= _BEFORE_SNAPSHOT_MAX
            bills = _stored_rows(ledger, select(r).where(*mine), r)
            pieces = _stored_rows(ledger, select(p).join(r, PIECES_OF_BILL).where(*mine), p)
            self._add((one for one in bills if (run_id, one["seq"]) not in waiting), pieces)

    def _take_running(self, ledger: Connection) -> None:
        u = schema.live_usage.c
        for run_id, text in ledger.execute(select(u.run_id, u.requests)):
            self._live[run_id] = tuple(live_requests(text))
        self._open(_stored_rows(ledger, select(schema.open_requests), schema.open_requests))

    def sent(self, tables: Sequence[TableRows]) -> list[TableRows]:
        """Return what is sent of the merged rows of a shipment: no rows of requests."""
        by_name = {name: _dicts(columns, rows) for name, columns, rows in tables}
        empty: list[_Row] = []
        self._open(by_name.get(schema.open_requests.name, empty))
        bills = by_name.get(schema.requests.name, empty)
        for bill in bills:
            self._opened.pop(bill["request_id"], None)
        self._add(bills, by_name.get(schema.usage_pieces.name, empty))
        for snapshot in by_name.get(schema.snapshots.name, empty):
            self._tail(snapshot["run_id"]).count_up_to(snapshot["last_seq"])
        for row in by_name.get(schema.live_usage.name, empty):
            self._live[row["run_id"]] = tuple(live_requests(row["requests"]))
        return [*(table for table in tables if table.table not in LEFT_OUT), *self.states()]

    def _tail(self, run_id: str) -> _Tail:
        return self._tails.setdefault(run_id, _Tail())

    def _add(self, bills: Iterable[_Row], pieces: Iterable[_Row]) -> None:
        for bill in bills:
            self._tail(bill["run_id"]).add(bill)
        for piece in pieces:
            self._tail(piece["run_id"]).add_piece(piece)

    def _open(self, rows: Iterable[_Row]) -> None:
        for row in rows:
            self._opened[row["request_id"]] = row

    def _changed_tails(self) -> list[TableRows]:
        rows: list[RowTuple] = []
        for run_id, tail in self._tails.items():
            if tail.has_changed and tail.last_seq is not None:
                pieces = [piece for of_bill in tail.pieces.values() for piece in of_bill.values()]
                rows.append((run_id, _text(tail.bills.values()), _text(pieces)))
                tail.has_changed = False
        return [TableRows(tails.name, ("run_id", "bills", "pieces"), rows)] if rows else []

    def _told_open(self) -> TableRows:
        ids = [id for of_run in self._live.values() for id in of_run]
        opened = [self._opened[id] for id in ids if id in self._opened]
        return TableRows(told_open_requests.name, ("opened",), [(_text(opened),)])


def _waiting_bills(ledger: Connection, sent_number: int) -> frozenset[tuple[str, int]]:
    """Return the bills that wait in the outbox, by run and number."""
    content = ledger.execute(select(outbox.c.content).where(outbox.c.number > sent_number))
    return frozenset(
        (row[columns.index("run_id")], row[columns.index("seq")])
        for packed in content.scalars()
        for name, columns, rows in unpacked(packed)
        if name == schema.requests.name
        for row in rows
    )


def _text(rows: Iterable[_Row]) -> str:
    """Return rows as a JSON text that PostgreSQL can read."""
    clean = [
        {name: storable(value) if isinstance(value, str) else value for name, value in row.items()}
        for row in rows
    ]
    return json.dumps(clean, separators=(",", ":"))


def _dicts(columns: Sequence[str], rows: Iterable[RowTuple]) -> list[_Row]:
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _stored_rows(connection: Connection, asked: Any, table: Table) -> list[_Row]:
    """Return rows by name with instants as the outbox has them, in microseconds."""
    instants = {c.name for c in table.c if isinstance(c.type, InstantColumn)}
    return [
        {
            name: instant_us(value) if name in instants and value is not None else value
            for name, value in _named(row).items()
        }
        for row in connection.execute(asked)
    ]


def _named(row: Any) -> Mapping[str, Any]:
    named: Mapping[str, Any] = row._asdict()
    return named
