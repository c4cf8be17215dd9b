"""Batches against real SQLite files: twice, in any order, with bad records, locked, full."""

import contextlib
import gc
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from tests.support.builders import HOUR, T0, make_bill, make_part, make_snapshot
from tests.support.ledger_writer import LedgerWriter
from vllm_cost_meter.ledger.batches import BatchWriter
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, Price, Usage
from vllm_cost_meter.records.snapshot import ClassTotals, Snapshot

HOURS = "SELECT hour, idle_ns FROM engine_hours ORDER BY hour"


def part(seq: int, run_id: str = "run", ns: int = 100, **changes: object) -> EngineRequest:
    bill = make_bill(
        run_id=run_id,
        seq=seq,
        request_id=f"internal-{run_id}-{seq}",
        pieces=(UsagePiece(HOUR, ns, 2 * ns, 8, 5),),
    )
    return make_part(bill, cost_nanousd=7, **changes)


def http(name: str) -> HttpRequest:
    return HttpRequest(
        name, None, None, Owner("alice"), "m", "/v1/completions", 200, False, Usage(10, 2, 5),
        300, 7, T0, T0 + 5,
    )  # fmt: skip


def snapshot(number: int, run_id: str = "run", **changes: object) -> Snapshot:
    return make_snapshot(number=number, run_id=run_id, **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def writer(path: Path):
    writer = LedgerWriter(f"sqlite:///{path}")
    yield writer
    writer.close()
    gc.collect()  # an unclosed connection would be a warning, and warnings are errors


def rows(path: Path, query: str) -> list[tuple]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def test_a_record_is_in_the_file_once_it_is_written(writer, path):
    writer.commit(part(1), http("http-run-1")).result(5)
    assert rows(path, "SELECT seq, tenant, gpu_time_ns, cost_nanousd FROM requests") == [
        (1, "alice", 300, 7)
    ]
    assert rows(path, "SELECT hour, prefill_ns, decode_ns FROM requests") == [(HOUR, 100, 200)]
    assert rows(path, "SELECT status, cost_nanousd FROM replies") == [(200, 7)]


def test_a_replayed_bill_is_written_once(writer, path):
    for _ in range(3):
        writer.commit(part(1), part(1), http("h"), http("h")).result(5)
    assert rows(path, "SELECT count(*), sum(gpu_time_ns) FROM requests") == [(1, 300)]
    assert rows(path, "SELECT count(*) FROM replies") == [(1,)]


def test_a_snapshot_gives_way_to_a_newer_one_only(writer, path):
    for number in (2, 1, 3, 3, 2):
        writer.commit(snapshot(number)).result(5)
    assert rows(path, "SELECT number, idle_ns FROM snapshots") == [(3, 30)]
    assert rows(path, "SELECT hour, number, idle_ns FROM engine_hours") == [(HOUR, 3, 30)]
    assert rows(path, "SELECT run_id, price_id FROM runs") == [("run", None)]


def test_an_older_snapshot_still_brings_hours_that_the_newer_did_not(writer, path):
    writer.commit(snapshot(2)).result(5)
    old = snapshot(1, hours={HOUR: ClassTotals(idle=1), HOUR - 1: ClassTotals(idle=4)})
    writer.commit(old).result(5)
    assert rows(path, "SELECT hour, idle_ns FROM engine_hours ORDER BY hour") == [
        (HOUR - 1, 4),
        (HOUR, 20),
    ]


def test_the_price_is_written_once_and_a_run_names_it(path):
    price = Price("p1", "2.50", "settings", T0)
    for number in (1, 2):
        writer = LedgerWriter(f"sqlite:///{path}", price_of=lambda _: price)
        writer.commit(snapshot(number))
        writer.close()
    assert rows(path, "SELECT price_id, usd_per_gpu_hour FROM prices") == [("p1", "2.50")]
    assert rows(path, "SELECT price_id FROM runs") == [("p1",)]


@pytest.mark.parametrize(
    "bad",
    [
        part(2, tenant=None),
        part(2, ns=2**63),
        part(2, tenant="\ud800"),
        part(2, tenant=object()),
        part(2, started_at_ns=10**30),
        part(2, latencies=None),
        "not a record",
    ],
)
def test_a_bad_record_is_dropped_alone_and_counted(writer, path, bad):
    batches = BatchWriter(writer.url)
    (refused,) = batches.write([part(1), bad, part(3)])
    batches.drop()
    assert refused.record is bad
    assert rows(path, "SELECT seq FROM requests") == [(1,), (3,)]


def test_a_record_that_fails_by_an_unknown_error_is_found_and_the_others_are_written(writer, path):
    writer.commit(http("h0"))
    _let_fail(path, "bad")
    batches = BatchWriter(writer.url)
    # The bad one alone may be the fault of the database: nothing is given up.
    for _ in range(2):
        with pytest.raises(OperationalError, match="malformed JSON"):
            batches.write([http("bad")])
    (refused,) = batches.write([http("bad"), *[http(f"h{number}") for number in range(1, 9)]])
    batches.drop()
    assert "malformed JSON" in str(refused.error)
    assert refused.record == http("bad")
    assert len(rows(path, "SELECT 1 FROM replies")) == 9


def _let_fail(path: Path, http_request_id: str) -> None:
    """Have the ledger refuse a record by an error that says nothing of whose fault it is."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "CREATE TRIGGER refuse BEFORE INSERT ON http_requests"
            f" WHEN new.http_request_id = '{http_request_id}'"
            " BEGIN SELECT json('{'); END"
        )


def test_many_bad_records_are_found_one_by_one(writer, path):
    batches = BatchWriter(writer.url)
    bad = batches.write([*[part(seq, ns=2**63) for seq in range(2, 60)], part(1)])
    batches.drop()
    assert [each.record.bill.seq for each in bad] == list(range(2, 60))
    assert rows(path, "SELECT seq FROM requests") == [(1,)]


def test_a_locked_ledger_writes_nothing_and_the_same_batch_can_be_written_later(writer, path):
    writer.commit(part(1))
    batches = BatchWriter(writer.url)
    more = [part(2), part(3), *map(snapshot, (1, 2, 3))]
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as blocker:
        blocker.execute("BEGIN EXCLUSIVE")
        with pytest.raises(OperationalError, match="locked"):
            batches.write(more)
    assert batches.write(more) == []
    batches.drop()
    assert rows(path, "SELECT count(*) FROM requests") == [(3,)]
    assert rows(path, "SELECT number FROM snapshots") == [(3,)]


def test_a_full_disk_writes_nothing_of_a_batch(path):
    """`max_page_count` makes SQLite say what a full disk makes it say."""
    full = [True]

    def open_small(url: str, **options: float):
        engine = open_database(url, **options)
        if full[0]:
            from sqlalchemy import event

            @event.listens_for(engine, "connect")
            def _small(connection, _record):
                connection.execute("PRAGMA max_page_count=1")  # clamped to the present size

            engine.dispose()
        return engine

    batches = BatchWriter(f"sqlite:///{path}", open_=open_small)
    batch = [part(seq) for seq in range(1, 2001)]
    for _ in range(2):
        with pytest.raises(OperationalError, match="full"):
            batches.write(batch)
        assert rows(path, "SELECT count(*) FROM requests") == [(0,)]
    full[0] = False
    assert batches.write(batch) == []
    batches.drop()
    assert rows(path, "SELECT count(*) FROM requests") == [(2000,)]


def test_what_is_written_beside_a_batch_is_in_its_transaction(path):
    batches = BatchWriter(f"sqlite:///{path}")

    def fails(_connection, _bad) -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        batches.write([part(1)], fails)
    assert rows(path, "SELECT count(*) FROM requests") == [(0,)]
    batches.drop()


def test_a_commit_to_the_disk_waits_for_it_and_the_next_one_does_not(path):
    batches = BatchWriter(f"sqlite:///{path}")
    seen = []

    def look(connection, _bad) -> None:
        seen.append(connection.exec_driver_sql("PRAGMA synchronous").scalar())

    for to_disk in (False, True, False):
        batches.write([part(1)], look, to_disk=to_disk)
    batches.drop()
    assert seen == [1, 2, 1]


@pytest.mark.parametrize(
    "away", ["ALTER TABLE snapshots RENAME TO away", "ALTER TABLE snapshots RENAME busy_ns TO away"]
)
def test_a_table_that_is_not_there_is_waited_for_and_costs_no_record(writer, path, away):
    """Also where other records of the batch could be written: it is no fault of the one."""
    batches = BatchWriter(writer.url)
    batches.opened()
    bill = part(1)
    state = make_snapshot(last_seq=1, billed_ns=300)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(away)
    with pytest.raises(OperationalError, match="no such table|no column named"):
        batches.write([bill, state])
    assert rows(path, "SELECT count(*) FROM requests") == [(0,)]
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        back = "away RENAME TO snapshots" if "TABLE snapshots RENAME TO" in away else None
        connection.execute(f"ALTER TABLE {back or 'snapshots RENAME away TO busy_ns'}")
    assert not batches.write([bill, state])
    batches.drop()
    assert rows(path, "SELECT count(*) FROM requests") == [(1,)]
    assert rows(path, "SELECT count(*) FROM snapshots") == [(1,)]
