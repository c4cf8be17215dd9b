"""The commands `report` and `statement`: figures of the ledger for people and spreadsheets.

A report without words of the grammar is the tenants' rows of the ledger; with any of them it is the
answer to that question, as `/cost/report` gives it. Exit status 1 if the books do not add up.
"""

import io
import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_cost_meter.cli.options import Json, Ledger, reading, write_output
from vllm_cost_meter.console import print_rows
from vllm_cost_meter.reports.allocation import COUNTS
from vllm_cost_meter.reports.grammar import DIMENSIONS, STEPS, TAG, TIMES, Words
from vllm_cost_meter.reports.idle import EXPECTED as POLICIES
from vllm_cost_meter.reports.price_lines import price_lines
from vllm_cost_meter.reports.statement_html import statement_html
from vllm_cost_meter.reports.statement_text import print_statement
from vllm_cost_meter.units.calendar import EXPECTED as WINDOWS
from vllm_cost_meter.units.calendar import hours_of_window, zone_of
from vllm_cost_meter.units.text import plain, to_csv

TENANT_COLUMNS: tuple[str, ...] = ("tenant", *COUNTS, "gpu_time_ns", "cost_usd")
REQUEST_COLUMNS: tuple[str, ...] = (
    "finished_at",
    "http_request_id",
    "tenant",
    "route",
    "state",
    "status",
    "engine_status",
    "prompt_tokens",
    "output_tokens",
    "gpu_time_ns",
    "cost_usd",
)
REPORT_COLUMNS = (*COUNTS, "gpu_time_ns", "idle_share_ns", "usage_cost_usd", "cost_usd")
# Shown where the energy of any row is known; in JSON and CSV always.
ENERGY_COLUMN = "energy_mj"


class What(StrEnum):
    """What a report is about."""

    tenants = "tenants"
    requests = "requests"


class Format(StrEnum):
    """How a statement is written."""

    table = "table"
    json = "json"
    csv = "csv"
    html = "html"


TimeZone = Annotated[
    str | None,
    typer.Option(help="Time zone of days and months, such as Europe/Berlin; otherwise UTC."),
]
Idle = Annotated[
    str | None, typer.Option(help=f"Who pays for idle time: {POLICIES}. Otherwise none.")
]


