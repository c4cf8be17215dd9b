"""Metered and billed amounts by day: the answer of `invoice days` and `/cost/invoices`.

Invariant: days are UTC days, and each hour in the window is in exactly one of them.
"""

from typing import cast

from vllm_cost_meter.ledger.billing.answers import InvoiceDays
from vllm_cost_meter.ledger.billing.comparison import Bills
from vllm_cost_meter.ledger.queries.costs import CutCosts
from vllm_cost_meter.ledger.queries.cut import NOW, AsOf, Window
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.reports.answers import PriceRow
from vllm_cost_meter.units.calendar import period_name


def invoice_days(
    reader: LedgerReader,
    from_hour: int | None = None,
    to_hour: int | None = None,
    as_of: AsOf = NOW,
) -> InvoiceDays:
    """Return the amounts metered and billed on each UTC day of a window, and their total.

    Hours count since the epoch, [from_hour, to_hour); None means no bound.
    """
    cut = reader.cut(Window(from_hour, to_hour), as_of)
    with reader.transaction() as connection:
        bills = Bills(connection, cut)
    return {
        "window": cut.window.as_dict(),
        "taken_at": cut.at(),
        "prices": cast("list[PriceRow]", CutCosts.of(cut).cost.listed()),
        "days": [
            {"day": period_name(hours[0], "day"), **bills.compared(hours).as_dict()}
            for hours in bills.days().values()
        ],
        "total": bills.compared().as_dict(),
    }
