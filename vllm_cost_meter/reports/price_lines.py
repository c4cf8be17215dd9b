"""Prices at the command line: the columns of the price book, and the lines below a report.

Invariant: below a cost stand the price, its scope and its source; below a missing cost stands the
reason.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_cost_meter.prices.book import described

# The columns of each table in the price book.
PRICE_COLUMNS = {
    "prices": (
        "key",
        "effective_from",
        "effective_until",
        "usd_per_gpu_hour",
        "usd_per_kv_block_hour",
        "amount",
        "currency",
        "scope",
        "gpus",
        "kind",
        "model",
        "gpu_name",
        "host",
        "labels",
        "source",
    ),
    "energy_prices": ("key", "effective_from", "effective_until", "usd_per_kwh", "host", "source"),
    "overheads": (
        "key",
        "effective_from",
        "effective_until",
        "name",
        "percent",
        "usd_per_month",
        "source",
    ),
}


def price_lines(answer: Mapping[str, Any]) -> Iterator[str]:
    """Yield the prices behind a tenant report, the reason for a missing cost, and overheads."""
    for price in answer["prices"]:
        yield f"priced at {described(price)}"
    if answer["cost_reason"] is not None:
        yield f"no cost in all: {answer['cost_reason']}"
    for line in answer["overheads"]:
        terms = (
            f"{line['percent']} %" if line["percent"] else f"{line['usd_per_month']} USD a month"
        )
        usd = f"{line['cost_usd']} USD" if line["cost_usd"] else line["cost_reason"]
        yield f"besides, {line['name']} ({terms}, {line['source']}): {usd}"
