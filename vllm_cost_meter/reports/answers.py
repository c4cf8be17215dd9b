"""Answer types of reports and the summary: each JSON field, its meaning and its unit.

A docstring below a field is its description. Money is nano-USD where it is an integer and USD where
it is text; unknown is null. A field taken from another answer is
explained there.

Invariant: an answer has these fields and no other. A report by other columns than the tenant has
those columns in place of `tenant`.
"""

from typing import Annotated, NotRequired

from typing_extensions import TypedDict

from vllm_cost_meter.reports.price_answers import EnergyPriceRow, PriceRow
from vllm_cost_meter.reports.request_answers import RequestRow

_Hours = TypedDict(
    "_Hours",
    {
        "from": Annotated[str | None, "RFC 3339 UTC: the begin of the window; null where open."],
        "to": Annotated[str | None, "RFC 3339 UTC: the end, not included; null where open."],
    },
)


class Hours(_Hours):
    """The hours of an answer, as RFC 3339 UTC and since the epoch; null where open."""

    from_hour: int | None
    """Hours since the epoch: the first hour of the answer; null where the window is open."""
    to_hour: int | None
    """Hours since the epoch: the hour after the last; null where the window is open."""


class ReportWindow(Hours):
    """The hours of a report, and the time zone of its days."""

    tz: str
    """The time zone in which days and months begin, such as `Europe/Berlin`."""


class AfterCut(TypedDict):
    """Bills of living engines that came after the snapshots, so that no row counts them yet."""

    bills: int
    """Number of bills that came after the snapshots."""
    gpu_time_ns: int
    """GPU-ns: the GPU time of these bills."""


_OverheadRow = TypedDict(
    "_OverheadRow",
    {
        "from": Annotated[str, "RFC 3339 UTC: the first instant that the cost is for."],
        "to": Annotated[str, "RFC 3339 UTC: the instant after the last one."],
    },
)


class OverheadRow(_OverheadRow):
    """A cost beside the GPUs that the operator declared; no other figure contains it."""

    name: str
    """What the cost is for, such as `support`."""
    percent: str | None
    """%: the cost as a percentage of the price of all engine time; null for a fixed cost."""
    usd_per_month: str | None
    """USD: the fixed cost of a month; null for a percentage."""
    source: str
    """Where the figure comes from, in the operator's words."""
    cost_nanousd: int | None
    """nano-USD: the cost of the hours from `from` to `to`."""
    cost_usd: str | None
    """USD: the same as a decimal string."""
    cost_reason: str | None
    """Why `cost_nanousd` is null; null if it is known."""


class RunRow(TypedDict):
    """One engine process, from its start to its end."""

    run_id: str
    """The id of the engine run, which is new whenever an engine process starts."""
    engine_index: int
    """The data-parallel rank of the engine, from 0."""
    model: str
    """The name that the model is served by."""
    gpus: int
    """Number of GPUs the engine uses: its `world_size`."""
    hardware: str
    """Name of the GPUs, or of the CPU."""
    parallelism: str
    """How the model is spread over the GPUs: tensor, pipeline and other parallelism."""
    precision: str
    """Number format of the weights."""
    vllm_version: str
    """The version of vLLM that the engine runs."""
    method: str
    """How the time of a step is split between its requests: `shapley`, `tokens` or `equal`."""
    preemption_paid_by: str
    """Who pays the time to compute again what a preemption threw away: `victim`, the request that
    was preempted, or `operator`."""
    started_at: str
    """RFC 3339 UTC: creation of the engine process."""
    taken_at: str | None
    """RFC 3339 UTC: the instant of its latest snapshot; null before the first."""
    running: int
    """Number of requests that ran at `taken_at`."""
    waiting: int
    """Number of requests that waited in the engine's queue at `taken_at`."""
    kv_cache_usage: float | None
    """The used part of the KV cache at `taken_at`, 0 to 1; null if it is unknown."""
    steps: int
    """Number of engine steps that computed tokens."""
    errors: int
    """Number of errors in the meter's own hooks; serving went on."""
    state: str
    """Whether the meter works in this engine: `on`, or `off` after too many errors."""
    labels: dict[str, str] | None
    """The labels that the operator declared for the engine; null for runs of older versions."""
    alive: bool
    """Whether the engine lives: a snapshot came in the last 15 s, or its server knows that it
    runs."""
    usd_per_gpu_hour: str | None
    """USD: the price of one GPU-hour when the run began."""
    devices: list[dict[str, str]] | None
    """`name` and `uuid` of each GPU whose energy is read; null without any."""
    energy_mj: int | None
    """mJ: the energy of these GPUs since the engine began."""
    energy_unknown_ns: int | None
    """GPU-ns: time since the first reading whose energy is unknown; `energy_mj` lacks it."""
    energy_reason: str | None
    """Why the energy of the latest such time is unknown."""


