"""The explanation of one request's bill, so that anybody can recompute it by hand.

These are pure functions from a request row with its parts (see `LedgerReader.request`) to its
explanation. It has, for each part:

- GPU time and tokens of each phase, and its share of the steps it was in;
- the time that it added to these steps, and its share of the time that the batch takes anyway;
- the time that caching saved, and that preemption, rejected drafts and cut tokens wasted;
- the prices of its hours, and the cost models in use while it ran.

Invariant: every figure of a part is in its bill, or follows from figures beside it by a formula in
`formulas`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from vllm_cost_meter.prices.book import (
    GpuHourPrice,
    by_price,
    described,
    kv_nanousd,
    time_nanousd,
    total_nanousd,
)
from vllm_cost_meter.prices.cost import NO_QUANTITIES, Quantities
from vllm_cost_meter.prices.run_prices import RunPrices
from vllm_cost_meter.records.engine import OPERATOR
from vllm_cost_meter.records.requests import KV_CONSUMER, KV_PRODUCER
from vllm_cost_meter.reports.charges import charge_error_of, within
from vllm_cost_meter.reports.request_answers import Explanation
from vllm_cost_meter.reports.request_row import FINISHED
from vllm_cost_meter.units.money import format_usd
from vllm_cost_meter.units.time import hour_of

Fields = Mapping[str, Any]
# What each bill used in each hour, by run and number.
SpentOfBills = Mapping[tuple[str, int], Sequence[tuple[int, Quantities]]]

FORMULAS = {
    "gpu_time_ns": "phases.prefill.gpu_time_ns + phases.decode.gpu_time_ns",
    "share": "gpu_time_ns / step_ns",
    "charge_error": "charge_error_ns / gpu_time_ns",
    "average_batch": "batch / steps",
    "common_ns": "gpu_time_ns - marginal_ns; plus preempted.recomputed_ns where the operator pays"
    " that, as it is in marginal_ns and not in gpu_time_ns",
    "time_cost_nanousd": "the sum over prices of gpu_time_ns x usd_per_gpu_hour / 3600, each"
    " rounded half to even",
    "kv_cost_nanousd": "the sum over prices of kv_block_ms x usd_per_kv_block_hour x 10^9 /"
    " 3600000, each rounded half to even; 0 without such a price",
    "cost_nanousd": "time_cost_nanousd + kv_cost_nanousd",
}


def explained(
    request: Fields,
    prices: Mapping[str, RunPrices],
    spent: SpentOfBills,
    models: Sequence[Fields],
    payers: Mapping[str, str],
) -> Explanation:
    """Return the explanation of a request row with its `parts`.

    `prices` has the prices by run, `spent` the use of each bill by hour, by its key, and
    `models` the cost models of these runs as answers show them, oldest first. `payers` says by run
    who pays preemptions; it lacks runs of which only the bills are known.
    """
    parts = [
        _part(
            part,
            prices[part["run_id"]],
            spent.get((part["run_id"], part["seq"]), []),
            [model for model in models if _used(model, part)],
            payers.get(part["run_id"]),
        )
        for part in request["parts"]
        if part["state"] == FINISHED
    ]
    names = (
        "request_id",
        "http_request_id",
        "response_id",
        "x_request_id",
        "tenant",
        "model",
        "route",
    )
    figures = ("state", "gpu_time_ns", "cost_nanousd", "cost_usd")
    explanation = {name: request[name] for name in (*names, *figures)}
    explanation["parts"] = parts
    explanation["formulas"] = FORMULAS
    return cast("Explanation", {**explanation, "text": list(lines(explanation))})


def _used(model: Fields, part: Fields) -> bool:
    is_of_run: bool = model["run_id"] == part["run_id"]
    return is_of_run and part["first_model"] <= model["version"] <= part["last_model"]


def _part(
    part: Fields,
    prices: RunPrices,
    spent: Sequence[tuple[int, Quantities]],
    models: Sequence[Fields],
    payer: str | None,
) -> dict[str, Any]:
    common_ns = part["gpu_time_ns"] - part["marginal_ns"]
    if payer == OPERATOR:
        common_ns += part["recomputed_ns"]
    steps, step_ns = part["steps"], part["step_ns"]
    saved_ns = part["saved_estimate_ns"]
    return {
        **{name: part[name] for name in ("run_id", "seq", "request_id", "lora", "engine_status")},
        "kv_role": part["kv_role"],
        "phases": {
            phase: {
                "gpu_time_ns": part[f"{phase}_ns"],
                "tokens": part[f"{phase}_tokens"],
            }
            for phase in ("prefill", "decode")
        },
        "gpu_time_ns": part["gpu_time_ns"],
        "steps": steps,
        "batch": part["batch"],
        "average_batch": part["batch"] / steps if steps else None,
        "step_ns": step_ns,
        "share": part["gpu_time_ns"] / step_ns if step_ns else None,
        "marginal_ns": part["marginal_ns"],
        "common_ns": common_ns,
        "charge_error_ns": part["charge_error_ns"],
        "charge_error": charge_error_of(part["gpu_time_ns"], part["charge_error_ns"]),
        "cached": {"tokens": part["cached_tokens"], "saved_estimate_ns": saved_ns},
        "external_tokens": part["external_tokens"],
        "preempted": {
            "preemptions": part["preemptions"],
            "recomputed_tokens": part["recomputed_tokens"],
            "recomputed_ns": part["recomputed_ns"],
            "paid_by": payer,
        },
        "drafts": {
            "rejected_tokens": part["rejected_tokens"],
            "rejected_ns": part["rejected_ns"],
        },
        "cut_off": {"cut_tokens": part["cut_tokens"], "cut_ns": part["cut_ns"]},
        "kv_block_ms": part["kv_block_ms"],
        **_cost(part, prices, spent),
        "told_nanousd": part["cost_nanousd"],
        "method": part["method"],
        "cost_models": [_model(model) for model in models],
    }


def _cost(
    part: Fields, prices: RunPrices, spent: Sequence[tuple[int, Quantities]]
) -> dict[str, Any]:
    """Return a bill's cost at the prices of its hours, and these prices."""
    # A request without GPU time has no hour of its own; the hour of its end stands for it.
    spent = spent or [(hour_of(part["finished_at"]), NO_QUANTITIES)]
    at = by_price(spent, prices.at)
    cost = None if at is None else total_nanousd(at)
    missing = next((hour for hour, _ in spent if prices.at(hour) is None), None)
    only = next(iter(at)) if at is not None and len(at) == 1 else None
    return {
        "usd_per_gpu_hour": only.text if only else None,
        "price_source": only.entry.source if only else None,
        "prices": [_priced(price, used) for price, used in (at or {}).items()],
        "time_cost_nanousd": None if at is None else time_nanousd(at),
        "kv_cost_nanousd": None if at is None else kv_nanousd(at),
        "cost_nanousd": cost,
        "cost_usd": format_usd(cost),
        "cost_reason": None if missing is None else prices.why_none(missing),
    }


