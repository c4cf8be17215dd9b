"""A fleet whose servers keep the rows of requests to themselves has the same books.

Method: the same records go into ledgers that send no rows, and into one ledger that all share. What
does not need rows must have the answers of that one.
"""

import random
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import duckdb
import pytest
from sqlalchemy import create_engine, select

from tests.component.ledger.test_open_requests import USED
from tests.component.ledger.test_reader import HOUR, part, snapshot
from tests.ecosystem.test_fleet import BILLS, KilledError, Mortal, name_of, records_of, write
from tests.ecosystem.test_postgresql import AS_OF, BOOK, rows
from tests.support.builders import make_open
from tests.support.fleet import sent
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.fleet import delivery
from vllm_cost_meter.ledger.fleet.rows import files as row_files
from vllm_cost_meter.ledger.fleet.sender import FleetSender
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.schema import requests
from vllm_cost_meter.records.snapshot import ClassTotals

TOTALS = ClassTotals(in_flight=USED.gpu_time_ns, idle=1000)
ROW_TABLES = ("requests", "usage_pieces", "http_requests", "request_energy", "open_requests")


def figures(url: str) -> list[Any]:
    """Return what a ledger answers by its sums."""
    with LedgerReader(url, book=BOOK) as reader:
        audit = {**reader.audit(AS_OF), "rows_kept_from": None, "fleet": None}
        for run in audit["runs"]:
            run["lost_requests"] = sorted(one["request_id"] for one in run["lost_requests"])
            run["unbilled_replies"] = None
        windows = ((), (HOUR - 1, HOUR))
        answers: list[Any] = [
            *(reader.tenants(*hours, as_of=AS_OF) for hours in windows),
            reader.report(aggregate="tenant,hour", as_of=AS_OF),
        ]
        return [audit, *({**answer, "rows_kept_from": None} for answer in answers)]


