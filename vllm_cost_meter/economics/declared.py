"""Facts that only the operator can declare: latency bounds (SLO) and throughput at full load."""

from dataclasses import dataclass
from typing import TypedDict


class Slo(TypedDict):
    """The latency bounds that the operator declared, and whether they are kept."""

    ttft_ms: float | None
    """ms: time to first token, at most; null for no bound."""
    tpot_ms: float | None
    """ms: time per output token, at most; null for no bound."""
    e2e_ms: float | None
    """ms: from arrival to the last token, at most; null for no bound."""
    percentile: float
    """%: the requests that must keep all bounds."""
    met: bool | None
    """Whether they do, null without requests."""


@dataclass(frozen=True, slots=True)
class Declared:
    """Latency bounds (SLO) in ms, None for no bound, and the throughput at full load.

    `percentile` is the percentage of requests that must keep all bounds. `theta_max` is the whole
    deployment's full load in output tokens per second, None if nobody measured it.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    percentile: float = 99.0
    theta_max: float | None = None

    @property
    def has_slo(self) -> bool:
        """True if there is any latency bound."""
        return any(bound is not None for bound in (self.ttft_ms, self.tpot_ms, self.e2e_ms))

    def slo(self, share: float | None) -> Slo | None:
        """Return the bounds, and in `met` whether enough requests keep them.

        `share` is the part of requests within all bounds, 0 to 1; None leaves `met` unknown.
        Returns None if there is no bound.
        """
        if not self.has_slo:
            return None
        return {
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
            "e2e_ms": self.e2e_ms,
            "percentile": self.percentile,
            "met": None if share is None else 100 * share >= self.percentile,
        }
