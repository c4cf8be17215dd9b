"""The views of a fleet's database in place of a ledger's tables, so that a `LedgerReader` answers.

Of states a view has the latest one of each key; of sums what all shipments that count add up to.
The tables with a row for each request are views too: over what senders with rows have sent, and
over the bills that no snapshot counts yet of senders without. Of the other bills of those, which
were never here, the views say what a ledger says of dropped ones.

Invariant: a bill is in `requests` or among what `dropped_bills` adds up to, never both.
"""

# ruff: noqa: S608 - only names of tables and columns are written into the SQL below
from collections.abc import Sequence

from sqlalchemy import Dialect, Table, make_url

from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.fleet.changes import STATES
from vllm_cost_meter.ledger.fleet.schema import (
    FOLDED,
    FOLDED_DAYS,
    WITH_ROWS,
    kept_name,
    retired_senders,
    run_senders,
    senders,
    sent_name,
    shared_runs,
    tails,
    told_name,
    told_open_requests,
    unsent_bills,
)
from vllm_cost_meter.ledger.tables.replies import replies
from vllm_cost_meter.ledger.tables.replies import view_statement as replies_statement
from vllm_cost_meter.units.calendar import HOURS_PER_DAY
from vllm_cost_meter.units.time import NS_PER_HOUR, NS_PER_SECOND

_POSTGRESQL: Dialect = make_url("postgresql+psycopg://").get_dialect()()

# How these columns of `bill_sums` add up, as `BillSums.with_more` does it.
_BILL_SUMS = {
    "last_seq": "MAX({})",
    "digest": f"CAST(MOD(SUM({{}}), {schema.DIGEST_MODULUS}) AS BIGINT)",
    "method": "MIN({})",
    "started_at": "MIN({})",
    "finished_at": "MAX({})",
}


def view_names() -> list[str]:
    """Return the names of all views, each before those that it is made of."""
    return [replies.name, *reversed(_views())]


def view_statements() -> list[str]:
    """Return the statements that make the views, each after those that it is made of."""
    made = [f"CREATE VIEW {name} AS {query}" for name, query in _views().items()]
    return [*made, replies_statement(_POSTGRESQL)]


def _views() -> dict[str, str]:
    return {
        "uncounted_runs": _uncounted_runs(),
        "uncounted_groups": (
            "SELECT uncounted_runs.sender_id, group_id FROM uncounted_runs"
            f" JOIN {schema.rollup_groups.name} USING (run_id)"
        ),
        **{table.name: _latest(table) for table in STATES},
        schema.rollup_hours.name: _of_groups([c.name for c in schema.rollup_hours.c]),
        schema.rollup_days.name: _days(),
        schema.rollup_latencies.name: _of_no_run(schema.rollup_latencies),
        schema.rollup_arrivals.name: _of_no_run(schema.rollup_arrivals),
        schema.bill_sums.name: _of_runs(schema.bill_sums),
        schema.energy_sums.name: _of_runs(schema.energy_sums),
        **_row_views(),
    }


def _latest(table: Table) -> str:
    """Return the query of the latest state of each key: one look into the key's index for each."""
    told = told_name(table)
    keys = [column.name for column in table.primary_key]
    columns = ", ".join(f"latest.{column.name}" for column in table.c)
    same = " AND ".join(f"each.{key} = known.{key}" for key in keys)
    known = (
        f"SELECT {schema.runs.name}.run_id FROM {schema.runs.name}"
        if keys == ["run_id"]
        else f"SELECT DISTINCT {', '.join(keys)} FROM {told}"
    )
    return (
        f"SELECT {columns} FROM ({known}) AS known CROSS JOIN LATERAL ("
        f"SELECT * FROM {told} AS each WHERE {same} ORDER BY each.number DESC LIMIT 1) AS latest"
    )


def _uncounted_runs() -> str:
    """Return the query of the senders by which a shared run does not count."""
    of_each = (
        f"SELECT sender_id, run_id, SUM(bills) AS bills FROM {sent_name(schema.bill_sums)}"
        f" WHERE run_id IN (SELECT run_id FROM {shared_runs.name}) GROUP BY sender_id, run_id"
    )
    is_retired = f"sender_id IN (SELECT sender_id FROM {retired_senders.name})"
    ranked = (
        "SELECT sender_id, run_id, RANK() OVER (PARTITION BY run_id ORDER BY bills DESC,"
        f" {is_retired}, sender_id) AS place FROM ({of_each}) AS of_each"
    )
    return f"SELECT sender_id, run_id FROM ({ranked}) AS ranked WHERE place > 1"


