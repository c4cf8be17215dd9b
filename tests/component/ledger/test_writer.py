"""The writer against real SQLite files, with the database locked, full, broken and killed."""

import contextlib
import gc
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from tests.support.builders import HOUR, T0, make_bill, make_part, make_snapshot
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.writer import LedgerWriter
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
    writer.start()
    yield writer
    writer.close(5)
    assert writer.queued == writer.committed + writer.dropped
    gc.collect()  # an unclosed connection would be a warning, and warnings are errors


def rows(path: Path, query: str) -> list[tuple]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def test_a_committed_record_is_in_the_file_when_the_future_is_done(writer, path):
    writer.commit(part(1), http("http-run-1")).result(5)
    assert rows(path, "SELECT seq, tenant, gpu_time_ns, cost_usd FROM requests") == [
        (1, "alice", 300, "0.000000007")
    ]
    assert rows(path, "SELECT hour, prefill_ns, decode_ns FROM usage_pieces") == [(HOUR, 100, 200)]
    assert rows(path, "SELECT status, cost_nanousd FROM http_requests") == [(200, 7)]
    assert (writer.queued, writer.committed, writer.dropped) == (2, 2, 0)
    assert writer.last_commit_ns > 0


def test_a_put_record_is_written_soon_without_being_asked_for(writer, path):
    writer.commit().result(5)  # the ledger is open
    writer.put(part(1))
    deadline = time.monotonic() + 5
    while writer.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert rows(path, "SELECT seq FROM requests") == [(1,)]


def test_a_commit_takes_along_all_that_was_put_before(path):
    writer = LedgerWriter(f"sqlite:///{path}", gather_s=60)
    writer.start()
    writer.put(*(part(seq) for seq in range(1, 51)))
    writer.commit(part(51)).result(5)
    assert rows(path, "SELECT count(*) FROM requests") == [(51,)]
    writer.close(5)


def test_a_replayed_bill_is_written_once(writer, path):
    for _ in range(3):
        writer.commit(part(1), part(1), http("h"), http("h")).result(5)
    assert rows(path, "SELECT count(*), sum(gpu_time_ns) FROM requests") == [(1, 300)]
    assert rows(path, "SELECT count(*) FROM usage_pieces") == [(1,)]
    assert rows(path, "SELECT count(*) FROM http_requests") == [(1,)]


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
        writer.start()
        writer.commit(snapshot(number)).result(5)
        writer.close(5)
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
    writer.put(part(1))
    refused = writer.commit(bad)
    writer.commit(part(3)).result(5)
    with pytest.raises(Exception, match=r"."):
        refused.result(5)
    assert rows(path, "SELECT seq FROM requests") == [(1,), (3,)]
    assert rows(path, "SELECT seq FROM usage_pieces") == [(1,), (3,)]
    assert (writer.committed, writer.dropped, writer.failures) == (2, 1, 0)


def test_a_record_that_fails_by_an_unknown_error_is_named_and_the_others_are_written(
    writer, path, caplog
):
    writer.commit(http("h0")).result(5)
    _let_fail(path, "bad")
    # The bad one alone may be the fault of the database: nothing is given up.
    refused = writer.commit(http("bad"))
    with pytest.raises(TimeoutError):
        refused.result(0.3)
    assert writer.dropped == 0
    writer.put(*[http(f"h{number}") for number in range(1, 9)])
    with pytest.raises(OperationalError, match="malformed JSON"):
        refused.result(5)
    assert len(rows(path, "SELECT 1 FROM http_requests")) == 9
    assert (writer.committed, writer.dropped) == (9, 1)
    assert "cannot take the HttpRequest bad, dropped: OperationalError: malformed" in caplog.text


