"""A statement as text for a terminal: a table of lines, the totals, and notes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

from vllm_cost_meter.console import print_rows
from vllm_cost_meter.prices.cost import MS_PER_HOUR
from vllm_cost_meter.records.owner import TenantScope
from vllm_cost_meter.reports.charges import charges_text
from vllm_cost_meter.reports.statement import CLASS, KV, format_cents, notes
from vllm_cost_meter.units.text import plain

COLUMNS = (
    "tenant",
    "day",
    "item",
    "requests",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "gpu_time_ns",
    "idle_share_ns",
    "kv_block_hours",
    "usd_per_kv_block_hour",
    "usage_usd",
    "idle_share_usd",
    "amount_usd",
)
# A statement without lines of KV residency does not have these.
_KV_COLUMNS = ("kv_block_hours", "usd_per_kv_block_hour")
# What the table calls the item of such a line: the model's other line has its plain name.
_KV_ITEM = "KV cache of {}"
_PLACES = 6


# A narrow terminal drops other columns before these.
FIRST = ("day", "item", "amount_usd", "tenant", "gpu_time_ns", "usage_usd", "idle_share_usd")
CHARGES_NOTE = (
    "how far a split may be off is an estimate, from what the cost model does not know"
    " (docs/explanation/attribution.md); no amount depends on it"
)
CENTS_NOTE = (
    "cents: idle_share_usd is amount_usd less usage_usd, and both are rounded so that they add up;"
    " so it may be 0.01 or -0.01 where no idle time is charged"
)


def print_statement(answer: Mapping[str, Any], file: IO[str], *, wide: bool = False) -> None:
    """Write a statement as text. A terminal gets the columns that fit, or all with `wide`."""
    lines = rows(answer)
    said = (*totals(answer), *charges_lines(answer), *cents_notes(lines), *notes(answer))
    below = "\n".join(map(plain, said))
    print_rows(lines, columns_of(answer), plain(title(answer)), below, file, first=FIRST, wide=wide)


def charges_lines(answer: Mapping[str, Any]) -> Iterator[str]:
    """Yield how well the split of each tenant's GPU time is known, and that of all of them."""
    tenants = answer.get("tenants")
    if tenants is None:
        yield charges_text(answer["total"])
    else:
        used = [tenant for tenant in tenants if tenant["gpu_time_ns"]]
        for tenant in used:
            yield f"{tenant['tenant']}: {charges_text(tenant)}"
        # The grand total has time without requests too, which nobody splits.
        whole = {**answer["total"], "gpu_time_ns": sum(tenant["gpu_time_ns"] for tenant in used)}
        yield f"all tenants, on average: {charges_text(whole)}"
    if answer["total"]["charge_error"]:
        yield CHARGES_NOTE


def cents_notes(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a note if a line without idle time has cents of it by rounding; usually nothing."""
    is_odd = any(
        not line["idle_share_ns"] and float(line.get("idle_share_usd") or 0) for line in lines
    )
    return [CENTS_NOTE] if is_odd else []


def columns_of(answer: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns of a statement's table."""
    is_of_one = {line["tenant"] for line in answer["lines"]} == {answer["tenant"]}
    charges_blocks = any(line["kind"] == KV for line in answer["lines"])
    hidden = (*(["tenant"] if is_of_one else []), *([] if charges_blocks else _KV_COLUMNS))
    return tuple(name for name in COLUMNS if name not in hidden)


def title(answer: Mapping[str, Any]) -> str:
    """Return the title: tenant, month, time zone, and whether it is preliminary."""
    whose = "all tenants"
    if answer["tenant"] is not None:
        whose = TenantScope(answer["tenant"], answer["covers"]).text
    draft = "" if answer["final"] else ", preliminary"
    return f"Statement of {whose}, {answer['month']} ({answer['window']['tz']}){draft}"


def rows(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the table's rows: each tenant's lines with their total, and the grand total last.

    A class without engine time is left out.
    """
    lines: Sequence[Mapping[str, Any]] = [_with_blocks(line) for line in answer["lines"]]
    if answer["tenant"] is not None:
        return [*lines, _with_blocks({"item": "total", **answer["total"]})]
    found: list[Mapping[str, Any]] = []
    for total in answer["tenants"]:
        found += [line for line in lines if line["tenant"] == total["tenant"]]
        found.append(_with_blocks({"item": "total", **total}))
    nobodys = (line for line in lines if line["tenant"] is None)
    found += [line for line in nobodys if line["kind"] != CLASS or line["gpu_time_ns"]]
    return [*found, _with_blocks({"item": "grand total", **answer["total"]})]


def _with_blocks(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a line or a total as the table shows KV residency: in blocks x hours."""
    block_ms = line["kv_block_ms"]
    shown = {**line, "kv_block_hours": None}
    if block_ms is not None:
        shown["kv_block_hours"] = f"{block_ms / MS_PER_HOUR:.{_PLACES}f}"
    if line.get("kind") == KV:
        shown["item"] = _KV_ITEM.format(line["item"])
    return shown


def totals(answer: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines with the total; for all tenants also the whole that it adds up to."""
    total = answer["total"]["amount_usd"]
    currency = answer["currency"]
    yield f"taxes: {answer['taxes']}"
    yield f"total: {'unknown, no price' if total is None else f'{total} {currency}'}"
    if (whole := answer.get("whole")) is None:
        return
    seconds = f"{whole['wall_gpu_ns'] / 1e9:.6f}"
    wall = format_cents(whole["wall_cents"]) or "unknown"
    blocks = whole["kv_cents"]
    others = [f"KV cache {format_cents(blocks)}"] if blocks else []
    others += [f"{cost['name']} {format_cents(cost['cents'])}" for cost in whole["overhead"]]
    yield (
        f"whole: {seconds} GPU-seconds of wall time x price {wall}"
        f"{''.join(f' + {other}' for other in others)} = {whole['amount_usd'] or 'unknown'}"
        f" {currency}"
    )