def _of_groups(columns: Sequence[str]) -> str:
    """Return the query of the sums by hour and group that count."""
    return (
        f"SELECT {', '.join(columns)} FROM {sent_name(schema.rollup_hours)}"
        " WHERE (sender_id, group_id) NOT IN (SELECT sender_id, group_id FROM uncounted_groups)"
    )


def _of_runs(table: Table) -> str:
    """Return the query of the sums by run that count, added up by run."""
    sums = [f"{added_up(table, c.name, c.name)} AS {c.name}" for c in table.c if not c.primary_key]
    return (
        f"SELECT run_id, {', '.join(sums)} FROM {sent_name(table)}"
        " WHERE (sender_id, run_id) NOT IN (SELECT sender_id, run_id FROM uncounted_runs)"
        " GROUP BY run_id"
    )


def added_up(table: Table, column: str, how: str) -> str:
    """Return the SQL for what a column of sums adds up to over rows in which it is `how`."""
    if table is schema.bill_sums and column in _BILL_SUMS:
        return _BILL_SUMS[column].format(how)
    return f"MIN({how})" if column == "first_hour" else f"CAST(SUM({how}) AS BIGINT)"


def _of_no_run(table: Table) -> str:
    """Return the query of the sums that are of no run and count."""
    return (
        f"SELECT {', '.join(table.c.keys())} FROM {sent_name(table)}"
        f" WHERE sender_id NOT IN (SELECT sender_id FROM {retired_senders.name})"
    )


def _days() -> str:
    folded = ", ".join(schema.rollup_days.c.keys())
    made = ", ".join(f"{how} AS {name}" for name, how in day_columns().items())
    counts = "(sender_id, group_id) NOT IN (SELECT sender_id, group_id FROM uncounted_groups)"
    return (
        f"SELECT {folded} FROM {FOLDED_DAYS.name} WHERE {counts} UNION ALL"
        f" SELECT {made} FROM {sent_name(schema.rollup_hours)}"
        f" WHERE first_number > {FOLDED} AND {counts}"
    )


def day_columns() -> dict[str, str]:
    """Return by name how the columns of `rollup_days` are made of those of an hour."""
    used = " OR ".join(f"{name} <> 0" for name in schema.SUMMED_AMOUNTS)
    amounts = {c.name: c.name for c in schema.rollup_hours.c if not c.primary_key}
    return {
        "day": f"hour / {HOURS_PER_DAY}",
        "group_id": "group_id",
        "first_hour": f"CASE WHEN {used} THEN hour END",
        **amounts,
    }


# ---- rows of requests


def _row_views() -> dict[str, str]:
    """Return the queries of the tables with a row for each request, and of what was dropped."""
    runs = "run_id NOT IN (SELECT run_id FROM rowless_runs)"
    return {
        "rowless_runs": (
            f"SELECT run_id, sender_id FROM {run_senders.name} JOIN {senders.name}"
            f" USING (sender_id) WHERE {senders.name}.rows <> '{WITH_ROWS}' AND (sender_id, run_id)"
            " NOT IN (SELECT sender_id, run_id FROM uncounted_runs)"
        ),
        # The latest tail of each run, and up to which bill its latest snapshot counts.
        "latest_tails": (
            "SELECT run_id, latest.bills, latest.pieces, COALESCE(counted.last_seq, 0) AS last_seq"
            f" FROM rowless_runs CROSS JOIN LATERAL (SELECT bills, pieces FROM {tails.name} AS each"
            " WHERE each.sender_id = rowless_runs.sender_id AND each.run_id = rowless_runs.run_id"
            " ORDER BY each.number DESC LIMIT 1) AS latest LEFT JOIN LATERAL (SELECT last_seq FROM"
            f" {told_name(schema.snapshots)} AS told WHERE told.run_id = rowless_runs.run_id"
            " ORDER BY told.number DESC LIMIT 1) AS counted ON true"
        ),
        "tail_bills": _tail_of(schema.requests, "bills"),
        "tail_pieces": _tail_of(schema.usage_pieces, "pieces"),
        schema.requests.name: _both(schema.requests, runs, "tail_bills"),
        schema.usage_pieces.name: _both(schema.usage_pieces, runs, "tail_pieces"),
        schema.request_energy.name: _all_of(schema.request_energy, runs),
        schema.open_requests.name: _open_requests(),
        **_dropped_views(runs),
    }


def _all_of(table: Table, where: str) -> str:
    return f"SELECT {', '.join(table.c.keys())} FROM {kept_name(table)} WHERE {where}"


