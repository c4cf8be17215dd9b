"""Money from GPU time: exact integers, one rounding.

A price is a decimal in USD per GPU-hour; a cost is an integer of nano-USD, rounded half to even
once, at the end. No price means no cost: None travels through every function here, so that an
unknown can never turn into 0.
"""

from decimal import Decimal, InvalidOperation

from vllm_cost_meter.records import NS_PER_HOUR, format_nano

NANOUSD_PER_USD = 1_000_000_000


def parse_price(text: str) -> Decimal:
    """Return USD per GPU-hour from its decimal text. Raises ValueError unless finite and >= 0."""
    try:
        price = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"expected a decimal number of USD per GPU-hour, got {text!r}") from None
    if not price.is_finite() or price < 0:
        raise ValueError(f"expected a finite price of at least 0 USD per GPU-hour, got {text!r}")
    return price


def cost_nanousd(gpu_time_ns: int, usd_per_gpu_hour: Decimal | None) -> int | None:
    """Return the cost of GPU time in nano-USD, rounded half to even; None without a price."""
    if usd_per_gpu_hour is None:
        return None
    numerator, denominator = usd_per_gpu_hour.as_integer_ratio()
    dividend = gpu_time_ns * numerator * NANOUSD_PER_USD
    divisor = denominator * NS_PER_HOUR
    quotient, remainder = divmod(dividend, divisor)
    if 2 * remainder > divisor or (2 * remainder == divisor and quotient % 2):
        quotient += 1
    return quotient


def format_usd(nanousd: int | None) -> str | None:
    """Return nano-USD as a plain decimal string with nine places, e.g. "0.000012345"."""
    return None if nanousd is None else format_nano(nanousd)
