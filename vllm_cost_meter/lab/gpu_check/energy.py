"""Energy of a window in three ways: NVML's counter, its power integrated, the meter's books.

The meter's books are read at the instants of two of its snapshots, and the other two are taken
between exactly these instants, out of samples that a watch took all the while. So what differs is
not where a window begins and ends. The counter moves in jumps: at each end of a window it may be
one jump off, and so may what the meter read of it. That is the noise of the comparison. Power is a
mean over the last second on most cards, so its integral lacks what it changed in one second.

Invariant: the three figures are of one window; one that was not read is None, with the reason.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any, NamedTuple

from vllm_cost_meter.engine.energy.nvml import WRAP_DELTA_MJ_MAX, WRAP_MJ
from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.gpu_check.card import NvidiaCard, PowerSample, PowerWatch
from vllm_cost_meter.lab.gpu_check.mixed import Driven, drive
from vllm_cost_meter.lab.gpu_check.plan import EnergySize
from vllm_cost_meter.lab.gpu_check.served import Checked

NS = 10**9
SNAPSHOT_TIMEOUT_S = 15
LOOK_EVERY_S = 0.1
# What the meter's books say of a run, as differences over a window.
CLASSES = ("busy_ns", "own_ns", "requests_ns", "idle_ns")
# So long power is averaged, at most.
POWER_MEAN_S = 1.0

Points = Sequence[tuple[int, int]]


class BooksAt(NamedTuple):
    """The meter's books at a snapshot, in Unix ns: energy since the run began, GPU time by class.

    Without an energy there is a reason.
    """

    unix_ns: int
    energy_mj: int | None
    energy_unknown_ns: int
    reason: str | None
    classes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Energies:
    """The energy of a window in mJ, in three ways, and how well each is known."""

    seconds: float
    counter_mj: float | None
    integral_mj: float | None
    meter_mj: int | None
    # Twice the largest jump of the counter.
    counter_noise_mj: float | None
    # What power changed, for as long as it is averaged.
    integral_noise_mj: float | None
    why_not: str | None

    @property
    def meter_ratio(self) -> float | None:
        """The meter's energy by the counter's."""
        return self.meter_mj / self.counter_mj if self.meter_mj and self.counter_mj else None

    @property
    def integral_ratio(self) -> float | None:
        """Integrated power by the counter's energy."""
        return self.integral_mj / self.counter_mj if self.integral_mj and self.counter_mj else None


def measure_energy(
    checked: Checked, card: NvidiaCard | None, size: EnergySize, on_phase: Callable[[str], None]
) -> dict[str, Any]:
    """Measure a window without traffic, and one for each number of clients; ready for JSON.

    Without a card the windows have what the books say of time, and no energy. Raises ServerError.
    """
    windows = []
    for clients in (0, *size.clients):
        on_phase(f"{clients or 'no'} clients for {size.window_s:.0f} s")
        if card is None:
            before, driven, after = _window(checked, clients, size)
            found = compared([], before, after, "no NVIDIA GPU here")
        else:
            with PowerWatch(card) as watch:
                # A snapshot is up to a second old when it is read.
                _later_books(checked, time.time_ns())
                before, driven, after = _window(checked, clients, size)
            found = compared(watch.samples, before, after)
        windows.append(
            {
                "clients": clients,
                "traffic": asdict(driven),
                "energy": asdict(found),
                "meter_by_counter": found.meter_ratio,
                "integral_by_counter": found.integral_ratio,
                **{name: after.classes[name] - before.classes[name] for name in CLASSES},
            }
        )
    return {"windows": windows}


def _window(checked: Checked, clients: int, size: EnergySize) -> tuple[BooksAt, Driven, BooksAt]:
    before = _later_books(checked, 0)
    if clients:
        seed = f"energy {clients}"
        driven = drive(checked.judged, clients, size.window_s, size.tokens_part, seed)
    else:
        time.sleep(size.window_s)
        driven = Driven(0, seconds=size.window_s)
    return before, driven, _later_books(checked, time.time_ns())


def _later_books(checked: Checked, after_ns: int) -> BooksAt:
    """Return the books at a snapshot that was taken after an instant. Raises ServerError."""
    deadline = time.monotonic() + SNAPSHOT_TIMEOUT_S
    while True:
        found = books_of(checked.judged.ask("summary"))
        if found.unix_ns > after_ns:
            return found
        if time.monotonic() > deadline:
            raise ServerError(
                f"expected a snapshot of the engine each second, got none in {SNAPSHOT_TIMEOUT_S} s"
            )
        time.sleep(LOOK_EVERY_S)


