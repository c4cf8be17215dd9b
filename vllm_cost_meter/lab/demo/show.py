"""Show the demo's results: headers, the last chunk, the bill, the audit, the statement."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_cost_meter.lab.demo.checks import DemoFigures
from vllm_cost_meter.lab.demo.setup import Setup
from vllm_cost_meter.lab.demo.traffic import CHAT, Sightings
from vllm_cost_meter.lab.server import Server
from vllm_cost_meter.reports.statement_text import print_statement
from vllm_cost_meter.units.money import format_usd
from vllm_cost_meter.units.text import plain

# The demo's statement charges idle time by this policy.
IDLE_POLICY = "proportional"


def show(
    console: Console, server: Server, setup: Setup, seen: Sightings, figures: DemoFigures
) -> None:
    """Print the results: a reply's headers, a stream's end, the bill, the audit, the statement."""
    console.print("\nthe headers of one reply")
    for name, value in seen.headers:
        console.print(f"  {name}: {plain(value)}", soft_wrap=True)
    console.print("\nthe last chunk of one stream")
    console.print(f"  {plain(seen.last_chunk)}", soft_wrap=True)
    console.print("\nthe bill")
    console.print(bill_table(figures.tenants["tenants"]))
    console.print(sum_line(figures.tenants), soft_wrap=True)
    for run in figures.audit["runs"]:
        console.print(audit_line(run), soft_wrap=True)
    ask = f"statement --all --month {figures.statement['month']} --idle {IDLE_POLICY}"
    console.print(f"\nvllm-cost-meter {ask}")
    print_statement(figures.statement, console.file)
    console.print()
    for name, what in (
        ("one request", f"curl {server.side_url}/cost/requests/{seen.reply_id}"),
        ("endpoint", f"{server.side_url}/cost/summary (also /cost/tenants, /cost/audit, /metrics)"),
        ("ledger", f"{short_path(str(setup.folder / 'ledger.db'))} ({size_of_ledger(figures)})"),
        ("vLLM's log", short_path(str(server.log))),
    ):
        console.print(f"{name:<12} {plain(what)}", soft_wrap=True)


def size_of_ledger(figures: DemoFigures) -> str:
    """Return how large the ledger is, and how long a report of it took."""
    requests = sum(row["requests"] or 0 for row in figures.tenants["tenants"])
    return (
        f"{figures.ledger_bytes / 1e6:.1f} MB with its log, {requests} requests;"
        f" the report by tenants took {figures.report_s:.2f} s"
    )


def bill_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the bill as a table: tenants, classes of engine time above zero, the total."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("  tenant")
    for column in ("requests", "prompt", "cached", "output", "GPU seconds", "USD"):
        table.add_column(column, justify="right", no_wrap=True)
    names = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")
    shown = [row for row in rows if row["gpu_time_ns"] or row["requests"]]
    for row in shown:
        counts = ("" if is_class(row) else str(row[name]) for name in names)
        table.add_row(f"  {plain(row['tenant'])}", *counts, *_money(row))
    total = {name: sum(row[name] or 0 for row in shown) for name in (*names, "gpu_time_ns")}
    costs = [row["cost_nanousd"] for row in shown]
    cost = None if None in costs else format_usd(sum(costs))
    counts = (str(total[name]) for name in names)
    table.add_row("  total", *counts, *_money({**total, "cost_usd": cost}))
    return table


def is_class(row: Mapping[str, Any]) -> bool:
    """Return whether a row is a class of engine time, such as `__idle__`, and not a tenant."""
    return str(row["tenant"]).startswith("__")


def _money(row: Mapping[str, Any]) -> tuple[str, str]:
    return f"{row['gpu_time_ns'] / 1e9:.9f}", row["cost_usd"] or "-"


def sum_line(tenants: Mapping[str, Any]) -> str:
    """Return the line under the bill, which says whether its rows cover all GPU time."""
    rows_ns = sum(row["gpu_time_ns"] for row in tenants["tenants"])
    missing_ns = tenants["wall_gpu_ns"] - rows_ns
    verdict = "the rows are all of" if not missing_ns else f"{missing_ns} ns are missing of"
    return f"sum: {verdict} {tenants['wall_gpu_ns'] / 1e9:.9f} s wall x GPUs"


def audit_line(run: Mapping[str, Any]) -> str:
    """Return a line for one engine run in the audit."""
    verdict = "balanced" if not run["difference_ns"] else f"{run['difference_ns']} ns are missing"
    missing = f", {len(run['missing_bills'])} bills missing" if run["missing_bills"] else ""
    return (
        f"audit, a moment later: engine {run['engine_index']} ran {run['wall_ns'] / 1e9:.9f} s "
        f"on {run['gpus']} GPU; {run['last_seq']} bills; "
        f"difference {run['difference_ns']} ns: {verdict}{missing}"
    )


def show_how_to_use(console: Console, server: Server, setup: Setup) -> None:
    """Print how to stop the server that goes on, and how to use it from this shell."""
    console.print(f"\nthe server goes on; stop it with: kill {server.pid}")
    console.print(f"use it as {CHAT}, from this shell only (the key is written nowhere):")
    console.print(f"  export OPENAI_BASE_URL={server.url}/v1", soft_wrap=True)
    console.print(f"  export OPENAI_API_KEY={setup.keys[CHAT]}", soft_wrap=True)
    body = json.dumps({"model": setup.name, "prompt": "Once upon a time", "max_tokens": 16})
    console.print(
        f'  curl -si $OPENAI_BASE_URL/completions -H "Authorization: Bearer $OPENAI_API_KEY" '
        f"-H 'Content-Type: application/json' -d {shlex.quote(body)}",
        soft_wrap=True,
    )


def short_path(path: str) -> str:
    """Return a path relative to the current folder, if it is below it."""
    here = f"{Path.cwd()}{os.sep}"
    return plain(path.removeprefix(here))
