"""What the audit of a ledger says, as metrics.

An audit reads a row for each run, and a page of metrics may be asked for often: so an audit holds
for some seconds.

Invariant: what cannot be told is NaN, and never 0.
"""

import math
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from vllm_cost_meter.ledger.reader import LedgerReader

AUDIT_KEPT_S = 15.0


class AuditMetrics:
    """What an audit says, as metrics. Used by one thread at a time."""

    def __init__(
        self,
        reader: LedgerReader,
        clock_s: Callable[[], float] = time.monotonic,
        *,
        version: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`version` returns that of the fleet's settings that are in use; None if none are."""
        self._version = version
        self._reader = reader
        self._clock_s = clock_s
        self._until_s = 0.0
        self._registry = CollectorRegistry()
        self._balanced = self._gauge(
            "cost_meter_books_balanced", "1 if the books of all runs balance, 0 if not, else NaN"
        )
        self._runs = self._gauge("cost_meter_fleet_runs", "Engine runs with totals")
        self._complete = self._gauge(
            "cost_meter_fleet_complete_runs", "Runs of which every bill is here, and they add up"
        )
        self._senders = self._gauge("cost_meter_fleet_senders", "Ledgers that have sent")
        self._settings = self._gauge(
            "cost_meter_settings_version", "Version of the fleet's settings that is used here"
        )

    def _gauge(self, name: str, help_: str) -> Gauge:
        return Gauge(name, help_, registry=self._registry)

    def text(self) -> bytes:
        """Return the text of the metrics. Raises LedgerError."""
        if self._clock_s() >= self._until_s:
            audit = self._reader.audit()
            balanced, fleet = audit["balanced"], audit["fleet"]
            self._balanced.set(math.nan if balanced is None else balanced)
            runs = len(audit["runs"])
            self._runs.set(runs)
            self._complete.set(fleet["complete_runs"] if fleet else runs)
            self._senders.set(fleet["senders"] if fleet else 1)
            self._until_s = self._clock_s() + AUDIT_KEPT_S
        used = self._version()
        self._settings.set(math.nan if used is None else used)
        return generate_latest(self._registry)
