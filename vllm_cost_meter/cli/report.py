"""The commands `report` and `statement`: usage and cost as tables, JSON, CSV or HTML.

Without further parameters a report is the one by tenant, as at `/cost/tenants`, with prices and
overheads below it. With any parameter besides window and time zone it is the one at `/cost/report`.
The exit status is 1 if the books do not add up.
"""

import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_cost_meter.cli.options import (
    Config,
    Csv,
    Engines,
    Json,
    Ledger,
    Output,
    TimeZone,
    Wide,
    WindowOption,
    dropped_lines,
    engines_lines,
    print_answer,
    reading,
    refuse_both,
    settings_of,
    write_output,
)
from vllm_cost_meter.console import print_lines, print_rows
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.records.owner import COVERS_TEXT, OWN, WITH_CHILDREN, Covers, TenantScope
from vllm_cost_meter.reports.answers import TenantsReport
from vllm_cost_meter.reports.charges import charges_cell
from vllm_cost_meter.reports.facts import MAIN_COUNTS
from vllm_cost_meter.reports.grammar import DIMENSIONS, LABEL, STEPS, TAG, TIMES, Words, question
from vllm_cost_meter.reports.idle import EXPECTED as POLICIES
from vllm_cost_meter.reports.price_lines import price_lines
from vllm_cost_meter.reports.statement_html import statement_html
from vllm_cost_meter.reports.statement_text import print_statement
from vllm_cost_meter.units.calendar import hours_of_window, zone_of
from vllm_cost_meter.units.text import plain, to_csv

TENANT_COLUMNS: tuple[str, ...] = ("tenant", *MAIN_COUNTS, "gpu_time_ns", "cost_usd")
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
REPORT_COLUMNS = (*MAIN_COUNTS, "gpu_time_ns", "idle_share_ns", "usage_cost_usd", "cost_usd")
# A narrow terminal drops other columns before these, and keeps the aggregated columns longest.
FIRST = (
    "tenant",
    "cost_usd",
    "gpu_time_ns",
    "requests",
    "idle_share_ns",
    "prompt_tokens",
    "output_tokens",
)
# Of requests: the id is what `explain` takes, and is never cut. The newest stand first, so the time
# is what a narrow terminal can spare.
REQUEST_FIRST = ("tenant", "http_request_id", "cost_usd", "finished_at", "gpu_time_ns", "status")
NANO_USD_NOTE = (
    "usage_cost_usd and cost_usd are both rounded so that they add up; so they may differ by a"
    " nano-USD where no idle time is charged"
)
# A table has this column only if the energy of any row is known; JSON and CSV always have it.
ENERGY_COLUMN = "energy_mj"
# Likewise only if KV residency has a price in any row; it is a part of the costs beside it.
KV_COLUMN = "kv_cost_usd"
# Likewise only if it is known of any row how far its split may be off.
SPLIT_COLUMN = "split_within"
SPLIT_NOTE = (
    f"{SPLIT_COLUMN}: how far the split of a row's GPU time may be off, an estimate; no amount"
    " depends on it"
)


class What(StrEnum):
    """The subject of a report."""

    tenants = "tenants"
    requests = "requests"


class Format(StrEnum):
    """The output format of a statement."""

    table = "table"
    json = "json"
    csv = "csv"
    html = "html"


Idle = Annotated[
    str | None, typer.Option(help=f"Who pays for idle time: {POLICIES}. Otherwise none.")
]

Aggregate = Annotated[
    str | None,
    typer.Option(
        help=f"Columns to add up by, with commas: {', '.join((*DIMENSIONS, *TIMES))}, {TAG}NAME,"
        f" {LABEL}NAME; otherwise tenant."
    ),
]
WithChildren = Annotated[
    bool,
    typer.Option(
        "--with-children/--own",
        help="What a tenant means: itself with all tenants below it, or itself alone.",
    ),
]
Filter = Annotated[
    str | None,
    typer.Option(
        help=f"Rows to show, such as tenant:a,b+model:m+{TAG}team=x; {LABEL}pool=spot chooses"
        " engines."
    ),
]


