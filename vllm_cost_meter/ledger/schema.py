"""The ledger's tables: one schema for SQLite and PostgreSQL.

Facts (bills, their pieces, HTTP exchanges, prices, runs) are written once by key and never change.
Four tables hold cumulative counters, which only a higher snapshot number overwrites:

- `snapshots` has the latest snapshot of each run.
- `engine_hours` and `energy_hours` have the same classes hour by hour.
- `live_usage` has the usage of the requests that ran at the snapshot.

`rollup_hours` and `rollup_days` add up bills and exchanges by hour and day, and `bill_sums` the
bills of each run, so that reports and audits need not read them one by one. They follow from the
rows, and change in the transaction that writes them.

`journals` says how far each journal is in this file, in the transaction that brought its records.
`outbox` has what a fleet's database is still to be sent.

An HTTP exchange stands in the row of its bill where it can, else in `http_requests`
(`tables/replies.py`). A row of `open_requests` goes when its bill comes. `billed_hours` follows
from the facts in a provider's bills: an import rewrites the hours that it changes. Amounts are
64-bit integers. Instants are RFC 3339 text with a fixed width, so text order is time order; where
there is a row for each request, they are microseconds since the epoch, and ids are packed
(`tables/packed.py`).
NULL means unknown.

Invariant: a snapshot, its hours and its live usage change in one transaction, and so do a bill, its
pieces and its open request. So at any instant a run's hours add up to its snapshot, the pieces of a
bill add up to it, the energy of requests adds up to the snapshot's class `requests`, and no
request is both billed and open.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    Table,
    Text,
    TextClause,
    text,
)

from vllm_cost_meter.ledger.tables.base import KeyText, amount_columns
from vllm_cost_meter.ledger.tables.base import metadata as metadata
from vllm_cost_meter.ledger.tables.dropped import dropped_bills as dropped_bills
from vllm_cost_meter.ledger.tables.dropped import dropped_hours as dropped_hours
from vllm_cost_meter.ledger.tables.dropped import dropped_latencies as dropped_latencies
from vllm_cost_meter.ledger.tables.dropped import dropped_unknown_energy as dropped_unknown_energy
from vllm_cost_meter.ledger.tables.dropped import row_cutoffs as row_cutoffs
from vllm_cost_meter.ledger.tables.outbox import fleet_sender as fleet_sender
from vllm_cost_meter.ledger.tables.outbox import outbox as outbox
from vllm_cost_meter.ledger.tables.packed import InstantColumn, PackedId
from vllm_cost_meter.ledger.tables.sums import DIGEST_MODULUS as DIGEST_MODULUS
from vllm_cost_meter.ledger.tables.sums import ENDED_AMOUNTS as ENDED_AMOUNTS
from vllm_cost_meter.ledger.tables.sums import PIECE_AMOUNTS as PIECE_AMOUNTS
from vllm_cost_meter.ledger.tables.sums import SUMMED_AMOUNTS as SUMMED_AMOUNTS
from vllm_cost_meter.ledger.tables.sums import bill_sums as bill_sums
from vllm_cost_meter.ledger.tables.sums import energy_sums as energy_sums
from vllm_cost_meter.ledger.tables.sums import rollup_arrivals as rollup_arrivals
from vllm_cost_meter.ledger.tables.sums import rollup_days as rollup_days
from vllm_cost_meter.ledger.tables.sums import rollup_groups as rollup_groups
from vllm_cost_meter.ledger.tables.sums import rollup_hours as rollup_hours
from vllm_cost_meter.ledger.tables.sums import rollup_latencies as rollup_latencies
from vllm_cost_meter.records.energy import ENERGY_CLASSES
from vllm_cost_meter.records.snapshot import CLASSES

SCHEMA_VERSION = 20


def _class_columns() -> list[Column[int]]:
    """Return a column for each class of time, in GPU-nanoseconds."""
    return [Column(f"{name}_ns", BigInteger, nullable=False) for name in CLASSES]


def _energy_columns(*, nullable: bool) -> list[Column[int]]:
    """Return a column for each class of energy, in millijoules."""
    return [Column(f"{name}_mj", BigInteger, nullable=nullable) for name in ENERGY_CLASSES]


def not_derived(id_column: str) -> TextClause:
    """Return the SQL condition on `requests`: vLLM's internal id does not begin with another id.

    Where it does, who asks for the other one finds the row by the index of the internal id.
    """
    return text(f"substr(request_id, 1, length({id_column})) <> {id_column}")


def _index_of_not_derived(id_column: str) -> Index:
    """Return an index of an id of `requests` for the rows that `not_derived` is true of."""
    where = not_derived(id_column)
    name = f"ix_requests_{id_column}"
    return Index(name, id_column, sqlite_where=where, postgresql_where=where)


def _index_of_known(table: str, id_column: str) -> Index:
    """Return an index of an id that a request may lack: rows without it take no room there."""
    where = text(f"{id_column} IS NOT NULL")
    return Index(f"ix_{table}_{id_column}", id_column, sqlite_where=where, postgresql_where=where)


schema_version = Table("schema_version", metadata, Column("version", Integer, primary_key=True))

prices = Table(
    "prices",
    metadata,
    Column("price_id", KeyText, primary_key=True),
    Column("usd_per_gpu_hour", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("effective_from", KeyText, nullable=False),
    # NULL where KV blocks cost nothing.
    Column("usd_per_kv_block_hour", Text),
)

runs = Table(
    "runs",
    metadata,
    Column("run_id", KeyText, primary_key=True),
    Column("engine_index", Integer, nullable=False),
    Column("model", Text, nullable=False),
    Column("gpus", Integer, nullable=False),
    Column("hardware", Text, nullable=False),
    Column("parallelism", Text, nullable=False),
    Column("kv_blocks", BigInteger),
    Column("kv_block_size", Integer),
    Column("host", Text, nullable=False),
    Column("precision", Text, nullable=False),
    Column("method", Text, nullable=False),
    Column("vllm_version", Text, nullable=False),
    Column("meter_version", Text, nullable=False),
    Column("native", Boolean, nullable=False),
    Column("started_at", KeyText, nullable=False),
    Column("price_id", KeyText),
    # This JSON has each GPU's name and UUID.
    Column("devices", Text),
    # This JSON has the texts that the operator declared; NULL before there were labels.
    Column("labels", Text),
    # "victim" or "operator".
    Column("preemption_paid_by", Text, nullable=False),
)

cost_models = Table(
    "cost_models",
    metadata,
    Column("run_id", KeyText, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    # The first snapshot that had the model, at most one poll after it was published.
    Column("taken_at", KeyText, nullable=False),
    Column("form", Text, nullable=False),
    # This JSON has planes with five coefficients each, in GPU-ns.
    Column("planes", Text, nullable=False),
    # This JSON has a curve and what is known of the model; NULL before there were curves.
    Column("curve", Text),
    Column("steps", BigInteger, nullable=False),
    Column("error_two_planes", Float, nullable=False),
    # Of a curve, or in older rows of one plane.
    Column("error_other_form", Float, nullable=False),
    Column("explained", Float, nullable=False),
    # This JSON has the part by which charges of each kind may be off; NULL before that was known.
    Column("charge_errors", Text),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("run_id", KeyText, primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("taken_at", KeyText, nullable=False),
    Column("wall_ns", BigInteger, nullable=False),
    *_class_columns(),
    Column("last_seq", BigInteger, nullable=False),
    Column("billed_ns", BigInteger, nullable=False),
    Column("running", Integer, nullable=False),
    Column("waiting", Integer, nullable=False),
    Column("kv_cache_usage", Float),
    Column("steps", BigInteger, nullable=False),
    Column("busy_ns", BigInteger, nullable=False),
    Column("own_ns", BigInteger, nullable=False),
    Column("errors", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("prior", Text, nullable=False),
    # Energy is NULL until it is known for the first time.
    Column("energy_mj", BigInteger),
    *_energy_columns(nullable=True),
    Column("energy_unknown_ns", BigInteger),
    Column("energy_reason", Text),
)

engine_hours = Table(
    "engine_hours",
    metadata,
    Column("run_id", KeyText, primary_key=True),
    Column("hour", Integer, primary_key=True),
    # The snapshot that has these totals: an older one that comes late must not overwrite them.
    Column("number", BigInteger, nullable=False),
    *_class_columns(),
)

energy_hours = Table(
    "energy_hours",
    metadata,
    Column("run_id", KeyText, primary_key=True),
    Column("hour", Integer, primary_key=True),
    Column("number", BigInteger, nullable=False),
    *_energy_columns(nullable=False),
)

live_usage = Table(
    "live_usage",
    metadata,
    Column("run_id", KeyText, primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("taken_at", KeyText, nullable=False),
    # All open requests' time, and the running step's; the sum is the snapshot's class in_flight.
    Column("live_ns", BigInteger, nullable=False),
    Column("step_ns", BigInteger, nullable=False),
    # The JSON is {"fields": [...], "requests": [[request_id, an amount for each field], ...]}.
    Column("requests", Text, nullable=False),
)

open_requests = Table(
    "open_requests",
    metadata,
    Column("request_id", PackedId, primary_key=True),
    # vLLM may use ids that clients choose, and then an id can come again.
    Column("started_at", InstantColumn, primary_key=True),
    Column("external_id", PackedId, index=True),
    Column("response_id", PackedId, index=True),
    Column("http_request_id", PackedId, index=True),
    Column("x_request_id", PackedId, index=True),
    Column("prompt_group", PackedId, nullable=False),
    Column("tenant", KeyText, nullable=False),
    # The rule that named the tenant, and what was declared of that tenant when the request came.
    Column("tenant_rule", Text, nullable=False),
    Column("tenant_parent", KeyText),
    # JSON: an object of texts.
    Column("tags", Text),
    # All tenants above it, the parent first, each on a line of its own; NULL for none.
    Column("tenant_above", KeyText),
    Column("model", Text),
    Column("lora", Text),
    Column("route", Text),
    # As in `requests`.
    Column("kv_role", Text),
)

# Those that do not stand in the row of a bill; `tables/replies.py` has a view of all.
http_requests = Table(
    "http_requests",
    metadata,
    Column("http_request_id", PackedId, primary_key=True),
    Column("response_id", PackedId),
    Column("x_request_id", PackedId),
    Column("tenant", KeyText, nullable=False),
    Column("tenant_rule", Text, nullable=False),
    Column("tenant_above", KeyText),
    Column("model", Text),
    Column("route", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("streamed", Boolean, nullable=False),
    # The client was told these; NULL if the reply did not say.
    Column("prompt_tokens", BigInteger),
    Column("cached_tokens", BigInteger),
    Column("output_tokens", BigInteger),
    Column("gpu_time_ns", BigInteger),
    Column("cost_nanousd", BigInteger),
    Column("started_at", InstantColumn, nullable=False),
    Column("finished_at", InstantColumn, nullable=False),
    # Pages of all tenants, and the replies that ended as an engine died.
    Index("ix_http_requests_finished", "finished_at"),
    # Pages of one tenant, and whether a tenant was ever seen.
    Index("ix_http_requests_tenant", "tenant", "finished_at"),
    # Find a request by these ids.
    _index_of_known("http_requests", "response_id"),
    _index_of_known("http_requests", "x_request_id"),
)

requests = Table(
    "requests",
    metadata,
    Column("run_id", KeyText, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("request_id", PackedId, nullable=False),
    Column("external_id", PackedId),
    Column("response_id", PackedId),
    Column("http_request_id", PackedId),
    # Empty where it is `request_id`: the prompt is of this request alone.
    Column("prompt_group", PackedId, nullable=False),
    Column("tenant", KeyText, nullable=False),
    # The rule that named the tenant, and what was declared of that tenant when the request came.
    Column("tenant_rule", Text, nullable=False),
    Column("tenant_parent", KeyText),
    # JSON: an object of texts.
    Column("tags", Text),
    # All tenants above it, the parent first, each on a line of its own; NULL for none.
    Column("tenant_above", KeyText),
    Column("model", Text),
    Column("lora", Text),
    Column("route", Text),
    Column("engine_status", Text, nullable=False),
    Column("method", Text, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("prefill_tokens", BigInteger, nullable=False),
    Column("decode_tokens", BigInteger, nullable=False),
    Column("gpu_time_ns", BigInteger, nullable=False),
    Column("prefill_ns", BigInteger, nullable=False),
    Column("decode_ns", BigInteger, nullable=False),
    Column("cost_nanousd", BigInteger),
    Column("marginal_ns", BigInteger, nullable=False),
    Column("marginal_cost_nanousd", BigInteger),
    Column("recomputed_ns", BigInteger, nullable=False),
    Column("recomputed_tokens", BigInteger, nullable=False),
    Column("rejected_ns", BigInteger, nullable=False),
    Column("rejected_tokens", BigInteger, nullable=False),
    Column("cut_ns", BigInteger, nullable=False),
    Column("cut_tokens", BigInteger, nullable=False),
    Column("kv_block_ms", BigInteger, nullable=False),
    Column("step_ns", BigInteger, nullable=False),
    Column("saved_estimate_ns", BigInteger, nullable=False),
    Column("preemptions", Integer, nullable=False),
    Column("steps", BigInteger, nullable=False),
    Column("batch", BigInteger, nullable=False),
    Column("first_model", Integer, nullable=False),
    Column("last_model", Integer, nullable=False),
    Column("started_at", InstantColumn, nullable=False),
    Column("finished_at", InstantColumn, nullable=False),
    # Whole microseconds: SQLite stores such a number in 2 to 4 bytes, and a fraction in 8.
    Column("queue_us", Float),
    Column("ttft_us", Float),
    Column("tpot_us", Float),
    Column("e2e_us", Float),
    # The hour that all of it was used in; NULL if `usage_pieces` has the hours.
    Column("hour", Integer),
    # How much of its time may belong to others; NULL where nobody knows, as in older rows.
    Column("charge_error_ns", BigInteger),
    # When the reply ended that stands in this row; without one, when the engine request did.
    Column("ended_at", InstantColumn, server_default=text("0"), nullable=False),
    # That reply (`tables/replies.py`): all NULL without one.
    Column("reply_status", Integer),
    Column("reply_streamed", Boolean),
    Column("reply_started_at", InstantColumn),
    Column("reply_told", Integer),
    Column("reply_gpu_time_ns", BigInteger),
    Column("reply_cost_nanousd", BigInteger),
    Column("x_request_id", PackedId),
    # Prompt tokens that came over a KV connector; NULL where nobody knows, as in older rows.
    Column("external_tokens", BigInteger),
    # "kv_producer" or "kv_consumer": which half of a request it is; NULL if it was not split.
    Column("kv_role", Text),
    # Whether an open request has its bill, and to find a request by vLLM's internal id.
    Index("ix_requests_request_id", "request_id"),
    # The parts of an exchange.
    Index("ix_requests_http", "http_request_id"),
    # Pages of all tenants, and the oldest rows.
    Index("ix_requests_ended_at", "ended_at"),
    # The bills of a tenant.
    Index("ix_requests_tenant", "tenant", "ended_at"),
    # Find a request by these ids. A bill's response id is there before the reply has ended.
    _index_of_not_derived("external_id"),
    _index_of_not_derived("response_id"),
    _index_of_known("requests", "x_request_id"),
)

# Bills of several hours only.
usage_pieces = Table(
    "usage_pieces",
    metadata,
    Column("run_id", KeyText, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("hour", Integer, primary_key=True, autoincrement=False),
    Column("tenant", KeyText, nullable=False),
    *amount_columns("prefill_ns", "decode_ns", "prefill_tokens", "decode_tokens", "marginal_ns"),
    *amount_columns("recomputed_ns", "recomputed_tokens", "rejected_ns", "rejected_tokens"),
    *amount_columns("cut_ns", "cut_tokens", "kv_block_ms", "step_ns", "saved_estimate_ns"),
    Column("charge_error_ns", BigInteger),
    # The table is clustered by key, so a run's pieces up to a bill are one range in the file.
    sqlite_with_rowid=False,
)

# A snapshot after the bill brings the energy: NULL, with a reason's code, if it is unknown.
request_energy = Table(
    "request_energy",
    metadata,
    Column("run_id", KeyText, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("hour", Integer, primary_key=True, autoincrement=False),
    Column("energy_mj", BigInteger),
    Column("reason", Text),
    sqlite_with_rowid=False,
)

# ---- how far this file has the journals of the processes that bill

journals = Table(
    "journals",
    metadata,
    Column("journal_id", KeyText, primary_key=True),
    # Where in the journal the next record begins, and the number of the one before it.
    Column("segment", BigInteger, nullable=False),
    Column("offset_bytes", BigInteger, nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("applied_at", KeyText, nullable=False),
)

# Records of journals that nobody can read any more, or that no ledger can take.
journal_losses = Table(
    "journal_losses",
    metadata,
    Column("journal_id", KeyText, primary_key=True),
    # The number of the record before those that are lost.
    Column("after_number", BigInteger, primary_key=True, autoincrement=False),
    Column("records", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("noticed_at", KeyText, nullable=False),
)

# ---- provider bills, imported by billing/importing.py

billing_snapshots = Table(
    "billing_snapshots",
    metadata,
    Column("resource", KeyText, primary_key=True),
    Column("taken_at", KeyText, primary_key=True),
    Column("kind", Text, nullable=False),
    # One of the next two is NULL: a reading is either a counter or a rate.
    Column("cumulative_nanousd", BigInteger),
    Column("nanousd_per_hour", BigInteger),
    Column("source", Text, nullable=False),
    Column("imported_at", KeyText, nullable=False),
)

invoice_lines = Table(
    "invoice_lines",
    metadata,
    Column("resource", KeyText, primary_key=True),
    Column("begins_at", KeyText, primary_key=True),
    Column("ends_at", KeyText, primary_key=True),
    # The next three are empty if a bill does not have them.
    Column("invoice", KeyText, primary_key=True),
    Column("item", KeyText, primary_key=True),
    Column("charge_class", KeyText, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("nanousd", BigInteger, nullable=False),
    Column("source", Text, nullable=False),
    Column("imported_at", KeyText, nullable=False),
)

# The bill for each resource and hour; it follows from the two tables above.
billed_hours = Table(
    "billed_hours",
    metadata,
    Column("resource", KeyText, primary_key=True),
    Column("kind", KeyText, primary_key=True),
    Column("hour", Integer, primary_key=True, autoincrement=False),
    Column("nanousd", BigInteger, nullable=False),
    # The parts of the hour with a known spend, and without observation.
    Column("covered_ns", BigInteger, nullable=False),
    Column("unobserved_ns", BigInteger, nullable=False),
    Column("resets", Integer, nullable=False),
    Column("basis", Text, nullable=False),
    Index("ix_billed_hours_hour", "hour"),
)

# Full load as sweeps measured it, with the deployment and the size of the requests.
saturation_points = Table(
    "saturation_points",
    metadata,
    # The id is a digest of the curve's file.
    Column("point_id", KeyText, primary_key=True),
    Column("measured_at", KeyText, nullable=False),
    Column("model", Text, nullable=False),
    Column("precision", Text, nullable=False),
    Column("vllm_version", Text, nullable=False),
    Column("hardware", Text, nullable=False),
    Column("gpus", Integer, nullable=False),
    Column("parallelism", Text, nullable=False),
    Column("engines", Integer, nullable=False),
    # The size of a request in tokens.
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("output_tokens_per_s", Float, nullable=False),
    Column("requests_per_s", Float, nullable=False),
    Column("window_s", Float, nullable=False),
    # This JSON says how the point was measured.
    Column("protocol", Text, nullable=False),
)
