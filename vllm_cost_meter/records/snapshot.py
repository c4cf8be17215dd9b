"""A snapshot of an engine's books: time by class, the open requests, and the cost models.

All amounts are integers in the smallest useful unit, and names end with the unit. `_ns` means
GPU-nanoseconds unless the name says wall time. GPU time is wall time times the engine's GPUs, so
the classes of a run add up to `wall x gpus` exactly. A snapshot is built once and never changed;
one from another process is checked when it arrives. An unknown value is None, never 0.

Invariant: `Snapshot.difference_ns == 0`, i.e. at any cut of a run
*wall x gpus = requests + in_flight + idle + sleep + startup + tail + dummy + recomputed + host +
lost*.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.energy import NO_ENERGY, RunEnergy
from vllm_cost_meter.records.engine import EngineIdentity
from vllm_cost_meter.records.requests import Price

# Classes of GPU time that belong to no request. Each is a row `__name__` of a tenant report.
OTHER_CLASSES = ("idle", "sleep", "startup", "tail", "dummy", "recomputed", "host", "lost")
# The rows in the order that reports show them; the last holds the requests without a bill yet.
OTHER_ROWS = (*OTHER_CLASSES, "in_flight")
# Forms of the cost model. Another is "curve with features" (attribution/cost_model.py), and once
# there was "one plane".
TWO_PLANES = "two planes"
EARLIER_CURVE = "curve"  # without features

CLASSES = ("requests", "in_flight", *OTHER_CLASSES)
# Classes outside of `requests` in which the GPUs did work.
WORK = ("in_flight", "tail", "dummy", "recomputed")
BUSY = ("requests", *WORK)


@dataclass(frozen=True, slots=True)
class LearntCurve:
    """The curve of a cost model: its coefficients, and what is known of the served model.

    `experts` are their number in a layer and how many each token chooses; `layers` how many see all
    of the context, how many a window of it, and the window; `captured` the batch sizes of captured
    graphs, ascending. `form` says which coefficients there are: earlier versions had none of
    features. docs/explanation/attribution.md explains them.
    """

    coefficients: tuple[float, ...]
    experts: tuple[int, int]
    layers: tuple[int, int, int]
    captured: tuple[int, ...]
    form: str = EARLIER_CURVE

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Parse a curve's plain values. Raises TypeError or KeyError on anything else."""
        values: dict[str, Any] = dict(plain)
        form = values.pop("form", EARLIER_CURVE)
        return cls(**{name: tuple(value) for name, value in values.items()}, form=form)


@dataclass(frozen=True, slots=True)
class CostModel:
    """A published cost model: it predicts the GPU time of a step from what the step holds.

    docs/explanation/attribution.md explains it. The forms of a curve use `curve`; "two planes" uses
    the planes compute and memory, with a coefficient in GPU-ns for each of (1, tokens, sequences,
    products, context). Models of earlier versions have no curve, and a third plane, which the form
    "one plane" used. The model has learnt from `steps` steps. The two errors are running means of
    |predicted / measured - 1|, with two planes and with the other form, where each step was
    predicted before the model learnt from it. `explained` is the share of the step times' variance
    that the form in use explains. `charge_errors` are the parts by which charges may be off, by
    kind (`CHARGE_KIND_NAMES`), 1 where that is unknown; None in models of earlier versions.
    """

    version: int
    form: str
    planes: tuple[tuple[float, ...], ...]
    steps: int
    error_two_planes: float
    explained: float
    # Journals of earlier versions lack what follows: every field that comes needs a default.
    error_other_form: float = 1.0
    curve: LearntCurve | None = None
    charge_errors: tuple[float, ...] | None = None

    @property
    def two_planes(self) -> bool:
        return self.form == TWO_PLANES

    @property
    def error(self) -> float:
        """Return the mean relative error (MAPE) of the form in use."""
        return self.error_two_planes if self.two_planes else self.error_other_form

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Parse a model's plain values. Raises TypeError or KeyError on anything else."""
        curve, errors = wire["curve"], wire["charge_errors"]
        return cls(
            **{
                **wire,
                "planes": tuple(tuple(plane) for plane in wire["planes"]),
                "curve": None if curve is None else LearntCurve.from_plain(curve),
                "charge_errors": None if errors is None else tuple(errors),
            }
        )


@dataclass(frozen=True, slots=True)
class EarlierFit:
    """What an earlier run with equal model, hardware and parallelism learnt of the cost model."""

    planes: tuple[tuple[float, ...], ...]
    coefficients: tuple[float, ...]
    two_planes: bool


@dataclass(slots=True)
class ClassTotals:
    """GPU-nanoseconds by class, for a run or for one of its hours. The only mutable record."""

    requests: int = 0
    in_flight: int = 0
    idle: int = 0
    sleep: int = 0
    startup: int = 0
    tail: int = 0
    dummy: int = 0
    recomputed: int = 0
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

    - `wall_ns`: wall time since the engine process was created.
    - `last_seq`, `billed_ns`: the number of the latest bill, and the GPU time of all bills so far.
    - `own_ns`: wall time that the meter's own hooks took.
    - `state`: "on", or "off" after too many errors.
    - `prior`: where the cost model started from.
    - `hours`, `cost_models`: news since the snapshot that the reader acknowledged, i.e. the totals
      of hours that changed, and the models that were published.
    - `energy`: the energy that the GPUs used, up to the same instant.
    - `live`, `step_ns`: the GPU time of each open request over all hours, and the time of the step
      in flight, which belongs to nobody before its result comes. Together they are the class
      `in_flight`.
    - `first_price`: what a GPU-hour of the run costs in its first hour; the engine does not know
      it, so the API server adds it.
    - `equal_splits`, `missed_arrivals`: odd events of the run, i.e. steps without weights that were
      split equally, and requests that the meter first saw in a step.
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
    equal_splits: int = 0
    missed_arrivals: int = 0
    steps_in_flight: int = 0
    first_price: Price | None = None

    @property
    def live_ns(self) -> int:
        """Return the GPU time of all open requests together."""
        return sum(used.gpu_time_ns for _, used in self.live)

    @property
    def difference_ns(self) -> int:
        """Return wall x gpus minus the sum of the classes: 0 if the books balance."""
        return self.wall_ns * self.engine.gpus - self.totals.total()

    def to_wire(self) -> dict[str, Any]:
        """Return plain values for msgpack (the utility RPC carries nothing else)."""
        # Requests and energy are added by hand: asdict would copy each number of each request.
        wire = asdict(replace(self, live=(), energy=NO_ENERGY))
        wire["live"] = list(self.live)
        wire["energy"] = self.energy.to_wire()
        wire["hours"] = {str(hour): totals for hour, totals in wire["hours"].items()}
        return wire

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self:
        """Parse the values of `to_wire`. Raises TypeError or KeyError on anything else."""
        values = dict(wire)
        values["engine"] = EngineIdentity(**values["engine"])
        values["totals"] = ClassTotals(**values["totals"])
        values["hours"] = {int(h): ClassTotals(**t) for h, t in values["hours"].items()}
        values["cost_models"] = tuple(map(CostModel.from_wire, values["cost_models"]))
        values["energy"] = RunEnergy.from_wire(values["energy"])
        values["live"] = tuple((id, Accrued(*used)) for id, used in values["live"])
        return cls(**values)
