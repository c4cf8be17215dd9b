"""The tables of retention: from when on rows are kept, and what the dropped ones add up to.

Sums that reports read (`rollup_hours` and the like) are made of rows. Where rows are dropped, the
same amounts are put into the tables here, in the same transaction. So these, with the rows that are
left, add up to the sums at any instant, and a sum can be made anew or judged as before.

Invariant: no row of `requests` is in what these tables add up to.
"""

from sqlalchemy import BigInteger, Column, Integer, Table, Text

from vllm_cost_meter.ledger.tables.base import KeyText, amount_columns, metadata
from vllm_cost_meter.ledger.tables.sums import ENDED_AMOUNTS, SUMMED_AMOUNTS

row_cutoffs = Table(
    "row_cutoffs",
    metadata,
    # Rows of requests that ended before this hour may be gone; the latest one counts.
    Column("kept_from_hour", Integer, primary_key=True, autoincrement=False),
    Column("decided_at", KeyText, nullable=False),
)

# What the dropped bills of a run add up to, as `bill_sums` has it of all bills.
dropped_bills = Table(
    "dropped_bills",
    metadata,
    Column("run_id", KeyText, primary_key=True),
    Column("bills", BigInteger, nullable=False),
    # The highest number of a bill that was dropped.
    Column("last_seq", BigInteger, nullable=False),
    Column("gpu_time_ns", BigInteger, nullable=False),
    Column("digest", BigInteger, nullable=False),
    Column("method", KeyText, nullable=False),
    Column("started_at", KeyText, nullable=False),
    Column("finished_at", KeyText, nullable=False),
    # This JSON has the ranges of lower numbers that were not dropped: such a bill is in
    # `requests`, or the ledger never had it.
    Column("rest", Text, nullable=False),
)

dropped_hours = Table(
    "dropped_hours",
    metadata,
    Column("hour", Integer, primary_key=True, autoincrement=False),
    Column("group_id", BigInteger, primary_key=True, autoincrement=False),
    *amount_columns(*SUMMED_AMOUNTS, *ENDED_AMOUNTS),
    # Exchanges that came in this hour.
    Column("arrivals", BigInteger, nullable=False),
    # The known energy used in this hour, and of how many bills.
    Column("energy_mj", BigInteger, nullable=False),
    Column("energies", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

# Bills whose energy is unknown. A row with the same hour twice counts the bills that used it; a row
# with an hour and a later one takes off those of which these are two hours in a row. So the rows of
# which a window has both hours add up to the bills that have an hour in the window.
dropped_unknown_energy = Table(
    "dropped_unknown_energy",
    metadata,
    Column("hour", Integer, primary_key=True, autoincrement=False),
    Column("later_hour", Integer, primary_key=True, autoincrement=False),
    Column("group_id", BigInteger, primary_key=True, autoincrement=False),
    Column("bills", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

dropped_latencies = Table(
    "dropped_latencies",
    metadata,
    Column("hour", Integer, primary_key=True, autoincrement=False),
    Column("measure", KeyText, primary_key=True),
    Column("about_us", BigInteger, primary_key=True, autoincrement=False),
    Column("run_id", KeyText, primary_key=True),
    Column("exchanges", BigInteger, nullable=False),
    Column("sum_us", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
