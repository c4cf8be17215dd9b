"""The energy meter: reads an engine's GPU energy at each snapshot, and keeps the energy books.

A window ends at the instant of each snapshot, so that energy and booked time cover the same
stretch. Nothing is read while a step is processed; a bill costs one list entry here.

Invariant: nothing here raises. After an error of the energy meter, further energy is unknown, and
energy known before stays as it was. Time and bills do not depend on it.
"""

from collections.abc import Sequence
from dataclasses import replace

from vllm_cost_meter.engine.books import EngineBooks
from vllm_cost_meter.engine.energy.books import EnergyBooks, WindowEnd
from vllm_cost_meter.engine.energy.nvml import LASTING_REASONS, EnergyCounter
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.records.bill import Bill
from vllm_cost_meter.records.energy import RunEnergy
from vllm_cost_meter.records.snapshot import Snapshot
from vllm_cost_meter.units.time import NS_PER_HOUR

logger = meter_logger()


class EnergyMeter:
    """The energy of one engine run: its counter, its windows, its books."""

    def __init__(self, counter: EnergyCounter, gpus: int, now_ns: int) -> None:
        """Read the counter for the first time; the first window begins there."""
        self._counter = counter
        self._books = EnergyBooks(gpus)
        self._failed = False
        self._measured_ns = 0
        reading = counter.read(now_ns)
        self._last = RunEnergy(None, reading.reason or "first", devices=tuple(self._devices()))
        self._give_up_if_lasting(reading.reason)

    def billed(self, request_id: str, bill: Bill) -> None:
        """Note the bill of a request, whose energy is known when the window ends."""
        if self._books.off:
            return
        try:
            self._books.billed(bill.seq, request_id, bill.gpu_time_ns)
        except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
            self._fail(error)

    def added_to(
        self, snapshot: Snapshot, books: EngineBooks, now_ns: int, acknowledged: int
    ) -> Snapshot:
        """End a window at `now_ns`, the instant of `snapshot`; return it with the energy added."""
        try:
            if not self._failed:
                self._last = self._energy(snapshot, books, now_ns, acknowledged)
        except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
            self._fail(error)
        measured_ns = snapshot.totals.total() - snapshot.totals.startup
        if self._failed:
            unknown_ns = self._last.unknown_ns + measured_ns - self._measured_ns
            self._last = replace(self._last, unknown_ns=unknown_ns)
        self._measured_ns = measured_ns
        return replace(snapshot, energy=self._last)

    def _energy(
        self, snapshot: Snapshot, books: EngineBooks, now_ns: int, acknowledged: int
    ) -> RunEnergy:
        off = self._books.off
        reading = None if off else self._counter.read(now_ns)
        energy_mj = reading.energy_mj if reading else None
        reason = reading.reason if reading else self._last.reason
        end = WindowEnd(
            number=snapshot.number,
            hour=snapshot.taken_at_ns // NS_PER_HOUR,
            totals=snapshot.totals,
            open_gpu_ns={} if off else books.open_gpu_ns(),
            running_ns=snapshot.step_ns,
            running=books.running() if energy_mj is None and not off else (),
        )
        self._give_up_if_lasting(reason)
        self._books.close_window(end, energy_mj, reason, self._counter.power_max_mw)
        return self._books.energy(acknowledged, self._devices())

    def _give_up_if_lasting(self, reason: str | None) -> None:
        if reason is None or self._books.off:
            return
        if self._last.energy_mj is None and reason.partition(":")[0] in LASTING_REASONS:
            self._books.give_up(reason)

    def _devices(self) -> Sequence[tuple[str | None, str | None]]:
        return [(device.name, device.uuid) for device in self._counter.devices]

    def _fail(self, error: Exception) -> None:
        if not self._failed:
            logger.error(
                "cost meter: the energy of this engine is unknown from now on: %r. Time and bills"
                " go on as before.",
                error,
                exc_info=error,
            )
        self._failed = True
        self._last = replace(self._last, reason=f"error: the meter failed with {error!r}")
