"""The command `compare`: the price of a window's requests at APIs, beside their cost here."""

from collections.abc import Mapping
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
    Week,
    Wide,
    local_settings,
    print_answer,
    reading,
)
from vllm_cost_meter.config.offers import offers_for
from vllm_cost_meter.console import print_lines, print_rows
from vllm_cost_meter.ledger.economics.answers import Comparison
from vllm_cost_meter.ledger.economics.api_comparison import ComparisonQuestion, compared
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.units.calendar import WEEK
from vllm_cost_meter.units.money import format_amount, format_rate

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
FIRST = ("model", "usd", "times", "usd_per_m_output_tokens", "cheaper", "provider")
WHAT_IF_COLUMNS = ("provider", "model", "tokens_per_month", "usd", "cheaper")


def compare_(
    ledger: Ledger = None,
    config: Config = None,
    window: Week = WEEK,
    tz: TimeZone = None,
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
    filter: Engines = None,
    wide: Wide = False,
    as_json: Json = False,
    as_csv: Csv = False,
    output: Output = None,
) -> None:
    """What the same requests cost at an API.

    It prices every request of the window, one by one.

    Example: vllm-cost-meter compare --model 'openai/gpt-4o*' --window 7d
    """
    question = ComparisonQuestion(
        window,
        tuple(model or ()),
        tuple(provider or ()),
        tuple(label or ()),
        max_usd_per_m_output,
        ratio,
        tuple(volume or ()),
        accept_no_latency_promise,
        tz,
        filter,
    )
    with reading(ledger, config) as reader:
        answer = _answer(reader, question, prices or local_settings(config).api_prices)
    print_answer(
        answer,
        [answer["self_hosted"], *answer["offers"]],
        lambda: _show(answer, wide=wide),
        as_json=as_json,
        as_csv=as_csv,
        output=output,
    )


def _answer(
    reader: LedgerReader, question: ComparisonQuestion, prices: str | Path | None
) -> Comparison:
    """Compare with the offers of a price file. Raises ValueError for a wrong question."""
    file = None if prices is None else Path(prices).expanduser()
    question.check()
    offers = offers_for(question.model, question.provider, file, question.label)
    return compared(reader, question, offers, None if file is None else str(file))


def _show(answer: Mapping[str, Any], *, wide: bool) -> None:
    mix, supposed = answer["mix"], answer["what_if"]
    rows = [_shown(row) for row in (answer["self_hosted"], *answer["offers"])]
    print_rows(rows, COLUMNS, first=FIRST, wide=wide)
    said = [
        f"the same {mix['requests']} requests each: {mix['prompt_tokens']} prompt tokens, of which"
        f" {mix['cached_tokens']} cached, and {mix['output_tokens']} output tokens"
    ]
    if supposed is not None:
        month = supposed["self_hosted_usd_per_month"]
        shown = "unknown, no price" if month is None else f"{format_amount(month)} USD"
        said.append(
            f"what if, of requests of {supposed['tokens_per_request']} tokens, none cached; a month"
            f" here, at any volume: {shown}"
        )
    print_lines(said)
    if supposed is not None:
        what_if = [_shown(row) for row in supposed["offers"]]
        print_rows(what_if, WHAT_IF_COLUMNS, first=FIRST, wide=wide)
    if answer["note"] is not None:
        print_lines([answer["note"]])


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {
        "usd": format_amount,
        "usd_per_m_output_tokens": format_rate,
        "usd_per_m_total_tokens": format_rate,
        "times": format_rate,
    }
    return {name: numbers[name](row[name]) if name in numbers else row[name] for name in row}
