"""Bills whose rows a ledger dropped before it sent them: the fleet has only what they add up to.

A ledger keeps its rows until the fleet has them, with three exceptions: its file may be too large
while the fleet is away and the outbox was freed, somebody may drop them by hand, and a server that
sent no rows may send them from some day on. Such rows never come. When the ledger joins anew it
brings the sums of all its bills, so no amount is lost. What is lost are the rows: which requests
those were, and the energy of each tenant. The fleet notes their numbers.

Invariant: each bill that a ledger has counted and dropped has its rows in the fleet, or is among
what was dropped there, or is noted here.
"""

from typing import Any

from sqlalchemy import select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.fleet.inserting import insert_new
from vllm_cost_meter.ledger.fleet.schema import now_text, unsent_bills
from vllm_cost_meter.ledger.queries.answers import UnsentBills
from vllm_cost_meter.ledger.queries.missing import missing_among
from vllm_cost_meter.ledger.retention.known import dropped_by_run, kept_from_hour
from vllm_cost_meter.ledger.retention.ranges import Ranges, joined


def note_unsent(fleet: Connection, ledger: Connection, host: str) -> int:
    """Note which bills a ledger has dropped that the fleet has no rows of; return how many.

    Comes after all rows that the ledger has, in the same transaction of the fleet.
    """
    kept_from = kept_from_hour(ledger)
    if kept_from is None:
        return 0
    found = [
        (run_id, first, last)
        for run_id, dropped in dropped_by_run(ledger).items()
        for first, last in missing_among(fleet, run_id, dropped.ranges())
    ]
    now = fleet.execute(select(now_text())).scalar_one()
    about = {"host": host, "kept_from_hour": kept_from, "noticed_at": now}
    insert_new(fleet, unsent_bills, ["run_id", "first_seq", "last_seq"], found, **about)
    return sum(last - first + 1 for _, first, last in found)


def unsent_in(fleet: Connection) -> list[UnsentBills]:
    """Return the bills that were noted and have no rows to this day, by run."""
    u = unsent_bills.c
    noted: dict[str, list[Any]] = {}
    for row in fleet.execute(select(unsent_bills).order_by(u.noticed_at, u.run_id)):
        noted.setdefault(row.run_id, []).append(row)
    found: list[UnsentBills] = []
    for run_id, rows in noted.items():
        # Another ledger may have had the rows: a copy, or a backup that was restored.
        left = missing_among(fleet, run_id, joined((row.first_seq, row.last_seq) for row in rows))
        if left:
            found.append(_unsent(run_id, left, rows[-1]))
    return found


def _unsent(run_id: str, numbers: Ranges, latest: Any) -> UnsentBills:
    return {
        "run_id": run_id,
        "host": latest.host,
        "bills": sum(last - first + 1 for first, last in numbers),
        "first_seq": numbers[0][0],
        "last_seq": numbers[-1][1],
        "noticed_at": latest.noticed_at,
    }
