"""Put the rows of old requests into an archive, and drop what the archive holds.

A file of the archive has the rows of some thousand exchanges whose bills ended on one UTC day. They
are read in a transaction that locks nobody out, written, and read again. Then these exchanges are
dropped in small transactions, each one only if it still has the bills and the HTTP row that went
into the file. One that got a late one goes into another file, whole, and is dropped then. So a row
may be in two files, and is the same in both.

Invariant: a row is dropped only if a file holds it that was read again.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Engine, Table, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.database import in_one_state, open_database, writing
from vllm_cost_meter.ledger.retention.dropping import (
    BILLS_AT_ONCE,
    FIRST_REPLY,
    REPLIES_AT_ONCE,
    BillPlace,
    DroppedCounts,
    Whole,
    all_of,
    delete_replies,
    drop_exchanges,
    droppable,
    exchanges_of,
    giving_way,
    is_unbilled,
    keys_by_run,
    old_bills,
    old_replies,
    say_kept_from,
)
from vllm_cost_meter.ledger.retention.parquet import ParquetArchive
from vllm_cost_meter.ledger.rollups.upserts import in_chunks, lock_sums
from vllm_cost_meter.ledger.schema import (
    http_requests,
    request_energy,
    requests,
    usage_pieces,
)
from vllm_cost_meter.ledger.tables.replies import replies

# So many bills, or HTTP rows without one, are in a file at most: some 80 MB while it is written.
ROWS_IN_A_FILE = 10_000
_DATE_CHARS = len("2026-08-01")

_Rows = dict[Table, list[tuple[Any, ...]]]


def archive_and_drop(engine: Engine, before_hour: int, archive: ParquetArchive) -> DroppedCounts:
    """Drop all rows from before an hour that may go, each once it is in the archive.

    Raises LedgerError if the archive or the ledger cannot be written; what was dropped before is
    in the archive.
    """
    return all_of(archive_steps(engine, before_hour, archive))


def archive_steps(
    engine: Engine, before_hour: int, archive: ParquetArchive
) -> Iterator[DroppedCounts]:
    """Archive and drop bit by bit; yield how many rows went at each step.

    Raises LedgerError if the archive cannot be written, and what the database raises.
    """
    for day, exchanges, rows in _exchanges(engine, before_hour):
        archive.keep(day, rows)
        for at in range(0, len(exchanges), BILLS_AT_ONCE):
            yield _drop_same(engine, before_hour, exchanges[at : at + BILLS_AT_ONCE])
    for day, ids, rows in _replies(engine, before_hour):
        archive.keep(day, rows)
        for at in range(0, len(ids), REPLIES_AT_ONCE):
            yield _drop_unbilled(engine, before_hour, ids[at : at + REPLIES_AT_ONCE])


class ArchivingPass:
    """A pass over the rows that ended before an hour, in a thread: a file takes seconds.

    It has a connection of its own to the ledger. A process that ends does not wait for it: what is
    under way is rolled back, and done again by the next one.
    """

    is_waiting = True

    def __init__(self, engine: Engine, before_hour: int, archive: ParquetArchive) -> None:
        """`engine` tells which ledger it is."""
        self.engine = engine
        self.before_hour = before_hour
        self.counts = DroppedCounts()
        self._error: Exception | None = None
        self._thread = threading.Thread(
            target=self._run, args=(archive,), name="cost-meter-archive", daemon=True
        )
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def step(self) -> None:
        """Raise what went wrong, once it has ended."""
        if self.is_done and self._error is not None:
            raise self._error

    def _run(self, archive: ParquetArchive) -> None:
        try:
            engine = open_database(
                self.engine.url.render_as_string(hide_password=False), create=False
            )
            try:
                for some in giving_way(archive_steps(engine, self.before_hour, archive)):
                    self.counts += some
            finally:
                engine.dispose()
        except Exception as error:  # noqa: BLE001 - whoever asks for the next step gets it
            self._error = error


def _exchanges(engine: Engine, before_hour: int) -> Iterator[tuple[str, list[Whole], _Rows]]:
    """Yield exchanges that may go, with their rows, by the day of the first bill that was found."""
    place = BillPlace()
    while True:
        with in_one_state(engine).connect() as connection, connection.begin():
            found = old_bills(connection, before_hour, place, ROWS_IN_A_FILE)
            if not found:
                return
            day = found[0].ended_at[:_DATE_CHARS]
            of_day = [bill for bill in found if bill.ended_at.startswith(day)]
            exchanges = droppable(connection, before_hour, *exchanges_of(of_day))
            rows = _rows_of(connection, exchanges)
        last = of_day[-1]
        place = BillPlace(last.ended_at, last.run_id, last.seq)
        if exchanges:
            yield day, exchanges, rows


def _rows_of(connection: Connection, exchanges: Sequence[Whole]) -> _Rows:
    """Return all rows of exchanges, by table."""
    keys = keys_by_run((part.run_id, part.seq) for whole in exchanges for part in whole.parts)
    rows: _Rows = {
        table: [
            tuple(row)
            for run_id, seqs in keys.items()
            for some in in_chunks(seqs)
            for row in connection.execute(
                select(table)
                .where(table.c.run_id == run_id, table.c.seq.in_(some))
                .order_by(*table.primary_key)
            )
        ]
        for table in (requests, usage_pieces, request_energy)
    }
    ids = [whole.id for whole in exchanges if whole.id is not None and whole.reply is not None]
    return {**rows, replies: _reply_rows(connection, ids)}


def _reply_rows(connection: Connection, ids: Sequence[str]) -> list[tuple[Any, ...]]:
    h = replies.c.http_request_id
    return [
        tuple(row)
        for some in in_chunks(ids)
        for row in connection.execute(select(replies).where(h.in_(some)).order_by(h))
    ]


def _drop_same(engine: Engine, before_hour: int, archived: Sequence[Whole]) -> DroppedCounts:
    """Drop those exchanges that still have the rows that are in the archive, and no other."""
    known = {_keys_of(whole) for whole in archived}
    ids = [whole.id for whole in archived if whole.id is not None]
    alone = [(part.run_id, part.seq) for w in archived if w.id is None for part in w.parts]
    with writing(engine).begin() as connection:
        lock_sums(connection)
        found = droppable(connection, before_hour, ids, alone)
        same = [whole for whole in found if _keys_of(whole) in known]
        if same:
            say_kept_from(connection, before_hour)
        return drop_exchanges(connection, same)


def _keys_of(whole: Whole) -> tuple[Any, ...]:
    parts = sorted((part.run_id, part.seq) for part in whole.parts)
    return (whole.id, whole.reply is not None, *parts)


def _replies(engine: Engine, before_hour: int) -> Iterator[tuple[str, list[str], _Rows]]:
    """Yield HTTP requests without a bill by the day on which they ended, with their rows."""
    after = FIRST_REPLY
    while True:
        with in_one_state(engine).connect() as connection, connection.begin():
            found = old_replies(connection, before_hour, after, ROWS_IN_A_FILE)
            if not found:
                return
            day = found[0][0][:_DATE_CHARS]
            of_day = [(at, id) for at, id in found if at.startswith(day)]
            ids = [id for _, id in of_day]
            rows: _Rows = {replies: _reply_rows(connection, ids)}
        after = of_day[-1]
        yield day, ids, rows


def _drop_unbilled(engine: Engine, before_hour: int, ids: Sequence[str]) -> DroppedCounts:
    h = http_requests.c.http_request_id
    with writing(engine).begin() as connection:
        lock_sums(connection)
        still = [
            id
            for some in in_chunks(ids)
            for (id,) in connection.execute(select(h).where(h.in_(some), is_unbilled()))
        ]
        if still:
            say_kept_from(connection, before_hour)
        delete_replies(connection, still)
    return DroppedCounts(0, len(still))
