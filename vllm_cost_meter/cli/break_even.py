"""The command `break-even`: from which load on self-hosting pays, as a table and as plots.

The commands in `calc` follow from their functions' signatures. This one is separate, because it may
take rates from the price book, has several numbers in one option, and draws plots.

Invariant: all figures come from `economics.break_even`, and the answer repeats its inputs.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_cost_meter.cli.calc import option, show
from vllm_cost_meter.cli.options import Config, Json, Wide, one_line_errors, settings_of
from vllm_cost_meter.console import print_lines
from vllm_cost_meter.economics.calculators import calculate
from vllm_cost_meter.economics.numbers import HOURS_PER_MONTH
from vllm_cost_meter.plots import refuse_other_names
from vllm_cost_meter.plots.break_even import draw
from vllm_cost_meter.prices.book import PriceBook, described
from vllm_cost_meter.prices.purchase_kinds import listed, prices_by_kind, usd_per_hour_of
from vllm_cost_meter.units.time import NS_PER_HOUR

# The input that takes the price of each kind.
RATES = {
    "on_demand": "usd_per_hour",
    "reserved": "reserved_usd_per_hour",
    "spot": "spot_usd_per_hour",
}


def break_even_(
    tokens_per_hour: Annotated[float, option("tokens_per_hour")],
    api_usd_per_m: Annotated[float, option("api_usd_per_m")],
    usd_per_hour: Annotated[float | None, option("usd_per_hour")] = None,
    reserved_usd_per_hour: Annotated[float | None, option("reserved_usd_per_hour")] = None,
    spot_usd_per_hour: Annotated[float | None, option("spot_usd_per_hour")] = None,
    price_book: Annotated[
        bool, typer.Option("--price-book", help="Take these three from the settings; with --gpus.")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs of the whole deployment, with --price-book.")
    ] = None,
    gpu_name: Annotated[
        str | None, typer.Option(help="Their name, where the price book has several.")
    ] = None,
    overhead_usd_per_month: Annotated[float, option("overhead_usd_per_month")] = 0,
    overhead_percent: Annotated[float, option("overhead_percent")] = 0,
    redundancy: Annotated[float, option("redundancy")] = 1,
    hours_per_month: Annotated[float, option("hours_per_month")] = HOURS_PER_MONTH,
    utilization: Annotated[
        list[str] | None, typer.Option(help="Parts of the capacity, 0 to 1; several by commas.")
    ] = None,
    volume: Annotated[
        list[str] | None, typer.Option(help="Million tokens per month to judge; several by commas.")
    ] = None,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[U]...", help="More utilizations.")
    ] = None,
    plot: Annotated[
        list[Path] | None, typer.Option(help="A .png or .svg to draw; repeat it for several.")
    ] = None,
    config: Config = None,
    wide: Wide = False,
    as_json: Json = False,
) -> None:
    """From which volume on hosting pays.

    Give the rates, or let --price-book take them from the settings.

    Example: vllm-cost-meter break-even --tokens-per-hour 9e6 --api-usd-per-m 0.6
    --usd-per-hour 2.49
    """
    given: dict[str, Any] = {
        "tokens_per_hour": tokens_per_hour,
        "api_usd_per_m": api_usd_per_m,
        "overhead_usd_per_month": overhead_usd_per_month,
        "overhead_percent": overhead_percent,
        "redundancy": redundancy,
        "hours_per_month": hours_per_month,
    }
    said = dict(
        zip(RATES.values(), (usd_per_hour, reserved_usd_per_hour, spot_usd_per_hour), strict=True)
    )
    with one_line_errors():
        refuse_other_names(plot or ())
        if used := _numbers("utilization", [*(utilization or ()), *(more or ())]):
            given["utilization"] = used
        if volumes := _numbers("volume", volume or ()):
            given["volume"] = volumes
        rates, book = _rates(
            said, gpus, gpu_name, settings_of(None, config).price_book if price_book else None
        )
        answer = calculate("break-even", given | rates)
        if plot:
            draw(answer, plot)
    _print(answer, book, wide=wide, as_json=as_json)


def _print(
    answer: Mapping[str, Any], book: Mapping[str, Any] | None, *, wide: bool, as_json: bool
) -> None:
    """Print the answer, with the prices that came from the price book."""
    if as_json and book:
        answer = {**answer, "price_book": book}
    show(answer, wide=wide, as_json=as_json)
    if book and not as_json:
        prices = book["prices"]
        print_lines(f"{price['kind'] or 'on_demand'}: {described(price)}" for price in prices)


def _rates(
    said: dict[str, float | None], gpus: int | None, gpu_name: str | None, book: PriceBook | None
) -> tuple[dict[str, float], dict[str, Any] | None]:
    """Return the rates by input, and the price book's entries that they come from."""
    rates = {name: usd for name, usd in said.items() if usd is not None}
    if book is None:
        for name, value in (("gpus", gpus), ("gpu_name", gpu_name)):
            if value is not None:
                raise ValueError(f"{name}: expected --price-book with it, got none")
        if "usd_per_hour" not in rates:
            raise ValueError("usd_per_hour: expected it or --price-book, got neither")
        return rates, None
    if rates:
        raise ValueError(f"price book: expected it or {', '.join(rates)}, got both")
    if gpus is None:
        raise ValueError("gpus: expected how many the deployment has, got nothing")
    prices = prices_by_kind(book, time.time_ns() // NS_PER_HOUR, gpu_name)
    found = {RATES[kind]: float(usd_per_hour_of(one, gpus)) for kind, one in prices.items()}
    return found, {"gpus": gpus, "gpu_name": gpu_name, "prices": listed(prices)}


def _numbers(name: str, texts: Sequence[str]) -> list[float]:
    found = []
    for text in ",".join(texts).split(",") if texts else ():
        try:
            found.append(float(text))
        except ValueError:
            raise ValueError(f"{name}: expected numbers, got {text!r}") from None
    return found
