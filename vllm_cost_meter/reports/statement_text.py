"""A statement at a terminal: a table of its lines, their totals, and the notes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from vllm_cost_meter.console import print_rows
from vllm_cost_meter.reports.statement import CLASS, format_cents, notes
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
    "usage_usd",
    "idle_share_usd",
    "amount_usd",
)


def print_statement(answer: Mapping[str, Any], file: IO[str]) -> None:
    """Write a statement as text."""
    below = "\n".join(map(plain, (*totals(answer), *notes(answer))))
    print_rows(rows(answer), columns_of(answer), plain(title(answer)), below, file)


def columns_of(answer: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns of a statement's table."""
    return COLUMNS if answer["tenant"] is None else COLUMNS[1:]


def title(answer: Mapping[str, Any]) -> str:
    """Return what a statement is of."""
    whose = "all tenants" if answer["tenant"] is None else answer["tenant"]
    draft = "" if answer["final"] else ", preliminary"
    return f"Statement of {whose}, {answer['month']} ({answer['window']['tz']}){draft}"


def rows(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the lines with the total of each tenant below its own, and the grand total last.

    Classes in which the engines spent no time are left out.
    """
    lines: Sequence[Mapping[str, Any]] = answer["lines"]
    if answer["tenant"] is not None:
        return [*lines, {"item": "total", **answer["total"]}]
    found: list[Mapping[str, Any]] = []
    for total in answer["tenants"]:
        found += [line for line in lines if line["tenant"] == total["tenant"]]
        found.append({"item": "total", **total})
    nobodys = (line for line in lines if line["tenant"] is None)
    found += [line for line in nobodys if line["kind"] != CLASS or line["gpu_time_ns"]]
    return [*found, {"item": "grand total", **answer["total"]}]


def totals(answer: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that say what is owed, and of all, that it is what was paid."""
    total = answer["total"]["amount_usd"]
    currency = answer["currency"]
    yield f"taxes: {answer['taxes']}"
    yield f"total: {'unknown, no price' if total is None else f'{total} {currency}'}"
    if (whole := answer.get("whole")) is None:
        return
    seconds = f"{whole['wall_gpu_ns'] / 1e9:.6f}"
    wall = format_cents(whole["wall_cents"]) or "unknown"
    others = [f"{cost['name']} {format_cents(cost['cents'])}" for cost in whole["overhead"]]
    yield (
        f"whole: {seconds} GPU-seconds of wall time x price {wall}"
        f"{''.join(f' + {other}' for other in others)} = {whole['amount_usd'] or 'unknown'}"
        f" {currency}"
    )
