"""Answer types of statements: each JSON field, its meaning and its unit.

A docstring below a field is its description. Money is cents where it is an integer and USD where it
is text; unknown is null.

Invariant: an answer has these fields and no other.
"""

from typing_extensions import TypedDict

from vllm_cost_meter.reports.answers import ReportWindow
from vllm_cost_meter.reports.price_answers import PriceRow


class StatementLine(TypedDict):
    """A line of a statement: a model on a day, a cost beside the GPUs, or a class of time."""

    kind: str
    """What the line is about: `usage` (GPU time of a model on a day), `kv` (its KV residency, if
    that has a price), `overhead` or `class`."""
    tenant: str | None
    """The tenant who is charged; null for what nobody carries."""
    day: str | None
    """The day, such as 2026-11-28, in the statement's time zone; null for overheads
    and classes."""
    item: str
    """The model, the name of the declared cost, or the class, such as `__idle__`."""
    source: str | None
    """Where a declared cost comes from, in the operator's words; null for other lines."""
    requests: int | None
    """HTTP requests that ended on the day."""
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
    gpu_time_ns: int | None
    """GPU-ns: the GPU time used on the day."""
    idle_share_ns: int | None
    """GPU-ns: the part of the time without requests that the line carries, by the idle policy."""
    charge_known_ns: int | None
    """GPU-ns: the part of `gpu_time_ns` that was split with an error that is known; null but for a
    line of kind `usage`."""
    charge_error_ns: int | None
    """GPU-ns: **an estimate**: how much of `charge_known_ns` may belong to other requests; null but
    for a line of kind `usage`."""
    charge_error: float | None
    """`charge_error_ns` / `charge_known_ns`: the part by which it may be off; null if unknown."""
    kv_block_ms: int | None
    """Blocks x ms: the KV residency that a line of kind `kv` charges; null for other lines."""
    usd_per_kv_block_hour: str | None
    """USD: the price of a KV block-hour in that line, the mean where it changed within the day;
    null for other lines."""
    usage_cents: int | None
    """Cents: the price of `gpu_time_ns`, or of `kv_block_ms` in a line of kind `kv`."""
    idle_share_cents: int | None
    """Cents: the price of `idle_share_ns`: `amount_cents` less `usage_cents`."""
    amount_cents: int | None
    """Cents: the price of usage and idle share together."""
    usage_usd: str | None
    """USD: `usage_cents` as a decimal string."""
    idle_share_usd: str | None
    """USD: `idle_share_cents` as a decimal string."""
    amount_usd: str | None
    """USD: `amount_cents` as a decimal string."""
    cost_reason: str | None
    """Why `amount_cents` is null; null if it is known."""
    covers: str | None
    """`own`: the line is of its tenant alone; null for what nobody carries."""


class StatementTotal(TypedDict):
    """The sums over lines; an amount is null if that of one line is."""

    requests: int
    """Number of HTTP requests that ended in the month."""
    prompt_tokens: int
    """Tokens: the prompts of these requests, cached tokens included."""
    cached_tokens: int
    """Tokens: the part of the prompts that was found in the engines' own prefix caches."""
    output_tokens: int
    """Tokens: the output of these requests."""
    external_tokens: int
    """Tokens: the part of the prompts that came over a KV connector, as far as it is known."""
    external_known_tokens: int
    """Tokens: the prompts of which `external_tokens` is known, as the engines counted them."""
    gpu_time_ns: int
    """GPU-ns: the GPU time used in the month."""
    idle_share_ns: int
    """GPU-ns: the part of the time without requests, by the idle policy."""
    charge_known_ns: int
    """GPU-ns: the part of tenants' `gpu_time_ns` that was split with an error that is known."""
    charge_error_ns: int
    """GPU-ns: **an estimate**: how much of `charge_known_ns` may belong to other requests."""
    charge_error: float | None
    """`charge_error_ns` / `charge_known_ns`: the part by which it may be off; null if unknown. Of
    all tenants it is the mean: together they are charged what was measured."""
    kv_block_ms: int
    """Blocks x ms: the KV residency that lines of kind `kv` charge; 0 without such a price."""
    usage_cents: int | None
    """Cents: the price of `gpu_time_ns` and of `kv_block_ms`."""
    idle_share_cents: int | None
    """Cents: the price of `idle_share_ns`."""
    amount_cents: int | None
    """Cents: the price of usage and idle share together."""
    usage_usd: str | None
    """USD: `usage_cents` as a decimal string."""
    idle_share_usd: str | None
    """USD: `idle_share_cents` as a decimal string."""
    amount_usd: str | None
    """USD: `amount_cents` as a decimal string."""


