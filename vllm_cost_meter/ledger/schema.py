"""The tables of the ledger, one schema for SQLite and PostgreSQL.

Rows of fact (bills, their pieces, HTTP exchanges, prices, runs) are written once by key and never
changed. Only four tables are cumulative counters and are overwritten, by a higher snapshot number
and by nothing else: `snapshots`, the latest cut of each run, `engine_hours` and `energy_hours`, the
same classes hour by hour, and `live_usage`, what its running requests had used. Rows of
`open_requests` go when the bill comes. `billed_hours` follows from the facts of a provider's bills:
an import writes anew the hours that it changes. Amounts are 64-bit integers, instants are RFC 3339
text of fixed width (text order is time order), unknown is NULL.

Invariant: a snapshot, its hours and its live usage change in one transaction, and so do a bill, its
pieces and its open request; so at any instant the hours of a run add up to its snapshot, the pieces
of a bill to the bill, what a snapshot tells of the energy of requests to its class `requests`, and
no request is both billed and open.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
)

from vllm_cost_meter.records.energy import ENERGY_CLASSES
from vllm_cost_meter.records.snapshot import CLASSES

SCHEMA_VERSION = 7

metadata = MetaData()

# Keys and instants compare byte by byte, whatever the locale of a PostgreSQL database is.
_Key = Text().with_variant(Text(collation="C"), "postgresql")


def _class_columns() -> list[Column[int]]:
    """Return one column of GPU-nanoseconds for each class of time."""
    return [Column(f"{name}_ns", BigInteger, nullable=False) for name in CLASSES]


def _energy_columns(*, nullable: bool) -> list[Column[int]]:
    """Return one column of millijoules for each class of energy."""
    return [Column(f"{name}_mj", BigInteger, nullable=nullable) for name in ENERGY_CLASSES]


schema_version = Table("schema_version", metadata, Column("version", Integer, primary_key=True))

prices = Table(
    "prices",
    metadata,
    Column("price_id", _Key, primary_key=True),
    Column("usd_per_gpu_hour", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("effective_from", _Key, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("run_id", _Key, primary_key=True),
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
    Column("started_at", _Key, nullable=False),
    Column("price_id", _Key),
    # JSON: name and UUID of each GPU.
    Column("devices", Text),
)

cost_models = Table(
    "cost_models",
    metadata,
    Column("run_id", _Key, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    # When a snapshot first told of it, at most a poll later than it was published.
    Column("taken_at", _Key, nullable=False),
    Column("form", Text, nullable=False),
    # JSON: three planes of five coefficients, in GPU-ns.
    Column("planes", Text, nullable=False),
    Column("steps", BigInteger, nullable=False),
    Column("error_two_planes", Float, nullable=False),
    Column("error_one_plane", Float, nullable=False),
    Column("explained", Float, nullable=False),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("run_id", _Key, primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("taken_at", _Key, nullable=False),
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
    # NULL until the energy was known for the first time.
    Column("energy_mj", BigInteger),
    *_energy_columns(nullable=True),
    Column("energy_unknown_ns", BigInteger),
    Column("energy_reason", Text),
)

engine_hours = Table(
    "engine_hours",
    metadata,
    Column("run_id", _Key, primary_key=True),
    Column("hour", Integer, primary_key=True),
    # The snapshot these totals are from: an older one that comes late must not overwrite them.
    Column("number", BigInteger, nullable=False),
    *_class_columns(),
)

energy_hours = Table(
    "energy_hours",
    metadata,
    Column("run_id", _Key, primary_key=True),
    Column("hour", Integer, primary_key=True),
    Column("number", BigInteger, nullable=False),
    *_energy_columns(nullable=False),
)

live_usage = Table(
    "live_usage",
    metadata,
    Column("run_id", _Key, primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("taken_at", _Key, nullable=False),
    # Together the class in_flight of that snapshot: of all requests, and of the step in flight.
    Column("live_ns", BigInteger, nullable=False),
    Column("step_ns", BigInteger, nullable=False),
    # JSON: {"fields": [...], "requests": [[request_id, amounts as the fields say], ...]}.
    Column("requests", Text, nullable=False),
)

open_requests = Table(
    "open_requests",
    metadata,
    Column("request_id", _Key, primary_key=True),
    # vLLM can be told to use the ids that clients choose, which then come again.
    Column("started_at", _Key, primary_key=True),
    Column("external_id", _Key, index=True),
    Column("response_id", _Key, index=True),
    Column("http_request_id", _Key, index=True),
    Column("x_request_id", _Key, index=True),
    Column("prompt_group", _Key, nullable=False),
    Column("tenant", _Key, nullable=False),
    # The rule that named the tenant, and what was declared of that tenant when the request came.
    Column("tenant_rule", Text, nullable=False),
    Column("tenant_parent", _Key),
    # JSON: an object of texts.
    Column("tags", Text),
    Column("model", Text),
    Column("lora", Text),
    Column("route", Text),
)

http_requests = Table(
    "http_requests",
    metadata,
    Column("http_request_id", _Key, primary_key=True),
    Column("response_id", _Key, index=True),
    Column("x_request_id", _Key, index=True),
    Column("tenant", _Key, nullable=False),
    Column("tenant_rule", Text, nullable=False),
    Column("model", Text),
    Column("route", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("streamed", Boolean, nullable=False),
    # As the client was told: NULL where the reply did not say.
    Column("prompt_tokens", BigInteger),
    Column("cached_tokens", BigInteger),
    Column("output_tokens", BigInteger),
    Column("gpu_time_ns", BigInteger),
    Column("cost_nanousd", BigInteger),
    Column("cost_usd", Text),
    Column("started_at", _Key, nullable=False),
    Column("finished_at", _Key, nullable=False),
    Index("ix_http_requests_finished", "finished_at", "http_request_id"),
    Index("ix_http_requests_tenant", "tenant", "finished_at", "http_request_id"),
)

requests = Table(
    "requests",
    metadata,
    Column("run_id", _Key, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("request_id", _Key, nullable=False, index=True),
    Column("external_id", _Key, index=True),
    Column("response_id", _Key, index=True),
    Column("http_request_id", _Key),
    Column("prompt_group", _Key, nullable=False),
    Column("tenant", _Key, nullable=False),
    # The rule that named the tenant, and what was declared of that tenant when the request came.
    Column("tenant_rule", Text, nullable=False),
    Column("tenant_parent", _Key),
    # JSON: an object of texts.
    Column("tags", Text),
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
    Column("cost_usd", Text),
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
    Column("started_at", _Key, nullable=False),
    Column("finished_at", _Key, nullable=False, index=True),
    Column("queue_ms", Float),
    Column("ttft_ms", Float),
    Column("tpot_ms", Float),
    Column("e2e_ms", Float),
    # Covers the token counts of a tenant report, in the order they are grouped in.
    Index(
        "ix_requests_http",
        "http_request_id",
        "prompt_group",
        "prompt_tokens",
        "cached_tokens",
        "output_tokens",
    ),
)

usage_pieces = Table(
    "usage_pieces",
    metadata,
    Column("run_id", _Key, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("hour", Integer, primary_key=True, autoincrement=False),
    Column("tenant", _Key, nullable=False),
    Column("prefill_ns", BigInteger, nullable=False),
    Column("decode_ns", BigInteger, nullable=False),
    Column("prefill_tokens", BigInteger, nullable=False),
    Column("decode_tokens", BigInteger, nullable=False),
    Column("marginal_ns", BigInteger, nullable=False),
    Column("recomputed_ns", BigInteger, nullable=False),
    Column("recomputed_tokens", BigInteger, nullable=False),
    Column("rejected_ns", BigInteger, nullable=False),
    Column("rejected_tokens", BigInteger, nullable=False),
    Column("cut_ns", BigInteger, nullable=False),
    Column("cut_tokens", BigInteger, nullable=False),
    Column("kv_block_ms", BigInteger, nullable=False),
    Column("step_ns", BigInteger, nullable=False),
    Column("saved_estimate_ns", BigInteger, nullable=False),
    Index("ix_usage_pieces_hour", "hour", "tenant"),
    # Clustered by key: "all pieces of a run up to a bill" is one range of the file.
    sqlite_with_rowid=False,
)

# Told by a snapshot after the bill: NULL with the code of the reason where it is unknown.
request_energy = Table(
    "request_energy",
    metadata,
    Column("run_id", _Key, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("hour", Integer, primary_key=True, autoincrement=False),
    Column("energy_mj", BigInteger),
    Column("reason", Text),
    sqlite_with_rowid=False,
)

# ---- what providers billed: imported, see invoices.py

billing_snapshots = Table(
    "billing_snapshots",
    metadata,
    Column("resource", _Key, primary_key=True),
    Column("taken_at", _Key, primary_key=True),
    Column("kind", Text, nullable=False),
    # One of them is NULL.
    Column("cumulative_nanousd", BigInteger),
    Column("nanousd_per_hour", BigInteger),
    Column("source", Text, nullable=False),
    Column("imported_at", _Key, nullable=False),
)

invoice_lines = Table(
    "invoice_lines",
    metadata,
    Column("resource", _Key, primary_key=True),
    Column("begins_at", _Key, primary_key=True),
    Column("ends_at", _Key, primary_key=True),
    # Empty where a bill does not tell them.
    Column("invoice", _Key, primary_key=True),
    Column("item", _Key, primary_key=True),
    Column("charge_class", _Key, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("nanousd", BigInteger, nullable=False),
    Column("source", Text, nullable=False),
    Column("imported_at", _Key, nullable=False),
)

# Follows from both: what each resource was billed in each hour.
billed_hours = Table(
    "billed_hours",
    metadata,
    Column("resource", _Key, primary_key=True),
    Column("kind", _Key, primary_key=True),
    Column("hour", Integer, primary_key=True, autoincrement=False),
    Column("nanousd", BigInteger, nullable=False),
    # Of the hour: whose spend is known, and what nobody looked at.
    Column("covered_ns", BigInteger, nullable=False),
    Column("unobserved_ns", BigInteger, nullable=False),
    Column("resets", Integer, nullable=False),
    Column("basis", Text, nullable=False),
    Index("ix_billed_hours_hour", "hour"),
)

# Full load, as sweeps measured it: of which deployment, and with requests of which shape.
saturation_points = Table(
    "saturation_points",
    metadata,
    # A digest of the curve's file.
    Column("point_id", _Key, primary_key=True),
    Column("measured_at", _Key, nullable=False),
    Column("model", Text, nullable=False),
    Column("precision", Text, nullable=False),
    Column("vllm_version", Text, nullable=False),
    Column("hardware", Text, nullable=False),
    Column("gpus", Integer, nullable=False),
    Column("parallelism", Text, nullable=False),
    Column("engines", Integer, nullable=False),
    # Tokens of each request.
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("output_tokens_per_s", Float, nullable=False),
    Column("requests_per_s", Float, nullable=False),
    Column("window_s", Float, nullable=False),
    # JSON: how it was measured.
    Column("protocol", Text, nullable=False),
)
