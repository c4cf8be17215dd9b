"""The runs that have bills, and the number of each one's highest bill.

The bills' key is (`run_id`, `seq`), so both are found by looks into the key: two for each run,
however many bills it has. Grouping the bills by run would read them all.

Invariant: a run is here if and only if the ledger has a bill of it, whatever else it lacks.
"""

from sqlalchemy import func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.schema import requests


def highest_bills(connection: Connection) -> dict[str, int]:
    """Return the number of the highest bill of each run that has any."""
    return {run_id: int(seq) for run_id, seq in connection.execute(_HIGHEST)}


_first, _later, _last = (requests.alias(f"{which}_bill").c for which in ("first", "later", "last"))
# From one run the next is found by a look into the key.
_ids = select(func.min(_first.run_id).label("run_id")).cte("billed_runs", recursive=True)
_following = select(func.min(_later.run_id)).where(_later.run_id > _ids.c.run_id)
_runs = _ids.union_all(select(_following.scalar_subquery()).where(_ids.c.run_id.is_not(None)))
_HIGHEST = select(
    _runs.c.run_id,
    select(func.max(_last.seq)).where(_last.run_id == _runs.c.run_id).scalar_subquery(),
).where(_runs.c.run_id.is_not(None))
