"""What is known of dropped rows: from which hour on rows are kept, and which bills were dropped.

A record of a dropped row may come again: by an old journal, or a copy that is merged. Its bill is
known by its number, and must not be counted twice. So whoever writes records asks here first:

- A bill that was dropped is left out, with its energy. One that was not is written, however old.
- The HTTP row of an exchange is left out if one of its bills comes with it and was dropped. Without
  a bill it may come back: it adds nothing, and goes at the next time.
- An open request that began before rows are kept is left out: its bill may have been dropped.

A bill that the ledger gets for the first time after the HTTP row of its exchange was dropped counts
in full; its exchange is not counted as a request again.

Invariant: no bill is both in `requests` and among the dropped ones.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from sqlalchemy import Table, func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.retention.ranges import DroppedNumbers
from vllm_cost_meter.ledger.rollups.upserts import lock_sums
from vllm_cost_meter.ledger.rows import TableRow
from vllm_cost_meter.ledger.schema import dropped_bills, row_cutoffs
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, OpenRequest
from vllm_cost_meter.units.time import NS_PER_HOUR

_RUNS_AT_ONCE = 500
NONE_DROPPED = DroppedNumbers()


def kept_from_hour(connection: Connection, table: Table = row_cutoffs) -> int | None:
    """Return the hour, since the epoch, from which on rows are kept; None if all are.

    A fleet has a table of another name for what was dropped there.
    """
    hour = connection.execute(select(func.max(table.c.kept_from_hour))).scalar()
    return None if hour is None else int(hour)


def dropped_by_run(
    connection: Connection, run_ids: Iterable[str] | None = None, table: Table = dropped_bills
) -> dict[str, DroppedNumbers]:
    """Return which bills of these runs were dropped, or of all; runs without any are left out.

    A fleet has a table of another name for what was dropped there.
    """
    d = table.c
    asked = select(d.run_id, d.last_seq, d.rest)
    queries = [asked]
    if run_ids is not None:
        left = iter(sorted(set(run_ids)))
        queries = [asked.where(d.run_id.in_(some)) for some in _chunks(left)]
    return {
        run_id: DroppedNumbers.stored(seq, rest)
        for query in queries
        for run_id, seq, rest in connection.execute(query)
    }


def _chunks(left: Iterator[str]) -> Iterator[list[str]]:
    while some := list(islice(left, _RUNS_AT_ONCE)):
        yield some


@dataclass(frozen=True, slots=True)
class Unknown:
    """The records of a batch that are not those of dropped rows."""

    parts: Sequence[EngineRequest]
    replies: Sequence[HttpRequest]
    opened: Sequence[OpenRequest]
    numbers: Mapping[str, DroppedNumbers]

    def energies(self, rows: Sequence[TableRow]) -> list[TableRow]:
        """Return the rows of `request_energy` that are not those of dropped bills."""
        of = self.numbers
        return [row for row in rows if not of.get(row["run_id"], NONE_DROPPED).has(row["seq"])]


def without_dropped(
    connection: Connection,
    parts: Sequence[EngineRequest],
    replies: Sequence[HttpRequest],
    opened: Sequence[OpenRequest],
    snapshot_runs: Collection[str],
) -> Unknown:
    """Return a batch without the records of rows that were dropped."""
    if parts or replies:
        lock_sums(connection)
    kept_from = kept_from_hour(connection)
    if kept_from is None:
        return Unknown(parts, replies, opened, {})
    run_ids = {part.bill.run_id for part in parts} | set(snapshot_runs)
    numbers = dropped_by_run(connection, run_ids)
    again = [
        part for part in parts if numbers.get(part.bill.run_id, NONE_DROPPED).has(part.bill.seq)
    ]
    if again:
        keys = {(part.bill.run_id, part.bill.seq) for part in again}
        gone = {part.http_request_id for part in again}
        parts = [part for part in parts if (part.bill.run_id, part.bill.seq) not in keys]
        replies = [reply for reply in replies if reply.http_request_id not in gone]
    since_ns = kept_from * NS_PER_HOUR
    opened = [request for request in opened if request.started_at_ns >= since_ns]
    return Unknown(parts, replies, opened, numbers)
