"""The command `budgets`: how much of each budget in the settings is used, from the ledger alone.

While a server runs, it shows the same as `/cost/budgets`, as of the latest snapshots. Without a
server it counts the requests that ended. In a fleet it reads the fleet's database too.
"""

import time
from contextlib import ExitStack, closing
from typing import Any

from vllm_cost_meter.cli.options import (
    Config,
    Csv,
    Json,
    Ledger,
    Output,
    Wide,
    ledger_url,
    one_line_errors,
    print_answer,
    settings_of,
)
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.console import print_rows
from vllm_cost_meter.ledger.database import parse_url, sqlite_path
from vllm_cost_meter.ledger.fleet_use.others import FleetUse
from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.tenants.budgets import BudgetFigures, Standing, budget_row
from vllm_cost_meter.units.money import format_amount, format_usd

COLUMNS = (
    "budget",
    "of",
    "covers",
    "state",
    "used",
    "limit",
    "unit",
    "over",
    "period",
    "resets_at",
)
# The last columns that a narrow terminal leaves out. These fit 80 characters with any amounts.
FIRST = ("budget", "used", "limit", "unit", "state")


def budgets(
    ledger: Ledger = None,
    config: Config = None,
    wide: Wide = False,
    as_json: Json = False,
    as_csv: Csv = False,
    output: Output = None,
) -> None:
    """How much of each budget is used.

    Example: vllm-cost-meter budgets --json
    """
    with one_line_errors():
        settings = settings_of(ledger, config)
        figures = _figures(ledger_url(ledger, config), settings)
    standings = figures.standings
    rows = [budget_row(standing) for standing in standings]

    def show() -> None:
        if standings:
            print_rows([*map(_shown, standings)], COLUMNS, first=FIRST, wide=wide)
        else:
            print("no budget: declare [[budgets]] in the configuration file")

    print_answer({"budgets": rows}, rows, show, as_json=as_json, as_csv=as_csv, output=output)


def _figures(url: str, settings: Settings) -> BudgetFigures:
    """Return where budgets stand. Raises LedgerError if the ledger or the fleet cannot be read."""
    declared, book, now_ns = settings.declared_budgets, settings.price_book, time.time_ns()
    over_fleet = [budget for budget in declared if not budget.each_server]
    with ExitStack() as opened:
        fleet = None
        # A fleet's own database has all of it, as the ledger that is named.
        if settings.fleet is not None and over_fleet and sqlite_path(parse_url(url)) is not None:
            fleet = FleetUse(url, settings.fleet, settings.fleet_interval_s)
            opened.callback(fleet.close)
            fleet.look(over_fleet, now_ns)
        spending = opened.enter_context(closing(Spending(url, fleet=fleet)))
        return spending.look(declared, book, now_ns)


def _shown(standing: Standing) -> dict[str, Any]:
    """Return the row of a budget for people: amounts of USD or GPU-seconds, and their unit."""
    row = budget_row(standing)
    amounts = {name: format_amount(format_usd(row[name])) for name in ("used", "limit", "over")}
    unit = "USD" if row["unit"] == "usd" else "GPU-s"
    return {**row, "of": row["tenant"] or row["tag"], **amounts, "unit": unit}
