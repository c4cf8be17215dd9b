"""In how much time any engine ran: the time that rates are over.

Two servers that run at once serve twice the requests, and not in twice the time. So an hour counts
as long as at least one engine ran in it. Where one did, that is its wall time, to the nanosecond.
Of several it is the union of the times in which they lived, by the wall clock.

Invariant: an hour counts at least as long as its longest engine ran, and at most as long as all of
them together, or an hour.
"""

from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

from vllm_cost_meter.ledger.queries.cut import Cut, RunCut
from vllm_cost_meter.units.time import NS_PER_HOUR, unix_ns_of


def engines_at_once(cut: Cut) -> int:
    """Return the largest number of engines that ran at once in a cut's window."""
    first, last = cut.window.from_hour, cut.window.to_hour
    changes: list[tuple[int, int]] = []
    for run in cut.runs:
        low, high = _lived(run)
        low = low if first is None else max(low, first * NS_PER_HOUR)
        high = high if last is None else min(high, last * NS_PER_HOUR)
        if low < high:
            changes += [(low, 1), (high, -1)]
    # At one instant an engine ends before another begins.
    return max(accumulate(change for _, change in sorted(changes)), default=0)


def _lived(run: RunCut) -> tuple[int, int]:
    """Return when a run began and was last heard of, in ns."""
    began, seen = run.lifetime()
    return unix_ns_of(began), unix_ns_of(max(seen, run.heard_at()))


class _Ran(NamedTuple):
    """How long an engine ran in an hour, and when it lived in it."""

    wall_ns: float
    low_ns: int
    high_ns: int


def observed_ns(cut: Cut) -> dict[int, float] | None:
    """Return the time in which any engine ran, in ns, by hour of a cut's window.

    None if only bills are known of a run in the window: nobody knows how long it ran.
    """
    if cut.without_totals_ns():
        return None
    by_hour: dict[int, list[_Ran]] = {}
    for run in cut.runs:
        began, seen = _lived(run)
        for hour, classes in run.hours.items():
            if cut.window.contains(hour) and (gpu_ns := sum(classes.values())):
                low, high = hour * NS_PER_HOUR, (hour + 1) * NS_PER_HOUR
                ran = _Ran(gpu_ns / int(run.row["gpus"]), max(low, began), min(high, seen))
                by_hour.setdefault(hour, []).append(ran)
    return {hour: _together(engines) for hour, engines in sorted(by_hour.items())}


def _together(engines: list[_Ran]) -> float:
    if len(engines) == 1:
        return engines[0].wall_ns
    walls = [engine.wall_ns for engine in engines]
    union = _union_ns((engine.low_ns, engine.high_ns) for engine in engines)
    return max(*walls, min(union, sum(walls), NS_PER_HOUR))


def _union_ns(spans: Iterable[tuple[int, int]]) -> int:
    total, until = 0, None
    for low, high in sorted(spans):
        begin = low if until is None else max(low, until)
        if high > begin:
            total += high - begin
            until = high
    return total
