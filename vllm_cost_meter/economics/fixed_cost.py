"""Break-even: the monthly volume from which self-hosting costs less than an API.

Self-hosting has a fixed monthly cost, an API has a price per token. Both cost the same at the
volume fixed cost / API price. Utilization does not change that volume; it only says which part of
the capacity it takes.

Invariant: at the break-even volume both cost the same, at every utilization. Every rate and every
step of the sensitivity goes through the same computation as the main case.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from vllm_cost_meter.economics.numbers import (
    HOURS_PER_MONTH,
    TOKENS_PER_M,
    not_negative,
    positive,
    share,
)
from vllm_cost_meter.units.text import quoted

UTILIZATIONS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
FACTORS = (0.5, 0.8, 1.25, 2.0)
# The inputs that the sensitivity varies. An overhead of 0 stays 0 at every factor: it has no rows.
MOVED = (
    "usd_per_hour",
    "api_usd_per_m",
    "tokens_per_hour",
    "overhead_usd_per_month",
    "overhead_percent",
)


@dataclass(frozen=True, slots=True)
class VolumeVerdict:
    """A volume's monthly cost, self-hosted and at the API. `fits`: the deployment can serve it."""

    m_tokens_per_month: float
    """Million tokens: the volume of a month."""
    self_hosted_usd: float
    """USD: a month of the deployment."""
    api_usd: float
    """USD: the same volume at the API."""
    cheaper: Literal["self-hosted", "api", "equal"]
    """Who costs less at this volume."""
    fits: bool
    """Whether the deployment can serve the volume."""


@dataclass(frozen=True, slots=True)
class Rate:
    """One way to buy the deployment. `savings_percent` compares it with on demand."""

    kind: Literal["on_demand", "reserved", "spot"]
    """How the deployment is bought."""
    usd_per_hour: float
    """USD per hour: of the whole deployment."""
    monthly_cost_usd: float
    """USD: a month of the deployment."""
    break_even_m_tokens_per_month: float
    """Million tokens per month: from here on self-hosting costs less."""
    break_even_utilization: float
    """That as part of the capacity; above 1 it does not fit."""
    effective_usd_per_m_at_full_load: float
    """USD: the cost of a million tokens at full load."""
    savings_percent: float
    """%: what it saves against on demand."""


@dataclass(frozen=True, slots=True)
class Moved:
    """The result with one input multiplied by `factor`; `value` is that input afterwards."""

    input: str
    """The name of the input that was moved."""
    factor: float
    """The factor that the input was multiplied by."""
    value: float
    """The input afterwards, in its own unit."""
    monthly_cost_usd: float
    """USD: a month of the deployment."""
    break_even_m_tokens_per_month: float
    """Million tokens per month: from here on self-hosting costs less."""
    break_even_utilization: float
    """That as part of the capacity; above 1 it does not fit."""


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Fixed cost against an API's price. `effective_usd_per_m` has a row for each utilization."""

    FORMULA: ClassVar = (
        "monthly_cost_usd = usd_per_hour x redundancy x hours_per_month x"
        " (1 + overhead_percent / 100) + overhead_usd_per_month; monthly_capacity_m_tokens ="
        " tokens_per_hour x hours_per_month / 10^6; break_even_m_tokens_per_month ="
        " monthly_cost_usd / api_usd_per_m; break_even_utilization = that / capacity;"
        " effective_usd_per_m = monthly_cost_usd / (capacity x utilization); rates: the same at"
        " each usd_per_hour, savings_percent = 100 x (1 - monthly_cost_usd / that on demand);"
        " sensitivity: the same with one input x factor"
    )

    monthly_cost_usd: float
    """USD: a month of the deployment."""
    monthly_capacity_m_tokens: float
    """Million tokens: what a month at full load serves."""
    break_even_m_tokens_per_month: float
    """Million tokens per month: from here on self-hosting costs less."""
    break_even_utilization: float
    """That as part of the capacity; above 1 it does not fit."""
    effective_usd_per_m: Mapping[str, float]
    """USD: the cost of a million tokens, by utilization."""
    verdicts: Sequence[VolumeVerdict]
    """For each volume asked for, which is cheaper."""
    rates: Sequence[Rate]
    """The same for each way to buy the deployment."""
    sensitivity: Sequence[Moved]
    """The same with one input moved."""


