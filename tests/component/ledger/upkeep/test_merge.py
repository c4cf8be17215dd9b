"""Merge ledgers: the sums of all are there once, and what contradicts itself is refused whole."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.component.ledger.test_billing import USD, a_file, charged, read
from tests.component.ledger.test_reader import HOUR, NOW, part, snapshot
from tests.support.builders import make_open
from tests.support.ledger_writer import LedgerWriter
from tests.support.upkeep import fill, noise, rows_of, server, sql, url_of
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.billing.importing import import_invoice
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.schema import metadata
from vllm_cost_meter.ledger.upkeep.checking import check_ledger
from vllm_cost_meter.ledger.upkeep.kinds import kind_of_rows
from vllm_cost_meter.ledger.upkeep.merging import merge
from vllm_cost_meter.records.requests import Price
from vllm_cost_meter.units.time import NS_PER_HOUR

GAP_NS = 24 * NS_PER_HOUR
OLDEST = Path(__file__).parents[1] / "ledger_v1.sql"


@pytest.fixture
def ledger(tmp_path):
    fill(tmp_path / "ledger.db", "first", 40)
    fill(tmp_path / "ledger.db", "shared", 10)
    return tmp_path / "ledger.db"


@pytest.fixture
def other(tmp_path):
    """A ledger with a run of its own, and one that both have and that went on here."""
    fill(tmp_path / "other.db", "second", 25)
    fill(tmp_path / "other.db", "shared", 30, number=2)
    return tmp_path / "other.db"


def merged(ledger, *others, **options):
    done = merge(url_of(ledger), others, GAP_NS, **options)
    return {one.name: (one.new, one.raised, one.known, one.differing) for one in done}


def write(path, *records, usd_per_hour=None, since_ns=0):
    price = usd_per_hour and Price(f"settings:{usd_per_hour}", usd_per_hour, "here", since_ns)
    writer = LedgerWriter(url_of(path), price_of=lambda _: price)
    writer.start()
    writer.commit(*records).result(10)
    writer.close()


def test_the_sums_of_both_are_there_and_the_books_balance(ledger, other):
    before = rows_of(other)
    tables = merged(ledger, other)
    # 25 bills of the other run, and 20 of 30 of the run that both have.
    assert tables["requests"] == (45, 0, 10, 0)
    # Those of the 9 and 6 of them that are of two hours; the run that both have, has 3 there.
    assert tables["usage_pieces"] == (2 * (8 + 7), 0, 2 * 3, 0)
    assert tables["snapshots"] == (1, 1, 0, 0)
    assert tables["runs"] == (1, 0, 1, 0)
    assert sql(ledger, "SELECT run_id, count(*), sum(gpu_time_ns) FROM requests GROUP BY 1") == [
        ("first", 40, 40 * 300),
        ("second", 25, 25 * 300),
        ("shared", 30, 30 * 300),
    ]
    assert all(one.ok for one in check_ledger(url_of(ledger), full=True))
    with closing(LedgerReader(url_of(ledger))) as reader:
        assert reader.audit()["balanced"]
    assert rows_of(other) == before


def test_the_same_ledger_again_changes_nothing(ledger, other):
    merged(ledger, other)
    rows = rows_of(ledger)
    tables = merged(ledger, other, other)
    assert {(new, raised) for new, raised, _, _ in tables.values()} == {(0, 0)}
    assert rows_of(ledger) == rows


def test_the_order_does_not_matter_and_several_go_at_once(ledger, other, tmp_path):
    third = tmp_path / "third.db"
    fill(third, "third", 5)
    copies = [tmp_path / f"copy-{n}.db" for n in range(2)]
    for copy, source in zip(copies, (ledger, third), strict=True):
        shutil.copy(source, copy)
    merged(copies[0], other, third)
    merged(copies[1], ledger)
    merged(copies[1], other)
    assert rows_of(copies[0]) == rows_of(copies[1])


def test_a_dry_run_says_the_same_and_writes_nothing(ledger, other):
    rows = rows_of(ledger)
    said = merged(ledger, other, dry_run=True)
    assert rows_of(ledger) == rows
    assert merged(ledger, other) == said


def test_an_older_snapshot_changes_nothing(ledger, other):
    """The other way round: this ledger has the newer totals of the run that both have."""
    tables = merged(other, ledger)
    assert tables["snapshots"] == (1, 0, 1, 0)
    assert sql(other, "SELECT number, last_seq FROM snapshots WHERE run_id='shared'") == [(2, 30)]
    assert all(one.ok for one in check_ledger(url_of(other), full=True))


def test_a_request_that_is_open_in_one_and_billed_in_the_other_is_billed(tmp_path):
    one, two = tmp_path / "one.db", tmp_path / "two.db"
    write(one, make_open(request_id="internal-1", started_at_ns=part(1).started_at_ns))
    write(one, make_open(request_id="internal-9"))
    write(two, part(1), snapshot([part(1)]))
    merged(one, two)
    merged(two, one)
    for path in (one, two):
        assert sql(path, "SELECT request_id FROM open_requests") == [("internal-9",)]
        assert sql(path, "SELECT request_id FROM requests") == [("internal-1",)]


def test_a_ledger_of_the_oldest_schema_is_migrated_in_a_copy(ledger, tmp_path):
    old = tmp_path / "old.db"
    with closing(sqlite3.connect(old)) as connection:
        connection.executescript(OLDEST.read_text())
    before = old.read_bytes()
    merged(ledger, old)
    assert len(rows_of(ledger)["requests"]) == 51
    assert old.read_bytes() == before
    assert list(tmp_path.glob(".*")) == []


def test_columns_that_the_older_ledger_lacked_contradict_nothing(ledger, tmp_path):
    old = tmp_path / "old.db"
    shutil.copy(ledger, old)
    sql(ledger, "UPDATE runs SET labels='{}'")
    sql(old, "ALTER TABLE runs DROP COLUMN labels")
    sql(old, "UPDATE schema_version SET version=7")
    assert merged(ledger, old)["runs"] == (0, 0, 2, 0)
    assert sql(ledger, "SELECT DISTINCT labels FROM runs") == [("{}",)]


def test_facts_that_differ_stay_as_they_are_here_and_are_counted(ledger, other):
    sql(other, "UPDATE requests SET model='another' WHERE run_id='shared' AND seq<4")
    assert merged(ledger, other)["requests"] == (45, 0, 10, 3)
    assert sql(ledger, "SELECT count(*) FROM requests WHERE model='another'") == [(0,)]


# ---- what people declared and imported


def test_one_price_from_two_servers_is_one_price_and_another_rate_is_refused(tmp_path):
    one, two = tmp_path / "one.db", tmp_path / "two.db"
    write(one, snapshot([], run_id="a"), usd_per_hour="2.5")
    write(two, snapshot([], run_id="b"), usd_per_hour="2.5", since_ns=NS_PER_HOUR)
    merged(one, two)
    assert sql(one, "SELECT usd_per_gpu_hour FROM prices") == [("2.5",)]
    sql(two, "UPDATE prices SET usd_per_gpu_hour='9'")
    write(two, part(1, run_id="b"))
    rows = rows_of(one)
    with pytest.raises(LedgerError, match=r"prices: expected the same .*: settings:2.5; one of"):
        merged(one, two)
    assert rows_of(one) == rows


def bring(path, *facts):
    return import_invoice(url_of(path), a_file(*facts), GAP_NS, NOW)


def test_bills_of_both_give_the_hours_that_one_import_would(ledger, other, tmp_path):
    every = [read(0, 0), read(1, 3), read(2, 5), charged(0, 2, 7, "vol", "disk"), read(4, 9)]
    bring(ledger, every[0], every[2], every[3])
    bring(other, every[1], every[3], every[4])
    whole = tmp_path / "whole.db"
    fill(whole, "first", 1)
    bring(whole, *every)
    merged(ledger, other)
    for table in ("billed_hours",):
        assert rows_of(ledger)[table] == rows_of(whole)[table]
    assert sql(ledger, "SELECT sum(nanousd) FROM billed_hours") == [(16 * USD,)]
    assert len(rows_of(ledger)["billing_snapshots"]) == 4
    again = rows_of(ledger)
    merged(ledger, other)
    assert rows_of(ledger) == again


def test_a_bill_that_contradicts_the_other_ledger_is_refused_whole(ledger, other):
    bring(ledger, charged(0, 1, 5))
    bring(other, charged(0, 1, 6), charged(1, 1, 2))
    rows = rows_of(ledger)
    with pytest.raises(LedgerError, match=r"other.db: 'gpu-1' at 2027-01-15T08:00:00.*expected 5"):
        merged(ledger, other)
    assert rows_of(ledger) == rows


# ---- what is refused


def test_what_cannot_be_merged_is_refused_with_nothing_written(ledger, other, tmp_path):
    rows = rows_of(ledger)
    with pytest.raises(LedgerError, match="is the ledger itself"):
        merged(ledger, ledger)
    with pytest.raises(LedgerError, match="free bytes to copy and merge"):
        merged(ledger, other, free=lambda _: 1000)
    with pytest.raises(LedgerError, match="expected a ledger's file"):
        merged(ledger, other, tmp_path / "none.db")
    sql(other, "UPDATE schema_version SET version=99")
    with pytest.raises(LedgerError, match="other.db: has schema version 99"):
        merged(ledger, other)
    sql(other, "UPDATE schema_version SET version=9")
    with other.open("r+b") as file:
        file.seek(8 * 4096)
        file.write(noise(4096 * 2))
    with pytest.raises(LedgerError, match="ledger repair"):
        merged(ledger, other)
    assert rows_of(ledger) == rows
    assert list(tmp_path.glob(".*")) == []


def test_ledgers_that_servers_write_to_can_be_merged(ledger, other):
    with server(other, commits_per_s=50) as there:
        merged(ledger, other)
        committed = there.stop()
    (found,) = sql(ledger, "SELECT count(*) FROM requests WHERE run_id='live'")[0]
    assert 1 <= found <= committed
    with server(ledger, commits_per_s=50) as here:
        merged(ledger, other)
        here.stop()
    assert sql(ledger, "SELECT max(seq) FROM requests WHERE run_id='live'")[0][0] >= committed
    assert sql(ledger, "SELECT count(*) FROM requests WHERE hour<>?", HOUR) == [(0,)]


def test_every_table_says_how_its_rows_merge():
    assert [kind_of_rows(table) for table in metadata.tables.values()]
