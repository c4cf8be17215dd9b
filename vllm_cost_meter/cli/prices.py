"""The command `prices`: the price book of the settings."""

import json

from vllm_cost_meter.cli.options import Config, Json, one_line_errors
from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.console import print_rows
from vllm_cost_meter.reports.price_lines import PRICE_COLUMNS


def prices(config: Config = None, as_json: Json = False) -> None:
    """Which price holds when, by the settings.

    Example: vllm-cost-meter prices --config meter.toml
    """
    with one_line_errors():
        book = load_settings(config=config).price_book.listed()
    if as_json:
        print(json.dumps(book, indent=2))
        return
    for name, columns in PRICE_COLUMNS.items():
        if book[name]:
            print_rows(book[name], columns)
    if not book["prices"]:
        print("no price: set COST_METER_GPU_HOUR_USD, or [[prices]] in the configuration file")
