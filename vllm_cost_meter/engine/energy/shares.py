"""Divide a window's energy over requests and classes of time: the theory and the arithmetic.

1. A window is the time between two readings of the energy counter (`nvml.py`). The counter moves
   every 20 to 100 ms, by 70 J at 700 W. A step of 5 ms therefore has no energy of its own, and we
   divide windows, not steps. Whole millijoules, the counter's own unit, are fine enough.
   Microjoules would only show digits that nobody measured.
2. A window's energy E goes to *busy* time (steps, or what may have been steps) and *quiet* time
   (`QUIET_CLASSES`). By time alone, a quiet nanosecond would pay for the power of a busy one. So:

       busy = max(even, min(E - p_idle * quiet_ns, p_max * busy_ns)),  quiet = E - busy
       even = E * busy_ns / (busy_ns + quiet_ns)

   p_idle is the lowest mean power of any window so far. Apart from the counter's coarseness it is
   never below the true idle power, and it equals that once a window was quiet throughout. Until
   then, idle and host time pay too much rather than too little. p_max is the largest power that the
   cards can be set to. Working GPUs draw no less than waiting ones (even) and no more than the card
   can draw (p_max). These bounds keep the noise of p_idle from landing on one short request.
3. Within busy and within quiet time each share is proportional to its GPU-ns.

There are three limits. All busy time of a window costs the same energy per nanosecond, whether it
was memory-bound or compute-bound. Host time between steps, with clocks up, draws more than the idle
power that it is charged. Up to 100 ms of one window may be counted in the next.

Invariant: the parts of a window add up to its energy, to the millijoule.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self, TypeVar

from vllm_cost_meter.attribution import split
from vllm_cost_meter.units.time import NS_PER_SECOND

T = TypeVar("T")

# Classes of time in which no step ran. `startup` is not among them, because much of it is work.
# Neither is `lost`, which is mostly steps that could not be measured.
QUIET_CLASSES = ("idle", "sleep", "host")

# A shorter window says little about power: one in ten moves of the counter may belong to another.
POWER_WINDOW_NS_MIN = NS_PER_SECOND


@dataclass(frozen=True, slots=True)
class PowerBounds:
    """Bounds of the power of an engine's cards, as known so far; `after` refines them.

    `max_mw` is `EnergyCounter.power_max_mw`. The lowest mean power seen so far is `low_mj`
    millijoules in `low_gpu_ns` GPU-nanoseconds; `low_gpu_ns` is 0 if none was seen yet.
    """

    gpus: int
    max_mw: int | None = None
    low_mj: int = 0
    low_gpu_ns: int = 0

    def after(self, energy_mj: int, gpu_ns: int) -> Self:
        """Return the bounds after a window of `gpu_ns` GPU-nanoseconds (wall x gpus) in all."""
        if gpu_ns < POWER_WINDOW_NS_MIN * self.gpus:
            return self
        if self.low_gpu_ns and energy_mj * self.low_gpu_ns >= self.low_mj * gpu_ns:
            return self
        return replace(self, low_mj=energy_mj, low_gpu_ns=gpu_ns)

    def busy_mj(self, energy_mj: int, busy_gpu_ns: int, quiet_gpu_ns: int) -> int:
        """Return the busy time's part of a window's energy, in millijoules: point 2 above."""
        if not busy_gpu_ns or not quiet_gpu_ns:
            return energy_mj if busy_gpu_ns else 0
        even_mj = energy_mj * busy_gpu_ns // (busy_gpu_ns + quiet_gpu_ns)
        if not self.low_gpu_ns:
            return even_mj
        busy_mj = energy_mj - self.low_mj * quiet_gpu_ns // self.low_gpu_ns
        if self.max_mw is not None:
            # mW x s = mJ, and the cards' GPU-ns are wall time x gpus.
            busy_mj = min(busy_mj, self.max_mw * busy_gpu_ns // (self.gpus * NS_PER_SECOND))
        return max(even_mj, busy_mj)


@dataclass(frozen=True, slots=True)
class EnergyShares:
    """A window's energy by key, in millijoules. Both parts together are the window's energy."""

    busy_mj: dict[str, int]
    quiet_mj: dict[str, int]


def split_energy(
    energy_mj: int,
    busy_gpu_ns: Mapping[str, int],
    quiet_gpu_ns: Mapping[str, int],
    bounds: PowerBounds,
) -> EnergyShares:
    """Divide a window's energy over its GPU-ns, busy and quiet time apart.

    Keys are request ids and classes; their time adds up to the window's wall time x gpus. `bounds`
    may be the bounds before or `after` this window. A share is within 1 mJ of its exact value; in a
    window of more than 2 GPU-seconds add 2 billionths of the window per key. Raises ValueError for
    a negative energy or time, and for energy without any time. The caller adds such energy to the
    next window.
    """
    total_busy_ns, total_quiet_ns = sum(busy_gpu_ns.values()), sum(quiet_gpu_ns.values())
    if energy_mj and not total_busy_ns + total_quiet_ns:
        raise ValueError(f"split_energy: expected some GPU time for {energy_mj} mJ, got none")
    busy_mj = bounds.busy_mj(energy_mj, total_busy_ns, total_quiet_ns)
    return EnergyShares(
        busy_mj=split_by_time(busy_mj, busy_gpu_ns),
        quiet_mj=split_by_time(energy_mj - busy_mj, quiet_gpu_ns),
    )


def split_by_time(energy_mj: int, gpu_ns: Mapping[T, int]) -> dict[T, int]:
    """Divide an energy in proportion to GPU-ns: point 3 above."""
    # `split` needs weights that add up to less than 2**31, which is 2 GPU-seconds in ns. A longer
    # window is weighed in units of 2, 4, 8 and so on ns, and then still has at least 2**30 units.
    shift = max(0, sum(gpu_ns.values()).bit_length() - 31)
    weights = [ns >> shift for ns in gpu_ns.values()]
    return dict(zip(gpu_ns, split(energy_mj, weights), strict=True))
