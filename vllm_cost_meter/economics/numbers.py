"""Range checks for arguments of formulas, and the constants that formulas share.

Each error names the argument, the expected range and the value. The bounds are wide enough for any
deployment, and narrow enough that a product of a few numbers does not overflow.
"""

from vllm_cost_meter.units.text import quoted

HOURS_PER_MONTH = 730.0
S_PER_HOUR = 3600.0
TOKENS_PER_M = 1e6
SMALLEST, LARGEST = 1e-12, 1e15


def positive(name: str, value: float) -> float:
    """Return a rate, price or amount. Raises ValueError unless it is a number above 0."""
    if isinstance(value, bool) or not SMALLEST <= value <= LARGEST:  # NaN is not either
        raise ValueError(f"{name}: expected a number above 0, at most 10^15, got {quoted(value)}")
    return float(value)


def not_negative(name: str, value: float) -> float:
    """Return an amount that may be 0. Raises ValueError for any other."""
    if value == 0 and not isinstance(value, bool):
        return 0.0
    if isinstance(value, bool) or not SMALLEST <= value <= LARGEST:  # NaN is not either
        raise ValueError(
            f"{name}: expected 0 or a number above it, at most 10^15, got {quoted(value)}"
        )
    return float(value)


def share(name: str, value: float, *, may_be_0: bool = False) -> float:
    """Return a part of a whole. Raises ValueError unless it is above 0 (or 0) and at most 1."""
    low = 0.0 if may_be_0 else SMALLEST
    if isinstance(value, bool) or not low <= value <= 1:
        expected = "from 0" if may_be_0 else "above 0"
        raise ValueError(f"{name}: expected a number {expected}, at most 1, got {quoted(value)}")
    return float(value)


def usd_per_m(usd_per_hour: float, tokens_per_s: float) -> float:
    """Return USD per million tokens, from a price per hour and a throughput."""
    return usd_per_hour * TOKENS_PER_M / (S_PER_HOUR * tokens_per_s)
