"""Turn records into ledger rows: which field goes into which column of which table.

These are pure functions without a database. The writer runs them inside its error handling, so it
drops only the record that cannot become a row. All rows of a table have the same keys, because a
bulk insert needs that.

Invariant: a row of `requests` equals the sum of its rows in `usage_pieces`, if it has any.
"""

import json
from dataclasses import asdict
from typing import Any, NamedTuple

import orjson

from vllm_cost_meter.ledger.tables.replies import REPLY_COLUMNS, TOLD
from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.energy import ENERGY_CLASSES
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, OpenRequest, Price
from vllm_cost_meter.records.snapshot import CLASSES, ClassTotals, Snapshot
from vllm_cost_meter.units.time import NS_PER_US, rfc3339

TableRow = dict[str, Any]
_NO_REPLY: TableRow = dict.fromkeys(REPLY_COLUMNS)


class BesideBill(NamedTuple):
    """A reply that stands in its bill's row, and what of the bill its client was told."""

    reply: HttpRequest
    told: int


def beside_bill(part: EngineRequest, reply: HttpRequest) -> BesideBill | None:
    """Return a reply for its bill's row; None if it names another owner, model, id or tokens.

    GPU time and cost may have been told otherwise: they then stand in columns of their own.
    """
    owner, payer, bill, usage = part.owner, reply.owner, part.bill, reply.usage
    ids = part.response_id, part.model, part.route
    if ids != (reply.response_id, reply.model, reply.route):
        return None
    if owner != payer and (
        (owner.tenant, owner.rule_text, owner.above_text)
        != (payer.tenant, payer.rule_text, payer.above_text)
    ):
        return None
    told = 0
    # To its client vLLM calls cached what came over a KV connector too.
    cached_tokens = bill.cached_tokens + (bill.external_tokens or 0)
    for number, said, known in (
        (TOLD["prompt_tokens"], usage.prompt_tokens, bill.prompt_tokens),
        (TOLD["cached_tokens"], usage.cached_tokens, cached_tokens),
        (TOLD["output_tokens"], usage.output_tokens, bill.output_tokens),
    ):
        if said is not None:
            if said != known:
                return None
            told += number
    if reply.gpu_time_ns is not None and reply.gpu_time_ns == bill.gpu_time_ns:
        told += TOLD["gpu_time_ns"]
    if reply.cost_nanousd is not None and reply.cost_nanousd == part.cost_nanousd:
        told += TOLD["cost_nanousd"]
    return BesideBill(reply, told)


def part_row(part: EngineRequest, beside: BesideBill | None = None) -> TableRow:
    """Return an engine request's row in `requests`, with the reply that stands beside its bill."""
    bill, used, times = part.bill, part.bill.whole(), part.latencies
    return {
        "run_id": bill.run_id,
        "seq": bill.seq,
        "request_id": bill.request_id,
        "external_id": part.external_id,
        "response_id": part.response_id,
        "http_request_id": part.http_request_id,
        "prompt_group": part.prompt_group if part.prompt_group != bill.request_id else "",
        **owner_columns(part.owner),
        "model": part.model,
        "lora": part.lora,
        "route": part.route,
        "engine_status": bill.engine_status,
        "method": bill.method,
        "prompt_tokens": bill.prompt_tokens,
        "cached_tokens": bill.cached_tokens,
        "output_tokens": bill.output_tokens,
        "prefill_tokens": used.prefill_tokens,
        "decode_tokens": used.decode_tokens,
        "gpu_time_ns": used.gpu_time_ns,
        "prefill_ns": used.prefill_ns,
        "decode_ns": used.decode_ns,
        "cost_nanousd": part.cost_nanousd,
        "marginal_ns": used.marginal_ns,
        "marginal_cost_nanousd": part.marginal_cost_nanousd,
        "recomputed_ns": used.recomputed_ns,
        "recomputed_tokens": used.recomputed_tokens,
        "rejected_ns": used.rejected_ns,
        "rejected_tokens": used.rejected_tokens,
        "cut_ns": used.cut_ns,
        "cut_tokens": used.cut_tokens,
        "kv_block_ms": used.kv_block_ms,
        "step_ns": used.step_ns,
        "saved_estimate_ns": used.saved_estimate_ns,
        "charge_error_ns": used.charge_error_ns,
        "preemptions": bill.preemptions,
        "steps": bill.steps,
        "batch": bill.batch,
        "first_model": bill.first_model,
        "last_model": bill.last_model,
        "started_at": part.started_at_ns // NS_PER_US,
        "finished_at": part.finished_at_ns // NS_PER_US,
        "queue_us": us_of(times.queue_ms),
        "ttft_us": us_of(times.ttft_ms),
        "tpot_us": us_of(times.tpot_ms),
        "e2e_us": us_of(times.e2e_ms),
        "hour": bill.pieces[0].hour if len(bill.pieces) == 1 else None,
        "external_tokens": bill.external_tokens,
        "kv_role": part.kv_role,
        **_reply_columns(part, beside),
    }


