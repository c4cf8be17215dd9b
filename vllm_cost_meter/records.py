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
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple, Self

from vllm_cost_meter.accrued import Accrued
from vllm_cost_meter.energy_records import NO_ENERGY, RunEnergy

NS_PER_SECOND = 1_000_000_000
NS_PER_MS = 1_000_000
NS_PER_HOUR = 3_600 * NS_PER_SECOND

# The key under which a bill rides in a request's trace headers. HTTP header syntax, lower case,
# because vLLM hands trace headers to the OpenTelemetry propagator, which ignores unknown names.
BILL_KEY = "x-cost-meter-bill"
# Request id of the outputs that carry late bills; vLLM skips outputs of ids it does not know.
CARRIER_ID = "cost-meter-late-bills"

# Time of a run that is nobody's request. Each is a row `__name__` of a tenant report.
OVERHEAD_CLASSES = ("idle", "sleep", "startup", "tail", "dummy", "host", "lost")
# Those rows in the order they are shown, and that of requests without a bill yet.
OVERHEAD_ROWS = (*OVERHEAD_CLASSES, "in_flight")
TWO_PLANES = "two planes"  # a form of the cost model; the other is "one plane"

CLASSES = ("requests", "in_flight", *OVERHEAD_CLASSES)


def format_nano(amount: int) -> str:
    """Return a count of billionths as a plain decimal with nine places, e.g. "0.000012345"."""
    sign = "-" if amount < 0 else ""
    whole, fraction = divmod(abs(amount), 1_000_000_000)
    return f"{sign}{whole}.{fraction:09d}"


def rfc3339(unix_ns: int) -> str:
    """Format a UTC instant given in nanoseconds since the epoch, with microseconds and `Z`.

    The width is fixed, so that text order is time order.
    """
    second, ns = divmod(unix_ns, NS_PER_SECOND)
    return f"{_second_text(second)}.{ns // 1000:06d}Z"


# Two to six instants are written per bill; a busy ledger sees thousands of them in one second.
@lru_cache(maxsize=1024)
def _second_text(unix_s: int) -> str:
    # Not strftime: it is slow, and does not pad the year.
    return datetime.fromtimestamp(unix_s, UTC).isoformat()[:19]


def instant_of(hour: int | None) -> str | None:
    """Return the RFC 3339 instant at which an hour since the epoch begins; None of None."""
    return None if hour is None else rfc3339(hour * NS_PER_HOUR)


def hour_text(hour: int) -> str:
    """Return an hour since the epoch for people to read, e.g. "2026-01-01T00Z"."""
    return f"{rfc3339(hour * NS_PER_HOUR)[:13]}Z"


def unix_ns_of(text: str) -> int:
    """Return the nanoseconds since the epoch of an RFC 3339 instant. Raises ValueError."""
    instant = datetime.fromisoformat(text)
    if instant.tzinfo is None:
        raise ValueError(f"expected an instant with a time zone, e.g. ending in Z, got {text!r}")
    since_epoch = instant - datetime(1970, 1, 1, tzinfo=UTC)
    seconds = since_epoch.days * 86_400 + since_epoch.seconds
    return seconds * NS_PER_SECOND + since_epoch.microseconds * 1000


