"""Answer types of metered and billed days: each JSON field, its meaning and its unit.

Invariant: an answer has these fields and no other.
"""

from typing_extensions import TypedDict

from vllm_cost_meter.reports.answers import BilledAmounts, Hours
from vllm_cost_meter.reports.price_answers import PriceRow


class InvoiceDay(BilledAmounts):
    """The metered cost and the billed amounts of one UTC day."""

    day: str
    """The UTC day, such as 2026-11-28."""


class InvoiceDays(TypedDict):
    """The metered cost and the billed amounts, day by day."""

    window: Hours
    """The hours that the days cover."""
    taken_at: str | None
    """RFC 3339 UTC: the latest snapshot; the figures are as of then."""
    prices: list[PriceRow]
    """The prices that the costs were computed with, the earliest first."""
    days: list[InvoiceDay]
    """Each day in which anything ran or was billed."""
    total: BilledAmounts
    """The metered cost and the billed amounts of all days together."""
