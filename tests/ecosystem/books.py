"""Whether a fleet's database has what ledgers have: row by row, sum by sum, reply by reply.

The ledgers' rows are put together here, and not by the product: facts and states side by side, and
sums added up by their keys.

Invariant: where `differences` is empty, no row, amount or reply is missing, twice or other.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Engine, Table, create_engine, select

from tests.ecosystem.machines import Told
from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.fleet.changes import FACTS, STATES, SUMS
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.tables.replies import replies

# A ledger takes out the row of an open request when its bill comes; a fact of the fleet stays.
_STAYS_IN_FLEET = (schema.open_requests.name,)
# These have one row for each run. Runs are of one ledger, so there is nothing to add up.
_SUMS_OF_RUNS = (schema.bill_sums.name, schema.energy_sums.name)
Rows = dict[tuple[Any, ...], Any]
_LATER = AsOf(now_ns=time.time_ns() + 10**9 * 3600)


def rows_of(url: str, table: Table) -> list[dict[str, Any]]:
    """Return all rows of a table or view."""
    engine = create_engine(url)
    try:
        return _rows(engine, table)
    finally:
        engine.dispose()


def _rows(engine: Engine, table: Table) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return [row._asdict() for row in connection.execute(select(table))]


def differences(ledgers: Sequence[str], fleet: str) -> list[str]:
    """Return what a fleet's tables have otherwise than the ledgers together, a line for each."""
    found = []
    for table in (*FACTS, *STATES, *SUMS):
        keys = [column.name for column in table.primary_key]
        put = _added_up if table in SUMS and table.name not in _SUMS_OF_RUNS else _side_by_side
        own = put(keys, (row for url in ledgers for row in rows_of(url, table)))
        in_fleet = rows_of(fleet, table)
        there = put(keys, in_fleet)
        if put is _side_by_side and len(in_fleet) > len(there):
            found.append(f"{table.name}: a row is there twice")
        for key in own.keys() | there.keys():
            if key not in own and table.name in _STAYS_IN_FLEET:
                continue
            if own.get(key) != there.get(key):
                found.append(f"{table.name} {key}: {own.get(key)} != {there.get(key)}")
    return found


def _side_by_side(keys: Sequence[str], rows: Iterable[dict[str, Any]]) -> Rows:
    found: Rows = {}
    for row in rows:
        key = tuple(row.pop(name) for name in keys)
        # Two ledgers may have the same price, each since another instant: that one is for people.
        row.pop("effective_from", None)
        assert found.setdefault(key, row) == row, f"twice: {key}"
    return found


def _added_up(keys: Sequence[str], rows: Iterable[dict[str, Any]]) -> Rows:
    found: Rows = defaultdict(lambda: defaultdict(int))
    for row in rows:
        sums = found[tuple(row[name] for name in keys)]
        for name, value in row.items():
            if name not in keys:
                sums[name] += value
    return {key: dict(sums) for key, sums in found.items()}


def told_otherwise(told: Mapping[str, Told], url: str) -> list[str]:
    """Return the replies that a ledger or a fleet has otherwise than their clients were told."""
    there = {row["http_request_id"]: row for row in rows_of(url, replies)}
    found = []
    for name, one in told.items():
        row = there.get(name)
        if row is None or one != Told(*(row[field] for field in Told._fields)):
            found.append(f"{name}: told {one}, got {row}")
    return found


def audited(url: str) -> dict[str, dict[str, Any]]:
    """Return the full audit of each run, as if nobody had sent anything for an hour."""
    with LedgerReader(url) as reader:
        audit = reader.audit(_LATER, full=True)
    return {run["run_id"]: dict(run) for run in audit["runs"]}


def usage(urls: Sequence[str]) -> Rows:
    """Return what reports of ledgers say in all, by tenant or class and by hour.

    Money is left out: each report rounds its own.
    """
    found: Rows = defaultdict(lambda: defaultdict(int))
    for url in urls:
        with LedgerReader(url) as reader:
            report = reader.report(aggregate="tenant,hour", as_of=_LATER)
        for piece in report["series"]:
            for row in piece["rows"]:
                sums = found[row["tenant"], row["hour"]]
                for name, value in row.items():
                    if isinstance(value, int) and "usd" not in name:
                        sums[name] += value
    return {key: dict(sums) for key, sums in found.items()}