def _reply_columns(part: EngineRequest, beside: BesideBill | None) -> TableRow:
    if beside is None:
        return {**_NO_REPLY, "ended_at": part.finished_at_ns // NS_PER_US}
    reply, told = beside
    return {
        "x_request_id": reply.x_request_id,
        "reply_status": reply.status,
        "reply_streamed": reply.streamed,
        "reply_started_at": reply.started_at_ns // NS_PER_US,
        "ended_at": reply.finished_at_ns // NS_PER_US,
        "reply_told": told,
        "reply_gpu_time_ns": None if told & TOLD["gpu_time_ns"] else reply.gpu_time_ns,
        "reply_cost_nanousd": None if told & TOLD["cost_nanousd"] else reply.cost_nanousd,
    }


def us_of(ms: float | None) -> int | None:
    """Return a time in ms as whole microseconds."""
    return None if ms is None else max(round(ms * 1000), 0)


def piece_rows(part: EngineRequest) -> list[TableRow]:
    """Return an engine request's rows in `usage_pieces`, one per hour; none if it has one hour."""
    bill = part.bill
    if len(bill.pieces) == 1:
        return []
    return [
        {
            "run_id": bill.run_id,
            "seq": bill.seq,
            "hour": piece.hour,
            "tenant": part.owner.tenant,
            "prefill_ns": piece.prefill_ns,
            "decode_ns": piece.decode_ns,
            "prefill_tokens": piece.prefill_tokens,
            "decode_tokens": piece.decode_tokens,
            "marginal_ns": piece.marginal_ns,
            "recomputed_ns": piece.recomputed_ns,
            "recomputed_tokens": piece.recomputed_tokens,
            "rejected_ns": piece.rejected_ns,
            "rejected_tokens": piece.rejected_tokens,
            "cut_ns": piece.cut_ns,
            "cut_tokens": piece.cut_tokens,
            "kv_block_ms": piece.kv_block_ms,
            "step_ns": piece.step_ns,
            "saved_estimate_ns": piece.saved_estimate_ns,
            "charge_error_ns": piece.charge_error_ns,
        }
        for piece in bill.pieces
    ]


def http_row(http: HttpRequest) -> TableRow:
    """Return an HTTP exchange's row in `http_requests`."""
    return {
        "http_request_id": http.http_request_id,
        "response_id": http.response_id,
        "x_request_id": http.x_request_id,
        "tenant": http.owner.tenant,
        "tenant_rule": http.owner.rule_text,
        "tenant_above": http.owner.above_text,
        "model": http.model,
        "route": http.route,
        "status": http.status,
        "streamed": http.streamed,
        "prompt_tokens": http.usage.prompt_tokens,
        "cached_tokens": http.usage.cached_tokens,
        "output_tokens": http.usage.output_tokens,
        "gpu_time_ns": http.gpu_time_ns,
        "cost_nanousd": http.cost_nanousd,
        "started_at": http.started_at_ns // NS_PER_US,
        "finished_at": http.finished_at_ns // NS_PER_US,
    }


def open_row(request: OpenRequest) -> TableRow:
    """Return the row in `open_requests` for an engine request without a bill."""
    return {
        "request_id": request.request_id,
        "started_at": request.started_at_ns // NS_PER_US,
        "external_id": request.external_id,
        "response_id": request.response_id,
        "http_request_id": request.http_request_id,
        "x_request_id": request.x_request_id,
        "prompt_group": request.prompt_group,
        **owner_columns(request.owner),
        "model": request.model,
        "lora": request.lora,
        "route": request.route,
        "kv_role": request.kv_role,
    }


def live_row(snapshot: Snapshot) -> TableRow:
    """Return a snapshot's row in `live_usage`; `live_requests` reads it again."""
    # A busy server writes a thousand requests each second beside its event loop; orjson is fast.
    usage = {
        "fields": Accrued._fields,
        "requests": [[request_id, *used] for request_id, used in snapshot.live],
    }
    return {
        "run_id": snapshot.run_id,
        "number": snapshot.number,
        "taken_at": rfc3339(snapshot.taken_at_ns),
        "live_ns": snapshot.live_ns,
        "step_ns": snapshot.step_ns,
        "requests": orjson.dumps(usage).decode(),
    }


def live_requests(text: str) -> dict[str, Accrued]:
    """Return each request's usage from a row of `live_usage`, by internal request id.

    `text` is the row's JSON. Fields are read by name and unknown ones are skipped, because another
    version of the meter may have written the row.
    """
    usage = orjson.loads(text)
    known = [(at, name) for at, name in enumerate(usage["fields"], 1) if name in Accrued._fields]
    return {
        request[0]: Accrued(**{name: request[at] for at, name in known})
        for request in usage["requests"]
    }


def price_row(price: Price) -> TableRow:
    """Return a price's row in `prices`."""
    return {
        "price_id": price.price_id,
        "usd_per_gpu_hour": price.usd_per_gpu_hour,
        "source": price.source,
        "effective_from": rfc3339(price.effective_from_ns),
        "usd_per_kv_block_hour": price.usd_per_kv_block_hour,
    }


def run_row(snapshot: Snapshot) -> TableRow:
    """Return the row in `runs` for a snapshot's run."""
    return {
        "run_id": snapshot.run_id,
        **asdict(snapshot.engine),
        "labels": json.dumps(snapshot.engine.labels, ensure_ascii=False),
        "started_at": rfc3339(snapshot.started_at_ns),
        "price_id": snapshot.first_price.price_id if snapshot.first_price is not None else None,
        "devices": _devices(snapshot),
    }


def snapshot_row(snapshot: Snapshot) -> TableRow:
    """Return a snapshot's row in `snapshots`."""
    return {
        "run_id": snapshot.run_id,
        "number": snapshot.number,
        "taken_at": rfc3339(snapshot.taken_at_ns),
        "wall_ns": snapshot.wall_ns,
        **_class_columns(snapshot.totals),
        "last_seq": snapshot.last_seq,
        "billed_ns": snapshot.billed_ns,
        "running": snapshot.running,
        "waiting": snapshot.waiting,
        "kv_cache_usage": snapshot.kv_cache_usage,
        "steps": snapshot.steps,
        "busy_ns": snapshot.busy_ns,
        "own_ns": snapshot.own_ns,
        "errors": snapshot.errors,
        "state": snapshot.state,
        "prior": snapshot.prior,
        **_energy_columns(snapshot),
    }


def model_rows(snapshot: Snapshot) -> list[TableRow]:
    """Return the rows in `cost_models` for the models that a snapshot brings."""
    return [
        {
            "run_id": snapshot.run_id,
            "version": model.version,
            "taken_at": rfc3339(snapshot.taken_at_ns),
            "form": model.form,
            "planes": json.dumps(model.planes),
            "curve": None if model.curve is None else json.dumps(asdict(model.curve)),
            "steps": model.steps,
            "error_two_planes": model.error_two_planes,
            "error_other_form": model.error_other_form,
            "explained": model.explained,
            "charge_errors": (
                None if model.charge_errors is None else json.dumps(model.charge_errors)
            ),
        }
        for model in snapshot.cost_models
    ]


def hour_rows(snapshot: Snapshot) -> list[TableRow]:
    """Return the rows in `engine_hours` for the hours that a snapshot brings."""
    return [
        {
            "run_id": snapshot.run_id,
            "hour": hour,
            "number": snapshot.number,
            **_class_columns(totals),
        }
        for hour, totals in snapshot.hours.items()
    ]


def energy_hour_rows(snapshot: Snapshot) -> list[TableRow]:
    """Return the rows in `energy_hours` for the hours that a snapshot brings."""
    return [
        {
            "run_id": snapshot.run_id,
            "hour": hour,
            "number": snapshot.number,
            **{f"{name}_mj": classes.get(name, 0) for name in ENERGY_CLASSES},
        }
        for hour, classes in snapshot.energy.hours.items()
    ]


def request_energy_rows(snapshot: Snapshot) -> list[TableRow]:
    """Return the rows in `request_energy` for the requests whose energy a snapshot brings."""
    return [
        {"run_id": snapshot.run_id, **reported._asdict()} for reported in snapshot.energy.reported
    ]


def _devices(snapshot: Snapshot) -> str | None:
    devices = [{"name": name, "uuid": uuid} for name, uuid in snapshot.energy.devices]
    return json.dumps(devices) if devices else None


def _energy_columns(snapshot: Snapshot) -> TableRow:
    energy = snapshot.energy
    # A record of an earlier version lacks the classes that came since.
    nothing = None if energy.energy_mj is None else 0
    return {
        "energy_mj": energy.energy_mj,
        **{f"{name}_mj": energy.classes.get(name, nothing) for name in ENERGY_CLASSES},
        "energy_unknown_ns": energy.unknown_ns,
        "energy_reason": energy.reason,
    }


def owner_columns(owner: Owner) -> TableRow:
    """Return the columns that say who pays, which several tables have."""
    return {
        "tenant": owner.tenant,
        "tenant_rule": owner.rule_text,
        "tenant_parent": owner.parent,
        "tenant_above": owner.above_text,
        "tags": tags_text(owner),
    }


def tags_text(owner: Owner) -> str | None:
    """Return an owner's tags as the ledger keeps them: a JSON object; None for none."""
    return orjson.dumps(owner.tags).decode() if owner.tags else None


def _class_columns(totals: ClassTotals) -> TableRow:
    return {f"{name}_ns": getattr(totals, name) for name in CLASSES}
