"""Cost of GPU time and energy: exact arithmetic, rounded once.

A price is a decimal or fraction: USD per GPU-hour or per kilowatt-hour. A cost is an integer number
of nano-USD, rounded half to even once, at the end. Without a price there is no cost: None passes
through every function here.

Invariant: an unknown amount never becomes 0.
"""

from decimal import Decimal, InvalidOperation
from fractions import Fraction

from vllm_cost_meter.units.money import NANOUSD_PER_USD
from vllm_cost_meter.units.rounding import half_even
from vllm_cost_meter.units.time import NS_PER_HOUR

MJ_PER_KWH = 3_600_000_000


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


def exact_nanousd(gpu_time_ns: int, usd_per_gpu_hour: Decimal | Fraction) -> Fraction:
    """Return the cost of GPU time in nano-USD, to be rounded together with others."""
    return Fraction(usd_per_gpu_hour) * gpu_time_ns * NANOUSD_PER_USD / NS_PER_HOUR


def exact_energy_nanousd(energy_mj: int, usd_per_kwh: Decimal) -> Fraction:
    """Return the cost of energy in nano-USD, to be rounded together with others."""
    return Fraction(usd_per_kwh) * energy_mj * NANOUSD_PER_USD / MJ_PER_KWH
