"""The command `compare`: what the requests of a window would have cost at APIs."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_cost_meter.cli.options import Json, Ledger, reading
from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.config.offers import matches, offers_of_file, offers_of_package
from vllm_cost_meter.console import print_rows
from vllm_cost_meter.economics import (
    Compared,
    Declared,
    Mix,
    Offer,
    WhatIf,
    compare,
    ratio_of,
    volumes_of,
    what_if,
)
from vllm_cost_meter.economics.comparison import FORMULA
from vllm_cost_meter.economics.numbers import HOURS_PER_MONTH, S_PER_HOUR, not_negative
from vllm_cost_meter.ledger.economics.query import read_figures, read_mix
from vllm_cost_meter.ledger.queries.cut import Window
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.units.calendar import EXPECTED, WEEK, hours_of_window
from vllm_cost_meter.units.text import plain

NO_PROMISE = (
    "note: an API's price promises no latency; what was measured here came with the one that"
    " `economics` shows"
)
COLUMNS = (
    "provider",
    "model",
    "usd",
    "usd_per_m_output_tokens",
    "usd_per_m_total_tokens",
    "times",
    "cheaper",
    "as_of",
    "source",
)
WHAT_IF_COLUMNS = ("provider", "model", "tokens_per_month", "usd", "cheaper")
# A ratio of prompt to output tokens, and volumes per month.
Supposition = tuple[tuple[float, float], list[int]]
# Of a supposed request, where none was measured.
TOKENS_PER_REQUEST = 1_000
# Requests x offers: each is priced by itself.
PRICED_MAX = 20_000_000
# Offers x volumes: the side endpoint has the whole answer in memory.
SUPPOSED_MAX = 10_000


def compare_(
    ledger: Ledger = None,
    window: Annotated[str, typer.Option(help=f"{EXPECTED}.")] = WEEK,
    model: Annotated[
        list[str] | None,
        typer.Option(help="PROVIDER/MODEL of genai-prices, or a pattern; repeat it for several."),
    ] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="A provider, or a pattern; repeat it for several.")
    ] = None,
    prices: Annotated[
        Path | None,
        typer.Option(
            help="A TOML file of [[api_prices]] of your own; otherwise COST_METER_API_PRICES."
        ),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Only offers with this label; repeat it for several.")
    ] = None,
    max_usd_per_m_output: Annotated[
        float | None, typer.Option(help="Only offers up to this, for the measured mix.")
    ] = None,
    ratio: Annotated[
        str | None,
        typer.Option(help="What if: input tokens to output tokens, such as 3:1; with --volume."),
    ] = None,
    volume: Annotated[
        list[str] | None,
        typer.Option(help="What if: tokens per month, such as 100M or 1M..1B; with --ratio."),
    ] = None,
    accept_no_latency_promise: Annotated[
        bool, typer.Option(help="Leave out the note on latency.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print what the requests of a window cost here, and what they would have at APIs."""
    inputs = {
        "window": window,
        "model": model,
        "provider": provider,
        "prices": None,
        "label": label,
        "max_usd_per_m_output": max_usd_per_m_output,
        "ratio": ratio,
        "volume": volume,
        "accept_no_latency_promise": accept_no_latency_promise,
    }
    with reading(ledger) as reader:
        file = _price_file(prices)
        inputs["prices"] = None if file is None else str(file)
        if max_usd_per_m_output is not None:
            not_negative("max_usd_per_m_output", max_usd_per_m_output)
        offers = _offers(model or (), provider or (), file, label or ())
        asked = _supposition(ratio, volume or ())
        answer = _answer(reader, hours_of_window(window), offers, asked, max_usd_per_m_output)
    answer["note"] = None if accept_no_latency_promise else NO_PROMISE
    if as_json:
        print(json.dumps({"inputs": inputs, "formula": FORMULA, **answer}, indent=2))
    else:
        _show(answer)


def _price_file(given: Path | None) -> Path | None:
    """Return the price file that is given, or that the settings name."""
    if given is not None:
        return given
    named = load_settings().api_prices
    return None if named is None else Path(named).expanduser()


def _supposition(ratio: str | None, volumes: Sequence[str]) -> Supposition | None:
    if bool(ratio) != bool(volumes):
        raise ValueError("ratio: expected it and volume together, got one of them")
    if not ratio:
        return None
    return ratio_of(ratio), [tokens for each in volumes for tokens in volumes_of(each)]


def _offers(
    models: Sequence[str], providers: Sequence[str], prices: Path | None, labels: Sequence[str]
) -> list[Offer]:
    found = [] if prices is None else offers_of_file(prices)
    found = [one for one in found if not providers or matches(one.provider, providers)]
    if models or (providers and not found):
        found += offers_of_package(models, providers)
    found = [one for one in found if not labels or one.label in labels]
    if not found:
        raise ValueError("offers: expected some, by model, provider or prices, got none")
    return found


