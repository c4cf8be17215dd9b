"""The energy books of one engine run: charge every millijoule read to a request or a class.

The energy is read once per snapshot. The time between two readings is a window (`meter.py`). A
window is divided over the time that the books booked in it: to each class, and within busy time to
each request (`shares.py`). Three rules keep that right at the edges:

- A step that runs when a window ends has no shares yet. It takes part as `in_flight`. Its energy is
  divided later, together with the busy part of the next window, by the time that is booked then.
  Otherwise the idle moment before a long step would be charged with the power of the step.
- A bill leaves before its window ends, so it cannot include energy. A later snapshot reports the
  energy by the bill's number, and repeats it until a snapshot that had it is acknowledged.
- If a request ran in a window with unknown energy, its energy is unknown for the hour in which that
  window ended. Its known energy in that hour becomes `unattributed`.

Energy belongs to the hour in which its window ends, at most one window after it was used.

Invariant: the classes add up to the energy read, to the millijoule, over the run and within each
hour. The class `requests` is the sum of all request energies that were reported.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from vllm_cost_meter.engine.energy.shares import (
    QUIET_CLASSES,
    PowerBounds,
    split_by_time,
    split_energy,
)
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.records.energy import ENERGY_CLASSES, RequestEnergy, RunEnergy
from vllm_cost_meter.records.snapshot import ClassTotals

logger = meter_logger()

# Classes of busy time besides requests; `lost` is mostly steps that could not be measured.
BUSY_CLASSES = ("tail", "dummy", "recomputed", "lost")
# Number of bills with energy that is not reported or not acknowledged yet; they take 10 MB. If
# there are more, nobody reads the snapshots.
UNREPORTED_MAX = 50_000


@dataclass(frozen=True, slots=True)
class WindowEnd:
    """The time books at the end of a window, i.e. at snapshot `number`.

    `totals` and `open_gpu_ns` (by open request) are GPU-ns since the run began. `running_ns` is the
    GPU time of the running step, which is not split yet. `running` lists the requests of that step;
    they are needed only if the window's energy is unknown.
    """

    number: int
    hour: int
    totals: ClassTotals
    open_gpu_ns: Mapping[str, int]
    running_ns: int
    running: Collection[str] = ()

    @property
    def measured_ns(self) -> int:
        """The GPU-ns since the first reading."""
        return self.totals.total() - self.totals.startup


@dataclass(slots=True, eq=False)
class _Request:
    """A request's GPU time at the end of the last window, and its energy by hour so far."""

    gpu_ns: int = 0
    mj: dict[int, int] = field(default_factory=dict)
    # The reason code of each hour in which a part of the energy is unknown.
    unknown: dict[int, str] = field(default_factory=dict)

    def miss(self, hour: int, reason: str) -> None:
        """Note that it ran while the energy was unknown."""
        self.mj.setdefault(hour, 0)
        self.unknown.setdefault(hour, reason.partition(":")[0])


# GPU-ns of a window's busy time, by request or class.
_Parties = dict[_Request | str, int]


