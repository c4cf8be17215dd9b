"""Imports into a ledger that others write to: what is locked, computed, written, and told."""

import contextlib
import sqlite3
import threading
import time

import pytest
import sqlalchemy

from tests.component.ledger.test_billing import USD, bring, charged, everything, ledger, read, rows
from tests.component.ledger.test_reader import HOUR, part
from tests.support.ledger_writer import LedgerWriter
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.billing.hours import ImportLimits
from vllm_cost_meter.ledger.database import BUSY_TIMEOUT_S

__all__ = ["ledger"]


@contextlib.contextmanager
def before_writing(step):
    """Do this step once, as the next transaction ends: that in which an import computes."""
    rest = [step]

    def ends(_connection) -> None:
        if rest:
            rest.pop()()

    sqlalchemy.event.listen(sqlalchemy.Engine, "commit", ends)
    try:
        yield
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "commit", ends)
    assert not rest


def test_a_server_commits_bills_while_an_import_computes(ledger):
    writer = LedgerWriter(ledger.url)
    writer.start()
    bill = part(1)
    with before_writing(lambda: writer.commit(bill).result(BUSY_TIMEOUT_S)):
        bring(ledger, charged(0, 1, 5))
    writer.close()
    assert rows(ledger, "SELECT seq FROM requests") == [(1,)]
    assert rows(ledger, "SELECT nanousd FROM billed_hours") == [(5 * USD,)]


def test_no_bill_is_lost_or_late_beside_a_large_import(ledger):
    writer = LedgerWriter(ledger.url)
    writer.start()
    writer.commit(part(1)).result(BUSY_TIMEOUT_S)
    facts = [charged(hour, 1, 1, f"gpu-{node}") for node in range(20) for hour in range(300)]
    importing = threading.Thread(target=bring, args=(ledger, *facts))
    importing.start()
    seq = 1
    while importing.is_alive():
        seq += 1
        writer.commit(part(seq)).result(BUSY_TIMEOUT_S)
        # A server commits ten batches a second. Without any pause SQLite may give its lock to
        # nobody else for seconds: it has no queue.
        time.sleep(0.02)
    importing.join()
    writer.close()
    assert seq > 2
    assert rows(ledger, "SELECT count(*) FROM requests") == [(seq,)]
    assert rows(ledger, "SELECT count(*), sum(nanousd) FROM billed_hours") == [(6000, 6000 * USD)]


def test_an_import_that_another_one_overtook_is_computed_anew(ledger):
    bring(ledger, read(0, 0), read(4, 4))
    with before_writing(lambda: bring(ledger, charged(1, 1, 7))):
        answer = bring(ledger, read(2, 3))
    assert rows(ledger, "SELECT hour, nanousd, basis FROM billed_hours ORDER BY hour") == [
        (HOUR, 1_500_000_000, "counter"), (HOUR + 1, 7 * USD, "invoice"),
        (HOUR + 2, 500_000_000, "counter"), (HOUR + 3, 500_000_000, "counter"),
    ]  # fmt: skip
    assert (answer["snapshots"], answer["resources"][0]["lines"]) == (1, 1)


def test_an_import_that_is_overtaken_again_and_again_gives_up_with_one_line(ledger):
    said = "other imports came between; nothing written, try again"
    overtaken = before_writing(lambda: bring(ledger, charged(1, 1, 7)))
    with overtaken, pytest.raises(LedgerError, match=said):
        bring(ledger, read(2, 3), limits=ImportLimits(attempts=1))
    assert rows(ledger, "SELECT count(*) FROM billing_snapshots") == [(0,)]


def test_a_contradiction_that_came_between_refuses_the_file(ledger):
    said = "expected 7.000000000 USD of gpu, as the ledger has it"
    overtaken = before_writing(lambda: bring(ledger, charged(0, 1, 7)))
    with overtaken, pytest.raises(ValueError, match=said):
        bring(ledger, charged(0, 1, 5))
    assert rows(ledger, "SELECT nanousd FROM billed_hours") == [(7 * USD,)]


def test_years_of_earlier_imports_do_not_count_against_the_bound(ledger):
    for day in range(5):
        bring(ledger, charged(24 * day, 24, 24), limits=ImportLimits(hours=48))
    assert rows(ledger, "SELECT count(*), sum(nanousd) FROM billed_hours") == [(120, 120 * USD)]


def test_of_a_long_line_only_the_hours_that_can_change_are_written_anew(ledger):
    bring(ledger, charged(0, 1000, 1000), read(10, 0, "b"), read(20, 10, "b"))
    before = rows(ledger, "SELECT rowid FROM billed_hours")
    bring(ledger, charged(500, 2, 4, item="more"))
    kept = rows(ledger, "SELECT rowid FROM billed_hours WHERE hour NOT IN"
                        f" ({HOUR + 500}, {HOUR + 501})")  # fmt: skip
    assert len(kept) == 1008
    assert set(kept) < set(before)
    assert rows(ledger, "SELECT sum(nanousd) FROM billed_hours") == [(1014 * USD,)]


def test_more_rows_than_a_server_should_wait_for_are_refused_with_one_line(ledger):
    message = r"bill\.csv: expected at most 5 rows .* import the file in parts"
    with pytest.raises(ValueError, match=message):
        bring(ledger, *(charged(hour, 1, 1) for hour in range(3)), limits=ImportLimits(rows=5))
    assert everything(ledger) == [[], [], []]


def test_a_dry_run_and_an_import_of_what_is_known_wait_for_no_writer(ledger):
    bring(ledger, charged(0, 1, 5))
    path = ledger.url.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as blocker:
        blocker.execute("BEGIN IMMEDIATE")
        assert bring(ledger, charged(0, 1, 5))["known"] == 1
        assert bring(ledger, charged(1, 1, 5), dry_run=True)["lines"] == 1
