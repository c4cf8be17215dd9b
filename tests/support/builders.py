"""Records with every field filled in, of which a test changes those it is about."""

import json
from dataclasses import fields, replace
from typing import Any

from vllm_cost_meter.attribution.cost_model import CURVE, FIT_TERMS
from vllm_cost_meter.engine.books import EngineState
from vllm_cost_meter.records.bill import Bill, UsagePiece
from vllm_cost_meter.records.engine import EngineIdentity
from vllm_cost_meter.records.owner import NamedBy, Owner
from vllm_cost_meter.records.requests import (
    EngineRequest,
    HttpRequest,
    Latencies,
    OpenRequest,
    Usage,
)
from vllm_cost_meter.records.snapshot import ClassTotals, CostModel, LearntCurve, Snapshot

HOUR = 500_000
T0 = 1_800_000_000 * 10**9
COST_MODEL = CostModel(
    version=3,
    form=CURVE,
    planes=((0.0, 1.0, 0.0, 0.0, 0.0), (0.0,) * 5),
    steps=128,
    error_two_planes=0.05,
    error_other_form=0.04,
    explained=0.93,
    curve=LearntCurve(
        (2e6, 1e5, 5e4, 5.0, *[0.0] * (FIT_TERMS - 4)), (0, 0), (1, 0, 0), (1, 2, 4), CURVE
    ),
    charge_errors=(1.0, 0.4, 0.12, 0.03, 0.05, 0.06, 1.0),
)


ENGINE = EngineIdentity(
    model="m",
    engine_index=0,
    vllm_version="0.32.0",
    hardware="a GPU",
    parallelism="tp=1 pp=1 dp=1",
    gpus=1,
    method="tokens",
    native=True,
    kv_blocks=1000,
    kv_block_size=16,
    host="node-1",
    precision="bfloat16",
    meter_version="0.1.0",
    labels={"pool": "spot"},
)
ENGINE_STATE = EngineState(
    running=0,
    waiting=0,
    kv_cache_usage=None,
    own_ns=0,
    errors=0,
    state="on",
)


def make_owner(
    tenant: str, rule: str = "none", parent: str | None = None, tags: str | None = None
) -> Owner:
    """Return an owner by texts as the ledger has them, e.g. `api_key+user` and `{"a":"b"}`."""
    named, _, child = rule.partition("+")
    return Owner(
        tenant, _named_by(named), _named_by(child) if child else None, parent,
        json.loads(tags) if tags else {},
    )  # fmt: skip


def _named_by(text: str) -> NamedBy:
    kind, _, key = text.partition(":")
    return NamedBy(kind, key)  # type: ignore[arg-type]


def owned(changes: dict[str, Any]) -> dict[str, Any]:
    """Return a record's changes with the owner that `tenant` and what goes with it describe."""
    loose = {name: changes[name] for name in _OWNER if name in changes}
    if not loose:
        return changes
    owner = make_owner(
        loose.get("tenant", "alice"),
        loose.get("tenant_rule", "none"),
        loose.get("tenant_parent"),
        loose.get("tags"),
    )
    return {**{name: to for name, to in changes.items() if name not in _OWNER}, "owner": owner}


_OWNER = ("tenant", "tenant_rule", "tenant_parent", "tags")


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
        "owner": Owner("alice"),
        "model": "m",
        "lora": None,
        "route": "/v1/completions",
        "cost_nanousd": None,
        "marginal_cost_nanousd": None,
        "started_at_ns": T0,
        "finished_at_ns": T0 + bill.seq,
        "latencies": Latencies(),
    }
    return EngineRequest(**{**values, **owned(changes)})


def make_open(**changes: Any) -> OpenRequest:
    """Return an engine request of alice without a bill, in the exchange `http-1`."""
    values: dict[str, Any] = {
        "request_id": "internal-1",
        "external_id": "external-1",
        "response_id": "resp-1",
        "http_request_id": "http-1",
        "x_request_id": "x-1",
        "prompt_group": "group-1",
        "owner": Owner("alice"),
        "model": "m",
        "lora": None,
        "route": "/v1/completions",
        "started_at_ns": T0,
    }
    return OpenRequest(**{**values, **owned(changes)})


def make_snapshot(**changes: Any) -> Snapshot:
    """Return a snapshot of an engine that has idled all its life, all of it in HOUR.

    What is of `EngineIdentity` goes into its engine.
    """
    facts = {field.name for field in fields(EngineIdentity)} & changes.keys()
    engine = replace(ENGINE, **{name: changes.pop(name) for name in facts})
    totals = changes.pop("totals", ClassTotals(idle=changes.get("number", 1) * 10))
    values: dict[str, Any] = {
        "run_id": "run",
        "number": 1,
        "taken_at_ns": T0 + changes.get("number", 1),
        "started_at_ns": T0,
        "wall_ns": totals.total() // engine.gpus,
        "engine": engine,
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
        "prior": "tokens",
        "cost_models": (COST_MODEL,),
        "hours": {HOUR: totals},
        # What is in flight and not the running requests' is the step's.
        "step_ns": totals.in_flight - sum(used.gpu_time_ns for _, used in changes.get("live", ())),
    }
    return Snapshot(**{**values, **changes})


def reply_of(part: EngineRequest, reply: HttpRequest) -> HttpRequest:
    """Return a reply that says of its one engine request what the bill says, and nothing else."""
    bill = part.bill
    # To its client vLLM calls cached what came over a KV connector too.
    cached_tokens = bill.cached_tokens + (bill.external_tokens or 0)
    return replace(
        reply,
        response_id=part.response_id,
        owner=part.owner,
        model=part.model,
        route=part.route or reply.route,
        usage=Usage(bill.prompt_tokens, cached_tokens, bill.output_tokens),
        gpu_time_ns=bill.gpu_time_ns,
        cost_nanousd=part.cost_nanousd,
    )