def _priced(price: GpuHourPrice, used: Quantities) -> dict[str, Any]:
    quantities = {"gpu_time_ns": used.gpu_time_ns, "kv_block_ms": used.kv_block_ms}
    return {**quantities, **price.as_dict()}


def _model(model: Fields) -> dict[str, Any]:
    names = ("version", "taken_at", "form", "planes", "curve", "steps", "error", "explained")
    return {name: model[name] for name in (*names, "charge_errors")}


def lines(explanation: Fields) -> Iterator[str]:
    """Yield an explanation as sentences."""
    parts = explanation["parts"]
    of = f" of {len(parts)} engine requests" if len(parts) != 1 else ""
    so_far = "" if explanation["state"] == FINISHED else f" so far ({explanation['state']})"
    cost = explanation["cost_usd"]
    yield (
        f"{explanation['http_request_id'] or explanation['request_id']}, tenant"
        f" {explanation['tenant']}: {_seconds(explanation['gpu_time_ns'] or 0)}{so_far}{of},"
        f" {'no price at the time' if cost is None else f'{cost} USD'}"
    )
    if len(halves := {part["kv_role"] for part in parts}) == 1 and (half := halves.pop()):
        yield (
            f"this is the part of a {SERVERS[half]} server alone; by its X-Request-Id the request"
            " is found with that of the other server, if both are in this ledger"
        )
    for part in parts:
        yield from _part_lines(part)


