"""Rows that a ledger had to drop before it could send them: the fleet has the sums, and says so.

Method: a ledger gets bills while the fleet is away, its outbox is freed, and rows are dropped. Then
the fleet is back. What does not need rows must be as in a ledger that all of them went into.
"""

from pathlib import Path

import pytest

from tests.component.ledger.test_reader import HOUR, part, snapshot
from tests.ecosystem.test_fleet import BILLS, records_of, send, write
from tests.ecosystem.test_fleet_retention import drop_in_ledger, join_anew
from tests.ecosystem.test_fleet_rows import figures
from tests.ecosystem.test_postgresql import AS_OF, rows
from tests.support.fleet import sent
from vllm_cost_meter.cli.audit import audit_lines
from vllm_cost_meter.ledger.queries.answers import Audit
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.records.energy import ENERGY_CLASSES, RequestEnergy, RunEnergy
from vllm_cost_meter.records.snapshot import ClassTotals

SENT = 12


def audited(url: str, *, full: bool = False) -> Audit:
    with LedgerReader(url) as reader:
        return reader.audit(AS_OF, full=full)


@pytest.fixture
def own(tmp_path: Path, url: str) -> str:
    """Give a ledger that has sent some bills of a run, and dropped those that came later unsent."""
    ledger, alone = f"sqlite:///{tmp_path}/ledger.db", f"sqlite:///{tmp_path}/alone.db"
    records = records_of("run")
    send(ledger, url)
    write(ledger, *records[: 2 * SENT])
    send(ledger, url)
    write(ledger, *records[2 * SENT :])
    write(alone, *records)
    join_anew(ledger)  # as when the outbox is freed
    drop_in_ledger(ledger)
    return ledger


def test_the_books_have_every_bill_and_the_audit_says_of_which_there_are_no_rows(
    tmp_path: Path, url: str, own: str, caplog: pytest.LogCaptureFixture
) -> None:
    send(own, url)
    assert figures(url) == figures(f"sqlite:///{tmp_path}/alone.db")
    here = [seq for (seq,) in rows(url, "SELECT seq FROM requests ORDER BY seq")]
    unsent = BILLS - len(here)
    assert 0 < unsent < BILLS
    for full in (False, True):
        audit = audited(url, full=full)
        assert audit["balanced"] is True
        assert audit["runs"][0]["missing_bills"] == []
        assert audit["rows_kept_from"] is not None
        fleet = audit["fleet"]
        assert fleet is not None
        assert fleet["complete_runs"] == fleet["runs"] == 1
        (told,) = fleet["unsent"]
        assert (told["run_id"], told["bills"]) == ("run", unsent)
        assert (told["first_seq"], told["last_seq"]) == (len(here) + 1, BILLS)
        lines = list(audit_lines(audit))
        assert f"dropped the rows of {unsent} bills ({len(here) + 1}-{BILLS}) before" in lines[1]
    assert f"the rows of {unsent} bills were dropped here before" in caplog.text


def test_rows_that_a_server_dropped_before_it_sent_any_are_named_too(
    tmp_path: Path, url: str
) -> None:
    ledger = f"sqlite:///{tmp_path}/ledger.db"
    bills = [part(seq, f"h{seq}") for seq in range(1, 6)]
    write(ledger, *bills, snapshot(bills, 1))
    sent(ledger, url, rows="none")
    drop_in_ledger(ledger)
    sent(ledger, url, stops=True)  # from now on with rows
    (told,) = audited(url)["fleet"]["unsent"]  # type: ignore[index]
    assert (told["bills"], told["first_seq"], told["last_seq"]) == (5, 1, 5)
    for full in (False, True):
        assert audited(url, full=full)["runs"][0]["missing_bills"] == []
    assert figures(url) == figures(ledger)


def test_the_energy_of_tenants_is_unknown_where_rows_never_came(tmp_path: Path, url: str) -> None:
    ledger = f"sqlite:///{tmp_path}/ledger.db"
    told = tuple(RequestEnergy(seq, HOUR, 30, None) for seq in range(1, 5))
    classes = dict.fromkeys(ENERGY_CLASSES, 0) | {"requests": 120}
    energy = RunEnergy(120, None, 0, classes, (), {HOUR: classes}, told)
    bills = [part(seq, f"h{seq}") for seq in range(1, 5)]
    totals = ClassTotals(requests=4 * 300)
    send(ledger, url)
    write(ledger, *bills[:2])
    send(ledger, url)
    write(ledger, *bills[2:], snapshot(bills, totals=totals, energy=energy))
    with LedgerReader(ledger) as reader:
        assert reader.tenants(as_of=AS_OF)["tenants"][0]["energy_mj"] == 120
    join_anew(ledger)
    drop_in_ledger(ledger)
    send(ledger, url)
    with LedgerReader(url) as reader:
        row = reader.tenants(as_of=AS_OF)["tenants"][0]
        assert (row["gpu_time_ns"], row["energy_mj"]) == (4 * 300, None)
        assert row["energy_unknown_requests"] > 0
        assert reader.audit(AS_OF, full=True)["runs"][0]["energy_difference_mj"] == 0


def test_a_copy_that_has_the_rows_brings_them(tmp_path: Path, url: str, own: str) -> None:
    send(own, url)
    assert audited(url)["fleet"]["unsent"]  # type: ignore[index]
    send(f"sqlite:///{tmp_path}/alone.db", url)
    assert audited(url)["fleet"]["unsent"] == []  # type: ignore[index]
    full = audited(url, full=True)
    assert full["balanced"] is True
    assert rows(url, "SELECT count(*) FROM requests") == [(BILLS,)]


def test_what_the_fleet_has_or_has_dropped_is_not_called_unsent(tmp_path: Path, url: str) -> None:
    ledger = f"sqlite:///{tmp_path}/ledger.db"
    bills = [part(seq, f"h{seq}") for seq in range(1, 6)]
    write(ledger, *bills, snapshot(bills, 1))
    send(ledger, url)
    drop_in_ledger(ledger)
    join_anew(ledger)
    sent(ledger, url)
    assert audited(url)["fleet"]["unsent"] == []  # type: ignore[index]
    assert rows(url, "SELECT * FROM unsent_bills") == []