def _both(table: Table, where: str, tail: str) -> str:
    return f"{_all_of(table, where)} UNION ALL SELECT {', '.join(table.c.keys())} FROM {tail}"


def _tail_of(table: Table, column: str) -> str:
    """Return the query of the rows in the latest tails that no snapshot counts."""
    names = ", ".join(f"row.{name}" for name in table.c.keys())  # noqa: SIM118 - no mapping
    return (
        f"SELECT {names} FROM latest_tails AS tail CROSS JOIN LATERAL jsonb_populate_recordset("
        f"CAST(NULL AS {kept_name(table)}), CAST(tail.{column} AS JSONB)) AS row"
        " WHERE row.seq > tail.last_seq"
    )


def _open_requests() -> str:
    table = schema.open_requests
    names = ", ".join(f"row.{name}" for name in table.c.keys())  # noqa: SIM118 - no mapping
    retired = f"SELECT sender_id FROM {retired_senders.name}"
    return (
        f"{_all_of(table, 'true')} UNION ALL SELECT {names} FROM {senders.name} AS sender"
        f" CROSS JOIN LATERAL (SELECT opened FROM {told_open_requests.name} AS told WHERE"
        " told.sender_id = sender.sender_id ORDER BY told.number DESC LIMIT 1) AS latest"
        f" CROSS JOIN LATERAL jsonb_populate_recordset(CAST(NULL AS {kept_name(table)}),"
        f" CAST(latest.opened AS JSONB)) AS row WHERE sender.sender_id NOT IN ({retired})"
    )


def _dropped_views(runs: str) -> dict[str, str]:
    """Return the queries that say of bills that were never here what is said of dropped ones.

    Of a run of which numbers are missing nothing is said: which ones, only rows could tell. Its
    energy by tenant is unknown: that is known by rows alone.
    """
    now_s = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS BIGINT)"
    next_hour = f"CAST({now_s} / {NS_PER_HOUR // NS_PER_SECOND} + 1 AS INTEGER)"
    here = "bill_sums.bills - COALESCE(beyond.bills, 0)"
    last_seq = "COALESCE(NULLIF(latest_tails.last_seq, 0), bill_sums.last_seq)"
    return {
        schema.row_cutoffs.name: (
            f"{_all_of(schema.row_cutoffs, 'true')} UNION ALL SELECT {next_hour}, ''"
            " WHERE EXISTS (SELECT 1 FROM rowless_runs)"
            f" UNION ALL SELECT kept_from_hour, noticed_at FROM {unsent_bills.name}"
        ),
        schema.dropped_bills.name: (
            f"{_all_of(schema.dropped_bills, runs)} UNION ALL SELECT run_id, {here}, {last_seq},"
            " CAST(bill_sums.gpu_time_ns - COALESCE(beyond.gpu_time_ns, 0) AS BIGINT),"
            " bill_sums.digest,"
            " bill_sums.method, bill_sums.started_at, bill_sums.finished_at, '[]'"
            " FROM rowless_runs JOIN bill_sums USING (run_id) LEFT JOIN latest_tails USING (run_id)"
            " LEFT JOIN (SELECT run_id, COUNT(*) AS bills, SUM(gpu_time_ns) AS gpu_time_ns"
            f" FROM tail_bills GROUP BY run_id) AS beyond USING (run_id) WHERE {here} = {last_seq}"
        ),
        schema.dropped_unknown_energy.name: (
            f"{_all_of(schema.dropped_unknown_energy, 'true')} UNION ALL"
            f" SELECT hour, hour, group_id, GREATEST(requests, 1) FROM {schema.rollup_hours.name}"
            f" WHERE group_id IN (SELECT group_id FROM {schema.rollup_groups.name} WHERE run_id IN"
            " (SELECT run_id FROM rowless_runs))"
            f" UNION ALL {_unsent_energy()}"
        ),
    }


def _unsent_energy() -> str:
    """Return the query of the hours in which the energy of bills is unknown that were not sent.

    Which bills of an hour these are, only their rows could tell: so it is unknown for all.
    """
    until = f"SELECT run_id, MAX(kept_from_hour) AS hour FROM {unsent_bills.name} GROUP BY run_id"
    return (
        "SELECT used.hour, used.hour, group_id, GREATEST(requests, 1)"
        f" FROM ({until}) AS until JOIN {schema.rollup_groups.name} USING (run_id)"
        f" JOIN {schema.rollup_hours.name} AS used USING (group_id) WHERE used.hour < until.hour"
    )
