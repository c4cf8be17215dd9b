"""The commands `calc ...`: the calculators of `economics` at a terminal.

The options come from the functions' signatures: `--usd-per-hour` is the parameter `usd_per_hour`.
"""

import csv
import inspect
import io
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_cost_meter.cli.options import Json, Wide, new_group, one_line_errors
from vllm_cost_meter.console import print_lines, print_rows
from vllm_cost_meter.economics import Curve, curve_of
from vllm_cost_meter.economics.calculators import CALCULATORS, INPUTS, calculate
from vllm_cost_meter.units.money import figure_text

app = new_group("calc")
# The help text of each calculator, and an example of its options.
HELP = {
    "c-eff": (
        "Effective cost per token at a given throughput.",
        "--usd-per-hour 2.49 --output-tokens-per-s 2500",
    ),
    "arrival": (
        "Cost at low load: arrivals are served, the rest is idle.",
        "--usd-per-hour 2.49 --requests-per-s 0.5 --output-tokens-per-request 256",
    ),
    "request": (
        "Cost of a request, and what failures and retries add to it.",
        "--usd-per-hour 2.49 --requests-per-s 3 --failure-share 0.02",
    ),
    "blended": (
        "Price of input and output tokens together.",
        "--input-usd-per-m 0.15 --output-usd-per-m 0.6 --ratio 3:1",
    ),
    "penalty": (
        "Cost at each measured load, against that at full load.",
        "--curve sweep/curve-512x256.json --usd-per-hour 2.49",
    ),
    "slo": (
        "The highest rate within latency bounds, and its cost.",
        "--curve sweep/curve-512x256.json --ttft-p99-ms 500 --tpot-ms 50",
    ),
    "crossover": (
        "The rate from which on your tokens cost less than an API's.",
        "--usd-per-hour 2.49 --api-usd-per-m-output 0.6 --output-tokens-per-request 256",
    ),
    "serverless": (
        "Cost of a month where hardware is billed by the second.",
        "--gpu-usd-per-s 0.001 --run-s 2 --calls 100000",
    ),
}
# A narrow terminal drops other columns before these.
FIRST = ("break_even_m_tokens_per_month",)
# A larger file cannot be a measured curve.
CURVE_BYTES_MAX = 10_000_000


def _add(name: str) -> None:
    """Add the command of a calculator, with an option for each of its parameters."""
    function = CALCULATORS[name]
    hints = typing.get_type_hints(function)
    parameters = [
        inspect.Parameter(
            parameter.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=... if parameter.default is inspect.Parameter.empty else parameter.default,
            annotation=Annotated[_option_type(hints[parameter.name]), option(parameter.name)],
        )
        for parameter in inspect.signature(function).parameters.values()
    ]
    parameters += [
        inspect.Parameter(flag, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for flag, kind in (("wide", Wide), ("as_json", Json))
    ]

    def command(*, wide: bool, as_json: bool, **given: Any) -> None:
        with one_line_errors():
            if given.get("curve") is not None:
                given["curve"] = read_curve(given["curve"])
            answer = calculate(name, given)
        show(answer, wide=wide, as_json=as_json)

    text, example = HELP[name]
    command.__doc__ = f"{text}\n\nExample: vllm-cost-meter calc {name} {example}"
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    app.command(name)(command)


def option(name: str) -> Any:
    """Return the command-line option for an input."""
    return typer.Option(f"--{name.replace('_', '-')}", help=f"{INPUTS[name]}.")


def _option_type(hint: Any) -> Any:
    if Curve in (hint, *typing.get_args(hint)):
        return Path if hint is Curve else Path | None
    return hint


for _name in CALCULATORS:
    if _name != "break-even":
        _add(_name)


def read_curve(path: Path) -> Curve:
    """Return the curve in a JSON or CSV file. Raises ValueError for any other file."""
    return curve_of(read_points(path))


def read_points(path: Path) -> Any:
    """Return the content of a curve's file: parsed JSON, or CSV rows. Raises ValueError."""
    try:
        if path.stat().st_size > CURVE_BYTES_MAX:
            raise ValueError(f"--curve: expected at most {CURVE_BYTES_MAX} bytes in {path}")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"--curve: {path} cannot be read: {why}") from None
    if text.lstrip()[:1] not in ("{", "["):
        return list(csv.DictReader(io.StringIO(text)))
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"--curve: expected JSON in {path}: {error}") from None


def show(answer: Mapping[str, Any], *, wide: bool, as_json: bool) -> None:
    """Print a calculator's answer as a table, or as JSON."""
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    rows = []
    tables = {}
    for name, value in answer.items():
        if name in ("calculator", "inputs", "formula"):
            continue
        if isinstance(value, Mapping):
            rows += [
                {"figure": f"{name} at {at}", "value": figure_text(name, each)}
                for at, each in value.items()
            ]
        elif isinstance(value, list | tuple):
            tables[name] = [
                {key: figure_text(key, each) for key, each in row.items()} for row in value
            ]
        else:
            rows.append({"figure": name, "value": figure_text(name, value)})
    print_rows(rows, ("figure", "value"), wide=wide)
    for name, table in tables.items():
        if table:
            print_rows(table, tuple(table[0]), above=f"\n{name}", first=FIRST, wide=wide)
    print_lines([f"formula: {answer['formula']}"])