@dataclass(frozen=True, slots=True)
class _Case:
    """Checked inputs, and the figures that follow from them."""

    usd_per_hour: float
    api_usd_per_m: float
    tokens_per_hour: float
    overhead_usd_per_month: float
    overhead_percent: float
    redundancy: float
    hours_per_month: float

    @property
    def usd(self) -> float:
        hardware_usd = self.usd_per_hour * self.redundancy * self.hours_per_month
        return hardware_usd * (1 + self.overhead_percent / 100) + self.overhead_usd_per_month

    @property
    def capacity(self) -> float:
        return self.tokens_per_hour * self.hours_per_month / TOKENS_PER_M

    @property
    def volume(self) -> float:
        return self.usd / self.api_usd_per_m


def break_even(
    *,
    usd_per_hour: float,
    tokens_per_hour: float,
    api_usd_per_m: float,
    reserved_usd_per_hour: float | None = None,
    spot_usd_per_hour: float | None = None,
    overhead_usd_per_month: float = 0,
    overhead_percent: float = 0,
    redundancy: float = 1,
    hours_per_month: float = HOURS_PER_MONTH,
    utilization: Sequence[float] = UTILIZATIONS,
    volume: Sequence[float] = (),
) -> BreakEven:
    """Return the volume from which self-hosting costs less than an API.

    `usd_per_hour` is the on-demand rate; every figure but `rates` uses it. `tokens_per_hour` is the
    throughput at full load. It counts the tokens that `api_usd_per_m` prices: all tokens for a
    blended price, output tokens for an output price. `redundancy` multiplies the price but not the
    capacity, because standby machines serve nobody. `volume` lists monthly volumes to judge, in
    millions of tokens. A break-even utilization above 1 means that the deployment is too small to
    break even. Raises ValueError for an argument out of range.
    """
    factor = positive("redundancy", redundancy)
    if factor < 1:
        raise ValueError(f"redundancy: expected 1 or more, got {quoted(redundancy)}")
    case = _Case(
        usd_per_hour=positive("usd_per_hour", usd_per_hour),
        api_usd_per_m=positive("api_usd_per_m", api_usd_per_m),
        tokens_per_hour=positive("tokens_per_hour", tokens_per_hour),
        overhead_usd_per_month=not_negative("overhead_usd_per_month", overhead_usd_per_month),
        overhead_percent=not_negative("overhead_percent", overhead_percent),
        redundancy=factor,
        hours_per_month=positive("hours_per_month", hours_per_month),
    )
    rates = [_rate("on_demand", case, case)]
    if reserved_usd_per_hour is not None:
        usd = positive("reserved_usd_per_hour", reserved_usd_per_hour)
        rates.append(_rate("reserved", replace(case, usd_per_hour=usd), case))
    if spot_usd_per_hour is not None:
        usd = positive("spot_usd_per_hour", spot_usd_per_hour)
        rates.append(_rate("spot", replace(case, usd_per_hour=usd), case))
    return BreakEven(
        monthly_cost_usd=case.usd,
        monthly_capacity_m_tokens=case.capacity,
        break_even_m_tokens_per_month=case.volume,
        break_even_utilization=case.volume / case.capacity,
        effective_usd_per_m={
            f"{used:g}": case.usd / (case.capacity * share("utilization", used))
            for used in utilization
        },
        verdicts=[_verdict(positive("volume", each), case) for each in volume],
        rates=rates,
        sensitivity=list(_sensitivity(case)),
    )


def _rate(kind: Literal["on_demand", "reserved", "spot"], case: _Case, on_demand: _Case) -> Rate:
    return Rate(
        kind=kind,
        usd_per_hour=case.usd_per_hour,
        monthly_cost_usd=case.usd,
        break_even_m_tokens_per_month=case.volume,
        break_even_utilization=case.volume / case.capacity,
        effective_usd_per_m_at_full_load=case.usd / case.capacity,
        savings_percent=100 * (1 - case.usd / on_demand.usd),
    )


def _sensitivity(case: _Case) -> Iterator[Moved]:
    for name in MOVED:
        if not (value := getattr(case, name)):
            continue
        for factor in FACTORS:
            moved = replace(case, **{name: value * factor})
            yield Moved(
                input=name,
                factor=factor,
                value=value * factor,
                monthly_cost_usd=moved.usd,
                break_even_m_tokens_per_month=moved.volume,
                break_even_utilization=moved.volume / moved.capacity,
            )


def _verdict(volume: float, case: _Case) -> VolumeVerdict:
    there = volume * case.api_usd_per_m
    cheaper: Literal["self-hosted", "api", "equal"] = "equal"
    if there != case.usd:
        cheaper = "self-hosted" if case.usd < there else "api"
    return VolumeVerdict(volume, case.usd, there, cheaper, volume <= case.capacity)