def report(
    what: Annotated[
        What,
        typer.Argument(help="tenants, or requests: those that run, then the others, newest first"),
    ] = What.tenants,
    ledger: Ledger = None,
    config: Config = None,
    window: WindowOption = None,
    tz: TimeZone = None,
    aggregate: Aggregate = None,
    step: Annotated[
        str | None, typer.Option(help=f"A report for each of these: {', '.join(STEPS)}.")
    ] = None,
    accumulate: Annotated[bool, typer.Option(help="Add the steps up again.")] = False,
    idle: Idle = None,
    filter: Filter = None,
    price: Annotated[
        str | None, typer.Option(help="What if every GPU-hour had cost so many USD?")
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's requests.")] = None,
    with_children: WithChildren = True,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Requests to list.")] = 100,
    wide: Wide = False,
    as_json: Json = False,
    as_csv: Csv = False,
    output: Output = None,
) -> None:
    """What each tenant used and cost, idle time included.

    The rows add up to all the time of all engines. With `requests` it lists requests instead: first
    those that run, then the others, the newest first.

    Example: vllm-cost-meter report --window 7d --aggregate tenant,model
    """
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
    answer: Any
    with reading(ledger, config) as reader:
        _refuse(words if what is What.requests else {"tenant": tenant}, what)
        refuse_both(as_json=as_json, as_csv=as_csv)
        has_words = any(value for word, value in words.items() if word not in ("window", "tz"))
        if has_words:
            answer = reader.report(replace(question(**words), covers=_covers(with_children)))
            rows, columns = _series_rows(answer)
        elif what is What.tenants:
            answer = _plain_report(reader, window, tz)
            rows, columns = _series_rows(answer)[0], TENANT_COLUMNS
        else:
            answer = reader.requests(limit=limit, tenant=tenant, covers=_covers(with_children))
            rows, columns = [*answer["running"], *answer["requests"]], REQUEST_COLUMNS
    _say_who_is_unseen(answer, ledger, config)
    below = _below(what, answer, filter, has_words)
    print_answer(
        answer,
        rows,
        lambda: _print_table(rows, columns, below, wide=wide),
        as_json=as_json,
        as_csv=as_csv,
        output=output,
    )
    if what is What.tenants and not answer["adds_up"]:
        raise typer.Exit(1)


def _say_who_is_unseen(answer: Mapping[str, Any], ledger: str | None, config: Path | None) -> None:
    """Name on stderr whom the idle policy charges though nobody knows them."""
    if not (unseen := answer.get("idle_unseen")):
        return
    declared = {tenant.name for tenant in settings_of(ledger, config).tenants}
    for name in unseen:
        if name not in declared:
            said = f"--idle: tenant {name!r} is neither declared nor in the ledger"
            print(plain(f"vllm-cost-meter: {said}; it is charged all the same"), file=sys.stderr)


def statement(
    month: Annotated[str, typer.Option(help="The month, such as 2026-11.")],
    tenant: Annotated[str | None, typer.Option(help="Whose statement.")] = None,
    with_children: WithChildren = True,
    everyone: Annotated[
        bool, typer.Option("--all", help="All tenants, what nobody pays, and the grand total.")
    ] = False,
    tz: TimeZone = None,
    idle: Idle = None,
    filter: Engines = None,
    ledger: Ledger = None,
    config: Config = None,
    format: Annotated[Format, typer.Option(help="HTML prints well, also to PDF.")] = Format.table,
    output: Output = None,
    wide: Wide = False,
    as_json: Json = False,
    as_csv: Csv = False,
) -> None:
    """A tenant's month, line by line to the cent.

    The lines are by model and day, and add up to the total.

    Example: vllm-cost-meter statement --month 2026-11 --tenant search
    """
    with reading(ledger, config) as reader:
        format = _format_of(format, as_json=as_json, as_csv=as_csv)
        if everyone == (tenant is not None):
            raise ValueError("--tenant: expected it or --all, and not both")
        covers = _covers(with_children)
        answer = reader.statement(
            month, tenant=tenant, covers=covers, tz=tz, idle=idle, filter=filter
        )
        _say_who_is_unseen(answer, ledger, config)
        if output is not None:
            write_output(output, _written(answer, format))
    if output is None and format is Format.table:
        print_statement(answer, sys.stdout, wide=wide)
    elif output is None:
        print(_written(answer, format), end="")
    if not answer["adds_up"]:
        raise typer.Exit(1)


def _covers(with_children: bool) -> Covers:
    """Return what a tenant means by the options."""
    return WITH_CHILDREN if with_children else OWN


def _format_of(format: Format, *, as_json: bool, as_csv: bool) -> Format:
    """Return the format; --json and --csv are short for it. Raises ValueError for two of them."""
    refuse_both(as_json=as_json, as_csv=as_csv)
    short = Format.json if as_json else Format.csv if as_csv else format
    if format not in (short, Format.table):
        raise ValueError(f"--{short}: expected without --format {format}, got both")
    return short


def _print_table(
    rows: Sequence[Mapping[str, Any]],
    columns: tuple[str, ...],
    below: Sequence[str],
    *,
    wide: bool,
) -> None:
    if any(row.get("kv_cost_nanousd") for row in rows):
        at = columns.index("cost_usd")
        columns = (*columns[:at], KV_COLUMN, *columns[at:])
    if any(row.get(ENERGY_COLUMN) is not None for row in rows):
        columns = (*columns, ENERGY_COLUMN)
    if any(row.get("charge_known_ns") for row in rows):
        rows = [{**row, SPLIT_COLUMN: charges_cell(row)} for row in rows]
        columns, below = (*columns, SPLIT_COLUMN), [*below, SPLIT_NOTE]
    others = (*REPORT_COLUMNS, *REQUEST_COLUMNS, KV_COLUMN, ENERGY_COLUMN, SPLIT_COLUMN)
    names = [name for name in columns if name not in others]
    first = REQUEST_FIRST if "http_request_id" in columns else (*names, *FIRST)
    print_rows(rows, columns, first=first, wide=wide)
    print_lines(below)


def _plain_report(reader: LedgerReader, window: str | None, tz: str | None) -> TenantsReport:
    zone = zone_of(tz)
    return reader.tenants(*hours_of_window(window, zone=zone), zone)


def adds_up_line(answer: Mapping[str, Any]) -> str:
    """Return the line that says whether a report's rows add up to all engine time."""
    wall_s = answer["wall_gpu_ns"] / 1e9
    if answer["adds_up"]:
        return f"adds up: the rows are all of {wall_s:.6f} GPU-seconds, to the nanosecond"
    return f"DOES NOT ADD UP: {answer['difference_ns']} ns of {wall_s:.6f} GPU-seconds are missing"


def _refuse(words: Mapping[str, object], got: What) -> None:
    """Raise ValueError for a parameter that only the other kind of report uses."""
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
    # If all columns are times or labels, only the class distinguishes usage from idle time.
    others = [n for n in answer["aggregate"] if n not in TIMES and not n.startswith(LABEL)]
    names_class = () if others else ("class",)
    start = ("from",) if is_series else ()
    return rows, (*start, *names_class, *answer["aggregate"], *REPORT_COLUMNS)


def nano_usd_notes(answer: Mapping[str, Any]) -> list[str]:
    """Return a note if rounding shows a nano-USD of idle cost without idle time; often nothing."""
    rows = [row for piece in answer["series"] for row in piece["rows"] if not row["idle_share_ns"]]
    pairs = ((row["usage_cost_nanousd"], row["cost_nanousd"]) for row in rows)
    is_odd = any(None not in pair and pair[0] != pair[1] for pair in pairs)
    return [NANO_USD_NOTE] if is_odd else []


def _below(what: What, answer: Mapping[str, Any], filter: str | None, has_words: bool) -> list[str]:
    """Return the lines below a table."""
    if what is What.requests:
        return _requests_of(answer)
    return _lines_below(answer, filter, has_words)


def _lines_below(answer: Mapping[str, Any], filter: str | None, has_words: bool) -> list[str]:
    lines = []
    if "tenant" in answer["aggregate"]:
        lines.append("each row is a tenant on its own, without those below it")
    if answer.get("what_if_usd_per_gpu_hour") is not None:
        usd = answer["what_if_usd_per_gpu_hour"]
        lines.append(f"what if: every GPU-hour at {usd} USD; that is not what it cost")
    lines += engines_lines(answer["engines"])
    if question(filter=filter).row_conditions:
        means = COVERS_TEXT[answer["covers"]] if answer["covers"] else ""
        named = f"; a tenant in the filter means it {means}" if means else ""
        lines.append(f"filtered: rows that are not shown belong to the whole too{named}")
    if has_words:
        lines += nano_usd_notes(answer)
    lines.append(adds_up_line(answer))
    if answer["without_totals_ns"]:
        known_s = answer["without_totals_ns"] / 1e9
        lines.append(
            f"no totals are known of the runs with {known_s:.6f} of them: their idle time is in no"
            " row (see `audit`)"
        )
    # Only the plain report shows prices and overheads.
    return lines if has_words else [*lines, *price_lines(answer)]


def _requests_of(answer: Mapping[str, Any]) -> list[str]:
    """Return the lines that say whose requests are listed, and from when on there are any."""
    whose = answer["tenant"]
    of = [] if whose is None else [f"requests of {TenantScope(whose, answer['covers']).text}"]
    return [*of, *dropped_lines(answer["rows_kept_from"])]


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
