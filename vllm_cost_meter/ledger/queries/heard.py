"""Which engines live, by whether their snapshots go on; the clocks of other machines do not decide.

A snapshot has a number, which grows. When the number of a run has grown, its engine was alive since
the look before. Until then a run is judged by the instant in its snapshot, as far as that can be
right: a clock that is off by hours makes an engine neither dead nor alive for longer than a look.

Invariant: an engine whose snapshots stopped is dead after `DEAD_AFTER_NS` on the monotonic clock.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from vllm_cost_meter.ledger.queries.cut import DEAD_AFTER_NS
from vllm_cost_meter.units.time import unix_ns_of


class LatestSnapshot(NamedTuple):
    """What the latest snapshot of a run says of it."""

    run_id: str
    number: int
    taken_at: str
    state: str


@dataclass(frozen=True, slots=True)
class Instant:
    """One instant on two clocks: this machine's wall clock, and the one that only goes forward."""

    unix_ns: int
    monotonic_ns: int


@dataclass(frozen=True, slots=True)
class LivingRun:
    """A run whose engine lives, and when it was last heard of on the monotonic clock."""

    told: LatestSnapshot
    heard_ns: int


class Heard:
    """When each run was last heard of."""

    def __init__(self) -> None:
        # The number of the latest snapshot, and when it was heard of; None for too long ago.
        self._runs: dict[str, tuple[int, int | None]] = {}
        self._looked_ns: int | None = None

    def look(
        self, snapshots: Iterable[LatestSnapshot], at: Instant, alive: Collection[str] = ()
    ) -> list[LivingRun]:
        """Return the runs that live; `alive` names runs whose engines are known to, if silent."""
        living = []
        runs: dict[str, tuple[int, int | None]] = {}
        for told in snapshots:
            heard_ns = self._heard(told, at)
            runs[told.run_id] = told.number, heard_ns
            is_up = heard_ns is not None and at.monotonic_ns - heard_ns <= DEAD_AFTER_NS
            if is_up or told.run_id in alive:
                silent_ns = max(at.unix_ns - unix_ns_of(told.taken_at), 0)
                since_ns = at.monotonic_ns - silent_ns if heard_ns is None else heard_ns
                living.append(LivingRun(told, since_ns))
        self._runs, self._looked_ns = runs, at.monotonic_ns
        return living

    def _heard(self, told: LatestSnapshot, at: Instant) -> int | None:
        known = self._runs.get(told.run_id)
        if known is not None and known[0] == told.number:
            return known[1]
        age_ns = at.unix_ns - unix_ns_of(told.taken_at)
        if self._looked_ns is None:
            # Nothing is known but that instant: it counts if it may be that of a living engine.
            plausible = abs(age_ns) <= DEAD_AFTER_NS
            return at.monotonic_ns - max(age_ns, 0) if plausible else None
        # It was taken since the look before, as far as its clock agrees with that.
        since_ns = at.monotonic_ns - self._looked_ns
        return at.monotonic_ns - age_ns if 0 <= age_ns <= since_ns else at.monotonic_ns