class EnergyBooks:
    """Divides the windows of one run. `dropped` counts requests with energy never reported."""

    def __init__(self, gpus: int, unreported_max: int = UNREPORTED_MAX) -> None:
        """Begin at the first reading, when all time so far was booked as startup.

        If more than `unreported_max` requests wait to be reported, the oldest are dropped.
        """
        self._unreported_max = unreported_max
        self.dropped = 0
        self.off = False
        self._bounds = PowerBounds(gpus)
        # The energy read, None before the first reading; and why the latest unknown window is so.
        self._energy_mj: int | None = None
        self._unknown_ns = 0
        self._reason: str | None = None
        # The end of the last window, and each open request at that instant.
        self._end = WindowEnd(0, 0, ClassTotals(), {}, 0)
        self._open: dict[str, _Request] = {}
        # Bills since the last window: number, request, GPU-ns.
        self._billed: deque[tuple[int, str, int]] = deque()
        # GPU-ns of bills that were dropped since the last window.
        self._dropped_ns = 0
        # Energy read but not divided yet: for the running step, and for a window without any time.
        self._running_mj = 0
        self._carried_mj = 0
        self._classes = dict.fromkeys(ENERGY_CLASSES, 0)
        self._hours: dict[int, dict[str, int]] = {}
        # The first snapshot that surely included an hour's latest change, by hour.
        self._changed: dict[int, int] = {}
        # Reported but not acknowledged energies, each with the first snapshot that had it.
        self._reported: deque[tuple[int, RequestEnergy]] = deque()

    def billed(self, seq: int, request_id: str, gpu_ns: int) -> None:
        """Note the bill of a request and its GPU time."""
        if self.off:
            return
        while len(self._billed) + len(self._reported) >= self._unreported_max:
            self._drop_oldest()
        self._billed.append((seq, request_id, gpu_ns))

    def close_window(
        self, end: WindowEnd, energy_mj: int | None, reason: str | None, power_max_mw: int | None
    ) -> None:
        """Divide the energy of a window; `energy_mj` is None, with a reason, if unknown."""
        before, self._end = self._end, replace(end, totals=replace(end.totals))
        window_ns = end.measured_ns - before.measured_ns
        if energy_mj is None:
            self._unknown_ns += window_ns
            self._reason = reason
        if self.off:
            return
        parties, ended = self._parties(before)
        quiet = {name: self._grown(name, before) for name in QUIET_CLASSES}
        busy_ns = max(sum(parties.values()) - before.running_ns, 0)
        busy_mj = 0
        if energy_mj is None:
            self._miss(parties, reason or "error")
        else:
            self._energy_mj = (self._energy_mj or 0) + energy_mj
            self._carried_mj += energy_mj
            self._cell_of(end.hour)  # The hour's energy is known, even if it is 0.
            if busy_ns or any(quiet.values()):
                self._bounds = replace(self._bounds, max_mw=power_max_mw)
                self._bounds = self._bounds.after(self._carried_mj, window_ns)
                busy_mj = self._divide(busy_ns, quiet)
        self._divide_busy(self._running_mj + busy_mj, parties)
        for seq, request in ended:
            self._tell(seq, request)

    def give_up(self, reason: str) -> None:
        """Stop keeping energy of requests, because no energy can be read any more."""
        if self.off:
            return
        self.off = True
        self._reason = reason
        for request in self._open.values():
            self._move_all("unattributed", request)
        self._add("unattributed", self._running_mj + self._carried_mj, self._end.hour)
        self._running_mj = self._carried_mj = 0
        self._open.clear()
        self._billed.clear()

    def energy(
        self, acknowledged: int, devices: Iterable[tuple[str | None, str | None]]
    ) -> RunEnergy:
        """Return the run's energy at the end of the window, with all news not yet acknowledged."""
        hour = self._end.hour
        while self._reported and self._reported[0][0] <= acknowledged:
            self._reported.popleft()
        for past, number in list(self._changed.items()):
            if number <= acknowledged and past != hour:
                del self._changed[past]
        if self._energy_mj is None:
            # Nothing was divided, but `reported` may hold requests with unknown energy.
            reported = tuple(reported for _, reported in self._reported)
            return RunEnergy(
                None, self._reason, self._unknown_ns, devices=tuple(devices), reported=reported
            )
        undivided_mj = self._running_mj + self._carried_mj
        if undivided_mj or hour in self._hours:
            self._cell_of(hour)
            # The next snapshot repeats this hour; by then the undivided energy may have left it.
            self._changed_in(hour)
        hours = {past: dict(self._hours[past]) for past in self._changed}
        if undivided_mj:
            hours[hour]["in_flight"] += undivided_mj
        return RunEnergy(
            energy_mj=self._energy_mj,
            reason=self._reason,
            unknown_ns=self._unknown_ns,
            classes={**self._classes, "in_flight": self._classes["in_flight"] + undivided_mj},
            devices=tuple(devices),
            hours=hours,
            reported=tuple(reported for _, reported in self._reported),
        )

    # -- a window -------------------------------------------------------------------------------

    def _parties(self, before: WindowEnd) -> tuple[_Parties, list[tuple[int, _Request]]]:
        """Return the parties of the window's busy time, and the requests billed in it."""
        end = self._end
        known = self._open
        parties: _Parties = {}
        ended = []
        for seq, request_id, gpu_ns in self._billed:
            request = _take(known, request_id, gpu_ns)
            parties[request] = gpu_ns - request.gpu_ns
            ended.append((seq, request))
        self._billed.clear()
        # A request that is neither open nor billed was written off. So was one that has less time
        # than before: the id now belongs to another request.
        gone = [known.pop(request_id) for request_id in known.keys() - end.open_gpu_ns.keys()]
        for request_id, gpu_ns in end.open_gpu_ns.items():
            found = known.get(request_id)
            if found is None or found.gpu_ns > gpu_ns:
                gone += [found] if found else []
                found = known[request_id] = _Request()
            if gpu_ns > found.gpu_ns:
                parties[found] = gpu_ns - found.gpu_ns
                found.gpu_ns = gpu_ns
        parties |= {name: self._grown(name, before) for name in BUSY_CLASSES}
        # All their time has become lost.
        parties["lost"] = max(parties["lost"] - sum(each.gpu_ns for each in gone), 0)
        for request in gone:
            self._move_all("lost", request)
        parties["unattributed"], self._dropped_ns = self._dropped_ns, 0
        parties["in_flight"] = end.running_ns
        return parties, ended

    def _grown(self, name: str, before: WindowEnd) -> int:
        grown: int = getattr(self._end.totals, name) - getattr(before.totals, name)
        return grown

    def _miss(self, parties: _Parties, reason: str) -> None:
        """Note that the energy is unknown for every request that ran in the window."""
        for party, gpu_ns in parties.items():
            if gpu_ns and isinstance(party, _Request):
                party.miss(self._end.hour, reason)
        if self._end.running_ns:
            for request_id in self._end.running:
                if request_id in self._open:
                    self._open[request_id].miss(self._end.hour, reason)

    def _divide(self, busy_ns: int, quiet: Mapping[str, int]) -> int:
        """Charge the quiet classes with their part of the window, and return the busy part."""
        shares = split_energy(self._carried_mj, {"busy": busy_ns}, quiet, self._bounds)
        self._carried_mj = 0
        for name, mj in shares.quiet_mj.items():
            self._add(name, mj, self._end.hour)
        return shares.busy_mj["busy"]

    def _divide_busy(self, busy_mj: int, parties: _Parties) -> None:
        """Charge each busy party in proportion to its time."""
        self._running_mj = busy_mj
        if not any(parties.values()):
            return  # There is no party yet, so the next window takes the energy.
        hour = self._end.hour
        requests_mj = 0
        for party, mj in split_by_time(busy_mj, parties).items():
            if isinstance(party, _Request):
                party.mj[hour] = party.mj.get(hour, 0) + mj
                requests_mj += mj
            elif party == "in_flight":
                self._running_mj = mj
            else:
                self._add(party, mj, hour)
        self._add("in_flight", requests_mj, hour)

    # -- requests -------------------------------------------------------------------------------

    def _tell(self, seq: int, request: _Request) -> None:
        """Queue a request's energy for the next snapshots, once its last window has ended."""
        for hour, mj in (request.mj or {self._end.hour: 0}).items():
            reason = request.unknown.get(hour)
            self._move("in_flight", "unattributed" if reason else "requests", mj, hour)
            energy = RequestEnergy(seq, hour, None if reason else mj, reason)
            self._reported.append((self._end.number, energy))

    def _drop_oldest(self) -> None:
        """Drop the oldest request's energy, because nobody has read snapshots for very long."""
        if not self.dropped:
            logger.warning(
                "cost meter: nobody has read the energy of the last %d requests; the oldest ones"
                " are dropped from now on, and their energy is null in the ledger",
                self._unreported_max,
            )
        self.dropped += 1
        if not self._reported:
            _, request_id, gpu_ns = self._billed.popleft()
            request = _take(self._open, request_id, gpu_ns)
            self._dropped_ns += gpu_ns - request.gpu_ns
            self._move_all("unattributed", request)
            return
        seq = self._reported[0][1].seq
        while self._reported and self._reported[0][1].seq == seq:
            _, reported = self._reported.popleft()
            self._move("requests", "unattributed", reported.energy_mj or 0, reported.hour)

    # -- classes and hours ----------------------------------------------------------------------

    def _move_all(self, target: str, request: _Request) -> None:
        for hour, mj in request.mj.items():
            self._move("in_flight", target, mj, hour)

    def _move(self, source: str, target: str, mj: int, hour: int) -> None:
        self._add(source, -mj, hour)
        self._add(target, mj, hour)

    def _add(self, name: str, mj: int, hour: int) -> None:
        if mj:
            self._classes[name] += mj
            self._cell_of(hour)[name] += mj
            self._changed_in(hour)

    def _changed_in(self, hour: int) -> None:
        if hour in self._hours:
            # A change may fall between two snapshots. Sending an hour once too often does no harm.
            self._changed[hour] = self._end.number + 1

    def _cell_of(self, hour: int) -> dict[str, int]:
        if hour not in self._hours:
            self._hours[hour] = dict.fromkeys(ENERGY_CLASSES, 0)
        return self._hours[hour]


def _take(known: dict[str, _Request], request_id: str, gpu_ns: int) -> _Request:
    """Remove and return a known request; a smaller `gpu_ns` means a new request with its id."""
    request = known.get(request_id)
    if request is None or request.gpu_ns > gpu_ns:
        return _Request()
    return known.pop(request_id)
