"""The shapes of economics and comparisons, field by field, with their units: what JSON has.

A docstring below a field is its description. Figures and inputs are numbers, sums of a comparison
decimal text in USD; unknown is null.

Invariant: an answer has these fields and no other.
"""

from typing_extensions import TypedDict

from vllm_cost_meter.economics.comparison import Cheaper
from vllm_cost_meter.economics.declared import Slo
from vllm_cost_meter.reports.answers import Hours
from vllm_cost_meter.reports.price_answers import PriceRow


class Deployment(TypedDict):
    """Engine runs of one kind, as the engines reported it."""

    hardware: str
    """Name of the GPUs, or of the CPU."""
    gpus: int
    """`world_size` of each engine."""
    model: str
    """The served name."""
    precision: str
    """Number format of the weights."""
    parallelism: str
    """Tensor, pipeline and other parallelism."""
    vllm_version: str
    """The version of vLLM."""
    runs: int
    """How many engine runs there were."""


class PublicEconomics(TypedDict):
    """What tokens cost, without any amount."""

    window: Hours
    """The hours of the answer."""
    taken_at: str | None
    """RFC 3339 UTC: the latest snapshot: figures are as of then."""
    deployments: list[Deployment]
    """What ran in the window."""
    slo: Slo | None
    """The declared latency bounds, null without any."""
    figures: dict[str, float | None]
    """Each figure by its name."""


class Economics(PublicEconomics):
    """What tokens and requests cost in all, at which load and latency."""

    prices: list[PriceRow]
    """All prices that are in its costs, the earliest first."""


class FigureMethod(TypedDict):
    """Where a figure comes from."""

    figure: str
    """Its name."""
    unit: str | None
    """Its unit, null for a ratio."""
    meaning: str
    """What it is."""
    sql: str
    """The SQL that is executed for it."""


class Method(TypedDict):
    """The SQL behind each figure."""

    figures: list[FigureMethod]
    """Each figure of `/cost/economics`, in its order."""


class ComparisonInputs(TypedDict):
    """The question of a comparison."""

    window: str
    """The window in words, such as `7d`."""
    model: list[str] | None
    """Models or patterns, null for any."""
    provider: list[str] | None
    """Providers or patterns, null for any."""
    prices: str | None
    """The price file, null without one."""
    label: list[str] | None
    """Labels of offers, null for any."""
    max_usd_per_m_output: float | None
    """USD: of a million output tokens, at most."""
    ratio: str | None
    """What if: input to output tokens, such as `3:1`."""
    volume: list[str] | None
    """What if: tokens per month, such as `100M`."""
    accept_no_latency_promise: bool
    """Whether the note about latency is left out."""


class MixRow(TypedDict):
    """The requests that are compared."""

    requests: int
    """How many."""
    prompt_tokens: int
    """Tokens: the prompts of all requests, cached tokens included."""
    cached_tokens: int
    """Tokens: the part of the prompts that was found in the prefix cache."""
    output_tokens: int
    """Tokens: the output of all requests."""


class Sums(TypedDict):
    """What the requests cost, in all and per token."""

    usd: str | None
    """USD: all requests."""
    usd_per_m_output_tokens: str | None
    """USD: of a million output tokens, null without any."""
    usd_per_m_total_tokens: str | None
    """USD: of a million prompt and output tokens, null without any."""


class Costs(Sums):
    """What the requests cost with one provider."""

    provider: str
    """Its name."""
    model: str
    """The model."""
    source: str
    """Where the figure is from."""
    as_of: str | None
    """The date of the price, or RFC 3339 UTC of the latest snapshot; null if nobody declared it."""


class OfferRow(Costs):
    """What the requests would have cost at an API."""

    times: str | None
    """`usd` / that of the deployment."""
    cheaper: Cheaper | None
    """Who costs less, null without a cost of the deployment."""
    label: str
    """The offer's label."""


class SupposedRow(TypedDict):
    """What an API asks for a month's volume."""

    provider: str
    """Its name."""
    model: str
    """The model."""
    tokens_per_month: int
    """Tokens: the volume."""
    usd: str
    """USD: its price."""
    cheaper: Cheaper | None
    """Who costs less, null without a cost of the deployment."""


class Supposed(TypedDict):
    """What other volumes would cost."""

    tokens_per_request: int
    """Tokens: of the supposed request."""
    self_hosted_usd_per_month: str | None
    """USD: a month of the deployment."""
    offers: list[SupposedRow]
    """Each offer and volume."""


class Found(TypedDict):
    """What a comparison found."""

    window: Hours
    """The hours of the requests."""
    mix: MixRow
    """The requests."""
    self_hosted: Costs
    """What they cost here, idle included."""
    offers: list[OfferRow]
    """What they would have cost, the cheapest first."""
    what_if: Supposed | None
    """Other volumes, if they were asked for."""


class Comparison(Found):
    """What the requests of a window cost here, and what they would have cost at APIs."""

    inputs: ComparisonInputs
    """The question."""
    formula: str
    """How the figures follow from each other."""
    note: str | None
    """What the comparison leaves out."""
