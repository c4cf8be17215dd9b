"""The commands `calc ...` and `break-even`: the functions of `economics` at a terminal.

Options are made from the functions' signatures (`calculators`): `--usd-per-hour` is `usd_per_hour`.
"""

import csv
import inspect
import io
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_cost_meter.calculators import CALCULATORS, INPUTS, calculate
from vllm_cost_meter.command_line import Json
from vllm_cost_meter.economics import Curve, curve_of
from vllm_cost_meter.economics.numbers import HOURS_PER_MONTH
from vllm_cost_meter.terminal import one_line_errors, print_rows
from vllm_cost_meter.text import plain, rounded

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
            annotation=Annotated[_option_type(hints[parameter.name]), _option(parameter.name)],
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
        _show(answer, as_json=as_json)

    command.__doc__ = (function.__doc__ or "").partition("\n")[0]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    app.command(name)(command)


def _option(name: str) -> Any:
    return typer.Option(f"--{name.replace('_', '-')}", help=f"{INPUTS[name]}.")


def _option_type(hint: Any) -> Any:
    if Curve in (hint, *typing.get_args(hint)):
        return Path if hint is Curve else Path | None
    return hint


for _name in CALCULATORS:
    if _name != "break-even":
        _add(_name)


def break_even_(
    usd_per_hour: Annotated[float, _option("usd_per_hour")],
    tokens_per_hour: Annotated[float, _option("tokens_per_hour")],
    api_usd_per_m: Annotated[float, _option("api_usd_per_m")],
    overhead_usd_per_month: Annotated[float, _option("overhead_usd_per_month")] = 0,
    overhead_percent: Annotated[float, _option("overhead_percent")] = 0,
    redundancy: Annotated[float, _option("redundancy")] = 1,
    hours_per_month: Annotated[float, _option("hours_per_month")] = HOURS_PER_MONTH,
    utilization: Annotated[
        list[str] | None, typer.Option(help="Parts of the capacity, 0 to 1; several by commas.")
    ] = None,
    volume: Annotated[
        list[str] | None, typer.Option(help="Million tokens per month to judge; several by commas.")
    ] = None,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[U]...", help="More utilizations.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print from which volume on self-hosting costs less than an API."""
    given: dict[str, Any] = {
        "usd_per_hour": usd_per_hour,
        "tokens_per_hour": tokens_per_hour,
        "api_usd_per_m": api_usd_per_m,
        "overhead_usd_per_month": overhead_usd_per_month,
        "overhead_percent": overhead_percent,
        "redundancy": redundancy,
        "hours_per_month": hours_per_month,
    }
    with one_line_errors():
        if used := _numbers("utilization", [*(utilization or ()), *(more or ())]):
            given["utilization"] = used
        if volumes := _numbers("volume", volume or ()):
            given["volume"] = volumes
        answer = calculate("break-even", given)
    _show(answer, as_json=as_json)


def _numbers(name: str, texts: Sequence[str]) -> list[float]:
    found = []
    for text in ",".join(texts).split(",") if texts else ():
        try:
            found.append(float(text))
        except ValueError:
            raise ValueError(f"{name}: expected numbers, got {text!r}") from None
    return found


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


def _show(answer: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    rows = []
    tables = []
    for name, value in answer.items():
        if name in ("calculator", "inputs", "formula"):
            continue
        if isinstance(value, Mapping):
            rows += [
                {"figure": f"{name} at {at}", "value": rounded(each)} for at, each in value.items()
            ]
        elif isinstance(value, list | tuple):
            tables.append([{key: rounded(each) for key, each in row.items()} for row in value])
        else:
            rows.append({"figure": name, "value": rounded(value)})
    print_rows(rows, ("figure", "value"))
    for table in tables:
        if table:
            print_rows(table, tuple(table[0]))
    print(plain(f"formula: {answer['formula']}"))
