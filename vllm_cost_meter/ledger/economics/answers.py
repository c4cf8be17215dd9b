"""Answer types of economics and comparisons: each JSON field, its meaning and its unit.

A docstring below a field is its description. Figures and inputs are numbers. Amounts of a
comparison are decimal text in USD. Unknown is null.

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
    """Number of GPUs that each engine uses: its `world_size`."""
    model: str
    """The name that the model is served by."""
    precision: str
    """Number format of the weights."""
    parallelism: str
    """How the model is spread over the GPUs: tensor, pipeline and other parallelism."""
    vllm_version: str
    """The version of vLLM that the engines run."""
    runs: int
    """Number of engine runs of this kind."""


class PublicEconomics(TypedDict):
    """The cost per token, with load and latency, but without any total."""

    window: Hours
    """The hours that the figures cover."""
    taken_at: str | None
    """RFC 3339 UTC: the latest snapshot; the figures are as of then."""
    deployments: list[Deployment]
    """The kinds of engines that ran in the window."""
    rows_kept_from: str | None
    """Rows of requests that ended before this instant were dropped: percentiles of a window that
    reaches before it are within 1 %, and figures by declared bounds are null; null if none were."""
    slo: Slo | None
    """The latency bounds that the operator declared; null without any."""
    figures: dict[str, float | None]
    """Each figure by its name; null if it is unknown. `/cost/economics/method` explains them."""


class Economics(PublicEconomics):
    """The cost of tokens and requests, with totals, prices, load and latency."""

    engines: str | None
    """The filter that chooses engines by their labels: the figures are of these alone. Null for all
    engines."""

    prices: list[PriceRow]
    """The prices that the costs were computed with, the earliest first."""


class FigureMethod(TypedDict):
    """Where a figure comes from."""

    figure: str
    """The name of the figure."""
    unit: str | None
    """The unit of the figure; null for a ratio."""
    meaning: str
    """What the figure says, in a sentence."""
    sql: str
    """The SQL that is executed for it."""


class FigureMethods(TypedDict):
    """The SQL behind each figure."""

    figures: list[FigureMethod]
    """Each figure of `/cost/economics`, in its order."""


class ComparisonInputs(TypedDict):
    """The question that a comparison answers."""

    window: str
    """The window in words, such as `7d`."""
    model: list[str] | None
    """The models that are compared: names or patterns; null for all."""
    provider: list[str] | None
    """The providers that are compared: names or patterns; null for all."""
    prices: str | None
    """The path of the price file; null without one."""
    label: list[str] | None
    """The labels of the offers that are compared; null for all."""
    max_usd_per_m_output: float | None
    """USD: the highest price of a million output tokens that an offer may have; null for any."""
    ratio: str | None
    """For `what_if`: the supposed ratio of input to output tokens, such as `3:1`."""
    volume: list[str] | None
    """For `what_if`: the supposed tokens per month, such as `100M`."""
    filter: str | None
    """The filter that chooses engines by their labels; null for all engines."""
    accept_no_latency_promise: bool
    """Whether the note about latency is left out."""


class MixRow(TypedDict):
    """The requests that are compared."""

    requests: int
    """Number of requests that are compared."""
    prompt_tokens: int
    """Tokens: the prompts of all requests, cached tokens included."""
    cached_tokens: int
    """Tokens: the part of the prompts that was found in the prefix cache."""
    output_tokens: int
    """Tokens: the output of all requests."""


class Sums(TypedDict):
    """The cost of the requests, in total and per million tokens."""

    usd: str | None
    """USD: the cost of all requests."""
    usd_per_m_output_tokens: str | None
    """USD: the cost of a million output tokens; null without any."""
    usd_per_m_total_tokens: str | None
    """USD: the cost of a million prompt and output tokens; null without any."""


class Costs(Sums):
    """The cost of the requests with one provider."""

    provider: str
    """The name of the provider."""
    model: str
    """The name of the model."""
    source: str
    """Where the price comes from."""
    as_of: str | None
    """The date of the price, or RFC 3339 UTC of the latest snapshot; null if nobody declared it."""


class OfferRow(Costs):
    """The price of the requests at an API."""

    times: str | None
    """How many times the deployment's cost that is: `usd` / the deployment's `usd`."""
    cheaper: Cheaper | None
    """Who costs less; null if the deployment's cost is unknown."""
    label: str
    """The label that the price file gives the offer."""


class SupposedRow(TypedDict):
    """The price of a month's supposed volume at an API."""

    provider: str
    """The name of the provider."""
    model: str
    """The name of the model."""
    tokens_per_month: int
    """Tokens: the supposed volume of a month."""
    usd: str
    """USD: the price of that volume."""
    cheaper: Cheaper | None
    """Who costs less; null if the deployment's cost is unknown."""


class Supposed(TypedDict):
    """The cost of supposed volumes, here and at APIs."""

    tokens_per_request: int
    """Tokens: the size of the supposed request, prompt and output."""
    self_hosted_usd_per_month: str | None
    """USD: the cost of a month of the deployment."""
    offers: list[SupposedRow]
    """The price of each offer at each volume."""


class Found(TypedDict):
    """The result of a comparison: the cost here, and the price of each offer."""

    window: Hours
    """The hours in which the compared requests ended."""
    mix: MixRow
    """The requests that are compared, and their tokens."""
    self_hosted: Costs
    """The cost of the requests here, idle time included."""
    offers: list[OfferRow]
    """The price of the requests at each offer, the cheapest first."""
    what_if: Supposed | None
    """The cost of supposed volumes; null if the question supposes none."""


class Comparison(Found):
    """The cost of a window's requests here, and their price at APIs."""

    inputs: ComparisonInputs
    """The question that the comparison answers."""
    formula: str
    """How the figures follow from each other."""
    note: str | None
    """What the comparison leaves out; null if that was accepted."""
