"""What a deployment costs on demand, reserved and spot, by the price book as it is in force.

A book is asked for the price of a run elsewhere; here there is no run, so what an entry matches
besides the name of a GPU is not looked at. Where that leaves two entries of a kind, neither is
taken: to pick one would be to guess money. Core: standard library only.

Invariant: a price is that of one GPU x the GPUs asked for, exactly, in any scope and currency.
"""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from vllm_cost_meter.prices.book import GpuHourPrice, Kind, Matches, PriceBook, RunFacts

KINDS: tuple[Kind, ...] = ("on_demand", "reserved", "spot")


def prices_by_kind(
    book: PriceBook, hour: int, gpu_name: str | None = None
) -> dict[Kind, GpuHourPrice]:
    """Return the price in force of each kind that is declared, in an hour since the epoch.

    `gpu_name` leaves only entries for that GPU, of which the most specific wins. A price without a
    kind (COST_METER_GPU_HOUR_USD) stands for on demand where no other does. Raises ValueError if a
    kind has two, or there is none on demand.
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
    """Return USD per hour of so many GPUs, exactly. Raises ValueError for less than one."""
    if gpus < 1:
        raise ValueError(f"gpus: expected a whole number above 0, got {gpus!r}")
    return price.usd_per_gpu_hour * gpus


def listed(prices: Mapping[Kind, GpuHourPrice]) -> list[dict[str, Any]]:
    """Return the prices as they are declared, each with its key, source and date."""
    return [{"key": price.key, **price.as_dict()} for price in prices.values()]


def _is_for(gpu_name: str | None, price: GpuHourPrice) -> bool:
    return gpu_name is None or Matches(gpu_name=price.matches.gpu_name).fit(
        RunFacts(gpu_name=gpu_name)
    )


def _one_of(
    kind: Kind, prices: Iterable[GpuHourPrice], gpu_name: str | None
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
