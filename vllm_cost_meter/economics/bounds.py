"""Latency bounds that an operator declared, by which requests are good or missed."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency bounds in ms; None is no bound.

    `percentile` is the percentage of requests that must keep all of them.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    percentile: float = 99.0

    @property
    def is_declared(self) -> bool:
        """Whether there is any bound."""
        return any(bound is not None for bound in (self.ttft_ms, self.tpot_ms, self.e2e_ms))

    def told(self, share: float | None) -> dict[str, Any]:
        """Return the bounds, and whether such a share of requests that keep them is enough."""
        return {
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
            "e2e_ms": self.e2e_ms,
            "percentile": self.percentile,
            "met": None if share is None else 100 * share >= self.percentile,
        }
