"""How well the split is known: from bills over sums to tenants, and of what is older."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.component.ledger.test_reader import HOUR, Ledger, part, snapshot
from tests.support.older import as_version_17
from tests.support.upkeep import sql, url_of, wrong_sums
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.requests import EngineRequest
from vllm_cost_meter.records.snapshot import ClassTotals

NAMES = ("gpu_time_ns", "charge_known_ns", "charge_error_ns", "charge_error")
# Each column that version 17 added.
ADDED = [
    ("requests", "charge_error_ns"),
    ("usage_pieces", "charge_error_ns"),
    *(
        (table, column)
        for table in ("rollup_hours", "rollup_days", "dropped_hours")
        for column in ("charge_known_ns", "charge_error_ns")
    ),
]


def bill(seq: int, *errors_ns: int | None, tenant: str = "alice", **changes) -> EngineRequest:
    """A bill of 300 ns in each hour up to HOUR, of which so many may belong to others."""
    first = HOUR + 1 - len(errors_ns)
    pieces = tuple(
        UsagePiece(first + n, 100, 200, 8, 5, charge_error_ns=error)
        for n, error in enumerate(errors_ns)
    )
    return part(seq, f"h{seq}", pieces=pieces, tenant=tenant, **changes)


def by_hour(bills: list[EngineRequest]) -> dict[int, ClassTotals]:
    """What an engine says that did nothing else."""
    hours: dict[int, ClassTotals] = {}
    for piece in (piece for one in bills for piece in one.bill.pieces):
        hours.setdefault(piece.hour, ClassTotals()).requests += piece.gpu_time_ns
    return hours


def write(ledger: Ledger, bills: list[EngineRequest], number: int = 1) -> None:
    hours = by_hour(bills)
    totals = ClassTotals(requests=sum(of.requests for of in hours.values()))
    ledger.write(*bills, snapshot(bills, number, totals=totals, hours=hours))


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(url_of(tmp_path / "ledger.db"))
    yield ledger
    ledger.close()


def figures(row) -> tuple:
    return tuple(row[name] for name in NAMES)


def test_tenants_add_up_the_errors_of_their_bills_as_far_as_they_are_known(ledger):
    # alice: 30 + (5 + 7) of 300 + 600 ns known, 300 unknown; bob nothing known; carol alone.
    write(
        ledger,
        [
            bill(1, 30),
            bill(2, 5, 7),
            bill(3, None),
            bill(4, None, None, tenant="bob"),
            bill(5, 0, tenant="carol"),
        ],
    )
    rows = ledger.rows()
    assert figures(rows["alice"]) == (1200, 900, 42, 42 / 900)
    assert figures(rows["bob"]) == (600, 0, 0, None)
    assert figures(rows["carol"]) == (300, 300, 0, 0.0)
    assert figures(rows["__idle__"])[1:] == (None, None, None)
    hour_before = ledger.rows(HOUR - 1, HOUR)
    assert figures(hour_before["alice"]) == (300, 300, 5, 5 / 300)
    statement = ledger.reader.statement("2027-01")
    told = {one["tenant"]: one["charge_error"] for one in statement["tenants"]}
    assert told == {"alice": 42 / 900, "bob": None, "carol": 0.0}
    assert figures(statement["total"]) == (2100, 1200, 42, 42 / 1200)
    assert ledger.audit(full=True)["balanced"]


def test_a_tenant_with_those_below_it_adds_up_all_of_them(ledger):
    child = {"tenant_parent": "alice", "tenant_rule": "api_key"}
    write(
        ledger,
        [bill(1, 30), bill(2, 6, tenant="web", **child), bill(3, None, tenant="app", **child)],
    )
    assert figures(ledger.reader.tenant("alice")) == (900, 600, 36, 36 / 600)
    assert figures(ledger.reader.tenant("alice", covers="own")) == (300, 300, 30, 0.1)
    assert figures(ledger.reader.tenant("app")) == (300, 0, 0, None)


@pytest.mark.parametrize("changed", ["charge_error_ns = 8", "charge_error_ns = NULL"])
def test_an_error_that_was_changed_from_outside_is_seen(ledger, tmp_path, changed):
    write(ledger, [bill(1, 12, 0)])
    assert ledger.audit(full=True)["balanced"]
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection, connection:
        connection.execute(f"UPDATE usage_pieces SET {changed} WHERE hour = {HOUR}")
    (run,) = ledger.audit(full=True)["runs"]
    assert (run["balanced"], run["uneven_bills"], run["changed"]) == (False, 1, True)
    assert wrong_sums(tmp_path / "ledger.db")


def as_version_16(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        as_version_17(connection.execute)
        for table, column in ADDED:
            connection.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        connection.execute("UPDATE schema_version SET version = 16")


def test_of_bills_from_before_it_is_unknown_and_never_0(tmp_path):
    path = tmp_path / "ledger.db"
    older = [bill(1, None), bill(2, None, None), bill(3, None, tenant="bob")]
    before = Ledger(url_of(path))
    write(before, older)
    before.close()
    as_version_16(path)
    open_database(url_of(path)).dispose()
    assert sql(path, "SELECT version FROM schema_version") == [(SCHEMA_VERSION,)]
    assert wrong_sums(path) == []
    now = Ledger(url_of(path))
    assert figures(now.rows()["alice"]) == (900, 0, 0, None)
    # No bill reads as changed: the digest of an unknown error is that of before.
    assert now.audit(full=True)["balanced"]
    write(now, [*older, bill(4, 15)], number=2)
    assert figures(now.rows()["alice"]) == (1200, 300, 15, 0.05)
    assert figures(now.rows()["bob"]) == (300, 0, 0, None)
    assert now.audit(full=True)["balanced"]
    assert wrong_sums(path) == []
    now.close()
