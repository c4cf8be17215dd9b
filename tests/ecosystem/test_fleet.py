"""Ledgers of several servers in one fleet's database: all once, whatever is killed or copied.

Method: the same records go into ledgers of their own that send, and into one ledger that all share.
The fleet must give the answers of that one.
"""

import random
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine

from tests.component.ledger.test_reader import HOUR, NOW, http, part, snapshot
from tests.ecosystem.postgresql import Server
from tests.ecosystem.roles import as_role, make_roles
from tests.ecosystem.test_postgresql import LONG, OWNERS, _figures, rows
from tests.support.builders import make_open
from tests.support.fleet import sent
from vllm_cost_meter.cli.audit import audit_lines
from vllm_cost_meter.cli.doctor.findings import Outcome
from vllm_cost_meter.cli.doctor.fleet import fleet_reached
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.journal.entries import Record
from vllm_cost_meter.ledger.batches import BatchWriter
from vllm_cost_meter.ledger.database import open_database, writing
from vllm_cost_meter.ledger.fleet import delivery
from vllm_cost_meter.ledger.fleet import sender as sender_module
from vllm_cost_meter.ledger.fleet.outbox import begin_again, read_sender, waiting
from vllm_cost_meter.ledger.fleet.sender import FleetSender
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.retention.dropping import drop_rows
from vllm_cost_meter.ledger.upkeep.merging import merge
from vllm_cost_meter.units.time import rfc3339

BILLS = 30
S = 10**9
RFC_3339 = 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'


