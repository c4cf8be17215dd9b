"""On-demand, reserved and spot prices in force, taken from the price book without a run.

`break-even` needs a price for each kind of purchase before anything ran. So only the GPU name of an
entry's matches counts here. If that leaves two entries for a kind, neither is taken: to pick one
would be to guess money.

Invariant: an hourly price is exactly one GPU's price x the GPUs asked for, in any scope and
currency.
"""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from vllm_cost_meter.prices.book import GpuHourPrice, PriceBook, PurchaseKind, RunFacts, RunMatch

KINDS: tuple[PurchaseKind, ...] = ("on_demand", "reserved", "spot")


def prices_by_kind(
    book: PriceBook, hour: int, gpu_name: str | None = None
) -> dict[PurchaseKind, GpuHourPrice]:
    """Return the price in force for each declared kind of purchase, at an hour since the epoch.

    With `gpu_name`, only entries for that GPU count, and the most specific wins. A price without a
    kind (COST_METER_GPU_HOUR_USD) serves as on-demand price if there is no other. Raises ValueError
    if a kind has two prices, and if there is no on-demand price.
    """
    prices = [price for price in book.prices_in_force(hour) if _is_for(gpu_name, price)]
    found = {}
    for kind in KINDS:
        price = _one_of(kind, [each for each in prices if each.entry.kind == kind], gpu_name)
        if price is not None:
            found[kind] = price
    if "on_demand" not in found:
        plain = [price for price in prices if price.entry.kind is None]
        if not plain:
            of = "" if gpu_name is None else f" of {gpu_name!r}"
            declared = ", ".join(found) or "none"
            raise ValueError(
                f"price book: expected an on_demand price{of} in force, got {declared}"
            )
        found = {"on_demand": plain[0], **found}
    return found


def usd_per_hour_of(price: GpuHourPrice, gpus: int) -> Fraction:
    """Return the exact USD per hour for a number of GPUs. Raises ValueError for less than one."""
    if gpus < 1:
        raise ValueError(f"gpus: expected a whole number above 0, got {gpus!r}")
    return price.usd_per_gpu_hour * gpus


def listed(prices: Mapping[PurchaseKind, GpuHourPrice]) -> list[dict[str, Any]]:
    """Return the prices as declared, each with its key, source and date, ready for JSON."""
    return [{"key": price.key, **price.as_dict()} for price in prices.values()]


def _is_for(gpu_name: str | None, price: GpuHourPrice) -> bool:
    return gpu_name is None or RunMatch(gpu_name=price.matches.gpu_name).fit(
        RunFacts(gpu_name=gpu_name)
    )


def _one_of(
    kind: PurchaseKind, prices: Iterable[GpuHourPrice], gpu_name: str | None
) -> GpuHourPrice | None:
    found = list(prices)
    if gpu_name is not None:
        best = max((price.matches.specificity() for price in found), default=None)
        found = [price for price in found if price.matches.specificity() == best]
    if len(found) > 1:
        keys = " and ".join(sorted(price.key for price in found))
        hint = "; name a GPU of one of them" if gpu_name is None else ""
        raise ValueError(f"price book: expected one {kind} price in force, got {keys}{hint}")
    return found[0] if found else None
