"""The shapes of reports and the summary, field by field, with their units: what JSON has.

A docstring below a field is its description. Money is nano-USD where it is an integer and USD where
it is text; unknown is null. A field of another answer is explained there.

Invariant: an answer has these fields and no other; reports by other columns than the tenant have
those columns in place of `tenant`.
"""

from typing import Annotated, NotRequired

from typing_extensions import TypedDict

from vllm_cost_meter.reports.price_answers import EnergyPriceRow, PriceRow
from vllm_cost_meter.reports.request_answers import RequestRow

_Window = TypedDict(
    "_Window",
    {
        "from": Annotated[str | None, "RFC 3339 UTC: its begin; null where open."],
        "to": Annotated[str | None, "RFC 3339 UTC: its end, not in it; null where open."],
    },
)


class Hours(_Window):
    """The hours of an answer, as RFC 3339 UTC and since the epoch; null where open."""

    from_hour: int | None
    """Hours since the epoch: the first."""
    to_hour: int | None
    """Hours since the epoch: the one after the last."""


class Window(Hours):
    """The hours of a report, and the time zone of its days."""

    tz: str
    """The time zone of days and months."""


class AfterCut(TypedDict):
    """What came after the snapshots and is in no row yet."""

    bills: int
    """How many bills."""
    gpu_time_ns: int
    """GPU-ns: what they used."""


_OverheadRow = TypedDict(
    "_OverheadRow",
    {
        "from": Annotated[str, "RFC 3339 UTC: its begin."],
        "to": Annotated[str, "RFC 3339 UTC: its end, not in it."],
    },
)


class OverheadRow(_OverheadRow):
    """A declared overhead, in no other figure."""

    name: str
    """What it is for."""
    percent: str | None
    """%: of the cost of all time, or null."""
    usd_per_month: str | None
    """USD: fixed, or null."""
    source: str
    """Where the figure is from."""
    cost_nanousd: int | None
    """nano-USD: of that part."""
    cost_usd: str | None
    """USD: the same as a decimal string."""
    cost_reason: str | None
    """Why it is null."""


class RunRow(TypedDict):
    """One engine process, from its start to its end."""

    run_id: str
    """One engine process, from its start to its end."""
    engine_index: int
    """Data-parallel rank."""
    model: str
    """The served name."""
    gpus: int
    """`world_size` of the engine."""
    hardware: str
    """Name of its GPUs, or of the CPU."""
    parallelism: str
    """Tensor, pipeline and other parallelism."""
    precision: str
    """Number format of the weights."""
    vllm_version: str
    """The version of vLLM."""
    method: str
    """How its steps are split."""
    started_at: str
    """RFC 3339 UTC: creation of the engine process."""
    taken_at: str | None
    """RFC 3339 UTC: its latest snapshot."""
    running: int
    """Requests running then."""
    waiting: int
    """Requests waiting then."""
    kv_cache_usage: float | None
    """0 to 1."""
    steps: int
    """Steps with tokens."""
    errors: int
    """Errors of the meter in the engine, contained."""
    state: str
    """`on`, or `off` after too many errors."""
    labels: dict[str, str] | None
    """What the operator declared of the engine; null before schema version 8."""
    alive: bool
    """Whether its engine was asked for a snapshot and has not failed, or answered within 15 s."""
    usd_per_gpu_hour: str | None
    """USD: the price when the run began."""
    devices: list[dict[str, str]] | None
    """`name` and `uuid` of each GPU whose energy is read."""
    energy_mj: int | None
    """mJ: read of them since the engine began."""
    energy_unknown_ns: int | None
    """GPU-ns: since the first reading, of windows whose energy is unknown and not in it."""
    energy_reason: str | None
    """Why that of the latest of these windows is unknown."""


_ReportRow = TypedDict(
    "_ReportRow",
    {"class": Annotated[str, "`usage`, or a class of engine time that is nobody's."]},
)