class TenantTotal(StatementTotal):
    """The sums of one tenant's lines."""

    tenant: str
    """The tenant's name."""
    covers: str
    """`own`: the sums are of the tenant alone."""


class OverheadAmount(TypedDict):
    """A cost beside the GPUs' time, declared or billed."""

    name: str
    """The name that it has in the settings or in the bill."""
    source: str
    """Where the figure is from."""
    cents: int | None
    """Cents: its amount in the month; null where it is unknown."""


class BilledHoursOfMonth(TypedDict):
    """How much of a month the bills of the provider cover."""

    covered_hours: float
    """Hours: that GPU bills cover."""
    unobserved_hours: float
    """Hours: in a gap or before a reset, all resources together."""
    resets: int
    """The number of counters that fell."""


class StatementWhole(TypedDict):
    """The engines' own cost and the costs beside it, which the lines must add up to."""

    wall_gpu_ns: int
    """GPU-ns: the wall time of each run x its GPUs, summed over all runs."""
    wall_cents: int | None
    """Cents: the price of `wall_gpu_ns`."""
    kv_cents: int | None
    """Cents: the price of all KV residency; 0 without such a price."""
    overhead: list[OverheadAmount]
    """Each cost beside the GPUs: `name`, `source` and `cents`."""
    amount_cents: int | None
    """Cents: `wall_cents`, `kv_cents` and all costs beside them."""
    amount_usd: str | None
    """USD: `amount_cents` as a decimal string."""


class TenantStatement(TypedDict):
    """One tenant's statement of a month."""

    month: str
    """The month, such as 2026-11."""
    window: ReportWindow
    """The hours of the month, and its time zone."""
    taken_at: str | None
    """RFC 3339 UTC: the latest snapshot; the figures are as of then."""
    methods: list[str]
    """How steps were split between requests: `shapley`, `tokens` or `equal`, each that was used."""
    preemption_paid_by: list[str]
    """Who paid the time to compute again what preemptions threw away: `victim` or `operator`, each
    that held in a run of the month."""
    prices: list[PriceRow]
    """The prices that the costs were computed with, the earliest first."""
    engines: str | None
    """The filter that chooses engines by their labels: the answer is about these alone. Null for
    all engines."""
    billed: BilledHoursOfMonth | None
    """How much of the month a provider's bills cover; null without a bill."""
    tenant: str | None
    """The tenant that the statement is for; null for all tenants."""
    covers: str | None
    """`with_children`: the lines of all tenants below it too, or `own`; null for all tenants."""
    currency: str
    """The currency of all amounts, by its ISO 4217 code."""
    idle: str
    """The idle policy: who carries the time without requests."""
    idle_unseen: list[str]
    """Tenants that the idle policy names and that have no request in the ledger: a slip?"""
    taxes: str
    """`none`: no amount contains taxes."""
    is_over: bool
    """Whether the month is over."""
    in_flight_ns: int
    """GPU-ns: the time used by requests that have no bill yet."""
    final: bool
    """Whether no figure will change: the month is over, and every request has its bill."""
    adds_up: bool
    """Whether usage and classes add up to the wall time: `difference_ns` is 0."""
    difference_ns: int
    """GPU-ns: wall time x GPUs less usage and all classes."""
    without_totals_ns: int
    """GPU-ns: usage of runs of which only the bills are known: their idle time is in no line."""
    lines: list[StatementLine]
    """The lines, by tenant, day and model."""
    total: StatementTotal
    """The sums over all lines."""


class Statement(TenantStatement):
    """The statement of all tenants for a month."""

    tenants: list[TenantTotal]
    """The sums over each tenant's lines."""
    whole: StatementWhole
    """The cost that all lines must add up to."""