_ReportRow = TypedDict(
    "_ReportRow",
    {"class": Annotated[str, "`requests` for usage, or a class of engine time, such as `idle`."]},
)


class ReportRow(_ReportRow):
    """A row of a report; it has the columns that it is aggregated by as well.

    Only reports by tenant alone, without steps, have the fields from `prefill_ns` on.
    """

    requests: int
    """HTTP requests that ended in the hours."""
    prompt_tokens: int | None
    """Tokens: the prompts of these requests, cached tokens included."""
    cached_tokens: int | None
    """Tokens: the part of the prompts that was found in the engines' own prefix caches."""
    output_tokens: int | None
    """Tokens: the output of these requests."""
    external_tokens: int | None
    """Tokens: the part of the prompts that came over a KV connector, as far as it is known."""
    external_known_tokens: int | None
    """Tokens: the prompts of which `external_tokens` is known, as the engines counted them."""
    gpu_time_ns: int
    """GPU-ns: the GPU time used in the hours."""
    idle_share_ns: int
    """GPU-ns: the part of the time without requests that the row carries, by the idle policy."""
    charge_known_ns: int | None
    """GPU-ns: the part of `gpu_time_ns` that was split with an error that is known; null for a
    class."""
    charge_error_ns: int | None
    """GPU-ns: **an estimate**: how much of `charge_known_ns` may belong to other requests; null for
    a class."""
    charge_error: float | None
    """`charge_error_ns` / `charge_known_ns`: the part by which it may be off; null if unknown."""
    usage_cost_nanousd: int | None
    """nano-USD: the cost **without idle**: the price of `gpu_time_ns`, and `kv_cost_nanousd`."""
    usage_cost_usd: str | None
    """USD: the same as a decimal string."""
    kv_cost_nanousd: int | None
    """nano-USD: the part of both costs that is the price of KV residency; 0 without such a price,
    null where the cost is. All rows add up to it, rounded apart from the costs."""
    kv_cost_usd: str | None
    """USD: the same as a decimal string."""
    cost_nanousd: int | None
    """nano-USD: the cost **with idle**: the price of `gpu_time_ns` and `idle_share_ns`, and
    `kv_cost_nanousd`."""
    cost_usd: str | None
    """USD: the same as a decimal string."""
    cost_reason: str | None
    """Why `cost_nanousd` is null: the first hour and run without a price."""
    covers: NotRequired[str | None]
    """`own`: the row is of its tenant alone; null for a class. Rows without a tenant lack it."""
    tenant: NotRequired[str]
    """A tenant, or a class such as `__idle__`."""
    prefill_ns: NotRequired[int | None]
    """GPU-ns: the part of `gpu_time_ns` in which prompts were computed."""
    decode_ns: NotRequired[int | None]
    """GPU-ns: the part of `gpu_time_ns` in which the output was computed."""
    marginal_ns: NotRequired[int | None]
    """GPU-ns: what the steps took longer because of these requests, by the cost model."""
    recomputed_ns: NotRequired[int | None]
    """GPU-ns: the time that computed tokens again after a preemption: part of `prefill_ns`, or
    beside it where the operator pays."""
    rejected_ns: NotRequired[int | None]
    """GPU-ns: the time spent on draft tokens that were rejected."""
    cut_ns: NotRequired[int | None]
    """GPU-ns: the time spent on tokens that were computed for the output and are not in it."""
    kv_block_ms: NotRequired[int | None]
    """Blocks x ms: how many blocks of the KV cache were filled in the hours, x how long."""
    saved_estimate_ns: NotRequired[int | None]
    """GPU-ns: **an estimate**: what computing the `cached_tokens` would have taken."""
    kv_cache_share: NotRequired[float | None]
    """The filled part of all KV caches, 0 to 1: `kv_block_ms` / (their blocks x their time)."""
    energy_mj: NotRequired[int | None]
    """mJ: the energy used in the hours, as far as it is known."""
    energy_unknown_requests: NotRequired[int | None]
    """Number of engine requests that `energy_mj` lacks, as their energy is unknown or not known
    yet."""
    energy_cost_nanousd: NotRequired[int | None]
    """nano-USD: `energy_mj` x the price of energy in each hour, rounded so that all rows add up."""
    energy_cost_reason: NotRequired[str | None]
    """Why `energy_cost_nanousd` is null; null if it is known."""


