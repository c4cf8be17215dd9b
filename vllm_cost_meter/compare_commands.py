"""The command `compare`: what the requests of a window would have cost at APIs."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_cost_meter.api_prices import offers_of_file, offers_of_package
from vllm_cost_meter.command_line import Json, Ledger, reading
from vllm_cost_meter.economics import Compared, Mix, Slo, compare
from vllm_cost_meter.ledger.cut import Window
from vllm_cost_meter.ledger.economics import read_figures, read_mix
from vllm_cost_meter.terminal import print_rows
from vllm_cost_meter.text import plain
from vllm_cost_meter.windows import EXPECTED, WEEK, hours_of_window

NO_PROMISE = (
    "note: an API's price promises no latency; what was measured here came with the one that"
    " `economics` shows"
)
HERE = "self-hosted"
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
# Requests x offers: each is priced by itself.
PRICED_MAX = 20_000_000


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
        Path | None, typer.Option(help="A TOML file of [[api_prices]] of your own.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Only offers with this label; repeat it for several.")
    ] = None,
    max_usd_per_m_output: Annotated[
        float | None, typer.Option(min=0, help="Only offers up to this, for the measured mix.")
    ] = None,
    accept_no_latency_promise: Annotated[
        bool, typer.Option(help="Leave out the note on latency.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print what the requests of a window cost here, and what they would have at APIs."""
    with reading(ledger) as reader:
        offers = [] if prices is None else offers_of_file(prices)
        offers = [one for one in offers if not provider or one.provider in provider]
        if model or (provider and prices is None):
            offers += offers_of_package(model or (), provider or ())
        offers = [one for one in offers if not label or one.label in label]
        if not offers:
            raise ValueError("expected offers by --model, --provider or --prices, got none")
        cut = reader.cut(Window(*hours_of_window(window)), (), None, 0)
        with reader.transaction() as connection:
            cost = read_figures(connection, cut, Slo())["cost_usd"]
            sent = list(read_mix(connection, cut))
        if len(sent) * len(offers) > PRICED_MAX:
            raise ValueError(
                f"expected at most {PRICED_MAX} requests x offers, got {len(sent)} x"
                f" {len(offers)}: name fewer, or a shorter window"
            )
        mix = Mix.of(sent)
        here = None if cost is None else Decimal(repr(cost))
        rows = [_row(one, mix) for one in compare(sent, here, offers)]
    if max_usd_per_m_output is not None:
        rows = [row for row in rows if _at_most(row, max_usd_per_m_output)]
    own = {"provider": HERE, "model": "all of this ledger", **_usd(mix, here), "times": None}
    own |= {"cheaper": None, "source": "measured, idle included", "as_of": cut.at()}
    note = None if accept_no_latency_promise else NO_PROMISE
    if as_json:
        mixed = {name: getattr(mix, name) for name in mix.__slots__}
        answer = {"window": cut.window.as_dict(), "mix": mixed, "self_hosted": own}
        print(json.dumps({**answer, "offers": rows, "note": note}, indent=2))
        return
    print_rows([_rounded(row) for row in (own, *rows)], COLUMNS)
    print(
        f"the same {mix.requests} requests each: {mix.prompt_tokens} prompt tokens, of which"
        f" {mix.cached_tokens} cached, and {mix.output_tokens} output tokens"
    )
    if note:
        print(plain(note))


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


def _at_most(row: dict[str, Any], limit: float) -> bool:
    usd = row["usd_per_m_output_tokens"]
    return usd is not None and Decimal(usd) <= Decimal(repr(limit))


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    numbers = ("usd", "usd_per_m_output_tokens", "usd_per_m_total_tokens", "times")
    return {
        name: f"{float(value):.6g}" if name in numbers and value is not None else value
        for name, value in row.items()
    }
