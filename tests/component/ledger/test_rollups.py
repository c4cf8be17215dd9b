"""Sums that something else has changed: the audit and the check of the file see it."""

import sqlite3
from contextlib import closing

import pytest

from tests.component.ledger.test_reader import HOUR, Ledger, part, snapshot
from tests.support.upkeep import url_of
from vllm_cost_meter.ledger.upkeep.checking import check_ledger
from vllm_cost_meter.records.bill import UsagePiece


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(url_of(tmp_path / "ledger.db"))
    yield ledger
    ledger.close()


@pytest.mark.parametrize(
    ("changed", "ns"),
    [
        ("UPDATE rollup_hours SET decode_ns = decode_ns + 1", 2),  # its day has not got it either
        ("UPDATE rollup_days SET prefill_ns = 0", 100),
        ("DELETE FROM rollup_groups", 300),
        ("UPDATE requests SET hour = hour + 1", 600),
    ],
)
def test_sums_that_are_not_those_of_the_bills_are_seen(ledger, tmp_path, changed, ns):
    ledger.write(part(1), snapshot([part(1)]))
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection, connection:
        connection.execute(changed)
    audit = ledger.audit(full=True)
    assert (audit["balanced"], audit["runs"][0]["sums_difference_ns"]) == (False, ns)
    wrong = [one.name for one in check_ledger(ledger.url, full=True) if not one.ok]
    assert any(name.startswith("rollup_") for name in wrong)


def test_sums_of_blocks_that_are_not_those_of_the_bills_are_seen(ledger, tmp_path):
    bill = part(1, pieces=(UsagePiece(HOUR, 100, 200, 8, 5, kv_block_ms=70),))
    ledger.write(bill, snapshot([bill]))
    assert ledger.audit(full=True)["runs"][0]["sums_difference_block_ms"] == 0
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection, connection:
        connection.execute("UPDATE rollup_hours SET kv_block_ms = kv_block_ms - 7")
    audit = ledger.audit(full=True)
    # Its hour is wrong, and its day is not the sum of its hours.
    assert (audit["balanced"], audit["runs"][0]["sums_difference_block_ms"]) == (False, 14)
    assert ledger.audit()["runs"][0]["sums_difference_block_ms"] is None


@pytest.mark.parametrize("changed", ["decode_ns = 199", "gpu_time_ns = 299", "hour = NULL"])
def test_a_bill_of_one_hour_that_is_not_what_was_used_in_it_is_seen(ledger, tmp_path, changed):
    ledger.write(part(1), snapshot([part(1)]))
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection, connection:
        assert connection.execute("SELECT count(*) FROM usage_pieces").fetchone() == (0,)
        connection.execute(f"UPDATE requests SET {changed}")
    audit = ledger.audit(full=True)
    assert (audit["balanced"], audit["runs"][0]["uneven_bills"]) == (False, 1)
