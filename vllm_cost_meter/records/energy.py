"""What a snapshot says of its engine's energy: values that travel from the engine to the ledger.

Amounts are millijoules since the first reading of the engine's GPUs. Unknown is None with a reason,
never 0.

Invariant: `energy_mj`, all that was read, is the sum of `classes`; and the class `requests` is the
sum of all energies of requests that were ever reported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple, Self

# The classes of time (records.py) but for `startup`, which is over when the energy is first read;
# and what was read, but is of nobody: the rest of a request of which a part is unknown.
ENERGY_CLASSES = (
    "requests",
    "in_flight",
    "idle",
    "sleep",
    "tail",
    "dummy",
    "host",
    "lost",
    "unattributed",
)


class RequestEnergy(NamedTuple):
    """What one billed engine request used within one UTC hour; None where a part is unknown.

    `reason` is the code that says why (`energy.REASONS`).
    """

    seq: int
    hour: int
    energy_mj: int | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class RunEnergy:
    """The energy of one engine run, as of a snapshot.

    `energy_mj` is None until it was known for the first time. `unknown_ns` are the GPU-ns, since
    the first reading, of windows whose energy is unknown; `reason` is that of the latest of them.
    `devices` are the name and UUID of each GPU. `hours` holds those hours that changed since the
    snapshot the reader acknowledged, `reported` the requests whose energy came to be known, or is
    known to be unknown, since then.
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
        """Return these values with the hours and requests of an older snapshot besides."""
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
        """Return plain msgpack-able values. Requests are flat: there may be very many of them."""
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
        """Build it from `to_wire`'s form. Raises TypeError, ValueError or KeyError on others."""
        values = dict(wire)
        flat = iter(values["reported"])
        size = len(RequestEnergy._fields)
        requests = len(values["reported"]) // size
        values["reported"] = tuple(RequestEnergy(*islice(flat, size)) for _ in range(requests))
        values["devices"] = tuple((name, uuid) for name, uuid in values["devices"])
        values["hours"] = {int(hour): classes for hour, classes in values["hours"].items()}
        return cls(**values)


# Of an engine that said nothing of its GPUs.
NO_ENERGY = RunEnergy(None, "no_device: the engine told of no GPU")
