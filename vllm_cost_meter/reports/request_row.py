"""The request row: one HTTP exchange, made from its HTTP row and its engine requests (parts).

These are pure functions over rows of `replies` and `requests`. Tokens are those that the
client was told. If the reply did not say, they follow from the parts; a prompt that several parts
share counts once. To its client vLLM calls cached what came over a KV connector too, so where some
did, the parts say how many were cached.

The HTTP row may be missing: it may come after the bill, and never comes after a crash. Then its
columns are null, and the bill is still shown. Parts without a bill (see
`ledger.queries.open_requests`) count with what they used so far; columns that only a bill has are
null, in the request row too.

A request that a router has split between two servers is two exchanges. `exchange_of_halves` makes
one request row of both: what it used is the sum, and all else is of the server that replied.

Invariant: the GPU time of an exchange is the sum over its parts. Its cost and energy are null
unless every part has them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from vllm_cost_meter.reports.request_answers import PartRow, RequestRow
from vllm_cost_meter.units.money import format_usd

LedgerRow = Mapping[str, Any]

# The states of a part and of an exchange. A part with a bill is "finished".
RUNNING = "running"
LOST = "lost"
FINISHED = "finished"

# The columns of a part below its exchange.
PART_COLUMNS = (
    "run_id",
    "seq",
    "request_id",
    "external_id",
    "prompt_group",
    "lora",
    "state",
    "engine_status",
    "method",
    "prompt_tokens",
    "cached_tokens",
    "external_tokens",
    "output_tokens",
    "prefill_tokens",
    "decode_tokens",
    "gpu_time_ns",
    "prefill_ns",
    "decode_ns",
    "cost_nanousd",
    "cost_usd",
    "cost_reason",
    "marginal_ns",
    "marginal_cost_nanousd",
    "recomputed_ns",
    "recomputed_tokens",
    "rejected_ns",
    "rejected_tokens",
    "cut_ns",
    "cut_tokens",
    "kv_block_ms",
    "step_ns",
    "saved_estimate_ns",
    "charge_error_ns",
    "preemptions",
    "steps",
    "batch",
    "first_model",
    "last_model",
    "started_at",
    "finished_at",
    "as_of",
    "queue_ms",
    "ttft_ms",
    "tpot_ms",
    "e2e_ms",
    "energy_mj",
    "energy_reason",
    "kv_role",
)


# Columns summed over the parts; null for a request that never reached an engine.
PART_SUMS = (
    "prefill_ns",
    "decode_ns",
    "marginal_ns",
    "recomputed_ns",
    "rejected_ns",
    "cut_ns",
    "kv_block_ms",
    "saved_estimate_ns",
)


def exchange(http: LedgerRow | None, parts: Sequence[LedgerRow]) -> RequestRow:
    """Return the request row of an exchange; one of `http` and `parts` must be there."""
    parts = ordered(parts)
    first: LedgerRow = parts[0] if parts else {}
    whose: LedgerRow = http if http is not None else first
    told: LedgerRow = http if http is not None else {}
    row = {
        "request_id": first.get("request_id"),
        "response_id": whose["response_id"] or first.get("response_id"),
        "http_request_id": whose["http_request_id"],
        "x_request_id": told.get("x_request_id") or _any(parts, "x_request_id"),
        "tenant": whose["tenant"],
        "tenant_rule": whose.get("tenant_rule"),
        "model": whose["model"] or first.get("model"),
        "route": whose["route"],
        "status": told.get("status"),
        "streamed": told.get("streamed"),
        "engine_status": _common(parts, "engine_status"),
        **_tokens(told, parts),
        **_used(told, parts),
        "started_at": told.get("started_at") or first["started_at"],
        "finished_at": told.get("finished_at") or _last(parts, "finished_at"),
        **_latencies(parts),
        "prefill_http_request_id": None,
    }
    return cast("RequestRow", {name: row[name] for name in RequestRow.__annotations__})


def exchange_of_halves(
    http: LedgerRow | None,
    parts: Sequence[LedgerRow],
    prefill_http: LedgerRow | None,
    prefill_parts: Sequence[LedgerRow],
) -> RequestRow:
    """Return the request row of a request whose prompt was computed by a server of its own.

    `http` and `parts` are those of the server that replied to the client.
    """
    row, prefill = exchange(http, parts), exchange(prefill_http, prefill_parts)
    both = {
        **row,
        **_used({}, ordered([*prefill_parts, *parts])),
        "started_at": min(row["started_at"], prefill["started_at"]),
        "prefill_http_request_id": prefill["http_request_id"],
    }
    return cast("RequestRow", both)


def ordered(parts: Sequence[LedgerRow]) -> list[LedgerRow]:
    """Return the parts in the order in which they started."""

    def order(part: LedgerRow) -> tuple[str, str, int]:
        return part["started_at"], part["run_id"] or "", part["seq"] or 0

    return sorted(parts, key=order)


def shown_part(part: LedgerRow) -> PartRow:
    """Return a part as it is listed under `parts`."""
    shown = {name: part.get(name) for name in PART_COLUMNS}
    reason = None if shown["cost_nanousd"] is not None else _why_no_cost([part])
    told = {"state": _state([part]), "cost_reason": reason}
    return cast("PartRow", {**shown, **told, "cost_usd": format_usd(shown["cost_nanousd"])})


def _used(told: LedgerRow, parts: Sequence[LedgerRow]) -> dict[str, Any]:
    """Return what all parts used together, what that costs, and how it stands with it."""
    cost = _cost(told, parts)
    as_of = [part["as_of"] for part in parts if part.get("as_of") is not None]
    return {
        "state": _state(parts),
        **_gpu_time(told, parts),
        "cost_nanousd": cost,
        "cost_usd": format_usd(cost),
        "cost_reason": None if cost is not None else _why_no_cost(parts),
        "marginal_cost_usd": format_usd(_sum_of(parts, "marginal_cost_nanousd")),
        "method": _common(parts, "method"),
        "as_of": min(as_of, default=None),
        "energy_mj": _sum_of(parts, "energy_mj"),
        "energy_reason": next((p["energy_reason"] for p in parts if p["energy_reason"]), None),
        "kv_role": _common(parts, "kv_role"),
    }


def _tokens(told: LedgerRow, parts: Sequence[LedgerRow]) -> dict[str, int | None]:
    own: dict[str, int | None] = dict.fromkeys((*_OF_PROMPT, "output_tokens"))
    if parts and _state(parts) == FINISHED:
        own = {name: _sum_of_prompts(parts, name) for name in _OF_PROMPT}
        own["output_tokens"] = sum(part["output_tokens"] for part in parts)
    if own["external_tokens"]:
        told = {**told, "cached_tokens": None}
    return {name: n if told.get(name) is None else told[name] for name, n in own.items()}


_OF_PROMPT = ("prompt_tokens", "cached_tokens", "external_tokens")


def _sum_of_prompts(parts: Sequence[LedgerRow], name: str) -> int | None:
    """Return a sum over prompts, each counting once; None if one is unknown."""
    by_prompt: dict[str, int] = {}
    for part in parts:
        group, tokens = part["prompt_group"], part[name]
        if tokens is None:
            return None
        by_prompt[group] = max(tokens, by_prompt.get(group, 0))
    return sum(by_prompt.values())


def _gpu_time(told: LedgerRow, parts: Sequence[LedgerRow]) -> dict[str, int | None]:
    if not parts:
        return {"gpu_time_ns": told.get("gpu_time_ns"), **dict.fromkeys(PART_SUMS)}
    return {name: _sum_of(parts, name) for name in ("gpu_time_ns", *PART_SUMS)}


def _cost(told: LedgerRow, parts: Sequence[LedgerRow]) -> int | None:
    if not parts:
        return told.get("cost_nanousd")
    return _sum_of(parts, "cost_nanousd")


def _why_no_cost(parts: Sequence[LedgerRow]) -> str:
    """Return why the first part without a cost has none."""
    for part in parts:
        if part["cost_nanousd"] is None:
            if part["gpu_time_ns"] is None:
                return "no snapshot showed what it used"
            return part.get("cost_reason") or "there was no price when it was billed"
    return "no engine worked on it"


def _sum_of(parts: Sequence[LedgerRow], name: str) -> int | None:
    """Return the sum over the parts; None without parts, or if one value is unknown."""
    amounts = [part[name] for part in parts]
    return None if None in amounts or not amounts else sum(amounts)


def _latencies(parts: Sequence[LedgerRow]) -> dict[str, float | None]:
    def known(name: str) -> list[float]:
        return [part[name] for part in parts if part[name] is not None]

    return {
        "queue_ms": min(known("queue_ms"), default=None),
        "ttft_ms": min(known("ttft_ms"), default=None),
        "tpot_ms": parts[0]["tpot_ms"] if len(parts) == 1 else None,
        "e2e_ms": max(known("e2e_ms"), default=None),
    }


def _common(parts: Sequence[LedgerRow], name: str) -> str | None:
    """Return the parts' common value, or their values joined by plus signs; None if unknown."""
    found = {part[name] for part in parts}
    return None if None in found else "+".join(sorted(found)) or None


def _state(parts: Sequence[LedgerRow]) -> str:
    """Return "running" if any part runs, else "lost" if any is lost, else "finished"."""
    states = {part.get("state", FINISHED) for part in parts}
    return next((state for state in (RUNNING, LOST) if state in states), FINISHED)


def _last(parts: Sequence[LedgerRow], name: str) -> str | None:
    """Return the latest instant; None if a part has none."""
    instants = [part[name] for part in parts]
    return None if None in instants else max(instants)


def _any(parts: Sequence[LedgerRow], name: str) -> str | None:
    return next((part[name] for part in parts if part.get(name) is not None), None)