def _let_fail(path: Path, http_request_id: str) -> None:
    """Have the ledger refuse a record by an error that says nothing of whose fault it is."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "CREATE TRIGGER refuse BEFORE INSERT ON http_requests"
            f" WHEN new.http_request_id = '{http_request_id}'"
            " BEGIN SELECT json('{'); END"
        )


def test_bad_records_of_one_kind_do_not_use_up_the_log(writer, path, caplog):
    writer.put(*[part(seq, ns=2**63) for seq in range(2, 60)])
    writer.commit(part(1)).result(5)
    assert writer.dropped == 58
    assert caplog.text.count("cannot take") == 1


def test_a_locked_ledger_delays_commits_and_loses_nothing(writer, path):
    writer.commit(part(1)).result(5)
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    futures = [writer.commit(part(seq)) for seq in range(2, 5)]
    snapshots = [writer.commit(snapshot(number)) for number in (1, 2)]
    deadline = time.monotonic() + 10
    while not writer.failures and time.monotonic() < deadline:
        time.sleep(0.02)
    more = snapshot(3, hours={HOUR + 1: ClassTotals(idle=1)})
    futures.append(writer.commit(more))
    assert "locked" in writer.last_error
    assert not any(future.done() for future in (*futures, *snapshots))
    blocker.execute("COMMIT")
    blocker.close()
    for future in (*futures, *snapshots):
        future.result(10)
    assert rows(path, "SELECT count(*) FROM requests") == [(4,)]
    assert rows(path, "SELECT number FROM snapshots") == [(3,)]
    assert rows(path, "SELECT hour, idle_ns FROM engine_hours ORDER BY hour") == [
        (HOUR, 20),
        (HOUR + 1, 1),
    ]
    assert writer.last_error is None


def test_a_full_disk_delays_commits_and_loses_nothing(path, caplog):
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

    writer = LedgerWriter(f"sqlite:///{path}", open_=open_small)
    writer.start()
    future = writer.commit(*(part(seq) for seq in range(1, 2001)))
    deadline = time.monotonic() + 10
    while writer.failures < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "full" in writer.last_error
    assert not future.done()
    full[0] = False
    future.result(10)
    writer.close(5)
    assert rows(path, "SELECT count(*) FROM requests") == [(2000,)]
    told = [record for record in caplog.records if "full" in record.message]
    assert len(told) == 1  # each distinct error once


def test_beyond_the_bound_the_oldest_records_are_dropped_and_counted(tmp_path):
    (tmp_path / "file").write_text("")  # where a folder should be: the ledger never opens
    writer = LedgerWriter(f"sqlite:///{tmp_path}/file/ledger.db", max_records=10)
    writer.start()
    oldest = writer.commit(part(1))
    for seq in range(2, 12):
        writer.put(part(seq))
    with pytest.raises(LedgerError, match="dropped"):
        oldest.result(5)
    assert (writer.waiting, writer.dropped) == (10, 1)
    youngest = writer.commit(part(12))
    writer.close(0.2)
    with pytest.raises(LedgerError, match="closed"):
        youngest.result(5)
    assert (writer.queued, writer.committed, writer.dropped) == (12, 0, 12)
    assert writer.failures > 0


def test_close_writes_what_waits(path):
    writer = LedgerWriter(f"sqlite:///{path}", gather_s=60)
    writer.start()
    writer.put(*(part(seq) for seq in range(1, 101)))
    writer.close(5)
    assert rows(path, "SELECT count(*) FROM requests") == [(100,)]


def test_a_closed_or_unstarted_writer_refuses_without_raising(path):
    writer = LedgerWriter(f"sqlite:///{path}")
    waiting = writer.commit(part(1))
    writer.close(1)
    writer.put(part(2))
    for future in (waiting, writer.commit(part(3))):
        with pytest.raises(LedgerError):
            future.result(1)
    assert (writer.queued, writer.dropped) == (3, 3)


def test_a_cancelled_future_stops_nobody(writer, path):
    writer.commit(part(1)).cancel()
    writer.commit(part(2)).result(5)
    assert rows(path, "SELECT count(*) FROM requests") == [(2,)]


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from test_writer import LedgerWriter, part
writer = LedgerWriter(sys.argv[1]); writer.start()
first, last, run_id = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
for seq in range(first, last + 1):
    writer.commit(part(seq, run_id=run_id)).result(30)
    print(seq, flush=True)
if run_id == "killed":
    import time; time.sleep(60)
writer.close(5)
"""


def child(path: Path, first: int, last: int, run_id: str) -> subprocess.Popen:
    program = CHILD.format(tests=str(Path(__file__).parent))
    arguments = [f"sqlite:///{path}", str(first), str(last), run_id]
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True
    )


def test_a_commit_that_was_told_survives_kill_9(path):
    process = child(path, 1, 20, "killed")
    told = 0
    for line in process.stdout:
        told = int(line)
        if told == 20:
            break
    process.send_signal(signal.SIGKILL)
    process.wait(5)
    process.stdout.close()
    assert rows(path, "SELECT count(*), max(seq) FROM requests") == [(20, 20)]
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


def test_two_processes_write_at_once_and_neither_loses_nor_doubles(path):
    processes = [child(path, 1, 150, f"run{n}") for n in range(2)]
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [len(output) for output in outputs] == [150, 150]
    assert rows(path, "SELECT run_id, count(*), max(seq) FROM requests GROUP BY run_id") == [
        ("run0", 150, 150),
        ("run1", 150, 150),
    ]