def _answer(
    reader: LedgerReader,
    hours: tuple[int | None, int | None],
    offers: Sequence[Offer],
    asked: Supposition | None,
    limit: float | None,
) -> dict[str, Any]:
    cut = reader.cut(Window(*hours), (), None, 0)
    with reader.transaction() as connection:
        figures = read_figures(connection, cut, Declared(), ("cost_usd", "observed_seconds"))
        sent = list(read_mix(connection, cut))
    if len(sent) * len(offers) > PRICED_MAX:
        raise ValueError(
            f"expected at most {PRICED_MAX} requests x offers, got {len(sent)} x {len(offers)}:"
            " name fewer, or a shorter window"
        )
    if asked is not None and len(asked[1]) * len(offers) > SUPPOSED_MAX:
        raise ValueError(
            f"volume: expected at most {SUPPOSED_MAX} offers x volumes, got {len(offers)} x"
            f" {len(asked[1])}"
        )
    mix = Mix.of(sent)
    here = None if figures["cost_usd"] is None else Decimal(repr(figures["cost_usd"]))
    compared = [one for one in compare(sent, here, offers) if _at_most(mix, one.usd, limit)]
    answer = {
        "window": cut.window.as_dict(),
        "mix": {name: getattr(mix, name) for name in Mix.__slots__},
        "self_hosted": {
            "provider": "self-hosted",
            "model": "all of this ledger",
            **_usd(mix, here),
            "source": "measured, idle included",
            "as_of": cut.at(),
        },
        "offers": [_row(one, mix) for one in compared],
        "what_if": None,
    }
    if asked is not None:
        month, size = _usd_per_month(here, figures["observed_seconds"]), _mean_size(mix)
        rows = what_if(
            [one.offer for one in compared],
            ratio=asked[0],
            volumes=asked[1],
            tokens_per_request=size,
            at=datetime.now(UTC),
            self_hosted_usd_per_month=month,
        )
        answer["what_if"] = {
            "tokens_per_request": size,
            "self_hosted_usd_per_month": None if month is None else f"{month:f}",
            "offers": [_supposed(one) for one in rows],
        }
    return answer


def _show(answer: Mapping[str, Any]) -> None:
    mix, supposed = answer["mix"], answer["what_if"]
    print_rows([_rounded(row) for row in (answer["self_hosted"], *answer["offers"])], COLUMNS)
    print(
        f"the same {mix['requests']} requests each: {mix['prompt_tokens']} prompt tokens, of which"
        f" {mix['cached_tokens']} cached, and {mix['output_tokens']} output tokens"
    )
    if supposed is not None:
        month = supposed["self_hosted_usd_per_month"]
        shown = "unknown, no price" if month is None else f"{float(month):.2f} USD"
        print(
            f"what if, of requests of {supposed['tokens_per_request']} tokens, none cached; a month"
            f" here, at any volume: {shown}"
        )
        print_rows([_rounded(row) for row in supposed["offers"]], WHAT_IF_COLUMNS)
    if answer["note"] is not None:
        print(plain(answer["note"]))


def _mean_size(mix: Mix) -> int:
    """Return the tokens of a mean request."""
    if not mix.requests:
        return TOKENS_PER_REQUEST
    return max(round((mix.prompt_tokens + mix.output_tokens) / mix.requests), 2)


def _usd_per_month(usd: Decimal | None, observed_s: float | None) -> Decimal | None:
    """Return what a month costs at the price of the time that was observed."""
    if usd is None or not observed_s:
        return None
    return usd / Decimal(repr(observed_s)) * int(S_PER_HOUR * HOURS_PER_MONTH)


def _supposed(one: WhatIf) -> dict[str, Any]:
    return {
        "provider": one.offer.provider,
        "model": one.offer.model,
        "tokens_per_month": one.tokens_per_month,
        "usd": f"{one.usd:f}",
        "cheaper": one.cheaper,
    }


def _row(compared: Compared, mix: Mix) -> dict[str, Any]:
    offer = compared.offer
    return {
        "provider": offer.provider,
        "model": offer.model,
        **_usd(mix, compared.usd),
        "times": None if compared.times is None else f"{compared.times:f}",
        "cheaper": compared.cheaper,
        "label": offer.label,
        "source": offer.source,
        "as_of": offer.as_of,
    }


def _usd(mix: Mix, usd: Decimal | None) -> dict[str, str | None]:
    """Return a sum and what it is per token, as decimal text; None where it is not known."""
    if usd is None:
        return dict.fromkeys(("usd", "usd_per_m_output_tokens", "usd_per_m_total_tokens"))
    found = {
        "usd": usd,
        "usd_per_m_output_tokens": mix.usd_per_m_output_tokens(usd),
        "usd_per_m_total_tokens": mix.usd_per_m_total_tokens(usd),
    }
    return {name: None if value is None else f"{value:f}" for name, value in found.items()}


def _at_most(mix: Mix, usd: Decimal, limit: float | None) -> bool:
    if limit is None:
        return True
    per_m = mix.usd_per_m_output_tokens(usd)
    return per_m is not None and per_m <= Decimal(repr(limit))


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    numbers = ("usd", "usd_per_m_output_tokens", "usd_per_m_total_tokens", "times")
    return {
        name: f"{float(value):.6g}" if name in numbers and value is not None else value
        for name, value in row.items()
    }