@pytest.mark.parametrize("seed", range(3))
def test_the_books_are_the_same_whatever_is_killed_in_between(
    tmp_path: Path, url: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    alone = f"sqlite:///{tmp_path}/alone.db"
    ledgers = {run: f"sqlite:///{tmp_path}/{run}.db" for run in ("one", "two")}
    kinds = {"one": "none", "two": chance.choice(["none", "fleet"])}
    left = {run: records_of(run) for run in ledgers}
    for each in (alone, *ledgers.values()):
        open_database(each).dispose()
    real = delivery.insert_tables

    def cut_off(*arguments: Any) -> None:
        real(*arguments)
        if chance.random() < 0.2:
            raise KilledError

    while any(left.values()):
        monkeypatch.setattr(delivery, "insert_tables", cut_off)
        for run in [run for run, of_run in left.items() if of_run]:
            batch = [left[run].pop(0) for _ in range(min(chance.randint(1, 12), len(left[run])))]
            write(ledgers[run], *batch)
            write(alone, *batch)
            sender = Mortal(
                ledgers[run], url, shipment_bytes_max=chance.choice([1, 1 << 20]), rows=kinds[run]
            )
            sender.dies = chance.random() < 0.3
            try:
                while sender.step():
                    pass
            except KilledError:
                pass
            sender.close()
        monkeypatch.undo()
        if chance.random() < 0.4:
            for run, each in ledgers.items():
                sent(each, url, rows=kinds[run])
            assert figures(url) == figures(alone)
    for run, each in ledgers.items():
        sent(each, url, stops=True, rows=kinds[run])
    assert figures(url) == figures(alone)
    assert figures(url)[0]["balanced"] is True
    with LedgerReader(url, book=BOOK) as reader:
        assert reader.audit(AS_OF, full=True)["balanced"] is True
    with_rows = sum(BILLS for kind in kinds.values() if kind == "fleet")
    assert rows(url, "SELECT count(*) FROM kept_requests") == [(with_rows,)]


def test_bills_that_no_snapshot_counts_yet_are_no_part_of_a_report(
    tmp_path: Path, url: str
) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    sent(own, url, rows="none")
    bills = [part(seq, f"h{seq}") for seq in range(1, 6)]
    write(own, *bills[:3], snapshot(bills[:2], 1))
    sent(own, url, rows="none")
    assert rows(url, "SELECT seq FROM requests") == [(3,)]
    assert figures(url) == figures(own)
    write(own, *bills[3:])  # sent by another process
    sent(own, url, rows="none")
    assert rows(url, "SELECT seq FROM requests ORDER BY seq") == [(3,), (4,), (5,)]
    assert figures(url) == figures(own)
    write(own, snapshot(bills, 2))
    sent(own, url, rows="none")
    assert rows(url, "SELECT seq FROM requests") == []
    assert figures(url) == figures(own)
    for name in ROW_TABLES:
        kept = f"kept_{name}" if name != "http_requests" else name
        assert rows(url, f"SELECT count(*) FROM {kept}") == [(0,)]


def test_a_ledger_with_bills_joins_without_rows_and_may_send_them_later(
    tmp_path: Path, url: str
) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    write(own, *records_of("one")[:30])
    for kind in ("none", "fleet", "none"):
        sent(own, url, rows=kind)
        name = name_of(own)
        assert figures(url) == figures(own)
        here = rows(url, "SELECT count(*) FROM requests")
        counted = "WHERE seq > (SELECT last_seq FROM snapshots)" if kind == "none" else ""
        assert here == rows(own, f"SELECT count(*) FROM requests {counted}")
        sent(own, url, rows=kind)
        assert name_of(own) == name
    write(own, *records_of("one")[30:])
    sent(own, url, rows="none", stops=True)
    assert figures(url) == figures(own)


def test_whose_the_running_requests_are_is_known_and_goes_with_them(
    tmp_path: Path, url: str
) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    sent(own, url, rows="none")
    running = make_open(request_id="r", http_request_id="h")
    waiting = make_open(request_id="w", http_request_id="i")
    write(own, running, waiting, snapshot([], 1, totals=TOTALS, live=(("r", USED),)))
    sent(own, url, rows="none")
    assert rows(url, "SELECT request_id FROM open_requests") == [("r",)]
    write(own, snapshot([], 2, totals=TOTALS, live=(("r", USED),)))
    sent(own, url, rows="none")  # by another process
    assert rows(url, "SELECT request_id FROM open_requests") == [("r",)]
    assert figures(url) == figures(own)


def test_rows_go_into_files_once_whatever_is_killed_in_between(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By DuckDB, as docs/howto/fleet.md has it."""
    monkeypatch.setattr(row_files, "EVERY_S", 0.0)
    chance = random.Random(1)
    own, folder = f"sqlite:///{tmp_path}/ledger.db", tmp_path / "rows"
    records = records_of("one")
    write(own, *records[:15])
    for at in range(15, len(records), 5):
        write(own, *records[at : at + 5])
        with monkeypatch.context() as patched:
            if chance.random() < 0.5:
                patched.setattr(row_files.RowFiles, "_note", _dying(chance))
            sender = FleetSender(own, url, 1.0, chance.choice([1, 1 << 20]), "files", folder)
            with suppress(KilledError):
                while sender.step():
                    pass
            sender.close()
    sender = FleetSender(own, url, rows="files", files=folder)
    while sender.step():
        pass
    sender.end()
    sender.close()
    asked = "SELECT seq, gpu_time_ns, tenant, finished_at"
    files = f"read_parquet('{folder}/requests/*/*/*.parquet')"
    found = duckdb.sql(f"SELECT DISTINCT {asked.removeprefix('SELECT ')} FROM {files} ORDER BY seq")
    with closing(create_engine(own).connect()) as connection:
        ledger = connection.execute(
            select(
                *(requests.c[n] for n in ("seq", "gpu_time_ns", "tenant", "finished_at"))
            ).order_by(requests.c.seq)
        )
        assert found.fetchall() == [tuple(row) for row in ledger]
    assert len(list(folder.glob("http_requests/day=*/*.parquet"))) > 0
    assert rows(own, "SELECT count(*) FROM outbox") == [(0,)]
    assert figures(url) == figures(own)


def _dying(chance: random.Random) -> Any:
    real = row_files.RowFiles._note

    def note(*arguments: Any) -> None:
        if chance.random() < 0.4:
            raise KilledError
        real(*arguments)
        if chance.random() < 0.4:
            raise KilledError

    return note


def test_an_outbox_that_is_too_large_is_freed_and_nothing_is_lost(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    sent(own, url)
    name = name_of(own)
    write(own, *records_of("one")[:20])
    sender = FleetSender(own, "postgresql+psycopg://nobody@127.0.0.1:1/none", outbox_bytes_max=500)
    with pytest.raises(LedgerError):
        sender.step()
    assert sender.shed()
    assert not sender.shed()
    assert "more than 500 bytes wait for it" in caplog.text
    sender.close()
    assert rows(own, "SELECT count(*) FROM outbox") == [(0,)]
    write(own, *records_of("one")[20:])
    sent(own, url, stops=True)
    assert name_of(own) != name
    assert figures(url) == figures(own)
    assert rows(url, "SELECT count(*) FROM requests") == [(BILLS,)]
