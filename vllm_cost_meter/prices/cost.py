"""Cost of GPU time, KV residency and energy: exact arithmetic, rounded once.

A price is a decimal or fraction: USD per GPU-hour, per KV block-hour (one block of the KV cache
for an hour) or per kilowatt-hour. A cost is an integer number of nano-USD, rounded half to even
once, at the end. Without a price there is no cost: None passes through every function here. Only
the price of KV blocks is optional beside that of GPU time: without one, blocks cost nothing.

Invariant: an unknown amount never becomes 0.
"""

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import NamedTuple, Self

from vllm_cost_meter.units.money import NANOUSD_PER_USD
from vllm_cost_meter.units.rounding import half_even
from vllm_cost_meter.units.time import NS_PER_HOUR, NS_PER_MS

MJ_PER_KWH = 3_600_000_000
MS_PER_HOUR = NS_PER_HOUR // NS_PER_MS


class Rates(NamedTuple):
    """What usage costs: USD per GPU-hour, and USD per KV block-hour (0 without such a price)."""

    usd_per_gpu_hour: Fraction
    usd_per_kv_block_hour: Fraction = Fraction(0)


@dataclass(frozen=True, slots=True)
class Quantities:
    """What a request is charged for: GPU-ns, and KV cache blocks x ms."""

    gpu_time_ns: int = 0
    kv_block_ms: int = 0

    def __bool__(self) -> bool:
        return bool(self.gpu_time_ns or self.kv_block_ms)

    def __add__(self, other: Self) -> "Quantities":
        return Quantities(
            self.gpu_time_ns + other.gpu_time_ns, self.kv_block_ms + other.kv_block_ms
        )


NO_QUANTITIES = Quantities()


def parse_price(text: str) -> Decimal:
    """Return USD per GPU-hour from decimal text. Raises ValueError unless finite and >= 0."""
    try:
        price = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"expected a decimal number of USD per GPU-hour, got {text!r}") from None
    if not price.is_finite() or price < 0:
        raise ValueError(f"expected a finite price of at least 0 USD per GPU-hour, got {text!r}")
    return price.copy_abs()  # -0 is a price too.


def cost_nanousd(gpu_time_ns: int, usd_per_gpu_hour: Decimal | Fraction | None) -> int | None:
    """Return the cost of GPU time in nano-USD, rounded half to even; None without a price."""
    if usd_per_gpu_hour is None:
        return None
    numerator, denominator = usd_per_gpu_hour.as_integer_ratio()
    return half_even(gpu_time_ns * numerator * NANOUSD_PER_USD, denominator * NS_PER_HOUR)


def kv_cost_nanousd(kv_block_ms: int, usd_per_kv_block_hour: Decimal | Fraction) -> int:
    """Return the cost of KV residency (blocks x ms) in nano-USD, rounded half to even."""
    numerator, denominator = usd_per_kv_block_hour.as_integer_ratio()
    return half_even(kv_block_ms * numerator * NANOUSD_PER_USD, denominator * MS_PER_HOUR)


def exact_cost_nanousd(used: Quantities, rates: Rates) -> Fraction:
    """Return the cost of GPU time and KV residency in nano-USD, to be rounded with others."""
    time = exact_nanousd(used.gpu_time_ns, rates.usd_per_gpu_hour)
    if not (used.kv_block_ms and rates.usd_per_kv_block_hour):
        return time
    blocks = rates.usd_per_kv_block_hour * used.kv_block_ms * NANOUSD_PER_USD / MS_PER_HOUR
    return time + blocks


def exact_nanousd(gpu_time_ns: int, usd_per_gpu_hour: Decimal | Fraction) -> Fraction:
    """Return the cost of GPU time in nano-USD, to be rounded together with others."""
    return Fraction(usd_per_gpu_hour) * gpu_time_ns * NANOUSD_PER_USD / NS_PER_HOUR


def exact_energy_nanousd(energy_mj: int, usd_per_kwh: Decimal) -> Fraction:
    """Return the cost of energy in nano-USD, to be rounded together with others."""
    return Fraction(usd_per_kwh) * energy_mj * NANOUSD_PER_USD / MJ_PER_KWH
