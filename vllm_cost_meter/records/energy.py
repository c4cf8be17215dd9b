"""Energy records of an engine: they ride in its snapshots and end in the ledger.

Amounts are millijoules since the first reading of the engine's GPUs. An unknown amount is None
with a reason, never 0.

Invariant: `energy_mj`, the energy read so far, is the sum of `classes`. The class `requests` is the
sum of all request energies that were ever reported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple, Self

# The classes of time (`records/snapshot.py`) without `startup`: it ends before the first reading.
# `unattributed` is energy that was read and belongs to no one, e.g. the known part of a request's
# energy if its other part is unknown.
ENERGY_CLASSES = (
    "requests",
    "in_flight",
    "idle",
    "sleep",
    "tail",
    "dummy",
    "recomputed",
    "host",
    "lost",
    "unattributed",
)


class RequestEnergy(NamedTuple):
    """Energy of one billed engine request in one UTC hour; None if any part of it is unknown.

    `reason` is then the code that says why (`REASONS` in `engine/energy/nvml.py`).
    """

    seq: int
    hour: int
    energy_mj: int | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class RunEnergy:
    """The energy of one engine run at the instant of a snapshot.

    `energy_mj` is None until the first energy is known. `unknown_ns` counts the GPU-ns (since the
    first reading) of windows with unknown energy; `reason` explains the latest such window.
    `devices` has the name and UUID of each GPU. `hours` and `reported` hold news only, since the
    last snapshot that the reader acknowledged: the hours that changed, and the requests with an
    energy that was settled, as known or as unknown.
    """

    energy_mj: int | None
    reason: str | None
    unknown_ns: int = 0
    classes: Mapping[str, int] = field(default_factory=dict)
    devices: tuple[tuple[str | None, str | None], ...] = ()
    hours: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    reported: tuple[RequestEnergy, ...] = ()

    def __post_init__(self) -> None:
        if self.energy_mj is None and self.reason is None:
            raise ValueError("expected an energy or a reason why there is none, got neither")

    def merged_over(self, older: "RunEnergy") -> "RunEnergy":
        """Return these values plus the hours and requests of an older snapshot."""
        reported = {(each.seq, each.hour): each for each in (*older.reported, *self.reported)}
        return RunEnergy(
            self.energy_mj,
            self.reason,
            self.unknown_ns,
            self.classes,
            self.devices,
            {**older.hours, **self.hours},
            tuple(reported.values()),
        )

    def to_wire(self) -> dict[str, Any]:
        """Return plain values for msgpack. Requests are one flat list, as there may be many."""
        return {
            "energy_mj": self.energy_mj,
            "reason": self.reason,
            "unknown_ns": self.unknown_ns,
            "classes": dict(self.classes),
            "devices": [list(device) for device in self.devices],
            "hours": {str(hour): dict(classes) for hour, classes in self.hours.items()},
            "reported": list(chain.from_iterable(self.reported)),
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Parse the values of `to_wire`. Raises TypeError, ValueError or KeyError on others."""
        values = dict(wire)
        flat = iter(values["reported"])
        size = len(RequestEnergy._fields)
        requests = len(values["reported"]) // size
        values["reported"] = tuple(RequestEnergy(*islice(flat, size)) for _ in range(requests))
        values["devices"] = tuple((name, uuid) for name, uuid in values["devices"])
        values["hours"] = {int(hour): classes for hour, classes in values["hours"].items()}
        return cls(**values)


# The energy of an engine that has not reported its GPUs.
NO_ENERGY = RunEnergy(None, "no_device: the engine reported no GPU")
