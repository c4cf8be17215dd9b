"""What each tenant owes at a cut, and where the rest of the time went.

GPU time comes from the usage pieces of the bills up to the cut, the overhead rows from the
engines' own totals; so the rows add up to wall x gpus, and the answer says whether they do.
Requests and tokens count every exchange the ledger holds, in a window those that finished in it.
Cost is priced anew, run by run with the run's price, on sums: one rounding for each row and run.

Invariant: `difference_ns` = wall x gpus - the sum of all rows' GPU time, and is 0 when no bill
misses.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from sqlalchemy import ColumnElement, Select, Text, and_, cast, func, literal, or_, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.cut import Cut, Window
from vllm_cost_meter.ledger.energy import by_tenant, class_mj
from vllm_cost_meter.ledger.exchange import PART_SUMS
from vllm_cost_meter.ledger.schema import http_requests, requests, usage_pieces
from vllm_cost_meter.pricing import cost_nanousd, format_usd
from vllm_cost_meter.records import OVERHEAD_CLASSES

# The rows of an overhead report, in the order they are shown.
OVERHEAD_ROWS = (*OVERHEAD_CLASSES, "in_flight")
Prices = Mapping[str, Decimal | None]


def tenant_rows(connection: Connection, cut: Cut) -> list[dict[str, Any]]:
    """Return one row for each tenant, the most GPU time first, then one for each class."""
    prices = cut.price_of()
    used = _used(connection, cut)
    counted = _counts(connection, cut.window)
    cache_ms = cut.kv_cache_block_ms()
    energies = by_tenant(connection, cut)
    rows = []
    for tenant in used.keys() | counted.keys():
        per_run = used.get(tenant, {})
        counts = counted.get(tenant, (0, 0, 0, 0))
        spent = {run_id: sums["prefill_ns"] + sums["decode_ns"] for run_id, sums in per_run.items()}
        totals = {name: sum(sums[name] for sums in per_run.values()) for name in PART_SUMS}
        share = totals["kv_block_ms"] / cache_ms if cache_ms else None
        cache = {**totals, "kv_cache_share": share}
        unused = (0, 0) if energies else (None, None)
        energy = dict(zip(_ENERGY, energies.get(tenant, unused), strict=True))
        row = _row(tenant, dict(zip(_COUNTS, counts, strict=True)), spent, cache, prices)
        rows.append({**row, **energy})
    rows.sort(key=lambda row: (-row["gpu_time_ns"], row["tenant"]))
    of_none = dict.fromkeys((*PART_SUMS, "kv_cache_share"))
    for name in OVERHEAD_ROWS:
        no_counts = {**dict.fromkeys(_COUNTS), "requests": 0}
        row = _row(f"__{name}__", no_counts, cut.overhead_ns(name), of_none, prices)
        energy = dict(zip(_ENERGY, (class_mj(cut, name), None), strict=True))
        rows.append({**row, **energy})
    return rows


def cost_of(spent_ns: Mapping[str, int], prices: Prices) -> int | None:
    """Return the cost of time spent in runs; None if any that spent some has no price."""
    if not any(spent_ns.values()):
        return 0 if any(price is not None for price in prices.values()) else None
    costs = [cost_nanousd(ns, prices[run_id]) for run_id, ns in spent_ns.items() if ns]
    return None if None in costs else sum(cost for cost in costs if cost is not None)


def cost_of_all(cut: Cut) -> dict[str, Any]:
    """Return the cost of all time at the cut, and the price; None where runs differ in it."""
    if cut.window.is_all:
        spent = {r.run_id: int(r.row["wall_ns"]) * int(r.row["gpus"]) for r in cut.runs}
    else:
        spent = {run.run_id: run.total_ns() for run in cut.runs}
    cost = cost_of(spent, cut.price_of())
    prices = sorted({run.row["usd_per_gpu_hour"] for run in cut.runs if run.price is not None})
    return {
        "cost_nanousd": cost,
        "cost_usd": format_usd(cost),
        "usd_per_gpu_hour": prices[0] if len(prices) == 1 else None,
        "prices": prices,
    }


def after_cut(connection: Connection, cut: Cut) -> dict[str, int]:
    """Return the bills that no snapshot counts yet: they wait for the next one."""
    billed = select(func.count(), func.sum(requests.c.gpu_time_ns))
    if cut.runs:
        at = cut.cte()
        billed = billed.join_from(
            requests, at, requests.c.run_id == at.c.run_id, isouter=True
        ).where(or_(at.c.run_id.is_(None), requests.c.seq > at.c.last_seq))
    count, gpu_time_ns = connection.execute(billed).one()
    return {"bills": int(count), "gpu_time_ns": int(gpu_time_ns or 0)}


_TOKENS = ("prompt_tokens", "cached_tokens", "output_tokens")
_COUNTS = ("requests", *_TOKENS)
_ENERGY = ("energy_mj", "energy_unknown_requests")


def _row(
    tenant: str,
    counts: Mapping[str, int | None],
    spent_ns: Mapping[str, int],
    sums: Mapping[str, float | None],
    prices: Prices,
) -> dict[str, Any]:
    cost = cost_of(spent_ns, prices)
    return {
        "tenant": tenant,
        **counts,
        "gpu_time_ns": sum(spent_ns.values()),
        **sums,
        "cost_nanousd": cost,
        "cost_usd": format_usd(cost),
    }


def _used(connection: Connection, cut: Cut) -> dict[str, dict[str, dict[str, int]]]:
    """Return what the bills up to the cut used, by tenant and run."""
    if not cut.runs:
        return {}
    at, p = cut.cte(), usage_pieces.c
    used = (
        select(p.tenant, p.run_id, *(func.sum(p[name]) for name in PART_SUMS))
        .join(at, and_(p.run_id == at.c.run_id, p.seq <= at.c.last_seq))
        .where(cut.window.on_hours(p.hour))
        .group_by(p.tenant, p.run_id)
    )
    found: dict[str, dict[str, dict[str, int]]] = {}
    for tenant, run_id, *sums in connection.execute(used):
        found.setdefault(tenant, {})[run_id] = dict(zip(PART_SUMS, map(int, sums), strict=True))
    return found


def _counts(connection: Connection, window: Window) -> dict[str, tuple[int, int, int, int]]:
    """Return requests and tokens by tenant."""
    found: dict[str, tuple[int, int, int, int]] = {}
    for query in (_told_counts(window), _untold_counts(window)):
        for tenant, *counts in connection.execute(query):
            known = found.get(tenant, (0, 0, 0, 0))
            sums = (a + int(b) for a, b in zip(known, counts, strict=True))
            found[tenant] = tuple(sums)  # type: ignore[assignment]
    return found


def _told_counts(window: Window) -> Select[Any]:
    """Count exchanges with an HTTP row and at least one part; tokens told, else from the parts."""
    h, r = http_requests.c, requests.c
    prompts = (
        select(
            h.http_request_id,
            h.tenant,
            *(h[name].label(f"told_{name}") for name in _TOKENS),
            *_prompt_tokens(),
        )
        .join(requests, r.http_request_id == h.http_request_id)
        .where(window.on_instants(h.finished_at))
        .group_by(h.http_request_id, r.prompt_group)
        .subquery()
    )
    p = prompts.c
    exchanges = (
        select(
            func.max(p.tenant).label("tenant"),
            *(
                func.coalesce(func.max(p[f"told_{name}"]), func.sum(p[name])).label(name)
                for name in _TOKENS
            ),
        )
        .group_by(p.http_request_id)
        .subquery()
    )
    e = exchanges.c
    sums = (func.sum(e[name]) for name in _TOKENS)
    return select(e.tenant, func.count(), *sums).group_by(e.tenant)


def _prompt_tokens() -> list[ColumnElement[Any]]:
    """Return the tokens of the parts of one prompt: itself counts once, what it drew in full."""
    r = requests.c
    return [
        func.max(r.prompt_tokens).label("prompt_tokens"),
        func.max(r.cached_tokens).label("cached_tokens"),
        func.sum(r.output_tokens).label("output_tokens"),
    ]


def _untold_counts(window: Window) -> Select[Any]:
    """Count the tokens of parts without an HTTP row, as requests 0."""
    h, r = http_requests.c, requests.c
    own = func.coalesce(r.http_request_id, r.run_id + "/" + cast(r.seq, Text))
    prompts = (
        select(r.tenant, *_prompt_tokens())
        .join(http_requests, h.http_request_id == r.http_request_id, isouter=True)
        .where(h.http_request_id.is_(None), window.on_instants(r.finished_at))
        .group_by(r.tenant, own, r.prompt_group)
        .subquery()
    )
    sums = (func.sum(prompts.c[name]) for name in _TOKENS)
    return select(prompts.c.tenant, literal(0), *sums).group_by(prompts.c.tenant)