class UsagePiece(NamedTuple):
    """What one engine request used within one UTC hour; fields as in `Accrued`.

    `hour` counts hours since the epoch. `kv_block_ms` is blocks of the KV cache x milliseconds: in
    nanoseconds, the sum of a large server's bills would not fit 64 bits. `saved_estimate_ns` is
    what computing the cached tokens would have taken, by the cost model when it was billed.
    """

    hour: int
    prefill_ns: int
    decode_ns: int
    prefill_tokens: int
    decode_tokens: int
    marginal_ns: int = 0
    recomputed_ns: int = 0
    recomputed_tokens: int = 0
    rejected_ns: int = 0
    rejected_tokens: int = 0
    kv_block_ms: int = 0
    step_ns: int = 0
    saved_estimate_ns: int = 0

    @property
    def gpu_time_ns(self) -> int:
        return self.prefill_ns + self.decode_ns

    @classmethod
    def of(cls, hour: int, used: Accrued) -> Self:
        """Return the piece of an hour in which so much accrued."""
        return cls(hour, *used[:9], used.kv_block_ns // NS_PER_MS, used.step_ns)


class Bill(NamedTuple):
    """The final account of one engine request, numbered `seq` (from 1) within its run.

    `batch` is the sum, over its steps, of the requests in the step; `first_model` and `last_model`
    are the versions of the cost model in use when it came and when it was billed.
    """

    run_id: str
    seq: int
    request_id: str
    engine_status: str
    method: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    steps: int
    batch: int
    first_model: int
    last_model: int
    pieces: tuple[UsagePiece, ...]

    @property
    def prefill_ns(self) -> int:
        return self.sum_of("prefill_ns")

    @property
    def decode_ns(self) -> int:
        return self.sum_of("decode_ns")

    @property
    def gpu_time_ns(self) -> int:
        return self.prefill_ns + self.decode_ns

    @property
    def marginal_ns(self) -> int:
        return self.sum_of("marginal_ns")

    def sum_of(self, name: str) -> int:
        """Return the sum of a field over the pieces."""
        return sum(getattr(piece, name) for piece in self.pieces)


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
    says where the cost model started from. The KV cache has `kv_blocks` of `kv_block_size` tokens
    each, None if there is none. `hours` holds the totals of those hours that changed since the
    snapshot the reader acknowledged, `cost_models` the models that were published since.
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
    gpus: int
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
    model: str
    hardware: str
    parallelism: str
    kv_blocks: int | None
    kv_block_size: int | None
    host: str
    precision: str
    method: str
    native: bool
    engine_index: int
    vllm_version: str
    meter_version: str
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
        return self.wall_ns * self.gpus - self.totals.total()

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
        values["totals"] = ClassTotals(**values["totals"])
        values["hours"] = {int(h): ClassTotals(**t) for h, t in values["hours"].items()}
        values["cost_models"] = tuple(map(CostModel.from_wire, values["cost_models"]))
        values["energy"] = RunEnergy.from_wire(values["energy"])
        values["live"] = tuple((id, Accrued(*used)) for id, used in values["live"])
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Times of one engine request as its API server saw them, in milliseconds; None if unknown.

    `queue_ms` and `tpot_ms` are between instants of the engine, the others start at the request's
    arrival in its API server. `tpot_ms` is (last token - first token) / (output tokens - 1), None
    for fewer than two tokens.
    """

    queue_ms: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One engine request as the ledger keeps it: its bill, and whose it was.

    `tenant_rule` is the rule that named the tenant. `tenant_parent` and `tags`, a JSON object, are
    what the tenant had declared of it when the request came; None if nothing.
    `prompt_group` is shared by the parts of one prompt (n > 1), so that the prompt can be
    counted once. `announced` tells that an `OpenRequest` went before.
    """

    bill: Bill
    http_request_id: str | None
    response_id: str | None
    external_id: str | None
    prompt_group: str
    tenant: str
    model: str | None
    lora: str | None
    route: str | None
    cost_nanousd: int | None
    marginal_cost_nanousd: int | None
    started_at_ns: int
    finished_at_ns: int
    latencies: Latencies
    announced: bool = False
    tenant_rule: str = "none"
    tenant_parent: str | None = None
    tags: str | None = None


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """Whose an engine request is that has no bill yet: announced while it runs, gone when billed.

    `request_id` and `started_at_ns` tell it from all others, and are those of the bill to come.
    """

    request_id: str
    external_id: str | None
    response_id: str | None
    http_request_id: str | None
    x_request_id: str | None
    prompt_group: str
    tenant: str
    model: str | None
    lora: str | None
    route: str | None
    started_at_ns: int
    tenant_rule: str = "none"
    tenant_parent: str | None = None
    tags: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts as a client was told them; None where the reply did not say."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One HTTP exchange as the ledger keeps it: what its client was told, when, and whose it was.

    `status` is the HTTP status sent (499 when the client left before any was). `cost_nanousd` and
    `gpu_time_ns` are what the reply said, None if it said nothing.
    """

    http_request_id: str
    response_id: str | None
    x_request_id: str | None
    tenant: str
    model: str | None
    route: str
    status: int
    streamed: bool
    usage: Usage
    gpu_time_ns: int | None
    cost_nanousd: int | None
    started_at_ns: int
    finished_at_ns: int
    tenant_rule: str = "none"


@dataclass(frozen=True, slots=True)
class Price:
    """What one hour costs, as a decimal string in USD, and where the figure came from."""

    price_id: str
    usd_per_gpu_hour: str
    source: str
    effective_from_ns: int