class ReportRow(_ReportRow):
    """A row of a report; besides, the columns that it is added up by.

    Only rows by tenant alone, over the whole window, have the fields from `prefill_ns` on.
    """

    requests: int
    """HTTP requests that ended in the hours."""
    prompt_tokens: int | None
    """Tokens: the prompts of these requests, cached tokens included."""
    cached_tokens: int | None
    """Tokens: the part of the prompts that was found in the prefix cache."""
    output_tokens: int | None
    """Tokens: the output of these requests."""
    gpu_time_ns: int
    """GPU-ns: used in the hours."""
    idle_share_ns: int
    """GPU-ns: the row's share of overhead besides."""
    usage_cost_nanousd: int | None
    """nano-USD: **without idle**: the price of `gpu_time_ns`."""
    usage_cost_usd: str | None
    """USD: the same as a decimal string."""
    cost_nanousd: int | None
    """nano-USD: **with idle**: usage and its share."""
    cost_usd: str | None
    """USD: the same as a decimal string."""
    cost_reason: str | None
    """Why `cost_nanousd` is null: the first hour and run without a price."""
    tenant: NotRequired[str]
    """A tenant, or a class: `__idle__`, `__sleep__`, `__startup__`, `__tail__`, `__dummy__`."""
    prefill_ns: NotRequired[int | None]
    """GPU-ns: the part of `gpu_time_ns` in which prompts were computed."""
    decode_ns: NotRequired[int | None]
    """GPU-ns."""
    marginal_ns: NotRequired[int | None]
    """GPU-ns: as in the request row, as those that follow."""
    recomputed_ns: NotRequired[int | None]
    """GPU-ns."""
    rejected_ns: NotRequired[int | None]
    """GPU-ns."""
    cut_ns: NotRequired[int | None]
    """GPU-ns."""
    kv_block_ms: NotRequired[int | None]
    """Blocks x ms: KV residency, in the hours of the window."""
    saved_estimate_ns: NotRequired[int | None]
    """GPU-ns."""
    kv_cache_share: NotRequired[float | None]
    """`kv_block_ms` / (blocks of the KV caches x their time in the window)."""
    energy_mj: NotRequired[int | None]
    """mJ: used in the hours of the window, as far as it is known."""
    energy_unknown_requests: NotRequired[int | None]
    """Engine requests whose energy is not in it, unknown or not told yet."""
    energy_cost_nanousd: NotRequired[int | None]
    """nano-USD: `energy_mj` x the price of energy in its hours, rounded together with all rows."""
    energy_cost_reason: NotRequired[str | None]
    """Why that is null."""


_Piece = TypedDict(
    "_Piece",
    {
        "from": Annotated[str | None, "RFC 3339 UTC: its begin; null where open."],
        "to": Annotated[str | None, "RFC 3339 UTC: its end, not in it; null where open."],
    },
)


class Piece(_Piece):
    """The rows of the window, or of one of its steps."""

    gpu_time_ns: int
    """GPU-ns: the sum of all its rows, shown or not."""
    cost_nanousd: int | None
    """nano-USD: likewise."""
    cost_usd: str | None
    """USD: the same as a decimal string."""
    rows: list[ReportRow]
    """Rows: usage by time, then the most GPU time first."""


class Report(TypedDict):
    """The answer to a question in the words of reports.

    A tenant that asks is told its own rows, and nothing of the whole: those fields are missing.
    """

    window: Window
    """`from`, `to` (RFC 3339), `from_hour`, `to_hour` (hours since the epoch), `tz`."""
    taken_at: str | None
    """RFC 3339 UTC: the latest snapshot: figures are as of then."""
    prices: list[PriceRow]
    """All prices that are in its costs, the earliest first."""
    aggregate: list[str]
    """The columns."""
    idle: str
    """The policy."""
    what_if_usd_per_gpu_hour: str | None
    """USD: the price that was asked for."""
    series: list[Piece]
    """One piece for the window, or for each step."""
    wall_gpu_ns: NotRequired[int]
    """GPU-ns: wall time x GPUs of all runs."""
    wall_cost_nanousd: NotRequired[int | None]
    """nano-USD: what the engines' own hours cost."""
    wall_cost_usd: NotRequired[str | None]
    """USD: the same as a decimal string."""
    adds_up: NotRequired[bool]
    """Whether `difference_ns` is 0."""
    difference_ns: NotRequired[int]
    """GPU-ns: `wall_gpu_ns` less all rows, of all steps, before the filter."""


class BilledAmounts(TypedDict):
    """What was metered and what was billed in the same hours."""

    metered_usd: str | None
    """USD: wall time x price of all GPUs; null without a price, or if nothing ran."""
    metered_while_billed_usd: str | None
    """USD: the part of it that GPU bills cover."""
    billed_gpu_usd: str | None
    """USD: billed for GPUs; null if nothing was."""
    difference_usd: str | None
    """USD: `billed_gpu_usd` - `metered_while_billed_usd`."""
    capture_rate: float | None
    """`metered_while_billed_usd` / `billed_gpu_usd`."""
    billed_disk_usd: str | None
    """USD: billed for disks."""
    billed_network_usd: str | None
    """USD: billed for the network."""
    billed_other_usd: str | None
    """USD: billed for anything else."""
    covered_hours: float
    """Hours: that GPU bills cover."""
    unobserved_hours: float
    """Hours: in a gap or before a reset, all resources together."""
    resets: int
    """Counters that fell."""


class BilledResource(TypedDict):
    """What was billed for one resource that is no GPU."""

    resource: str
    """Its name in the bill."""
    kind: str
    """`disk`, `network` or `other`."""
    billed_usd: str | None
    """USD."""


