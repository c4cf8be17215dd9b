"""The runs that have bills, and the number of each one's highest bill.

Both are in the sums kept with the bills: a row for each run, however many bills it has.

Invariant: a run is here if and only if the ledger ever had a bill of it, whatever else it lacks.
"""

from sqlalchemy import select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.schema import bill_sums


def highest_bills(connection: Connection) -> dict[str, int]:
    """Return the number of the highest bill of each run that has any."""
    found = connection.execute(select(bill_sums.c.run_id, bill_sums.c.last_seq))
    return {run_id: int(seq) for run_id, seq in found}
