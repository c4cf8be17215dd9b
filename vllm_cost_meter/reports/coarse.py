"""Coarse figures for tenants: GPU time to 1 ms, and nothing that tells of other requests.

The exact time of a request, its cached tokens and the batches it was in depend on what other
tenants asked. With `tenant_detail = "coarse"` an answer for a tenant is coarsened here, field by
field. The rules go by the ends of names, so a new field of an old kind is coarsened too:

- times (`_ns`, `_ms`) are rounded to 1 ms, and instants are cut to it;
- money is the exact cost x the shown time / the exact time: what the shown time costs;
- energy is rounded to 1 J;
- what tells of caching, batches, steps and other requests' load is null.

Every figure is rounded by itself, sums too, so sums of shown figures may miss a shown sum. Ledger,
bills, budgets and the operator's figures stay exact.

Invariant: a figure above 0 is never shown as 0, and an unknown one stays null. No time or amount
shown is more exact than 1 ms of GPU time, whatever price a question supposes; only of a request
below 1 ms the last digits of a cost tell a little more.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from vllm_cost_meter.units.money import format_usd
from vllm_cost_meter.units.rounding import half_even
from vllm_cost_meter.units.time import NS_PER_MS

MJ_PER_J = 1_000

# These tell of the cache, of the batch or of the engine's load; null in coarse answers.
HIDDEN = frozenset(
    {"cached_tokens", "prefill_tokens", "saved_estimate_ns"}
    | {"external_tokens", "external_known_tokens"}
    | {"batch", "average_batch", "steps", "step_ns", "share", "first_model", "last_model"}
    | {"marginal_ns", "marginal_cost_nanousd", "marginal_cost_usd", "common_ns"}
    | {"kv_block_ms", "kv_cache_share", "kv_cost_nanousd", "kv_cost_usd", "time_cost_nanousd"}
    | {"preemptions", "recomputed_ns", "recomputed_tokens"}
    # A request that was alone has no error of its charge.
    | {"charge_known_ns", "charge_error_ns", "charge_error"}
)
# Which times an amount of money is for, by its name without the unit.
_TIMES_OF = {"usage_cost": ("gpu_time_ns",), "cost": ("gpu_time_ns", "idle_share_ns")}
_INSTANT = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3})\d+Z")

T = TypeVar("T")


def coarse(answer: T) -> T:
    """Return an answer (dicts, lists and values) with coarse figures."""
    return cast("T", _coarse(answer))


def coarse_ns(ns: int) -> int:
    """Return a time rounded to 1 ms; what is above 0 stays above 0."""
    return _rounded(ns, NS_PER_MS)


def coarse_amount(amount: int | None, exact: int, shown: int) -> int | None:
    """Return the part of an amount that a shown figure has, if the exact figure has all of it."""
    if amount is None or exact <= 0:
        return amount
    return half_even(amount * shown, exact)


def coarse_phases(gpu_time_ns: int, prefill_ns: int) -> tuple[int, int, int]:
    """Return GPU time, prefill and decode to 1 ms; the two phases add up to the GPU time."""
    shown = coarse_ns(gpu_time_ns)
    prefill = min(coarse_ns(prefill_ns), shown)
    return shown, prefill, shown - prefill


def coarse_use(amount: int, unit: str, limit: int) -> int:
    """Return the use of a budget to 1 ms of GPU time, or to a thousandth of its limit in USD."""
    return _rounded(amount, NS_PER_MS if unit == "gpu_seconds" else max(limit // 1_000, 1))


def _coarse(value: Any, name: str = "") -> Any:
    if isinstance(value, Mapping):
        return _coarse_fields(value)
    if isinstance(value, list):
        return [_coarse(each) for each in value]
    if isinstance(value, str):
        return _INSTANT.sub(r"\1Z", value) if name.endswith("_at") or name == "as_of" else value
    if value is None or name in HIDDEN:
        return None
    if name.endswith("_ns"):
        return coarse_ns(value)
    if name.endswith("_ms"):
        return float(round(value))
    return _rounded(value, MJ_PER_J) if name.endswith("_mj") else value


def _coarse_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    shown = {
        name: None if name in HIDDEN else _coarse(value, name) for name, value in fields.items()
    }
    if shown.get("gpu_time_ns") is not None and shown.get("prefill_ns") is not None:
        times = coarse_phases(fields["gpu_time_ns"], fields["prefill_ns"])
        shown["gpu_time_ns"], shown["prefill_ns"], shown["decode_ns"] = times
    for money, times_of in _TIMES_OF.items():
        _put_money(shown, money, fields, times_of, shown)
    _put_money(shown, "energy_cost", fields, ("energy_mj",), shown)
    if "limit" in fields and "used" in fields:
        shown |= _budget(fields)
    return shown


def _put_money(
    into: dict[str, Any],
    money: str,
    exact: Mapping[str, Any],
    names: tuple[str, ...],
    shown: Mapping[str, Any],
) -> None:
    key = f"{money}_nanousd"
    if exact.get(key) is None:
        return
    whole = sum(exact.get(name) or 0 for name in names)
    amount = coarse_amount(exact[key], whole, sum(shown.get(name) or 0 for name in names))
    into[key] = amount
    if f"{money}_usd" in into:
        into[f"{money}_usd"] = format_usd(amount)


def _budget(fields: Mapping[str, Any]) -> dict[str, int | None]:
    amounts = {name: fields[name] for name in ("used", "used_here", "over") if name in fields}
    return {
        name: None if amount is None else coarse_use(amount, fields["unit"], fields["limit"])
        for name, amount in amounts.items()
    }


def _rounded(amount: int, step: int) -> int:
    if 0 < amount < step:
        return step
    return half_even(amount, step) * step
