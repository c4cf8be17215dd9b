"""What a fleet says of runs that ended, while their ledger still holds some of their bills."""

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.component.ledger.test_reader import part, snapshot
from tests.ecosystem.test_fleet import changed, write
from tests.ecosystem.test_postgresql import rows
from tests.support.fleet import sent
from vllm_cost_meter.cli.audit import audit_lines
from vllm_cost_meter.journal.places import folder_of_ledger
from vllm_cost_meter.journal.writer import JournalWriter
from vllm_cost_meter.ledger.catching_up import catch_up
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.fleet.sender import FleetSender
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.units.time import NS_PER_HOUR

LONG_AGO = "2000-01-01T00:00:00.000000Z"
# Its engine died an hour ago.
DIED_NS = time.time_ns() - NS_PER_HOUR
BILLS = [
    replace(part(seq, f"h{seq}", run_id="run"), started_at_ns=DIED_NS, finished_at_ns=DIED_NS)
    for seq in range(1, 7)
]
WORD = snapshot(BILLS[:3], 1, "run", taken_at_ns=DIED_NS)


@pytest.fixture
def own(tmp_path: Path, url: str) -> str:
    """The ledger of a server that died. Its fleet has three bills, and a snapshot of them."""
    ledger = f"sqlite:///{tmp_path}/ledger.db"
    open_database(ledger).dispose()
    sent(ledger, url)
    write(ledger, *BILLS[:3], WORD)
    sent(ledger, url)
    for column in ("shipments SET received_at", "told_snapshots SET told_at"):
        changed(url, f"UPDATE {column} = '{LONG_AGO}'")
    changed(url, f"UPDATE shipments SET sent_at = '{LONG_AGO}'")
    return ledger


def journal(ledger: str, *records: Any) -> None:
    """Leave records in a journal of a process that is gone."""
    writer = JournalWriter(folder_of_ledger(Path(ledger.removeprefix("sqlite:///"))))
    writer.start()
    writer.append(*records).result(10)
    writer.close()


def said(url: str) -> tuple[str, list[str]]:
    """Return the state of the run, and the audit's lines about the fleet."""
    with LedgerReader(url) as reader:
        audit = reader.audit(AsOf(settle_s=0))
    assert audit["fleet"] is not None
    states = {run["run_id"]: run["state"] for run in audit["fleet"]["incomplete"]}
    return states.get("run", "complete"), list(audit_lines(audit))


def test_a_run_that_ended_is_complete_only_once_all_that_its_ledger_held_was_sent(
    own: str, url: str
) -> None:
    assert said(url)[0] == "unknown"
    for bill in BILLS[3:]:
        write(own, bill)
    with closing(FleetSender(own, url, shipment_bytes_max=1)) as sender:
        for bills in (4, 5):
            assert sender.step()
            assert rows(url, "SELECT bills FROM bill_sums") == [(bills,)]
            state, lines = said(url)
            assert state == "arriving"
            assert f"up to bill {bills}: later bills may not be here yet;" in lines[1]
        assert sender.step()
        assert said(url)[0] == "complete"


def test_a_run_that_ended_is_not_complete_while_a_journal_holds_bills_of_it(
    own: str, url: str
) -> None:
    journal(own, BILLS[4])
    write(own, BILLS[3])
    with closing(FleetSender(own, url)) as sender:
        assert sender.step()
        assert said(url)[0] == "arriving"
        assert catch_up(own) == 0
        assert sender.step()
        assert rows(url, "SELECT bills FROM bill_sums") == [(5,)]
        assert said(url)[0] == "complete"


def test_a_run_that_ended_and_is_told_of_late_is_not_complete_while_its_ledger_holds_more(
    own: str, url: str
) -> None:
    """What comes late makes its engine look alive for a while."""
    journal(own, BILLS[4])
    write(own, BILLS[3], snapshot(BILLS[:4], 2, "run", taken_at_ns=DIED_NS))
    with closing(FleetSender(own, url)) as sender:
        assert sender.step()
        assert said(url)[0] == "arriving"
        assert catch_up(own) == 0
        assert sender.step()
        assert said(url)[0] == "complete"


def test_a_stop_whose_journals_hold_more_is_no_last_word(own: str, url: str) -> None:
    journal(own, BILLS[3])
    sent(own, url, stops=True)
    assert rows(url, "SELECT count(*) FROM sender_ends") == [(0,)]
    assert said(url)[0] == "unknown"
    assert catch_up(own) == 0
    sent(own, url, stops=True)
    assert rows(url, "SELECT count(*) FROM sender_ends") == [(1,)]
    assert said(url)[0] == "complete"
