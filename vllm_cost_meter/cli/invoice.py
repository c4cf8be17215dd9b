"""The commands `invoice ...`: import a provider's bills, list them, compare them with the meter.

The settings (`[[invoices]]` and the like) describe how to read a file. Its facts stay in the
ledger.

Invariant: a file that is wrong anywhere, or contradicts the ledger, changes nothing.
"""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_cost_meter.cli.options import (
    Config,
    Csv,
    Json,
    Ledger,
    Output,
    Wide,
    WindowOption,
    ledger_url,
    local_settings,
    new_group,
    one_line_errors,
    print_answer,
    reading,
    refuse_both,
)
from vllm_cost_meter.console import print_lines, print_rows
from vllm_cost_meter.invoices.files import FOCUS, SNAPSHOTS, read_invoice
from vllm_cost_meter.ledger.billing.importing import import_invoice
from vllm_cost_meter.ledger.billing.meters import meters
from vllm_cost_meter.units.calendar import hours_of_window
from vllm_cost_meter.units.text import rounded

app = new_group("invoice")

METER_COLUMNS = (
    "resource",
    "kind",
    "from",
    "to",
    "snapshots",
    "lines",
    "billed_usd",
    "unobserved_hours",
    "resets",
)
METER_FIRST = ("resource", "billed_usd", "kind", "from", "to")
DAY_COLUMNS = (
    "day",
    "metered_usd",
    "billed_gpu_usd",
    "difference_usd",
    "capture_rate",
    "billed_disk_usd",
    "billed_network_usd",
    "billed_other_usd",
    "covered_hours",
    "unobserved_hours",
    "resets",
)
DAY_FIRST = ("day", "metered_usd", "billed_gpu_usd", "difference_usd", "capture_rate")
# An import prints at most so many unobserved times.
UNOBSERVED_LINES_MAX = 20


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="CSV, or JSON for snapshots.")],
    format: Annotated[
        str,
        typer.Option(
            help=f"{FOCUS}: the FinOps specification's CSV; {SNAPSHOTS}: readings of a counter or"
            " rate; or the name of one of [[invoices]] in the settings."
        ),
    ] = FOCUS,
    ledger: Ledger = None,
    config: Config = None,
    dry_run: Annotated[bool, typer.Option(help="Say what would be done, and do nothing.")] = False,
    wide: Wide = False,
    as_json: Json = False,
    as_csv: Csv = False,
    output: Output = None,
) -> None:
    """Read a file of what a provider billed into the ledger.

    The same file again changes nothing.

    Example: vllm-cost-meter invoice import bill.csv --format focus --dry-run
    """
    with one_line_errors():
        refuse_both(as_json=as_json, as_csv=as_csv)
        rules = local_settings(config).invoice_rules
        invoice = read_invoice(file, format, rules)
        url, now_ns = ledger_url(ledger, config), time.time_ns()
        answer = import_invoice(url, invoice, rules.gap_ns, now_ns, dry_run=dry_run)
    rows = answer["resources"]

    def show() -> None:
        print_rows(_shown(rows), METER_COLUMNS, first=METER_FIRST, wide=wide)
        print_lines(import_lines(answer))

    print_answer(answer, rows, show, as_json=as_json, as_csv=as_csv, output=output)


@app.command("list")
def list_(
    ledger: Ledger = None,
    config: Config = None,
    wide: Wide = False,
    as_json: Json = False,
    as_csv: Csv = False,
    output: Output = None,
) -> None:
    """List what was billed: resource, time span, sum and gaps.

    Example: vllm-cost-meter invoice list
    """
    with reading(ledger, config) as reader, reader.transaction() as connection:
        rows = meters(connection)

    def show() -> None:
        if rows:
            print_rows(_shown(rows), METER_COLUMNS, first=METER_FIRST, wide=wide)
        else:
            print("no bill: import one with `vllm-cost-meter invoice import`")

    answer = {"resources": rows}
    print_answer(answer, rows, show, as_json=as_json, as_csv=as_csv, output=output)


@app.command()
def days(
    ledger: Ledger = None,
    config: Config = None,
    window: WindowOption = None,
    wide: Wide = False,
    as_json: Json = False,
    as_csv: Csv = False,
    output: Output = None,
) -> None:
    """What was metered and billed on each UTC day.

    Example: vllm-cost-meter invoice days --window 30d
    """
    with reading(ledger, config) as reader:
        answer = reader.invoice_days(*hours_of_window(window))

    def show() -> None:
        rows = _shown([*answer["days"], {"day": "total", **answer["total"]}])
        print_rows(rows, DAY_COLUMNS, first=DAY_FIRST, wide=wide)

    print_answer(answer, answer["days"], show, as_json=as_json, as_csv=as_csv, output=output)


def import_lines(answer: Mapping[str, Any]) -> list[str]:
    """Return the lines that say what an import did, and which times were not observed."""
    would = "would be written" if answer["dry_run"] else "written"
    lines = [
        f"{answer['file']}: {would}: {answer['lines']} lines and {answer['snapshots']} snapshots;"
        f" known before: {answer['known']}; ignored rows: {answer['ignored']}"
    ]
    unobserved = answer["unobserved"]
    lines += [
        f"not observed: {one['resource']} ({one['kind']}) from {one['from']} to {one['to']}:"
        f" {one['reason']}"
        for one in unobserved[:UNOBSERVED_LINES_MAX]
    ]
    if (more := len(unobserved) - UNOBSERVED_LINES_MAX) > 0:
        lines.append(f"and {more} more; --json lists them")
    return lines


def _shown(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: rounded(value) if isinstance(value, float) else value for name, value in row.items()}
        for row in rows
    ]