def report(
    what: Annotated[
        What,
        typer.Argument(help="tenants, or requests: those that run, then the others, newest first"),
    ] = What.tenants,
    ledger: Ledger = None,
    window: Annotated[str | None, typer.Option(help=f"{WINDOWS}.")] = None,
    tz: TimeZone = None,
    aggregate: Annotated[
        str | None,
        typer.Option(
            help=f"Columns to add up by, with commas: {', '.join((*DIMENSIONS, *TIMES))}, {TAG}NAME"
            "; otherwise tenant."
        ),
    ] = None,
    step: Annotated[
        str | None, typer.Option(help=f"A report for each of these: {', '.join(STEPS)}.")
    ] = None,
    accumulate: Annotated[bool, typer.Option(help="Add the steps up again.")] = False,
    idle: Idle = None,
    filter: Annotated[
        str | None,
        typer.Option(help=f"Rows to show, such as tenant:a,b+model:m+{TAG}team=x."),
    ] = None,
    price: Annotated[
        str | None, typer.Option(help="What if every GPU-hour had cost so many USD?")
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's requests.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Requests to list.")] = 100,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Print what each tenant used and what the engines did besides, or the latest requests."""
    words: Words = {
        "window": window,
        "tz": tz,
        "aggregate": aggregate,
        "step": step,
        "accumulate": accumulate,
        "idle": idle,
        "filter": filter,
        "price": price,
    }
    with reading(ledger) as reader:
        _refuse(words if what is What.requests else {"tenant": tenant}, what)
        if as_json and as_csv:
            raise ValueError("--csv: expected without --json, got both")
        if any(value for word, value in words.items() if word not in ("window", "tz")):
            answer = reader.report(**words)
            rows, columns = _series_rows(answer)
        elif what is What.tenants:
            answer = reader.tenants(*hours_of_window(window, zone=zone_of(tz)))
            rows, columns = answer["tenants"], TENANT_COLUMNS
        else:
            answer = reader.requests(limit=limit, tenant=tenant)
            rows, columns = [*answer["running"], *answer["requests"]], REQUEST_COLUMNS
    if as_json:
        print(json.dumps(answer, indent=2))
    elif as_csv:
        print(to_csv(rows), end="")
    else:
        if any(row.get(ENERGY_COLUMN) is not None for row in rows):
            columns = (*columns, ENERGY_COLUMN)
        print_rows(rows, columns)
        if what is What.tenants:
            print("\n".join(map(plain, _lines_below(answer, filter))))
    if what is What.tenants and not answer["adds_up"]:
        raise typer.Exit(1)


def statement(
    month: Annotated[str, typer.Option(help="The month, such as 2026-11.")],
    tenant: Annotated[str | None, typer.Option(help="Whose statement.")] = None,
    everyone: Annotated[
        bool, typer.Option("--all", help="All tenants, what nobody pays, and the grand total.")
    ] = False,
    tz: TimeZone = None,
    idle: Idle = None,
    ledger: Ledger = None,
    format: Annotated[Format, typer.Option(help="HTML prints well, also to PDF.")] = Format.table,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file to write, or write anew.")
    ] = None,
) -> None:
    """Print a month's statement: lines by model and day that add up to the cent."""
    with reading(ledger) as reader:
        if everyone == (tenant is not None):
            raise ValueError("--tenant: expected it or --all, and not both")
        answer = reader.statement(month, tenant=tenant, tz=tz, idle=idle)
        text = _written(answer, format)
        if output is not None:
            write_output(output, text)
    if output is None:
        print(text, end="")
    if not answer["adds_up"]:
        raise typer.Exit(1)


def adds_up_line(answer: Mapping[str, Any]) -> str:
    """Return the line under a tenant report that says whether its rows are the whole."""
    wall_s = answer["wall_gpu_ns"] / 1e9
    if answer["adds_up"]:
        return f"adds up: the rows are all of {wall_s:.6f} GPU-seconds, to the nanosecond"
    return f"DOES NOT ADD UP: {answer['difference_ns']} ns of {wall_s:.6f} GPU-seconds are missing"


def _refuse(words: Mapping[str, object], got: What) -> None:
    """Raise ValueError for a word that would be passed over: it is of the other report."""
    expected = What.tenants if got is What.requests else What.requests
    for name, value in words.items():
        if value:
            raise ValueError(f"--{name}: expected with `report {expected}`, got it with {got}")


def _series_rows(answer: Mapping[str, Any]) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Return the rows of all pieces of a report, and the columns of its table."""
    is_series = len(answer["series"]) > 1
    rows = [
        {**({"from": piece["from"], "to": piece["to"]} if is_series else {}), **row}
        for piece in answer["series"]
        for row in piece["rows"]
    ]
    # Only times: without the class nobody could tell usage from idle.
    names_class = () if set(answer["aggregate"]) - set(TIMES) else ("class",)
    start = ("from",) if is_series else ()
    return rows, (*start, *names_class, *answer["aggregate"], *REPORT_COLUMNS)


def _lines_below(answer: Mapping[str, Any], filter: str | None) -> list[str]:
    lines = []
    if answer.get("what_if_usd_per_gpu_hour") is not None:
        usd = answer["what_if_usd_per_gpu_hour"]
        lines.append(f"what if: every GPU-hour at {usd} USD; that is not what it cost")
    if filter:
        lines.append("filtered: rows that are not shown belong to the whole too")
    lines.append(adds_up_line(answer))
    # A series has its own price in each row, and overheads are of a month, in statements.
    return lines if "series" in answer else [*lines, *price_lines(answer)]


def _written(answer: Mapping[str, Any], format: Format) -> str:
    if format is Format.json:
        return json.dumps(answer, indent=2) + "\n"
    if format is Format.csv:
        return to_csv(answer["lines"])
    if format is Format.html:
        return statement_html(answer)
    out = io.StringIO()
    print_statement(answer, out)
    return out.getvalue()
