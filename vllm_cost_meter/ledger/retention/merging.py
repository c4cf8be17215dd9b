"""Make two ledgers fit together of which either may have dropped rows, before one gets the rows of
the other.

What the dropped bills of a run add up to cannot be told apart by bill. So for each run one of the
two ledgers must have dropped all that the other has, and its amounts stand; rows of the other that
are in them are left out, with the HTTP rows of their exchanges. Where each ledger dropped bills of
a run that the other did not, no rule could add them up, and the merge is refused.

Invariant: afterwards no bill is in the rows of one ledger and among the dropped ones of either, and
for each run at most one of the two has dropped bills.
"""

from typing import Any

from sqlalchemy import MetaData, Select, Table, and_, delete, or_, select, update
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import Connection

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.retention.known import kept_from_hour
from vllm_cost_meter.ledger.retention.ranges import DroppedNumbers, Ranges, without
from vllm_cost_meter.ledger.schema import (
    dropped_bills,
    dropped_hours,
    dropped_latencies,
    dropped_unknown_energy,
    http_requests,
    open_requests,
    request_energy,
    requests,
    rollup_groups,
    snapshots,
    usage_pieces,
)
from vllm_cost_meter.ledger.tables.replies import REPLY_COLUMNS
from vllm_cost_meter.units.time import NS_PER_HOUR, rfc3339


def fit_together(connection: Connection, schema: str, name: str) -> None:
    """Make this ledger and an attached one fit together; both may change.

    Raises LedgerError if there is no way, and the caller rolls back. `name` is the other's file.
    """
    ours, theirs = _Side(connection, None), _Side(connection, schema)
    here, there = ours.dropped(), theirs.dropped()
    for run_id in sorted(here.keys() | there.keys()):
        mine, other = here.get(run_id, _NONE), there.get(run_id, _NONE)
        if not without(other.ranges(), mine.ranges()):
            theirs.forget(run_id)
            numbers = mine
        elif not without(mine.ranges(), other.ranges()):
            ours.forget(run_id)
            numbers = other
        else:
            raise LedgerError(
                f"{name}: run {run_id}: expected one of the ledgers to have dropped all bills that"
                f" the other one has, got {_shown(without(other.ranges(), mine.ranges()))} dropped"
                f" only there and {_shown(without(mine.ranges(), other.ranges()))} only here; merge"
                " a copy from before rows were dropped, nothing was written"
            )
        for side in (ours, theirs):
            side.leave_out(run_id, numbers.ranges())
    # The other groups are made anew with the sums.
    groups = sqlite.insert(rollup_groups).from_select(*theirs.groups_of_dropped())
    connection.execute(groups.on_conflict_do_nothing())
    kept_from = kept_from_hour(connection)
    if kept_from is not None:
        theirs.leave_out_open(rfc3339(kept_from * NS_PER_HOUR))


def refuse_bills_beyond(connection: Connection) -> None:
    """Raise LedgerError for a dropped bill after its run's last snapshot, which came otherwise.

    How much of it was in flight at the snapshot can be told by its row alone.
    """
    d, s = dropped_bills.c, snapshots.c
    beyond = select(d.run_id, d.last_seq, s.last_seq).join_from(
        dropped_bills, snapshots, and_(s.run_id == d.run_id, s.last_seq < d.last_seq)
    )
    for run_id, seq, last_seq in connection.execute(beyond.limit(1)):
        raise LedgerError(
            f"run {run_id}: expected the last snapshot to count all bills that were dropped, got"
            f" one that counts {last_seq} bills, and bill {seq} dropped; merge a copy from before"
            " rows were dropped, nothing was written"
        )


_NONE = DroppedNumbers()
_SHOWN_MAX = 5


def _shown(ranges: Ranges) -> str:
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    more = ["..."] if len(texts) > _SHOWN_MAX else []
    return f"bills {', '.join([*texts[:_SHOWN_MAX], *more])}"


class _Side:
    """The tables of one of the two ledgers."""

    def __init__(self, connection: Connection, schema: str | None) -> None:
        self._connection = connection
        self._schema = schema

    def _table(self, table: Table) -> Table:
        if self._schema is None:
            return table
        return table.to_metadata(MetaData(), schema=self._schema)

    def dropped(self) -> dict[str, DroppedNumbers]:
        d = self._table(dropped_bills).c
        rows = self._connection.execute(select(d.run_id, d.last_seq, d.rest))
        return {run_id: DroppedNumbers.stored(seq, rest) for run_id, seq, rest in rows}

    def groups_of_dropped(self) -> tuple[list[str], Select[Any]]:
        """Return the columns of a group, and the query for those that dropped bills are in."""
        g = self._table(rollup_groups)
        tables = [self._table(own) for own in (dropped_hours, dropped_unknown_energy)]
        is_needed = or_(*(g.c.group_id.in_(select(table.c.group_id)) for table in tables))
        return g.c.keys(), select(g).where(is_needed)

    def forget(self, run_id: str) -> None:
        """Delete what the dropped bills of a run add up to: the other side has it."""
        for own in (dropped_bills, dropped_latencies):
            table = self._table(own)
            self._connection.execute(delete(table).where(table.c.run_id == run_id))
        g = self._table(rollup_groups).c
        groups = select(g.group_id).where(g.run_id == run_id)
        for own in (dropped_hours, dropped_unknown_energy):
            table = self._table(own)
            self._connection.execute(delete(table).where(table.c.group_id.in_(groups)))

    def leave_out(self, run_id: str, numbers: Ranges) -> None:
        """Delete the rows of dropped bills, and the replies of the exchanges that they were in.

        A reply may stand beside another bill of its exchange: that bill stays, without it.
        """
        r, h = self._table(requests), self._table(http_requests)
        without_reply = {**dict.fromkeys(REPLY_COLUMNS), "ended_at": r.c.finished_at}
        for first, last in numbers:
            mine = and_(r.c.run_id == run_id, r.c.seq.between(first, last))
            ids = select(r.c.http_request_id).where(mine, r.c.http_request_id.is_not(None))
            self._connection.execute(delete(h).where(h.c.http_request_id.in_(ids)))
            beside = r.c.http_request_id.in_(ids), r.c.reply_status.is_not(None)
            self._connection.execute(update(r).where(*beside).values(without_reply))
            for own in (request_energy, usage_pieces, requests):
                table = self._table(own)
                gone = table.c.run_id == run_id, table.c.seq.between(first, last)
                self._connection.execute(delete(table).where(*gone))

    def leave_out_open(self, before: str) -> None:
        """Delete open requests that may have been billed by a bill that was dropped."""
        o = self._table(open_requests)
        self._connection.execute(delete(o).where(o.c.started_at < before))
