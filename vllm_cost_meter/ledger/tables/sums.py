"""The tables of sums over bills and exchanges, which `ledger/rollups` makes.

They follow from the rows of bills and exchanges, and change in the transaction that writes those.

Invariant: a sum has one amount for each amount of a piece, and two for the error of its charge.
"""

from sqlalchemy import BigInteger, Column, Index, Integer, Table

from vllm_cost_meter.ledger.tables.base import KeyText, amount_columns, metadata
from vllm_cost_meter.records.bill import UsagePiece

# What rows of one sum have in common: the run and what a report can ask for.
rollup_groups = Table(
    "rollup_groups",
    metadata,
    # A digest of the other columns, so that it is the same in every ledger.
    Column("group_id", BigInteger, primary_key=True, autoincrement=False),
    Column("run_id", KeyText, nullable=False),
    Column("tenant", KeyText, nullable=False),
    Column("tenant_rule", KeyText, nullable=False),
    Column("tenant_parent", KeyText),
    Column("tags", KeyText),
    Column("tenant_above", KeyText),
    Column("model", KeyText),
    Column("lora", KeyText),
    Column("route", KeyText),
    Column("engine_status", KeyText, nullable=False),
    # The tenants below one.
    Index("ix_rollup_groups_tenant", "tenant", "tenant_above"),
)

# The amounts of a piece that are always known: all but its hour and the error of its charge.
PIECE_AMOUNTS = UsagePiece._fields[1:-1]
# GPU time whose error is known, and that error: what charges add up to, as some errors are unknown.
CHARGE_AMOUNTS = ("charge_known_ns", "charge_error_ns")
# The amounts of pieces in a span of hours.
SUMMED_AMOUNTS = (*PIECE_AMOUNTS, *CHARGE_AMOUNTS)
# The tokens of an exchange that its client may have been told.
ENDED_TOKENS = ("prompt_tokens", "cached_tokens", "output_tokens")
# Prompt tokens that came over a KV connector, and the prompts of which that is known: what they add
# up to, as it is unknown of some.
EXTERNAL_AMOUNTS = ("external_tokens", "external_known_tokens")
# Exchanges that ended in a span of hours, and their tokens.
ENDED_AMOUNTS = ("requests", *ENDED_TOKENS, *EXTERNAL_AMOUNTS)


def _rollup(name: str, span: str, *more: Column[int]) -> Table:
    return Table(
        name,
        metadata,
        Column(span, Integer, primary_key=True, autoincrement=False),
        Column("group_id", BigInteger, primary_key=True, autoincrement=False),
        *more,
        *amount_columns(*SUMMED_AMOUNTS, *ENDED_AMOUNTS),
        sqlite_with_rowid=False,
    )


rollup_hours = _rollup("rollup_hours", "hour")
# A UTC day; `first_hour` is the first one with a piece in it.
rollup_days = _rollup("rollup_days", "day", Column("first_hour", Integer))

# How long exchanges took, by the hour in which they ended: a histogram for each measure.
rollup_latencies = Table(
    "rollup_latencies",
    metadata,
    Column("hour", Integer, primary_key=True, autoincrement=False),
    # ttft, tpot or e2e.
    Column("measure", KeyText, primary_key=True),
    # Stands for all times within 1 % of it, in microseconds.
    Column("about_us", BigInteger, primary_key=True, autoincrement=False),
    Column("exchanges", BigInteger, nullable=False),
    # What they took in all.
    Column("sum_us", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

# Exchanges with a bill, by the hour in which they came.
rollup_arrivals = Table(
    "rollup_arrivals",
    metadata,
    Column("hour", Integer, primary_key=True, autoincrement=False),
    Column("exchanges", BigInteger, nullable=False),
)

# Digests add up modulo this: two of them make a number of 64 bits with a sign.
DIGEST_MODULUS = 1 << 62

# What all bills of a run add up to, whatever of them is still in `requests`.
bill_sums = Table(
    "bill_sums",
    metadata,
    Column("run_id", KeyText, primary_key=True),
    Column("bills", BigInteger, nullable=False),
    # The highest number of a bill.
    Column("last_seq", BigInteger, nullable=False),
    Column("gpu_time_ns", BigInteger, nullable=False),
    # The sum of the digests of all bills, modulo `DIGEST_MODULUS`.
    Column("digest", BigInteger, nullable=False),
    Column("method", KeyText, nullable=False),
    Column("started_at", KeyText, nullable=False),
    Column("finished_at", KeyText, nullable=False),
)

# The known energy of all bills of a run.
energy_sums = Table(
    "energy_sums",
    metadata,
    Column("run_id", KeyText, primary_key=True),
    Column("energy_mj", BigInteger, nullable=False),
)
