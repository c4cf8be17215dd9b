"""Price settings: `[[prices]]`, `[[energy_prices]]` and `[[overheads]]`, and their price book.

Each key is checked alone, then with its table's other keys, then the tables with each other. Two
prices for the same runs from the same hour are refused: a report could not say which one it used.

Invariant: checked settings give a `PriceBook` without an error.
"""

from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_cost_meter.config import types as t
from vllm_cost_meter.config.types import WrongError, about
from vllm_cost_meter.prices.book import (
    USD,
    EnergyPrice,
    GpuHourPrice,
    PriceBook,
    PriceEntry,
    PurchaseKind,
    RunMatch,
    Scope,
    label_pairs,
    same_start,
)
from vllm_cost_meter.prices.overheads import Overhead
from vllm_cost_meter.units.time import hour_text

GPUS_MAX = 1_000_000
Gpus = Annotated[t.WholeNumber, Field(ge=1, le=GPUS_MAX)]
_PATTERN_IS = "; without it any."


class PriceSetting(BaseModel):
    """One `[[prices]]` entry: the price of GPUs per hour, for which runs, and from when."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    amount: t.MoneyAmount = Field(
        description="What one hour costs, as a number or a text.",
        json_schema_extra=about(t.AMOUNT, "`currency` per hour"),
    )
    currency: t.Currency = Field(
        default=USD,
        description="Currency of `amount`.",
        json_schema_extra=about(t.CURRENCY),
    )
    usd_rate: t.ExchangeRate | None = Field(
        default=None,
        description="What one unit of `currency` is worth. Needed for every currency but USD.",
        json_schema_extra=about(t.RATE, "USD"),
    )
    scope: Scope = Field(
        description="What `amount` pays for: one GPU, a node, or a whole deployment.",
        json_schema_extra=about("gpu, node or deployment"),
    )
    gpus: Gpus | None = Field(
        default=None,
        description="How many GPUs that is. Needed for `node` and `deployment`: GPU time costs "
        "`amount` / `gpus`.",
        json_schema_extra=about(f"a whole number from 1 to {GPUS_MAX}", "GPUs"),
    )
    usd_per_kv_block_hour: t.UsdPrice | None = Field(
        default=None,
        description="What one block of the KV cache costs for an hour, on top of GPU time, in USD "
        "whatever `currency` is. Without it, blocks cost nothing.",
        json_schema_extra=about(t.PRICE, "USD per KV block-hour"),
    )
    kind: PurchaseKind = Field(
        description="How it is bought.",
        json_schema_extra=about("on_demand, reserved or spot"),
    )
    effective_from: t.FullHour = Field(
        description="From when on it holds.",
        json_schema_extra=about(t.FULL_HOUR),
    )
    source: t.Note = Field(
        description="Where the figure is from: an invoice, a contract, a price list and its date.",
        json_schema_extra=about(t.NOTE),
    )
    model: t.Note | None = Field(
        default=None,
        description=f"The served model{_PATTERN_IS}",
        json_schema_extra=about(t.PATTERN),
    )
    gpu_name: t.Note | None = Field(
        default=None,
        description=f"Name of the GPU, `hardware` in the ledger{_PATTERN_IS}",
        json_schema_extra=about(t.PATTERN),
    )
    host: t.Note | None = Field(
        default=None,
        description=f"Name of the machine{_PATTERN_IS}",
        json_schema_extra=about(t.PATTERN),
    )
    id: t.EntryId | None = Field(
        default=None,
        description=t.ENTRY_ID_IS,
        json_schema_extra=about(t.ENTRY_ID),
    )
    labels: t.Labels = Field(
        default={},
        description='Labels of the engine, such as `{ pool = "spot" }`; without them any.',
        json_schema_extra=about(t.LABEL_PATTERNS),
    )

    @model_validator(mode="after")
    def _keys_that_need_each_other(self) -> Self:
        if self.currency != USD and self.usd_rate is None:
            expected = f"how many USD one {self.currency} is worth"
            raise WrongError(expected, "nothing", ("usd_rate",))
        if self.currency == USD and self.usd_rate is not None:
            expected = "no rate, because the currency is USD"
            raise WrongError(expected, str(self.usd_rate), ("usd_rate",))
        if self.scope != "gpu" and self.gpus is None:
            expected = f"how many GPUs the amount of a {self.scope} pays for"
            raise WrongError(expected, "nothing", ("gpus",))
        if self.scope == "gpu" and self.gpus is not None:
            expected = "no number, because the amount is for one GPU"
            raise WrongError(expected, str(self.gpus), ("gpus",))
        price = GpuHourPrice.of(self.entry("prices"))
        if price.usd_per_gpu_hour > t.PRICE_USD_MAX:
            expected = f"at most {t.PRICE_USD_MAX:,} USD per GPU-hour"
            raise WrongError(expected, price.text, ("amount",))
        return self

    def entry(self, key: str) -> PriceEntry:
        """Return the price as an entry for the book; `key` names it in messages."""
        return PriceEntry(
            key=key,
            amount=self.amount,
            source=self.source,
            effective_from_hour=self.effective_from,
            scope=self.scope,
            gpus=self.gpus or 1,
            kind=self.kind,
            currency=self.currency,
            usd_rate=self.usd_rate or Decimal(1),
            matches=RunMatch(self.model, self.gpu_name, self.host, label_pairs(self.labels)),
            usd_per_kv_block_hour=self.usd_per_kv_block_hour,
        )


class EnergyPriceSetting(BaseModel):
    """One `[[energy_prices]]` entry: the price of a kilowatt-hour, where, and from when."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    usd_per_kwh: t.UsdPrice = Field(
        description="What a kilowatt-hour costs.",
        json_schema_extra=about(t.PRICE, "USD per kWh"),
    )
    effective_from: t.FullHour = Field(
        description="From when on it holds.",
        json_schema_extra=about(t.FULL_HOUR),
    )
    source: t.Note = Field(
        description="Where the figure is from.",
        json_schema_extra=about(t.NOTE),
    )
    host: t.Note | None = Field(
        default=None,
        description=f"Name of the machine{_PATTERN_IS}",
        json_schema_extra=about(t.PATTERN),
    )
    id: t.EntryId | None = Field(
        default=None,
        description=t.ENTRY_ID_IS,
        json_schema_extra=about(t.ENTRY_ID),
    )

    def entry(self, key: str) -> EnergyPrice:
        """Return the price as an entry for the book; `key` names it in messages."""
        matches = RunMatch(host=self.host)
        return EnergyPrice(key, self.usd_per_kwh, self.source, self.effective_from, matches)


