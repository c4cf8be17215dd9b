"""The command `economics`: cost per token in a window, with the load and latency behind it."""

from collections.abc import Iterable, Mapping
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
    Week,
    Wide,
    dropped_lines,
    engines_lines,
    local_settings,
    one_line_errors,
    print_answer,
    reading,
)
from vllm_cost_meter.console import print_lines, print_rows
from vllm_cost_meter.ledger.economics.figures import FIGURES
from vllm_cost_meter.ledger.economics.query import economics, method
from vllm_cost_meter.prices.book import described
from vllm_cost_meter.reports.grammar import engines_named
from vllm_cost_meter.units.calendar import WEEK, hours_of_window, zone_of
from vllm_cost_meter.units.money import figure_text
from vllm_cost_meter.units.text import plain


def economics_(
    ledger: Ledger = None,
    config: Config = None,
    window: Week = WEEK,
    tz: TimeZone = None,
    filter: Engines = None,
    explain: Annotated[
        str | None, typer.Option(metavar="FIGURE", help="Print the SQL of this figure instead.")
    ] = None,
    wide: Wide = False,
    as_json: Json = False,
    as_csv: Csv = False,
    output: Output = None,
) -> None:
    """What a million tokens cost.

    It also shows the load and the latency under which they cost that.

    Example: vllm-cost-meter economics --window 30d
    """
    with one_line_errors():
        declared = local_settings(config).declared
        hours, engines = hours_of_window(window, zone=zone_of(tz)), engines_named(filter)
        with reading(ledger, config) as reader:
            if explain is None:
                answer: Mapping[str, Any] = economics(reader, declared, *hours, engines=engines)
            else:
                answer = _explained(explain, method(reader, declared, *hours, engines=engines))
    if explain is None:
        rows = [
            {"figure": name, "value": value, **FIGURES[name]._asdict()}
            for name, value in answer["figures"].items()
        ]
    else:
        rows = [dict(answer)]

    def show() -> None:
        if explain is None:
            _show(answer, rows, wide=wide)
        else:
            print(plain(f"{explain}: {answer['meaning']}"))
            print(answer["sql"])

    print_answer(answer, rows, show, as_json=as_json, as_csv=as_csv, output=output)


def _show(answer: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], *, wide: bool) -> None:
    shown = [{**row, "value": figure_text(row["figure"], row["value"])} for row in rows]
    print_rows(shown, ("figure", "value", "unit", "meaning"), wide=wide)
    print_lines(lines_below(answer))


def _explained(name: str, rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the SQL behind a figure. Raises ValueError for an unknown figure."""
    if name not in FIGURES:
        raise ValueError(f"--explain: expected a figure that `economics` lists, got {name!r}")
    known = {row["figure"]: row for row in rows}
    if name not in known:
        raise ValueError(f"{name}: expected latency bounds (slo_ttft_ms, ...), got none")
    return known[name]


def lines_below(answer: Mapping[str, Any]) -> list[str]:
    """Return the lines below the figures: window, deployments, prices and latency bounds."""
    window = answer["window"]
    lines = [f"from {window['from'] or 'the beginning'} to {window['to'] or answer['taken_at']}"]
    lines += engines_lines(answer["engines"])
    lines += [
        f"{one['model']} in {one['precision']} on {one['gpus']} x {one['hardware']},"
        f" {one['parallelism']}, vLLM {one['vllm_version']}"
        for one in answer["deployments"]
    ]
    lines += [f"priced at {described(price)}" for price in answer["prices"]]
    kept_from = answer["rows_kept_from"]
    if kept_from is not None and (window["from"] or "") < kept_from:
        (line,) = dropped_lines(kept_from)
        lines.append(f"{line}: percentiles are within 1 %, figures by declared bounds unknown")
    if (slo := answer["slo"]) is not None:
        why = "no request ended" if answer["figures"]["good_requests"] == 0 else "unknown"
        verdict = {None: why, True: "met", False: "NOT met"}[slo["met"]]
        bounds = [f"{n[:-3]} {slo[n]:g} ms" for n in ("ttft_ms", "tpot_ms", "e2e_ms") if slo[n]]
        lines.append(f"bounds: {', '.join(bounds)} for {slo['percentile']:g} %: {verdict}")
    return lines