_Piece = TypedDict(
    "_Piece",
    {
        "from": Annotated[str | None, "RFC 3339 UTC: the begin of the piece; null where open."],
        "to": Annotated[str | None, "RFC 3339 UTC: the end, not included; null where open."],
    },
)


class Piece(_Piece):
    """The rows of the window, or of one of its steps."""

    gpu_time_ns: int
    """GPU-ns: the sum over all rows, shown or not."""
    cost_nanousd: int | None
    """nano-USD: the cost of all rows, shown or not."""
    cost_usd: str | None
    """USD: the same as a decimal string."""
    rows: list[ReportRow]
    """Usage first, then classes of engine time; in each the most GPU time first."""


class Report(TypedDict):
    """The answer of `/cost/report`: rows of usage, time and cost, in one piece or by steps.

    A tenant that asks gets its own rows only; the fields about all tenants together are missing.
    """

    window: ReportWindow
    """The hours that the report covers, and its time zone."""
    taken_at: str | None
    """RFC 3339 UTC: the latest snapshot; the figures are as of then."""
    prices: list[PriceRow]
    """The prices that the costs were computed with, the earliest first."""
    engines: str | None
    """The filter that chooses engines by their labels: the answer is about these alone. Null for
    all engines."""
    aggregate: list[str]
    """The columns that rows are aggregated by, such as `tenant` and `day`."""
    covers: str | None
    """What a tenant in the filter means: `with_children`, itself and all below it, or `own`. It
    means that for a tenant that asks, too. Null without either."""
    idle: str
    """The idle policy: who carries the time without requests."""
    idle_unseen: list[str]
    """Tenants that the idle policy names and that have no request in the ledger: a slip?"""
    what_if_usd_per_gpu_hour: str | None
    """USD: the price of one GPU-hour that the question supposes; null for real prices."""
    series: list[Piece]
    """One piece for the whole window, or one for each step."""
    wall_gpu_ns: NotRequired[int]
    """GPU-ns: the wall time of each run x its GPUs, summed over all runs."""
    wall_cost_nanousd: NotRequired[int | None]
    """nano-USD: the price of `wall_gpu_ns`."""
    wall_cost_usd: NotRequired[str | None]
    """USD: the same as a decimal string."""
    kv_cost_nanousd: NotRequired[int | None]
    """nano-USD: the price of all KV residency, on top of `wall_cost_nanousd`; 0 without such a
    price. The rows cost both together."""
    kv_cost_usd: NotRequired[str | None]
    """USD: the same as a decimal string."""
    adds_up: NotRequired[bool]
    """Whether the rows add up to the wall time: `difference_ns` is 0."""
    difference_ns: NotRequired[int]
    """GPU-ns: `wall_gpu_ns` less all rows, those that a filter hides included."""
    without_totals_ns: NotRequired[int]
    """GPU-ns: the part of `wall_gpu_ns` that is of runs of which only the bills are known; what
    else these ran, such as their idle time, is in no row."""


