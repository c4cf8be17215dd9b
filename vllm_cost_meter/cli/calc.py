"""The commands `calc ...`: the functions of `economics` at a terminal.

Options are made from the functions' signatures (`calculators`): `--usd-per-hour` is `usd_per_hour`.
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

from vllm_cost_meter.cli.options import Json, one_line_errors
from vllm_cost_meter.console import print_rows
from vllm_cost_meter.economics import Curve, curve_of
from vllm_cost_meter.economics.calculators import CALCULATORS, INPUTS, calculate
from vllm_cost_meter.units.text import plain, rounded

app = typer.Typer(
    name="calc",
    help="The bare formulas of cost and load; no ledger is read.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# Nobody measures a curve that is larger.
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
    parameters.append(
        inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
    )

    def command(*, as_json: bool, **given: Any) -> None:
        with one_line_errors():
            if given.get("curve") is not None:
                given["curve"] = read_curve(given["curve"])
            answer = calculate(name, given)
        show(answer, as_json=as_json)

    command.__doc__ = (function.__doc__ or "").partition("\n")[0]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    app.command(name)(command)


def option(name: str) -> Any:
    """Return the option of an input."""
    return typer.Option(f"--{name.replace('_', '-')}", help=f"{INPUTS[name]}.")


def _option_type(hint: Any) -> Any:
    if Curve in (hint, *typing.get_args(hint)):
        return Path if hint is Curve else Path | None
    return hint


for _name in CALCULATORS:
    if _name != "break-even":
        _add(_name)


def read_curve(path: Path) -> Curve:
    """Return the curve of a JSON or CSV file. Raises ValueError for any other."""
    return curve_of(read_points(path))


def read_points(path: Path) -> Any:
    """Return what the file of a curve holds: JSON, or the rows of CSV. Raises ValueError."""
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


def show(answer: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the answer of a calculator."""
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
                {"figure": f"{name} at {at}", "value": rounded(each)} for at, each in value.items()
            ]
        elif isinstance(value, list | tuple):
            tables[name] = [{key: rounded(each) for key, each in row.items()} for row in value]
        else:
            rows.append({"figure": name, "value": rounded(value)})
    print_rows(rows, ("figure", "value"))
    for name, table in tables.items():
        if table:
            print_rows(table, tuple(table[0]), above=f"\n{name}")
    print(plain(f"formula: {answer['formula']}"))
