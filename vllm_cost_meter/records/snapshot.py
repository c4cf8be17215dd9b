"""The values that travel through the meter: bills, snapshots, and what the ledger keeps of them.

All amounts are integers of the smallest useful unit, units last in names (`_ns` is GPU-nanoseconds
unless the name says wall time). GPU time is wall time multiplied by the GPUs of the engine, so the
parts of a run add up to `wall x gpus` exactly. A record is built once and never changed; what comes
from another process is checked when it comes. Bills are named tuples, because the engine makes them
between two steps: a frozen dataclass takes four times as long. Unknown is None, never 0.

Invariant: `Snapshot.difference_ns == 0`, i.e. at any cut of a run
*wall x gpus = requests + in_flight + idle + sleep + startup + tail + dummy + host + lost*.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.energy import NO_ENERGY, RunEnergy
from vllm_cost_meter.records.engine import EngineIdentity

# Time of a run that is nobody's request. Each is a row `__name__` of a tenant report.
OTHER_CLASSES = ("idle", "sleep", "startup", "tail", "dummy", "host", "lost")
# Those rows in the order they are shown, and that of requests without a bill yet.
OTHER_ROWS = (*OTHER_CLASSES, "in_flight")
TWO_PLANES = "two planes"  # a form of the cost model; the other is "one plane"

CLASSES = ("requests", "in_flight", *OTHER_CLASSES)
# Of those rows, the ones in which the GPUs worked all the same; with requests, all their work.
WORK = ("in_flight", "tail", "dummy")
BUSY = ("requests", *WORK)


@dataclass(frozen=True, slots=True)
class CostModel:
    """What an engine's steps cost, as published to split them: see docs/explanation/attribution.md.

    `planes` are coefficients in GPU-ns of (1, tokens, sequences, products, context), of the planes
    compute, memory and one; form "two planes" uses the first two, "one plane" the last. `steps`
    were learnt from. The errors are running means of |predicted / measured - 1| of each form,
    every step predicted before it was learnt from; `explained` is the share of the variance of
    step times that the form in use explains.
    """

    version: int
    form: str
    planes: tuple[tuple[float, ...], ...]
    steps: int
    error_two_planes: float
    error_one_plane: float
    explained: float

    @property
    def two_planes(self) -> bool:
        return self.form == TWO_PLANES

    @property
    def error(self) -> float:
        """Return the mean relative error (MAPE) of the form in use."""
        return self.error_two_planes if self.two_planes else self.error_one_plane

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Build a model from its plain values. Raises TypeError or KeyError on anything else."""
        return cls(**{**wire, "planes": tuple(tuple(plane) for plane in wire["planes"])})


@dataclass(frozen=True, slots=True)
class EarlierFit:
    """What an engine of the same model, hardware and parallelism had learnt before."""

    planes: tuple[tuple[float, ...], ...]
    two_planes: bool


@dataclass(slots=True)
class ClassTotals:
    """GPU-nanoseconds of a run, or of one hour of it, by class. The one mutable record."""

    requests: int = 0
    in_flight: int = 0
    idle: int = 0
    sleep: int = 0
    startup: int = 0
    tail: int = 0
    dummy: int = 0
    host: int = 0
    lost: int = 0

    def total(self) -> int:
        return sum(getattr(self, name) for name in CLASSES)

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in CLASSES}

    def plus(self, other: "ClassTotals") -> "ClassTotals":
        return ClassTotals(**{n: getattr(self, n) + getattr(other, n) for n in CLASSES})


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All books of one engine run at one monotonic instant.

    `wall_ns` is wall time since the engine process was created. `last_seq` is the number of the
    last bill written up to this instant, `billed_ns` the sum of all bills up to it. `own_ns` is the
    wall time the meter's own hooks took. `state` is "on" or, after too many errors, "off". `prior`
    says where the cost model started from. `hours` holds the totals of those hours that changed
    since the snapshot the reader acknowledged, `cost_models` the models that were published since.
    `energy` is what the GPUs used, to the same instant.
    `live` has what each open request has accrued so far, over all hours, and `step_ns` the time of
    the step in flight, which is nobody's before its result: together they are the class
    `in_flight`.
    """

    run_id: str
    number: int
    taken_at_ns: int
    started_at_ns: int
    wall_ns: int
    engine: EngineIdentity
    totals: ClassTotals
    last_seq: int
    billed_ns: int
    running: int
    waiting: int
    kv_cache_usage: float | None
    steps: int
    busy_ns: int
    own_ns: int
    errors: int
    state: str
    prior: str
    cost_models: tuple[CostModel, ...] = ()
    hours: Mapping[int, ClassTotals] = field(default_factory=dict)
    energy: RunEnergy = NO_ENERGY
    step_ns: int = 0
    live: tuple[tuple[str, Accrued], ...] = ()

    @property
    def live_ns(self) -> int:
        """What the open requests have accrued together."""
        return sum(used.gpu_time_ns for _, used in self.live)

    @property
    def difference_ns(self) -> int:
        """What the classes miss of wall x gpus: 0, or the books do not balance."""
        return self.wall_ns * self.engine.gpus - self.totals.total()

    def to_wire(self) -> dict[str, Any]:
        """Return plain msgpack-able values (the utility RPC carries nothing else)."""
        # Apart, because asdict would copy each number of each running request.
        wire = asdict(replace(self, live=(), energy=NO_ENERGY))
        wire["live"] = list(self.live)
        wire["energy"] = self.energy.to_wire()
        wire["hours"] = {str(hour): totals for hour, totals in wire["hours"].items()}
        return wire

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Build a snapshot from `to_wire`'s form. Raises TypeError or KeyError on anything else."""
        values = dict(wire)
        values["engine"] = EngineIdentity(**values["engine"])
        values["totals"] = ClassTotals(**values["totals"])
        values["hours"] = {int(h): ClassTotals(**t) for h, t in values["hours"].items()}
        values["cost_models"] = tuple(map(CostModel.from_wire, values["cost_models"]))
        values["energy"] = RunEnergy.from_wire(values["energy"])
        values["live"] = tuple((id, Accrued(*used)) for id, used in values["live"])
        return cls(**values)