class Billed(BilledAmounts):
    """What was billed in a window, and for what besides GPUs."""

    others: list[BilledResource]
    """Each resource that is no GPU."""


class EnginesPart(TypedDict):
    """What engines say of themselves, beside a report by tenant."""

    gpus: int
    """GPUs of the engines that were up at `taken_at`."""
    after_cut: AfterCut
    """`bills` and `gpu_time_ns` that came after the snapshots and are in no row yet."""
    cost_nanousd: int | None
    """nano-USD: `wall_cost_nanousd`, by its old name."""
    cost_usd: str | None
    """USD: `wall_cost_usd`, by its old name."""
    cost_reason: str | None
    """Why it is null, as in the rows."""
    usd_per_gpu_hour: str | None
    """USD: the price."""
    energy_cost_nanousd: int | None
    """nano-USD: of `energy_mj`: the sum of the rows and of `unattributed_mj`."""
    energy_cost_reason: str | None
    """Why it is null."""
    energy_prices: list[EnergyPriceRow]
    """All prices that are in it: `usd_per_kwh`, `source`, `effective_from`, `host`."""
    overheads: list[OverheadRow]
    """Declared overheads of the window, in no other figure."""
    billed: Billed | None
    """What was billed in the window, null without a bill."""
    busy_ns: int
    """Wall ns: time in which a step ran, since the engines began (whatever the window)."""
    own_ns: int
    """Wall ns: time the meter's own hooks took in the engines, since they began."""
    own_time_share: float | None
    """`own_ns` / `busy_ns`."""
    energy_mj: int | None
    """mJ: read of the GPUs of all runs that count energy."""
    requests_mj: int | None
    """mJ: of it, told of requests: the sum of the tenants'."""
    unattributed_mj: int | None
    """mJ: of it, read but of nobody: the rest of requests of which a part is unknown."""
    runs: list[RunRow]
    """One run for each engine process the ledger knows."""


class TenantsReport(Report, EnginesPart):
    """The report by tenant, with the keys of its old form."""

    tenants: list[ReportRow]
    """The rows of its one piece."""


class Tenant(ReportRow):
    """One tenant's row and its latest requests."""

    window: Window
    """The hours of the row."""
    taken_at: str | None
    """RFC 3339 UTC: the latest snapshot."""
    prices: list[PriceRow]
    """All prices that are in the costs of the window."""
    recent: list[RequestRow]
    """The latest requests, of all time."""


class Summary(EnginesPart):
    """The totals of everything."""

    window: Window
    """`from`, `to` (RFC 3339), `from_hour`, `to_hour` (hours since the epoch), `tz`."""
    taken_at: str | None
    """RFC 3339 UTC: the latest snapshot: figures are as of then."""
    prices: list[PriceRow]
    """All prices that are in its costs, the earliest first."""
    wall_gpu_ns: int
    """GPU-ns: wall time x GPUs of all runs."""
    wall_cost_nanousd: int | None
    """nano-USD: what the engines' own hours cost."""
    wall_cost_usd: str | None
    """USD: the same as a decimal string."""
    adds_up: bool
    """Whether `difference_ns` is 0."""
    difference_ns: int
    """GPU-ns: `wall_gpu_ns` less all rows, of all steps, before the filter."""
    requests: int
    """HTTP requests of all tenants."""
    prompt_tokens: int
    """Tokens: the prompts of all requests, cached tokens included."""
    cached_tokens: int
    """Tokens: the part of the prompts that was found in the prefix cache."""
    output_tokens: int
    """Tokens: the output of these requests."""
    requests_ns: int
    """GPU-ns: billed to requests."""
    in_flight_ns: int
    """GPU-ns: used by requests that have no bill yet."""
    idle_ns: int
    """GPU-ns: a class of engine time, as those below; docs/explanation/books.md explains them."""
    sleep_ns: int
    """GPU-ns."""
    startup_ns: int
    """GPU-ns."""
    tail_ns: int
    """GPU-ns."""
    dummy_ns: int
    """GPU-ns."""
    host_ns: int
    """GPU-ns."""
    lost_ns: int
    """GPU-ns."""
    idle_mj: int | None
    """mJ: energy by class, as in the rows."""
    sleep_mj: int | None
    """mJ."""
    startup_mj: int | None
    """mJ: always null."""
    tail_mj: int | None
    """mJ."""
    dummy_mj: int | None
    """mJ."""
    host_mj: int | None
    """mJ."""
    lost_mj: int | None
    """mJ."""
    in_flight_mj: int | None
    """mJ."""
    utilization: float | None
    """Share of `wall_gpu_ns` in which the GPUs worked: requests, in flight, tail and dummy."""
