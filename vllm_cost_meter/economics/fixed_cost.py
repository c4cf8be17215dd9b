"""When self-hosting costs less than an API: a fixed monthly cost against a price per token.

The volume at which the two are equal is fixed cost / API price: how busy the deployment is does not
enter into it, and only says which part of its capacity that volume is.

Invariant: at the break-even volume both cost the same, at every utilization.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from vllm_cost_meter.economics.numbers import (
    HOURS_PER_MONTH,
    TOKENS_PER_M,
    not_negative,
    positive,
    share,
)

UTILIZATIONS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a volume costs here and there. `fits` says whether the deployment can serve it."""

    m_tokens_per_month: float
    self_hosted_usd: float
    api_usd: float
    cheaper: Literal["self-hosted", "api", "equal"]
    fits: bool


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Fixed cost against an API. `effective_usd_per_m` is by utilization, as it was written."""

    FORMULA: ClassVar = (
        "monthly_cost_usd = usd_per_hour x redundancy x hours_per_month x"
        " (1 + overhead_percent / 100) + overhead_usd_per_month; monthly_capacity_m_tokens ="
        " tokens_per_hour x hours_per_month / 10^6; break_even_m_tokens_per_month ="
        " monthly_cost_usd / api_usd_per_m; break_even_utilization = that / capacity;"
        " effective_usd_per_m = monthly_cost_usd / (capacity x utilization)"
    )

    monthly_cost_usd: float
    monthly_capacity_m_tokens: float
    break_even_m_tokens_per_month: float
    break_even_utilization: float
    effective_usd_per_m: Mapping[str, float]
    verdicts: Sequence[Verdict]


def break_even(
    *,
    usd_per_hour: float,
    tokens_per_hour: float,
    api_usd_per_m: float,
    overhead_usd_per_month: float = 0,
    overhead_percent: float = 0,
    redundancy: float = 1,
    hours_per_month: float = HOURS_PER_MONTH,
    utilization: Sequence[float] = UTILIZATIONS,
    volume: Sequence[float] = (),
) -> BreakEven:
    """Return the volume from which on self-hosting costs less than an API.

    `tokens_per_hour` is what the deployment makes at full load, of the tokens that `api_usd_per_m`
    is the price of: of all with a blended price, of output with an output price. `redundancy`
    multiplies the price and not the capacity, as standby serves nobody. `volume` are millions of
    tokens per month to judge. A break-even utilization above 1 says that the deployment is too
    small to break even. Raises ValueError.
    """
    factor = positive("redundancy", redundancy)
    if factor < 1:
        raise ValueError(f"redundancy: expected 1 or more, got {redundancy!r}")
    hours = positive("hours_per_month", hours_per_month)
    percent = not_negative("overhead_percent", overhead_percent)
    fixed = not_negative("overhead_usd_per_month", overhead_usd_per_month)
    hardware = positive("usd_per_hour", usd_per_hour) * factor * hours
    cost = hardware * (1 + percent / 100) + fixed
    capacity = positive("tokens_per_hour", tokens_per_hour) * hours / TOKENS_PER_M
    api = positive("api_usd_per_m", api_usd_per_m)
    return BreakEven(
        monthly_cost_usd=cost,
        monthly_capacity_m_tokens=capacity,
        break_even_m_tokens_per_month=cost / api,
        break_even_utilization=cost / api / capacity,
        effective_usd_per_m={
            f"{used:g}": cost / (capacity * share("utilization", used)) for used in utilization
        },
        verdicts=[_verdict(positive("volume", each), cost, api, capacity) for each in volume],
    )


def _verdict(volume: float, cost: float, api: float, capacity: float) -> Verdict:
    there = volume * api
    cheaper: Literal["self-hosted", "api", "equal"] = "equal"
    if there != cost:
        cheaper = "self-hosted" if cost < there else "api"
    return Verdict(volume, cost, there, cheaper, volume <= capacity)
