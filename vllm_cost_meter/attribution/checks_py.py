"""Check what comes in: the twin of `csrc/checks.pxd`.

Anything but an int in its range, or finite coefficients >= 0, raises a ValueError. Messages are
equal to the native ones.

Invariant: what passes needs no further check.
"""

import math

from vllm_cost_meter.attribution.cost_model import FIT_TERMS, Coefficients, Planes
from vllm_cost_meter.attribution.planes_py import TERMS


def check(value: object, maximum: int, what: str) -> None:
    """Raise ValueError unless a value is an int from 0 to a maximum."""
    if not isinstance(value, int) or not 0 <= value <= maximum:
        raise ValueError(f"{what}: expected an int from 0 to {maximum}, got {value!r}")


def checked_planes(planes: Planes) -> Planes:
    """Return two planes, or raise ValueError."""
    compute, memory = _checked(planes, "StepMeter: planes", 2, TERMS)
    return compute, memory  # type: ignore[return-value]


def checked_coefficients(coefficients: Coefficients) -> Coefficients:
    """Return the coefficients of a fit, or raise ValueError."""
    return _checked((coefficients,), "StepMeter: coefficients", 1, FIT_TERMS)[0]


def _checked(rows: object, what: str, count: int, terms: int) -> list[tuple[float, ...]]:
    """Return rows of finite coefficients >= 0, or raise ValueError."""
    try:
        checked = [tuple(float(value) for value in row) for row in rows]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        checked = []
    if [len(row) for row in checked] != [terms] * count:
        raise ValueError(f"{what}: expected {count} rows of {terms} numbers, got {rows!r}")
    if not all(math.isfinite(value) and value >= 0.0 for row in checked for value in row):
        raise ValueError(f"{what}: expected coefficients >= 0, got {rows!r}")
    return checked