def records_of(run: str) -> list[Record]:
    """Return bills of several tenants, their replies and the engine's totals, as they come."""
    found: list[Record] = []
    bills = []
    for seq in range(1, BILLS + 1):
        owner = OWNERS[seq % len(OWNERS)]
        bills.append(part(seq, f"{run}-h{seq}", run_id=run, owner=owner))
        found += [bills[-1], http(f"{run}-h{seq}", at=seq, owner=owner)]
        if seq % 10 == 0:
            found.append(snapshot(list(bills), seq // 10, run))
    found.append(make_open(request_id=f"{run}-open", http_request_id=f"{run}-open"))
    return found


def write(url: str, *records: Record) -> None:
    writer = BatchWriter(url)
    assert writer.write(records) == []
    writer.drop()


def send(url: str, fleet: str) -> None:
    sent(url, fleet, stops=True)
    engine = open_database(url)
    with engine.connect() as connection:
        assert waiting(connection) == (0, 0)
    engine.dispose()


def name_of(url: str) -> str:
    engine = open_database(url)
    with engine.connect() as connection:
        sender = read_sender(connection)
    engine.dispose()
    assert sender is not None
    return sender.sender_id


class KilledError(Exception):
    """The sender is dead."""


class Mortal(FleetSender):
    """A sender that may die after the fleet has committed, before the ledger knows."""

    dies = False

    def _note_sent(self, ledger: Any, number: int) -> None:
        if self.dies:
            raise KilledError
        super()._note_sent(ledger, number)


@pytest.mark.parametrize("seed", range(6))
def test_everything_is_there_once_whatever_is_killed_in_between(
    tmp_path: Path, url: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    alone = f"sqlite:///{tmp_path}/alone.db"
    ledgers = {run: f"sqlite:///{tmp_path}/{run}.db" for run in ("one", "two", "three")}
    left = {run: records_of(run) for run in ledgers}
    for each in (alone, *ledgers.values()):
        open_database(each).dispose()
    real = delivery.insert_tables

    def cut_off(*arguments: Any) -> None:
        real(*arguments)
        if chance.random() < 0.3:
            raise KilledError

    monkeypatch.setattr(delivery, "insert_tables", cut_off)
    while any(left.values()):
        run = chance.choice([run for run, of_run in left.items() if of_run])
        batch = [left[run].pop(0) for _ in range(min(chance.randint(1, 9), len(left[run])))]
        again = chance.sample(batch, chance.randint(0, len(batch)))
        write(ledgers[run], *batch)
        write(ledgers[run], *again)
        write(alone, *batch)
        # A new process each time; the last one may have died anywhere.
        sender = Mortal(ledgers[run], url, shipment_bytes_max=chance.choice([1, 1 << 20]))
        sender.dies = chance.random() < 0.4
        try:
            while chance.random() < 0.8 and sender.step():
                pass
        except KilledError:
            pass
        sender.close()
    monkeypatch.undo()
    for each in ledgers.values():
        send(each, url)
    assert _figures(url) == _figures(alone)
    assert _figures(url)[0]["balanced"] is True
    assert rows(url, "SELECT count(*) FROM requests") == [(3 * BILLS,)]
    assert rows(url, "SELECT count(DISTINCT sender_id) FROM shipments") == [(3,)]


def test_a_ledger_that_is_restored_loses_nothing_in_the_fleet_and_counts_nothing_twice(
    tmp_path: Path, url: str
) -> None:
    ledger, backup = tmp_path / "ledger.db", tmp_path / "backup.db"
    own, alone = f"sqlite:///{ledger}", f"sqlite:///{tmp_path}/alone.db"
    before, after = records_of("before"), records_of("after")
    open_database(own).dispose()
    sent(own, url)
    write(own, *before[:30])
    send(own, url)
    first = name_of(own)
    shutil.copy(ledger, backup)
    write(own, *before[30:])
    send(own, url)
    ledger.unlink()
    shutil.move(backup, ledger)
    # What a journal still had is applied again; then another engine runs.
    write(own, *before[50:55])
    write(own, *after)
    send(own, url)
    write(alone, *before, *after)
    assert name_of(own) != first
    assert _figures(url) == _figures(alone)


def test_a_copy_of_a_ledger_that_sends_too_counts_once(tmp_path: Path, url: str) -> None:
    ledger, copy = tmp_path / "ledger.db", tmp_path / "copy.db"
    own, other, alone = (f"sqlite:///{tmp_path}/{n}.db" for n in ("ledger", "copy", "alone"))
    shared, mine, theirs = records_of("shared"), records_of("mine"), records_of("theirs")
    open_database(own).dispose()
    sent(own, url)
    write(own, *shared)
    shutil.copy(ledger, copy)  # with the sender's name and what it has not sent
    write(own, *mine)
    write(other, *theirs)
    for each in (own, other, own):
        send(each, url)
    write(alone, *shared, *mine, *theirs)
    assert name_of(own) != name_of(other)
    figures = _figures(url)
    assert figures == _figures(alone)
    assert rows(url, "SELECT run_id FROM shared_runs") == [("shared",)]


def test_rows_that_a_ledger_has_dropped_are_none_in_the_fleet_and_count_all_the_same(
    tmp_path: Path, url: str
) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    write(own, *records_of("before"))
    assert _dropped(own) == BILLS
    send(own, url)
    assert _figures(url) == _figures(own)
    assert rows(url, "SELECT count(*) FROM requests") == [(0,)]
    # What is dropped later the fleet keeps, also if the ledger joins anew.
    write(own, *records_of("after"))
    send(own, url)
    assert _dropped(own) == BILLS
    engine = open_database(own)
    with writing(engine).begin() as connection:
        begin_again(connection)
    engine.dispose()
    send(own, url)
    assert _figures(url) == _figures(own)
    assert rows(url, "SELECT count(*) FROM requests") == [(BILLS,)]


def _dropped(url: str) -> int:
    engine = open_database(url)
    found = drop_rows(engine, HOUR + 16).bills
    engine.dispose()
    return found


def test_an_outbox_that_lost_a_row_has_its_ledger_join_anew(tmp_path: Path, url: str) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    open_database(own).dispose()
    sent(own, url)
    for record in records_of("run"):
        write(own, record)
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as damaged, damaged:
        damaged.execute("DELETE FROM outbox WHERE number IN (1, 40)")
    send(own, url)
    assert _figures(url) == _figures(own)
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as damaged, damaged:
        damaged.execute("UPDATE fleet_sender SET last_number = last_number + 1")
    send(own, url)
    assert _figures(url) == _figures(own)
    assert rows(url, "SELECT count(*) FROM senders") == [(3,)]


def test_a_ledger_that_got_another_ones_rows_joins_anew(tmp_path: Path, url: str) -> None:
    own, other = (f"sqlite:///{tmp_path}/{name}.db" for name in ("ledger", "other"))
    write(own, *records_of("mine"))
    sent(own, url)
    write(other, *records_of("theirs"))
    sent(other, url)  # the other one is in the fleet by itself, and then its rows come again
    merge(own, [tmp_path / "other.db"], 1)
    send(own, url)
    assert _figures(url) == _figures(own)


def test_a_writer_needs_no_right_but_to_insert_and_to_read(
    tmp_path: Path, server: Server, url: str
) -> None:
    """By the statements of docs/howto/fleet.md."""
    own, alone = (f"sqlite:///{tmp_path}/{name}.db" for name in ("ledger", "alone"))
    first, second = records_of("one"), records_of("two")
    open_database(f"sqlite:///{tmp_path}/first.db").dispose()
    sent(f"sqlite:///{tmp_path}/first.db", url)
    make_roles(url)
    as_writer, as_reader = (as_role(url, role) for role in ("meter_writer", "meter_reader"))
    write(own, *first)
    send(own, as_writer)
    write(own, *second)
    send(own, as_writer)
    write(alone, *first, *second)
    assert _figures(as_reader) == _figures(alone)
    for role, statement in (
        (as_writer, "DELETE FROM kept_requests"),
        (as_writer, "UPDATE runs SET model = 'x'"),
        (as_reader, "INSERT INTO shared_runs VALUES ('x')"),
    ):
        with (
            psycopg.connect(role.replace("+psycopg", "")) as connection,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            connection.execute(statement)


def test_many_senders_and_readers_share_few_sessions_of_a_pooler(
    tmp_path: Path, server: Server, url: str
) -> None:
    """By PgBouncer in transaction mode: each transaction may have another session."""
    alone = f"sqlite:///{tmp_path}/alone.db"
    names = [f"run-{number}" for number in range(6)]
    with server.pooled(url, sessions=2) as pooled:
        senders = []
        for name in names:
            own = f"sqlite:///{tmp_path}/{name}.db"
            records = records_of(name)
            write(own, *records)
            write(alone, *records)
            senders.append(FleetSender(own, pooled, shipment_bytes_max=1))
        with ThreadPoolExecutor(len(names)) as threads:
            list(threads.map(_send_all, senders))
        assert _figures(pooled) == _figures(alone)
        for _ in range(10):  # a driver would prepare what it has asked a few times
            assert _figures(pooled)[0]["balanced"] is True


def send_all_of(sender: FleetSender) -> None:
    while sender.step():
        pass


def _send_all(sender: FleetSender) -> None:
    send_all_of(sender)
    sender.end()
    sender.close()


def test_the_audit_says_what_is_complete_and_who_holds_what_is_missing(
    tmp_path: Path, url: str
) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    open_database(own).dispose()
    sent(own, url)
    bills = [part(seq, f"h{seq}", run_id="run") for seq in range(1, 9)]
    write(own, *bills[:3], *bills[5:], snapshot(bills, 1, "run"))
    sent(own, url)

    def told(heard_ago_s: int = 0) -> Any:
        at = f"to_char(timezone('UTC', now()) - interval '{heard_ago_s} s', '{RFC_3339}')"
        changed(url, f"UPDATE shipments SET received_at = {at}")
        changed(url, f"UPDATE told_snapshots SET told_at = {at}")
        with LedgerReader(url) as reader:
            # The clocks of servers and readers may be years off.
            audit = reader.audit(AsOf(now_ns=1, settle_s=0))
        assert audit["fleet"] is not None
        states = [(run["state"], run["missing_bills"]) for run in audit["fleet"]["incomplete"]]
        return audit["balanced"], audit["reason"], states, list(audit_lines(audit))[:2]

    balanced, reason, states, lines = told()
    assert (balanced, reason, states) == (None, "not_sent", [("arriving", ["4-5"])])
    assert lines[0].startswith("fleet: 0 of 1 runs of 1 ledgers are complete: every bill is here")
    assert "run run on node-1, up to bill 8: bills 4-5 are not here yet;" in lines[1]
    balanced, reason, states, lines = told(heard_ago_s=600)
    assert (balanced, states) == (False, [("missing", ["4-5"])])
    assert "are not here;" in lines[1]
    write(own, *bills[3:5])
    sent(own, url)
    assert told()[:3] == (True, None, [])
    # Its ledger became silent with it: its last word came right after the run's last snapshot.
    changed(url, f"UPDATE shipments SET sent_at = '{rfc3339(NOW + S)}'")
    balanced, reason, states, lines = told(heard_ago_s=600)
    assert (balanced, reason, states) == (None, "not_sent", [("unknown", [])])
    assert f"bills are unknown; the last word of its server was at {rfc3339(NOW + S)}" in lines[1]
    # A word of the same ledger that comes when the run has long been dead is behind all of it.
    changed(url, f"UPDATE shipments SET sent_at = '{rfc3339(NOW + 16 * S)}'")
    assert told(heard_ago_s=600)[:3] == (True, None, [])
    # A server that stops says that this was all.
    changed(url, f"UPDATE shipments SET sent_at = '{rfc3339(NOW + S)}'")
    sender = FleetSender(own, url)
    assert not sender.step()
    sender.end()
    sender.close()
    assert told(heard_ago_s=600)[:3] == (True, None, [])
    # What comes after that is another word.
    write(own, snapshot(bills, 2, "run"))
    sent(own, url)
    changed(url, f"UPDATE shipments SET sent_at = '{rfc3339(NOW + S)}'")
    assert told(heard_ago_s=600)[2] == [("unknown", [])]


def changed(url: str, statement: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()


def test_an_empty_ledger_joins_and_a_fleet_without_runs_has_no_figures(
    tmp_path: Path, url: str
) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    open_database(own).dispose()
    send(own, url)
    assert _figures(url)[0]["reason"] == "no_runs"
    assert _figures(url) == _figures(own)


def test_a_ledger_is_no_fleet_and_a_fleet_no_ledger(tmp_path: Path, server: Server) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    open_database(own).dispose()
    ledger, fleet = server.new_database(), server.new_database()
    open_database(ledger).dispose()
    with pytest.raises(LedgerError, match="got one with a ledger; name another database"):
        sent(own, ledger)
    sent(own, fleet)
    with pytest.raises(LedgerError, match="expected a ledger, got the database of a fleet"):
        open_database(fleet)
    with pytest.raises(LedgerError, match="expected a PostgreSQL database"):
        sent(own, own)


def test_the_doctor_says_whether_the_fleet_is_reached_and_what_waits_and_makes_nothing(
    tmp_path: Path, server: Server, url: str
) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    write(own, *records_of("run"))
    empty = fleet_reached(url, own)
    assert empty.outcome is Outcome.OK
    assert "empty: the first server makes its tables; this ledger joins" in empty.detail
    assert rows(url, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(0,)]
    send(own, url)
    write(own, *records_of("run 2"))
    assert "is reached; 1 transactions (" in fleet_reached(url, own).detail
    away = fleet_reached(url.replace("host=", "host=/nowhere"), own)
    assert away.outcome is Outcome.FAIL
    assert fleet_reached(None, own).outcome is Outcome.OK
    ledger = server.new_database()
    open_database(ledger).dispose()
    assert "got one with a ledger" in fleet_reached(ledger, own).detail


@pytest.mark.parametrize("joins_first", [True, False])
def test_a_text_that_postgresql_cannot_take_holds_up_nothing(
    tmp_path: Path, url: str, joins_first: bool
) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    open_database(own).dispose()
    if joins_first:
        sent(own, url)
    for seq, name in enumerate(("a\0b", LONG, "plain"), 1):
        write(own, part(seq, f"h{seq}", tenant=name), http(f"h{seq}"))
    send(own, url)
    write(own, part(4, "h4"), http("h4"))
    send(own, url)
    assert rows(url, "SELECT bills, gpu_time_ns FROM bill_sums") == [(4, 4 * 300)]
    tenants = rows(url, "SELECT tenant FROM requests ORDER BY seq")
    assert tenants[2:] == [("plain",), ("alice",)]
    assert tenants[0][0].startswith("a?b~sha256:")


def test_a_fleet_that_is_away_keeps_what_waits(tmp_path: Path, url: str) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    write(own, *records_of("run"))
    sent(own, url)
    write(own, *records_of("run 2"))
    away = FleetSender(own, url.replace("host=", "host=/nowhere"))
    with pytest.raises(LedgerError, match="^fleet postgresql"):
        away.step()
    engine = create_engine(own)
    with engine.connect() as connection:
        assert waiting(connection).rows == 1
    engine.dispose()
    send(own, url)
    assert rows(url, "SELECT count(*) FROM requests") == [(2 * BILLS,)]


def test_what_a_ledger_gets_while_it_joins_is_there_too(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    records = records_of("one")
    write(own, *records[:20])
    real = sender_module.large_facts

    def meanwhile(ledger: Any) -> Any:
        yield from real(ledger)
        write(own, *records[20:])

    monkeypatch.setattr(sender_module, "large_facts", meanwhile)
    send(own, url)
    assert _figures(url) == _figures(own)
    assert rows(url, "SELECT count(*) FROM requests") == [(BILLS,)]
