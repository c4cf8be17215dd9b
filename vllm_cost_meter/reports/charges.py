"""How well the split of GPU time is known: of how much of it, and how far it may be off.

Each bill says how much of its GPU time may belong to other requests, or that nobody knows. Rows add
these up. The errors of one tenant's bills partly cancel, so their sum is rather too wide than too
narrow for the tenant (docs/explanation/attribution.md).

Invariant: an error of unknown bills is never read as 0: whoever shows an error shows of how much
GPU time it is. No amount of money has any part of it.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class ChargesKnown(NamedTuple):
    """The GPU-ns whose error is known, and the GPU-ns of these that may belong to others."""

    known_ns: int = 0
    error_ns: int = 0

    def plus(self, other: "ChargesKnown") -> "ChargesKnown":
        """Return the sum."""
        return ChargesKnown(self.known_ns + other.known_ns, self.error_ns + other.error_ns)

    def as_dict(self) -> dict[str, Any]:
        """Return the columns of a row, in the order of `CHARGE_COLUMNS`."""
        error = charge_error_of(self.known_ns, self.error_ns)
        return dict(zip(CHARGE_COLUMNS, (*self, error), strict=True))


CHARGE_COLUMNS = ("charge_known_ns", "charge_error_ns", "charge_error")
# Of a row that is no usage: nobody splits a class of engine time, or a declared cost.
NO_CHARGES: Mapping[str, None] = dict.fromkeys(CHARGE_COLUMNS)


def charge_error_of(gpu_ns: int | None, error_ns: int | None) -> float | None:
    """Return the part by which GPU time may be off; None where it is unknown, or without time."""
    return error_ns / gpu_ns if gpu_ns and error_ns is not None else None


def charges_of_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the columns for the sum of rows; rows without usage add nothing."""
    whole = ChargesKnown()
    for row in rows:
        if row["charge_known_ns"] is not None:
            whole = whole.plus(ChargesKnown(row["charge_known_ns"], row["charge_error_ns"]))
    return whole.as_dict()


def charges_text(row: Mapping[str, Any]) -> str:
    """Return how well the split of a row's GPU time is known, as part of a sentence."""
    if row["charge_error"] is None:
        unknown = "not known how far the split may be off"
        return unknown if row["gpu_time_ns"] else "no GPU time was split"
    part = _part_known(row)
    return f"split known to within {within(row['charge_error'])}" + (
        f" for {part} of the GPU time" if part else ""
    )


def charges_cell(row: Mapping[str, Any]) -> str | None:
    """Return the same for a cell of a table; None for a row without GPU time that was split."""
    if row["charge_known_ns"] is None or not row["gpu_time_ns"]:
        return None
    if row["charge_error"] is None:
        return "unknown"
    part = _part_known(row)
    return within(row["charge_error"]) + (f" of {part}" if part else "")


def within(error: float) -> str:
    """Return a bound as a percentage, rounded up: what may be off is never shown as 0.0%."""
    # A product of floats may be a little above a whole number; what is nearly 0 still counts.
    per_mille = math.ceil(round(error * 1000, 6)) or math.ceil(error)
    return f"{per_mille / 1000:.1%}"


def _part_known(row: Mapping[str, Any]) -> str | None:
    """Return of how much GPU time an error is known, rounded down; None if that is all of it."""
    known_ns, gpu_ns = row["charge_known_ns"], row["gpu_time_ns"]
    if known_ns == gpu_ns:
        return None
    # What is not all is never shown as 100.0%, nor what is some as 0.0%.
    per_mille = known_ns * 1000 // gpu_ns
    return f"{per_mille / 1000:.1%}" if per_mille else "less than 0.1%"
