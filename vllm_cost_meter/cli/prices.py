"""The command `prices`: the price book of the settings."""

import json

from vllm_cost_meter.cli.options import Config, Json, Wide, one_line_errors, settings_of
from vllm_cost_meter.console import print_rows
from vllm_cost_meter.reports.price_lines import PRICE_COLUMNS

# A narrow terminal drops other columns before these, in all tables.
FIRST = (
    "key",
    "effective_from",
    "name",
    "usd_per_gpu_hour",
    "usd_per_kv_block_hour",
    "usd_per_kwh",
    "percent",
    "usd_per_month",
    "gpu_name",
    "model",
    "kind",
    "effective_until",
)


def prices(config: Config = None, wide: Wide = False, as_json: Json = False) -> None:
    """Which price holds when, by the settings.

    Example: vllm-cost-meter prices --config meter.toml
    """
    with one_line_errors():
        book = settings_of(None, config).price_book.listed()
    if as_json:
        print(json.dumps(book, indent=2))
        return
    for name, columns in PRICE_COLUMNS.items():
        if book[name]:
            print_rows(book[name], columns, first=FIRST, wide=wide)
    if not book["prices"]:
        print("no price: set COST_METER_GPU_HOUR_USD, or [[prices]] in the configuration file")
