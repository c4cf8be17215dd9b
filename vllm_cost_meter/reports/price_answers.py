"""The shapes of prices in answers, field by field, with their units: what JSON has.

A docstring below a field is its description. Unknown is null.

Invariant: a price has these fields and no other, in whichever answer it is.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from typing_extensions import TypedDict


class PriceRow(TypedDict):
    """A price of GPU time that a cost was computed with."""

    usd_per_gpu_hour: str
    """USD: `amount` x `usd_rate` / `gpus`, with at most 18 decimal places."""
    usd_per_kv_block_hour: str | None
    """USD: the price of one KV cache block for an hour, on top of GPU time; null if blocks cost
    nothing."""
    amount: str
    """The price of one hour, in `currency`, for what `scope` names."""
    currency: str
    """The currency of `amount`, by its ISO 4217 code."""
    usd_rate: str
    """USD: the value of one unit of `currency`."""
    scope: str
    """What `amount` pays for: one GPU, a node or the whole deployment (`gpu`, `node`,
    `deployment`)."""
    gpus: int
    """Number of GPUs that `amount` pays for."""
    kind: str | None
    """How the GPUs were bought: `on_demand`, `reserved` or `spot`; null if nobody declared it."""
    source: str
    """Where the price comes from, in the operator's words."""
    effective_from: str | None
    """RFC 3339 UTC: the instant from which the price holds."""
    model: str | None
    """The served models that the price is for: a name or a pattern; null for any."""
    gpu_name: str | None
    """The GPUs that the price is for: a name or a pattern; null for any."""
    host: str | None
    """The machine whose engines the price is for; null for any."""
    labels: dict[str, str] | None
    """The labels of the engines that the price is for: each a text or a pattern; null for any, and
    always null for a tenant."""


class PriceOfTime(PriceRow):
    """A price, and what a bill used at that price."""

    gpu_time_ns: int
    """GPU-ns: the GPU time of the bill at this price."""
    kv_block_ms: int
    """Blocks x ms: the KV residency of the bill at this price."""


class EnergyPriceRow(TypedDict):
    """A price of energy that a cost was computed with."""

    usd_per_kwh: str
    """USD: the price of one kilowatt-hour."""
    source: str
    """Where the price comes from, in the operator's words."""
    effective_from: str | None
    """RFC 3339 UTC: the instant from which the price holds."""
    host: str | None
    """The machine whose engines the price is for; null for any."""


def without_labels(prices: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return prices as a tenant sees them: pools, pods and nodes are the operator's own."""
    return [{**price, "labels": None} for price in prices]
