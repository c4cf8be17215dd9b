"""The command `budgets`: where each budget of the settings stands, by the ledger alone.

What `/cost/budgets` tells of a running server, at its latest snapshots; without one, of what ended.
"""

import json
import time
from contextlib import closing

from vllm_cost_meter.cli.options import (
    Config,
    Json,
    Ledger,
    Wide,
    ledger_url,
    one_line_errors,
)
from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.console import print_rows
from vllm_cost_meter.ledger.queries.spending import Spending
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
        with closing(Spending(ledger_url(ledger, config), create=False)) as spending:
            figures = spending.look(settings.declared_budgets, settings.price_book, time.time_ns())
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
