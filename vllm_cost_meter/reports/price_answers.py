"""The shapes of prices in answers, field by field, with their units: what JSON has.

A docstring below a field is its description. Unknown is null.

Invariant: a price has these fields and no other, in whichever answer it is.
"""

from typing_extensions import TypedDict


class PriceRow(TypedDict):
    """A price of GPU time that is in a cost."""

    usd_per_gpu_hour: str
    """USD: `amount` x `usd_rate` / `gpus`, with at most 18 decimal places."""
    amount: str
    """`currency`: what one hour costs."""
    currency: str
    """ISO 4217."""
    usd_rate: str
    """USD: what one of `currency` is worth."""
    scope: str
    """What `amount` pays for: `gpu`, `node` or `deployment`."""
    gpus: int
    """How many GPUs that is."""
    kind: str | None
    """`on_demand`, `reserved` or `spot`."""
    source: str
    """Where the figure is from."""
    effective_from: str | None
    """RFC 3339 UTC: from when on it holds."""
    model: str | None
    """The runs it is for: a name or a pattern, null for any."""
    gpu_name: str | None
    """The GPUs it is for: a name or a pattern, null for any."""
    host: str | None
    """The runs it is for, null for any."""


class PriceOfTime(PriceRow):
    """A price of GPU time, and the GPU time of a bill at that price."""

    gpu_time_ns: int
    """GPU-ns: what the bill used at this price."""


class EnergyPriceRow(TypedDict):
    """A price of energy that is in a cost."""

    usd_per_kwh: str
    """USD: per kilowatt-hour."""
    source: str
    """Where the figure is from."""
    effective_from: str | None
    """RFC 3339 UTC: from when on it holds."""
    host: str | None
    """The runs it is for, null for any."""
