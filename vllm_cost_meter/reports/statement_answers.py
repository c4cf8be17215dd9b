"""The shapes of statements, field by field, with their units: what JSON has.

A docstring below a field is its description. Money is cents where it is an integer and USD where it
is text; unknown is null.

Invariant: an answer has these fields and no other.
"""

from typing_extensions import TypedDict

from vllm_cost_meter.reports.answers import Window
from vllm_cost_meter.reports.price_answers import PriceRow


class StatementLine(TypedDict):
    """A line: a model on a day, a cost beside the GPUs', or a class of engine time."""

    kind: str
    """`usage`: a model on a day."""
    tenant: str | None
    """Null for what nobody carries."""
    day: str | None
    """The day in the statement's time zone."""
    item: str
    """The model."""
    source: str | None
    """Where the declared cost comes from."""
    requests: int | None
    """HTTP requests that ended on the day."""
    prompt_tokens: int | None
    """Tokens: the prompts of these requests, cached tokens included."""
    cached_tokens: int | None
    """Tokens: the part of the prompts that was found in the prefix cache."""
    output_tokens: int | None
    """Tokens: the output of these requests."""
    gpu_time_ns: int | None
    """GPU-ns: used on the day."""
    idle_share_ns: int | None
    """GPU-ns: as in rows."""
    usage_cents: int | None
    """Cents: without idle."""
    idle_share_cents: int | None
    """Cents: its share of idle."""
    amount_cents: int | None
    """Cents: both."""
    usage_usd: str | None
    """USD: the same three as decimal strings."""
    idle_share_usd: str | None
    """USD."""
    amount_usd: str | None
    """USD."""
    cost_reason: str | None
    """Why `amount_cents` is null."""


class StatementTotal(TypedDict):
    """The sums of lines; of money null if that of one is."""

    requests: int
    """HTTP requests that ended in the month."""
    prompt_tokens: int
    """Tokens: the prompts of these requests, cached tokens included."""
    cached_tokens: int
    """Tokens: the part of the prompts that was found in the prefix cache."""
    output_tokens: int
    """Tokens: the output of these requests."""
    gpu_time_ns: int
    """GPU-ns: used."""
    idle_share_ns: int
    """GPU-ns: the share of overhead."""
    usage_cents: int | None
    """Cents: without idle."""
    idle_share_cents: int | None
    """Cents: the share of idle."""
    amount_cents: int | None
    """Cents: both."""
    usage_usd: str | None
    """USD: the same."""
    idle_share_usd: str | None
    """USD: the same."""
    amount_usd: str | None
    """USD: the same."""


class TenantTotal(StatementTotal):
    """The sums of one tenant's lines."""

    tenant: str
    """Its name."""


class OverheadAmount(TypedDict):
    """A cost beside the GPUs' time, declared or billed."""

    name: str
    """The name that it has in the settings or in the bill."""
    source: str
    """Where the figure is from."""
    cents: int | None
    """Cents: its amount in the month; null where it is unknown."""


class BilledHours(TypedDict):
    """How much of a month the bills of the provider cover."""

    covered_hours: float
    """Hours: that GPU bills cover."""
    unobserved_hours: float
    """Hours: in a gap or before a reset, all resources together."""
    resets: int
    """The number of counters that fell."""


class StatementWhole(TypedDict):
    """What the lines must add up to."""

    wall_gpu_ns: int
    """GPU-ns: wall time x GPUs."""
    wall_cents: int | None
    """Cents: its price."""
    overhead: list[OverheadAmount]
    """Each cost beside it."""
    amount_cents: int | None
    """Cents: all together."""
    amount_usd: str | None
    """USD: the same."""


class TenantStatement(TypedDict):
    """One tenant's statement of a month."""

    month: str
    """Such as 2026-11."""
    window: Window
    """Its hours."""
    taken_at: str | None
    """RFC 3339 UTC: the latest snapshot."""
    methods: list[str]
    """How steps were split."""
    prices: list[PriceRow]
    """All prices that are in it."""
    billed: BilledHours | None
    """How much of the month bills cover."""
    tenant: str | None
    """The tenant that the statement is for; null for all tenants."""
    currency: str
    """ISO 4217."""
    idle: str
    """The policy."""
    taxes: str
    """None are in it."""
    is_over: bool
    """Whether the month is over."""
    in_flight_ns: int
    """GPU-ns: used by requests that have no bill yet."""
    final: bool
    """Whether nothing of it will change."""
    adds_up: bool
    """Whether `difference_ns` is 0."""
    difference_ns: int
    """GPU-ns: what usage and overhead miss of wall time x GPUs."""
    lines: list[StatementLine]
    """All lines."""
    total: StatementTotal
    """Their sums."""


class Statement(TenantStatement):
    """The statement of all tenants."""

    tenants: list[TenantTotal]
    """The total of each tenant."""
    whole: StatementWhole
    """What the lines must add up to."""
