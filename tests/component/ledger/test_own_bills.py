"""A tenant's own figures are read from its own rows, however many others there are.

Method: SQLite counts the steps of its programs. A tenant that asks with and without thousands of
bills of others in the ledger must cost about the same steps.
"""

from dataclasses import replace

import pytest
from sqlalchemy import event

from tests.component.ledger.test_reader import HOUR, Ledger, http, ledger, part, snapshot
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.units.time import NS_PER_HOUR

__all__ = ["ledger"]

OTHERS = 3_000
NOW = AsOf((HOUR + 4) * NS_PER_HOUR, 0)


def steps_of(ledger: Ledger, window: tuple[int, ...] = ()) -> int:
    """Return how many hundreds of steps alice's own figures take."""
    looks = 0

    def look() -> int:
        nonlocal looks
        looks += 1
        return 0

    with LedgerReader(ledger.reader.url) as reader:
        reader.tenant("alice", *window, as_of=NOW)  # plans are made
        with reader.transaction() as connection:
            engine = connection.engine
        # Each transaction has a connection of its own.
        event.listen(engine, "connect", lambda made, _: made.set_progress_handler(look, 100))
        found = reader.tenant("alice", *window, as_of=NOW)
    assert found is not None
    assert (found["requests"], len(found["recent"])) == (3, 4)
    return looks


@pytest.mark.parametrize("window", [(), (HOUR, HOUR + 2)])
def test_others_bills_cost_a_tenant_nothing(ledger, window):
    mine = [in_hour(part(n, f"h{n}", tenant="alice"), HOUR + n % 2) for n in (1, 2, 3, 4)]
    told = [http(f"h{n}", at=n, tenant="alice") for n in (1, 2, 3)]
    others = [
        in_hour(part(n, f"h{n}", tenant=f"other-{n % 7}"), HOUR + n % 3)
        for n in range(5, 5 + OTHERS)
    ]
    of_others = [http(f"h{n}", at=n, tenant=f"other-{n % 7}") for n in range(5, 5 + OTHERS, 2)]
    # Each tenant costs a look: all have a bill before the others are there.
    few = [*mine, *others[:21]]
    ledger.write(*few, *told, snapshot(few))
    alone = steps_of(ledger, window)
    ledger.write(*others, *of_others)
    totals = ClassTotals(requests=sum(each.bill.gpu_time_ns for each in (*mine, *others)))
    ledger.write(snapshot([*mine, *others], number=2, last_seq=4 + OTHERS, totals=totals))
    together = steps_of(ledger, window)
    assert alone > 5
    assert together < alone * 1.2 + 10, (alone, together)


def in_hour(each, hour: int):
    return replace(each, bill=each.bill._replace(pieces=(UsagePiece(hour, 100, 200, 8, 5),)))
