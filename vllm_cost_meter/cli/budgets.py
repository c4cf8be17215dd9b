"""The command `budgets`: how much of each budget in the settings is used, from the ledger alone.

While a server runs, it shows the same as `/cost/budgets`, as of the latest snapshots. Without a
server it counts the requests that ended.
"""

import json
import time
from contextlib import closing
from fractions import Fraction

from vllm_cost_meter.cli.options import (
    Config,
    Json,
    Ledger,
    Wide,
    ledger_url,
    one_line_errors,
    reading,
)
from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.console import print_rows
from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.prices.book import RunFacts
from vllm_cost_meter.tenants.budgets import told

COLUMNS = ("budget", "of", "state", "used", "limit", "over", "period", "resets_at")
FIRST = ("budget", "state", "used", "limit")


def budgets(
    ledger: Ledger = None, config: Config = None, wide: Wide = False, as_json: Json = False
) -> None:
    """How much of each budget is used.

    Example: vllm-cost-meter budgets --json
    """
    with one_line_errors():
        settings = load_settings(config=config)
        with reading(ledger, config) as reader:
            run = reader.latest_run() or RunFacts()

        def price_of(_run_id: str, hour: int) -> Fraction | None:
            price = settings.price_book.price_at(run, hour)
            return None if price is None else price.usd_per_gpu_hour

        with closing(Spending(ledger_url(ledger, config), create=False)) as spending:
            figures = spending.look(settings.declared_budgets, price_of, time.time_ns())
    if as_json:
        answer = {"budgets": [told(standing) for standing in figures.standings]}
        print(json.dumps(answer, indent=2))
        return
    if not figures.standings:
        print("no budget: declare [[budgets]] in the configuration file")
        return
    rows = []
    for standing in figures.standings:
        shown, row = standing.budget.shown, told(standing)
        of = row["tenant"] or row["tag"]
        used, over = row["used"], row["over"]
        amounts = {
            "used": None if used is None else shown(used),
            "limit": shown(row["limit"]),
            "over": None if over is None else shown(over),
        }
        rows.append({**row, "of": of, **amounts})
    print_rows(rows, COLUMNS, first=FIRST, wide=wide)
