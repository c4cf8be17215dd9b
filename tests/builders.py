"""Records with every field filled in, of which a test changes those it is about."""

from typing import Any

from vllm_cost_meter.engine.books import EngineFacts
from vllm_cost_meter.records.bill import Bill, UsagePiece
from vllm_cost_meter.records.requests import EngineRequest, Latencies, OpenRequest
from vllm_cost_meter.records.snapshot import ClassTotals, CostModel, Snapshot

HOUR = 500_000
T0 = 1_800_000_000 * 10**9
COST_MODEL = CostModel(
    version=3,
    form="one plane",
    planes=((0.0, 1.0, 0.0, 0.0, 0.0), (0.0,) * 5, (2e6, 1e5, 5e4, 5.0, 0.0)),
    steps=128,
    error_two_planes=0.05,
    error_one_plane=0.04,
    explained=0.93,
)


ENGINE_FACTS = EngineFacts(
    running=0,
    waiting=0,
    kv_cache_usage=None,
    own_ns=0,
    errors=0,
    state="on",
    model="m",
    native=True,
    engine_index=0,
    vllm_version="0.32.0",
    meter_version="0.1.0",
    hardware="a GPU",
    parallelism="tp=1 pp=1 dp=1",
    kv_blocks=None,
    kv_block_size=None,
    host="node-1",
    precision="bfloat16",
)


def make_bill(**changes: Any) -> Bill:
    """Return a bill of 10 prompt tokens (2 cached) and 5 output tokens: 100 + 200 ns in HOUR."""
    values: dict[str, Any] = {
        "run_id": "run",
        "seq": 1,
        "request_id": "internal-1",
        "engine_status": "stopped",
        "method": "tokens",
        "prompt_tokens": 10,
        "cached_tokens": 2,
        "output_tokens": 5,
        "preemptions": 0,
        "steps": 6,
        "batch": 12,
        "first_model": 1,
        "last_model": 3,
        "pieces": (UsagePiece(HOUR, 100, 200, 8, 5),),
    }
    return Bill(**{**values, **changes})


def make_part(bill: Bill | None = None, **changes: Any) -> EngineRequest:
    """Return an engine request of alice, without a price, in an exchange of its own."""
    bill = bill or make_bill()
    values: dict[str, Any] = {
        "bill": bill,
        "http_request_id": f"http-{bill.run_id}-{bill.seq}",
        "response_id": None,
        "external_id": None,
        "prompt_group": f"{bill.seq}",
        "tenant": "alice",
        "model": "m",
        "lora": None,
        "route": "/v1/completions",
        "cost_nanousd": None,
        "marginal_cost_nanousd": None,
        "started_at_ns": T0,
        "finished_at_ns": T0 + bill.seq,
        "latencies": Latencies(),
    }
    return EngineRequest(**{**values, **changes})


def make_open(**changes: Any) -> OpenRequest:
    """Return an engine request of alice without a bill, in the exchange `http-1`."""
    values: dict[str, Any] = {
        "request_id": "internal-1",
        "external_id": "external-1",
        "response_id": "resp-1",
        "http_request_id": "http-1",
        "x_request_id": "x-1",
        "prompt_group": "group-1",
        "tenant": "alice",
        "model": "m",
        "lora": None,
        "route": "/v1/completions",
        "started_at_ns": T0,
    }
    return OpenRequest(**{**values, **changes})


def make_snapshot(**changes: Any) -> Snapshot:
    """Return a snapshot of an engine that has idled all its life, all of it in HOUR."""
    totals = changes.pop("totals", ClassTotals(idle=changes.get("number", 1) * 10))
    values: dict[str, Any] = {
        "run_id": "run",
        "number": 1,
        "taken_at_ns": T0 + changes.get("number", 1),
        "started_at_ns": T0,
        "wall_ns": totals.total() // changes.get("gpus", 1),
        "gpus": 1,
        "totals": totals,
        "last_seq": 0,
        "billed_ns": 0,
        "running": 0,
        "waiting": 0,
        "kv_cache_usage": None,
        "steps": 0,
        "busy_ns": 0,
        "own_ns": 0,
        "errors": 0,
        "state": "on",
        "model": "m",
        "hardware": "a GPU",
        "parallelism": "tp=1 pp=1 dp=1",
        "kv_blocks": 1000,
        "kv_block_size": 16,
        "host": "node-1",
        "precision": "bfloat16",
        "method": "tokens",
        "native": True,
        "engine_index": 0,
        "vllm_version": "0.32",
        "meter_version": "0.1",
        "prior": "tokens",
        "cost_models": (COST_MODEL,),
        "hours": {HOUR: totals},
        # What is in flight and not the running requests' is the step's.
        "step_ns": totals.in_flight - sum(used.gpu_time_ns for _, used in changes.get("live", ())),
    }
    return Snapshot(**{**values, **changes})