class OverheadSetting(BaseModel):
    """One `[[overheads]]` entry: money paid besides the GPUs, shown in a line of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: t.Note = Field(
        description="What it is for.",
        json_schema_extra=about(t.NOTE),
    )
    percent: t.Percent | None = Field(
        default=None,
        description="Percentage of the cost of the GPUs. Either this or `usd_per_month`.",
        json_schema_extra=about(t.PERCENT, "%"),
    )
    usd_per_month: t.MoneyAmount | None = Field(
        default=None,
        description="A fixed amount, spread over the hours of each UTC month.",
        json_schema_extra=about(t.AMOUNT, "USD per month"),
    )
    source: t.Note = Field(
        description="Where the figure is from.",
        json_schema_extra=about(t.NOTE),
    )
    effective_from: t.FullHour | None = Field(
        default=None,
        description="From when on it holds; without it always.",
        json_schema_extra=about(t.FULL_HOUR),
    )
    effective_until: t.FullHour | None = Field(
        default=None,
        description="Until when; without it for good.",
        json_schema_extra=about(t.FULL_HOUR),
    )
    id: t.EntryId | None = Field(
        default=None,
        description=t.ENTRY_ID_IS,
        json_schema_extra=about(t.ENTRY_ID),
    )

    @model_validator(mode="after")
    def _keys_that_need_each_other(self) -> Self:
        if (self.percent is None) == (self.usd_per_month is None):
            got = "neither" if self.percent is None else "both"
            raise WrongError("one of percent and usd_per_month", got, ("percent",))
        begin, end = self.effective_from, self.effective_until
        if begin is not None and end is not None and end <= begin:
            raise WrongError(
                "an instant after effective_from", hour_text(end), ("effective_until",)
            )
        return self

    def overhead(self, key: str) -> Overhead:
        """Return the overhead for the book; `key` names it in messages."""
        return Overhead(
            key=key,
            name=self.name,
            source=self.source,
            percent=self.percent,
            usd_per_month=self.usd_per_month,
            effective_from_hour=self.effective_from,
            effective_until_hour=self.effective_until,
        )


def refuse_two_at_once(
    field: str, settings: Sequence[PriceSetting] | Sequence[EnergyPriceSetting]
) -> None:
    """Raise WrongError if two entries have the same matches and the same first hour."""
    twice = same_start([setting.entry("") for setting in settings])
    if twice is not None:
        earlier, place = twice
        raise WrongError(
            f"another instant than {field}[{earlier}], which has the same matches",
            hour_text(settings[place].effective_from),
            (place, "effective_from"),
        )


def refuse_overlaps(settings: Sequence[OverheadSetting]) -> None:
    """Raise WrongError if two overheads with one name hold at the same time."""
    for place, one in enumerate(settings):
        for earlier, other in enumerate(settings[:place]):
            if one.name == other.name and _overlap(one, other):
                expected = f"another name or time than overheads[{earlier}]"
                raise WrongError(expected, repr(one.name), (place, "name"))


def _overlap(one: OverheadSetting, other: OverheadSetting) -> bool:
    def begins_before_end(first: OverheadSetting, second: OverheadSetting) -> bool:
        begin, end = first.effective_from, second.effective_until
        return begin is None or end is None or begin < end

    return begins_before_end(one, other) and begins_before_end(other, one)


def price_book(
    gpu_hour_usd: Decimal | None,
    prices: Sequence[PriceSetting],
    energy_prices: Sequence[EnergyPriceSetting],
    overheads: Sequence[OverheadSetting],
) -> PriceBook:
    """Return the price book; `gpu_hour_usd` is the price where no other entry holds."""
    entries = [price.entry(price.id or f"prices[{n}]") for n, price in enumerate(prices)]
    if gpu_hour_usd is not None:
        name = "COST_METER_GPU_HOUR_USD"
        entries.append(PriceEntry(name, gpu_hour_usd, name, effective_from_hour=None))
    return PriceBook(
        entries,
        [price.entry(price.id or f"energy_prices[{n}]") for n, price in enumerate(energy_prices)],
        [line.overhead(line.id or f"overheads[{n}]") for n, line in enumerate(overheads)],
    )