class BilledAmounts(TypedDict):
    """The metered cost and the amount that the provider billed for the same hours."""

    metered_usd: str | None
    """USD: the price of all GPUs' wall time; null without a price, or if nothing ran."""
    metered_while_billed_usd: str | None
    """USD: the part of `metered_usd` in hours that GPU bills cover."""
    billed_gpu_usd: str | None
    """USD: the amount billed for GPUs; null without a GPU bill."""
    difference_usd: str | None
    """USD: `billed_gpu_usd` - `metered_while_billed_usd`."""
    capture_rate: float | None
    """`metered_while_billed_usd` / `billed_gpu_usd`."""
    billed_disk_usd: str | None
    """USD: the amount billed for disks."""
    billed_network_usd: str | None
    """USD: the amount billed for the network."""
    billed_other_usd: str | None
    """USD: the amount billed for anything else."""
    covered_hours: float
    """Hours: the time that GPU bills cover."""
    unobserved_hours: float
    """Hours: the time in gaps of bills or before resets, summed over all resources."""
    resets: int
    """How often a billed counter fell, as it does when it starts anew."""


class BilledResource(TypedDict):
    """The amount billed for one resource that is no GPU."""

    resource: str
    """The resource's name in the bill."""
    kind: str
    """`disk`, `network` or `other`."""
    billed_usd: str | None
    """USD: the amount billed for the resource."""


class Billed(BilledAmounts):
    """The amounts billed in a window, and each resource besides GPUs."""

    others: list[BilledResource]
    """Each billed resource that is no GPU."""


class EnginesPart(TypedDict):
    """Totals of the engines, beside a report by tenant."""

    gpus: int
    """Number of GPUs of the engines that were up at `taken_at`."""
    after_cut: AfterCut
    """Number and GPU time of bills that no snapshot, and so no row, counts yet."""
    cost_nanousd: int | None
    """nano-USD: `wall_cost_nanousd` under its old name."""
    cost_usd: str | None
    """USD: `wall_cost_usd` under its old name."""
    cost_reason: str | None
    """Why `cost_nanousd` is null: the first hour and run without a price."""
    usd_per_gpu_hour: str | None
    """USD: the price of one GPU-hour, if all prices in the costs are the same."""
    energy_cost_nanousd: int | None
    """nano-USD: the cost of `energy_mj`: the rows' and that of `unattributed_mj`."""
    energy_cost_reason: str | None
    """Why `energy_cost_nanousd` is null; null if it is known."""
    energy_prices: list[EnergyPriceRow]
    """The energy prices that `energy_cost_nanousd` was computed with."""
    overheads: list[OverheadRow]
    """The costs beside the GPUs that the operator declared; no other figure contains them."""
    billed: Billed | None
    """The amounts that the provider billed in the window; null without a bill."""
    busy_ns: int
    """Wall ns: time in which a step ran, since the engines began, whatever the window."""
    own_ns: int
    """Wall ns: time that the meter's own hooks took in the engines, since they began."""
    own_time_share: float | None
    """The meter's own part of the engines' busy time: `own_ns` / `busy_ns`."""
    energy_mj: int | None
    """mJ: the energy of all GPUs, summed over the runs that count energy."""
    requests_mj: int | None
    """mJ: the part of `energy_mj` that requests used: the sum over the tenants."""
    unattributed_mj: int | None
    """mJ: the part of `energy_mj` that belongs to requests whose own energy is partly unknown."""
    runs: list[RunRow]
    """Each engine run that the ledger knows."""


class TenantsReport(Report, EnginesPart):
    """The report by tenant, with the totals of the engines beside it."""

    tenants: list[ReportRow]
    """The rows by tenant: the same as in the one piece of `series`."""


class Tenant(ReportRow):
    """A tenant's figures and its latest requests, with those of all tenants below it or its own.

    The sums are those of the rows that a report by tenant has of them.
    """

    covers: str | None  # type: ignore[misc]
    """`with_children`: the figures of all tenants below it are part of these, or `own`."""
    tenants: int
    """Number of tenants with figures in these: itself, and those below it that used something."""
    window: ReportWindow
    """The hours that the row covers, and its time zone."""
    taken_at: str | None
    """RFC 3339 UTC: the latest snapshot; the row is as of then."""
    prices: list[PriceRow]
    """The prices that the costs were computed with, the earliest first."""
    recent: list[RequestRow]
    """The tenant's latest requests, the newest first, whatever the window."""


