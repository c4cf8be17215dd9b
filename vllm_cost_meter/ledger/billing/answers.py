"""The shapes of metered and billed days, field by field, with their units: what JSON has.

Invariant: an answer has these fields and no other.
"""

from typing_extensions import TypedDict

from vllm_cost_meter.reports.answers import BilledAmounts, Hours
from vllm_cost_meter.reports.price_answers import PriceRow


class InvoiceDay(BilledAmounts):
    """One UTC day."""

    day: str
    """The day, such as 2026-11-28."""


class InvoiceDays(TypedDict):
    """What was metered and what was billed, day by day."""

    window: Hours
    """The hours of the answer."""
    taken_at: str | None
    """RFC 3339 UTC: the latest snapshot: figures are as of then."""
    prices: list[PriceRow]
    """All prices that are in its costs, the earliest first."""
    days: list[InvoiceDay]
    """Each day in which anything ran or was billed."""
    total: BilledAmounts
    """All of them."""