def books_of(summary: dict[str, Any]) -> BooksAt:
    """Return the books out of a summary of a server with one engine. Raises ServerError."""
    alive = [run for run in summary["runs"] if run["alive"]]
    if len(alive) != 1:
        raise ServerError(f"expected one engine that lives, got {len(alive)}")
    (run,) = alive
    taken = datetime.fromisoformat(run["taken_at"])
    return BooksAt(
        # In whole microseconds: a float of seconds would round.
        int(taken.timestamp()) * NS + taken.microsecond * 1000,
        run["energy_mj"],
        run["energy_unknown_ns"],
        run["energy_reason"],
        {name: summary[name] or 0 for name in CLASSES},
    )


def compared(
    samples: Sequence[PowerSample], before: BooksAt, after: BooksAt, no_card: str | None = None
) -> Energies:
    """Compare the energies between two snapshots; `no_card` says why there are no samples."""
    seconds = (after.unix_ns - before.unix_ns) / NS
    meter_mj, why_not = None, no_card
    if before.energy_mj is None or after.energy_mj is None:
        why_not = no_card or after.reason or before.reason
    elif after.energy_unknown_ns > before.energy_unknown_ns:
        why_not = f"a part of the window has no energy in the books: {after.reason}"
    else:
        meter_mj = after.energy_mj - before.energy_mj
    counter = unwrapped([(s.unix_ns, s.counter_mj) for s in samples if s.counter_mj is not None])
    power = [(s.unix_ns, s.power_mw) for s in samples if s.power_mw is not None]
    jumps = [later - earlier for (_, earlier), (_, later) in pairwise(counter)]
    counter_mj = integral_mj = None
    if jumps and min(jumps) < 0:
        why_not = "the counter went back: its driver was loaded anew"
    elif covers(counter, before, after):
        start, end = (at(counter, books.unix_ns) for books in (before, after))
        counter_mj = end - start
    else:
        why_not = why_not or "NVML gave no energy counter over the whole window"
    if covers(power, before, after):
        # mW x ns / 10**9 = mJ.
        integral_mj = integral(power, before.unix_ns, after.unix_ns) / NS
    else:
        why_not = why_not or "NVML gave no power over the whole window"
    values = [mw for _, mw in power]
    return Energies(
        seconds,
        counter_mj,
        integral_mj,
        meter_mj,
        None if counter_mj is None else 2.0 * max(jumps),
        None if integral_mj is None else (max(values) - min(values)) * POWER_MEAN_S,
        why_not,
    )


def unwrapped(points: Points) -> list[tuple[int, int]]:
    """Return a counter's values without the jumps back of one that has 32 bits."""
    found: list[tuple[int, int]] = []
    wraps, before_mj = 0, None
    for unix_ns, value_mj in points:
        if before_mj is not None and 0 < value_mj + WRAP_MJ - before_mj <= WRAP_DELTA_MJ_MAX:
            wraps += 1
        found.append((unix_ns, value_mj + wraps * WRAP_MJ))
        before_mj = value_mj
    return found


def covers(points: Points, before: BooksAt, after: BooksAt) -> bool:
    """Return whether samples begin before a window and end after it."""
    return bool(points) and points[0][0] <= before.unix_ns and points[-1][0] >= after.unix_ns


def at(points: Points, unix_ns: int) -> float:
    """Return a value at an instant, on a straight line between the samples around it."""
    place = bisect_left(points, unix_ns, key=lambda point: point[0])
    if place == 0:
        return float(points[0][1])
    (left_ns, left), (right_ns, right) = points[place - 1], points[place]
    return left + (right - left) * (unix_ns - left_ns) / (right_ns - left_ns)


def integral(points: Points, from_ns: int, to_ns: int) -> float:
    """Return the integral of a value over a window that the samples cover, by trapezoids."""
    inside: list[tuple[int, float]] = [
        (from_ns, at(points, from_ns)),
        *((ns, value) for ns, value in points if from_ns < ns < to_ns),
        (to_ns, at(points, to_ns)),
    ]
    return sum((b_ns - a_ns) * (a + b) / 2 for (a_ns, a), (b_ns, b) in pairwise(inside))