class Summary(EnginesPart):
    """Totals over all engines and requests: tokens, GPU time by class, cost and energy."""

    window: ReportWindow
    """The hours that the totals cover, and their time zone."""
    taken_at: str | None
    """RFC 3339 UTC: the latest snapshot; the figures are as of then."""
    prices: list[PriceRow]
    """The prices that the costs were computed with, the earliest first."""
    wall_gpu_ns: int
    """GPU-ns: the wall time of each run x its GPUs, summed over all runs."""
    wall_cost_nanousd: int | None
    """nano-USD: the price of `wall_gpu_ns`."""
    wall_cost_usd: str | None
    """USD: the same as a decimal string."""
    kv_cost_nanousd: int | None
    """nano-USD: the price of all KV residency, on top of `wall_cost_nanousd`; 0 without such a
    price."""
    kv_cost_usd: str | None
    """USD: the same as a decimal string."""
    adds_up: bool
    """Whether all classes add up to the wall time: `difference_ns` is 0."""
    difference_ns: int
    """GPU-ns: `wall_gpu_ns` less all classes of time."""
    without_totals_ns: int
    """GPU-ns: the part of `wall_gpu_ns` that is of runs of which only the bills are known; what
    else these ran, such as their idle time, is in no row."""
    requests: int
    """Number of HTTP requests of all tenants that ended in the hours."""
    prompt_tokens: int
    """Tokens: the prompts of all requests, cached tokens included."""
    cached_tokens: int
    """Tokens: the part of the prompts that was found in the engines' own prefix caches."""
    output_tokens: int
    """Tokens: the output of all requests."""
    external_tokens: int
    """Tokens: the part of the prompts that came over a KV connector, as far as it is known."""
    external_known_tokens: int
    """Tokens: the prompts of which `external_tokens` is known, as the engines counted them."""
    requests_ns: int
    """GPU-ns: the time billed to requests."""
    in_flight_ns: int
    """GPU-ns: the time used by requests that have no bill yet."""
    idle_ns: int
    """GPU-ns: the time in which an engine was awake and held no unfinished request."""
    sleep_ns: int
    """GPU-ns: the time that engines spent in vLLM's sleep mode."""
    startup_ns: int
    """GPU-ns: the time that engines took to start, until their scheduler was made."""
    tail_ns: int
    """GPU-ns: the time in which steps still ran for requests that already had their bill."""
    dummy_ns: int
    """GPU-ns: the time of data-parallel dummy batches, which hold no request."""
    recomputed_ns: int
    """GPU-ns: the time in which requests computed again what a preemption threw away, where the
    operator pays for it; 0 where the requests do."""
    host_ns: int
    """GPU-ns: the time in which requests waited and no step ran: vLLM's work between steps."""
    lost_ns: int
    """GPU-ns: the time that is known to be missing from bills, after an error or a crash."""
    idle_mj: int | None
    """mJ: the energy of the time in `idle_ns`."""
    sleep_mj: int | None
    """mJ: the energy of the time in `sleep_ns`."""
    startup_mj: int | None
    """mJ: always null, as an engine's start is over before the first reading."""
    tail_mj: int | None
    """mJ: the energy of the time in `tail_ns`."""
    dummy_mj: int | None
    """mJ: the energy of the time in `dummy_ns`."""
    recomputed_mj: int | None
    """mJ: the energy of the time in `recomputed_ns`."""
    host_mj: int | None
    """mJ: the energy of the time in `host_ns`."""
    lost_mj: int | None
    """mJ: the energy of the time in `lost_ns`."""
    in_flight_mj: int | None
    """mJ: the energy of the time in `in_flight_ns`."""
    utilization: float | None
    """The part of `wall_gpu_ns` in which the GPUs worked: requests, in flight, tail,
    dummy and recomputed."""
