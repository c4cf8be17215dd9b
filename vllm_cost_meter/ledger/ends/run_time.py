"""The GPU time of one run at a cut, by class, by hour and by span of hours at one price.

Invariant: the spans and what is in none of them make up the total, class by class and in all.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_cost_meter.prices.run_prices import RunPrices
from vllm_cost_meter.records.snapshot import CLASSES

NO_TIME: Mapping[str, int] = dict.fromkeys(CLASSES, 0)


@dataclass(frozen=True, slots=True)
class RunTime:
    """The GPU time of one run at the cut, in the window.

    `classes` has the GPU-ns by class, and `hours` has them in each hour, also outside of the
    window. `stretches` divides `classes` by spans of hours at one price (see `prices.run_prices`).
    `wall_gpu_ns` is wall time x GPUs. Bills count up to number `last_seq`.
    """

    run_id: str
    last_seq: int
    prices: RunPrices
    classes: Mapping[str, int]
    hours: Mapping[int, Mapping[str, int]]
    stretches: Mapping[int, Mapping[str, int]]
    wall_gpu_ns: int

    def total_ns(self) -> int:
        return sum(self.classes.values())

    def used_ns(self, name: str | None = None) -> dict[int | None, int]:
        """Return the GPU time of a class, or of all, by span of hours at one price."""
        total = self.wall_gpu_ns if name is None else self.classes[name]
        return by_hour(self.stretches, name, total)


def by_hour(
    stretches: Mapping[int, Mapping[str, int]], name: str | None, total: int
) -> dict[int | None, int]:
    """Return a class, or all, by span of hours; None has the part of `total` in no span."""
    used: dict[int | None, int] = {
        hour: sum(classes.values()) if name is None else classes.get(name, 0)
        for hour, classes in stretches.items()
    }
    rest = total - sum(used.values())
    return {**used, None: rest} if rest else used


def as_ended(
    classes: Mapping[str, int], billed_ns: int = 0, of_in_flight_ns: int = 0
) -> Mapping[str, int]:
    """Return the classes of a dead run with its last bills: what was in flight besides is lost."""
    if not (classes["in_flight"] or billed_ns or of_in_flight_ns):
        return classes  # as in most hours
    lost = classes["lost"] + classes["in_flight"] - of_in_flight_ns
    return {**classes, "requests": classes["requests"] + billed_ns, "in_flight": 0, "lost": lost}