# What a server with each half of a request is called.
SERVERS = {KV_PRODUCER: "prefill", KV_CONSUMER: "decode"}


def _part_lines(part: Fields) -> Iterator[str]:
    prefill, decode = part["phases"]["prefill"], part["phases"]["decode"]
    where = f", at a {SERVERS[part['kv_role']]} server" if part["kv_role"] else ""
    yield f"engine request {part['request_id']} ({part['engine_status']}){where}:"
    yield (
        f"  prefill {_seconds(prefill['gpu_time_ns'])} for {prefill['tokens']} tokens"
        f" + decode {_seconds(decode['gpu_time_ns'])} for {decode['tokens']} tokens"
        f" = {_seconds(part['gpu_time_ns'])}"
    )
    if part["share"] is not None:
        yield (
            f"  {part['share']:.3%} of its {part['steps']} steps, which took"
            f" {_seconds(part['step_ns'])}, with {part['average_batch']:.1f} requests in each"
        )
        yield (
            f"  it added {_seconds(part['marginal_ns'])} to them; the other"
            f" {_seconds(part['common_ns'])} are its share of what the batch needs anyway"
        )
    if part["charge_error"] is not None:
        yield f"  split known to within {within(part['charge_error'])}"
    if tokens := part["cached"]["tokens"]:
        saved = _seconds(part["cached"]["saved_estimate_ns"])
        yield f"  caching {tokens} tokens saved about {saved} (an estimate)"
    if tokens := part["external_tokens"]:
        yield f"  {tokens} tokens of its prompt came over a KV connector: not computed here"
    if preemptions := part["preempted"]["preemptions"]:
        again = part["preempted"]
        is_charged = again["paid_by"] != OPERATOR
        yield (
            f"  preempted {preemptions} times: {again['recomputed_tokens']} tokens were computed"
            f" again, which took {_seconds(again['recomputed_ns'])}"
            f" {'of it' if is_charged else 'more; the operator pays that'}"
        )
    if tokens := part["drafts"]["rejected_tokens"]:
        yield f"  {tokens} draft tokens were rejected: {_seconds(part['drafts']['rejected_ns'])}"
    if tokens := part["cut_off"]["cut_tokens"]:
        cut = _seconds(part["cut_off"]["cut_ns"])
        yield f"  {tokens} tokens were computed that are not in the output: {cut}"
    yield from _price_lines(part)
    yield f"  split by {part['method']}"
    for model in part["cost_models"]:
        quality = f"learnt from {model['steps']} steps, off by {model['error']:.1%} on average"
        if not model["steps"]:  # Its error is unknown; "0 %" would be a false claim.
            quality = "what it began with, before any step was learnt from"
        yield f"  cost model {model['version']}: {model['form']}, {quality}"


def _price_lines(part: Fields) -> Iterator[str]:
    if part["cost_nanousd"] is None:
        yield f"  {part['cost_reason']}"
        return
    priced = [f"  {_quantities(price)} x {described(price)}" for price in part["prices"]]
    if len(priced) == 1:
        yield f"{priced[0]} = {part['cost_usd']} USD"
        return
    yield from priced
    yield f"  together {part['cost_usd']} USD"


def _quantities(price: Fields) -> str:
    """Return what is charged at a price, in its order: time, and blocks if they have a price."""
    time = f"{price['gpu_time_ns']} ns"
    if price["usd_per_kv_block_hour"] is None:
        return time
    return f"{time} and {price['kv_block_ms']} KV block-ms"


def _seconds(gpu_ns: int) -> str:
    return f"{gpu_ns / 1e9:.6f} GPU-s"
