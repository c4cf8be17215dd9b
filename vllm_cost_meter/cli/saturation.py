"""The commands `saturation ...`: import full load that sweeps measured, and list it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from vllm_cost_meter.cli.calc import read_points
from vllm_cost_meter.cli.options import (
    Config,
    Csv,
    Json,
    Ledger,
    Output,
    Wide,
    ledger_url,
    new_group,
    one_line_errors,
    print_answer,
)
from vllm_cost_meter.console import print_rows
from vllm_cost_meter.economics import saturation_of
from vllm_cost_meter.ledger.economics import saturation

KEPT_COLUMNS = (
    "measured_at", "model", "precision", "vllm_version", "hardware", "gpus", "engines",
    "input_tokens", "output_tokens", "output_tokens_per_s", "requests_per_s", "window_s",
)  # fmt: skip
FIRST = ("measured_at", "model", "output_tokens_per_s", "hardware", "gpus")

app = new_group("saturation")


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(help="Curves that `sweep` wrote.")],
    ledger: Ledger = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Keep the full load of curves in the ledger.

    A curve without its whole protocol is refused.

    Example: vllm-cost-meter saturation import sweep/curve-512x256.json
    """
    with one_line_errors():
        points = []
        for file in files:
            try:
                points.append(saturation_of(read_points(file)))
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from None
        new = saturation.keep(ledger_url(ledger, config), points)
    if as_json:
        print(json.dumps({"new": new, "known": len(points) - new}, indent=2))
    else:
        print(f"{new} new, {len(points) - new} known before")


@app.command("list")
def list_(
    ledger: Ledger = None,
    config: Config = None,
    wide: Wide = False,
    as_json: Json = False,
    as_csv: Csv = False,
    output: Output = None,
) -> None:
    """The full loads in the ledger, the latest first.

    Example: vllm-cost-meter saturation list
    """
    with one_line_errors():
        rows = saturation.kept(ledger_url(ledger, config))
    points = [{**row, "protocol": json.loads(row["protocol"])} for row in rows]
    print_answer(
        {"saturation_points": points},
        rows,
        lambda: print_rows(rows, KEPT_COLUMNS, first=FIRST, wide=wide),
        as_json=as_json,
        as_csv=as_csv,
        output=output,
    )
