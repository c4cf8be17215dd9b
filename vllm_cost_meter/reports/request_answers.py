"""The shapes of requests and their explanations, field by field, with their units: what JSON has.

A docstring below a field is its description. Money is nano-USD where it is an integer and USD where
it is text; unknown is null.

Invariant: an answer has these fields and no other.
"""

from typing_extensions import TypedDict

from vllm_cost_meter.reports.price_answers import PriceOfTime


class RequestRow(TypedDict):
    """One HTTP exchange: what the client was told, and what its engine requests cost."""

    request_id: str | None
    """vLLM's internal id of the (first) engine request."""
    response_id: str | None
    """The id in the reply."""
    http_request_id: str | None
    """The record's own id, as in `x-cost-meter-request-id`."""
    x_request_id: str | None
    """The client's `X-Request-Id`, if any."""
    tenant: str
    """Who pays."""
    tenant_rule: str | None
    """The rule that named them."""
    model: str | None
    """The (first) served model name."""
    route: str | None
    """The path of the request."""
    status: int | None
    """HTTP status sent."""
    streamed: bool | None
    """Whether the reply was a stream."""
    state: str
    """`running`, `lost` or `finished`: above."""
    engine_status: str | None
    """How the engine ended it: `stopped`, `length_capped`, `aborted`, `ignored`, `error`."""
    prompt_tokens: int | None
    """Tokens: as the client was told."""
    cached_tokens: int | None
    """Tokens: of those, found in the prefix cache."""
    output_tokens: int | None
    """Tokens: as the client was told, else as the engine counted."""
    gpu_time_ns: int | None
    """GPU-ns: sum over the parts."""
    prefill_ns: int | None
    """GPU-ns: the part in which the prompt was computed, or computed again after a preemption."""
    decode_ns: int | None
    """GPU-ns: the part in which the output was computed."""
    marginal_ns: int | None
    """GPU-ns: what its steps took longer because of it, by the cost model."""
    recomputed_ns: int | None
    """GPU-ns: the part of `prefill_ns` for what was computed again after a preemption."""
    rejected_ns: int | None
    """GPU-ns: spent on draft tokens that were rejected."""
    cut_ns: int | None
    """GPU-ns: spent on tokens that were computed for the output and are not in it (books.md)."""
    kv_block_ms: int | None
    """Blocks x ms: KV residency: blocks of the KV cache that the context filled, x how long."""
    saved_estimate_ns: int | None
    """GPU-ns: **an estimate**: what computing the `cached_tokens` would have taken."""
    cost_nanousd: int | None
    """nano-USD: sum over the parts of what each cost at the time."""
    cost_usd: str | None
    """USD: the same as a decimal string."""
    cost_reason: str | None
    """Why it is null, of the first part of which it is."""
    marginal_cost_usd: str | None
    """USD: the price of `marginal_ns` at the time, summed over the parts."""
    method: str | None
    """How steps were split: `shapley`, `tokens` or `equal` (attribution.md)."""
    started_at: str
    """RFC 3339 UTC: when the request reached the middleware."""
    finished_at: str | None
    """RFC 3339 UTC: when its record was written."""
    as_of: str | None
    """RFC 3339 UTC: while it runs, or if it was lost: the snapshot that the figures are from."""
    queue_ms: float | None
    """ms: shortest wait in the engine's queue among the parts."""
    ttft_ms: float | None
    """ms: from arrival to the first token, the first of all parts."""
    tpot_ms: float | None
    """ms: mean time between output tokens."""
    e2e_ms: float | None
    """ms: from arrival to the bill, the longest of the parts."""
    energy_mj: int | None
    """mJ: what it used of the GPUs, sum over the parts (energy.md)."""
    energy_reason: str | None
    """Why it is null: `pending` until a snapshot after its end tells it."""


class PartRow(TypedDict):
    """One engine request of an exchange."""

    run_id: str | None
    """The engine run that billed it, or has it now."""
    seq: int | None
    """The bill's number in its run, from 1, without gaps."""
    request_id: str | None
    """vLLM's internal id."""
    external_id: str | None
    """The id the API server gave the engine."""
    prompt_group: str | None
    """The same for the parts of one prompt (n > 1)."""
    lora: str | None
    """Name of the LoRA adapter, if any."""
    state: str
    """As in the request row."""
    engine_status: str | None
    """As in the request row."""
    method: str | None
    """As in the request row."""
    prompt_tokens: int | None
    """Tokens: length of the prompt."""
    cached_tokens: int | None
    """Tokens: found in the prefix cache when it was first scheduled."""
    output_tokens: int | None
    """Tokens: produced by the engine."""
    prefill_tokens: int | None
    """Tokens: computed in prefill: the prompt less what was cached."""
    decode_tokens: int | None
    """Tokens: computed in decode, rejected drafts and tokens cut off included."""
    gpu_time_ns: int | None
    """GPU-ns: `prefill_ns` + `decode_ns`."""
    prefill_ns: int | None
    """GPU-ns."""
    decode_ns: int | None
    """GPU-ns."""
    cost_nanousd: int | None
    """nano-USD: GPU time x price, by the hour, rounded half to even."""
    cost_usd: str | None
    """USD: the same as a decimal string."""
    cost_reason: str | None
    """As in the request row."""
    marginal_ns: int | None
    """GPU-ns: as in the request row."""
    marginal_cost_nanousd: int | None
    """nano-USD: `marginal_ns` x price."""
    recomputed_ns: int | None
    """GPU-ns: as in the request row."""
    recomputed_tokens: int | None
    """Tokens: the part of `prefill_tokens` that was computed again after a preemption."""
    rejected_ns: int | None
    """GPU-ns: as in the request row."""
    rejected_tokens: int | None
    """Tokens: draft tokens that were rejected."""
    cut_ns: int | None
    """GPU-ns: as in the request row."""
    cut_tokens: int | None
    """Tokens: computed for the output and not in it."""
    kv_block_ms: int | None
    """Blocks x ms: as in the request row."""
    step_ns: int | None
    """GPU-ns: what the steps it was part of took in all."""
    saved_estimate_ns: int | None
    """GPU-ns: as in the request row."""
    preemptions: int | None
    """How often it lost its place."""
    steps: int | None
    """Engine steps it was part of."""
    batch: int | None
    """The sum, over these steps, of the requests in the step."""
    first_model: int | None
    """Version of the cost model in use when it came."""
    last_model: int | None
    """Version of the cost model in use when it was billed."""
    started_at: str | None
    """RFC 3339 UTC: arrival at the API server."""
    finished_at: str | None
    """RFC 3339 UTC: when the bill came."""
    as_of: str | None
    """RFC 3339 UTC: as in the request row."""
    queue_ms: float | None
    """ms: as in the request row."""
    ttft_ms: float | None
    """ms: as in the request row."""
    tpot_ms: float | None
    """ms: as in the request row."""
    e2e_ms: float | None
    """ms: as in the request row."""
    energy_mj: int | None
    """mJ: sum over the hours."""
    energy_reason: str | None
    """As in the request row."""


class RequestWithParts(RequestRow):
    """One exchange with its parts."""

    parts: list[PartRow]
    """Its engine requests, in the order they started in."""


class RequestsPage(TypedDict):
    """A page of exchanges, the newest first."""

    requests: list[RequestRow]
    """Those that ended."""
    running: list[RequestRow]
    """On the first page, the newest of which nothing has ended yet."""
    next: str | None
    """The token of the next page; null on the last."""


class ModelInUse(TypedDict):
    """A version of the cost model that was in use while an engine request ran."""

    version: int
    """0 is the prior."""
    taken_at: str | None
    """RFC 3339 UTC: when a snapshot first told of it."""
    form: str
    """`two planes` (`compute` and `memory`) or `one plane` (`one`)."""
    planes: dict[str, dict[str, float]]
    """GPU-ns: of `compute`, `memory` and `one`: `fixed_ns`, `token_ns`, `sequence_ns`."""
    steps: int
    """The number of steps that it was learnt from."""
    error: float
    """The mean relative error of the form in use (MAPE)."""
    explained: float
    """The share of the variance of step times that the form in use explains."""


class ExplainedPart(TypedDict):
    """How the bill of one engine request came about."""

    run_id: str
    """As in parts, as all that is not explained here."""
    seq: int
    """Number of the bill in its run."""
    request_id: str
    """vLLM's internal id."""
    lora: str | None
    """Name of the LoRA adapter, if any."""
    engine_status: str | None
    """How the engine ended it."""
    phases: dict[str, dict[str, int]]
    """`prefill` and `decode`, each with `gpu_time_ns` and the `tokens` computed in it."""
    gpu_time_ns: int
    """GPU-ns: the sum of both."""
    steps: int
    """Engine steps it was part of."""
    batch: int
    """The sum, over these steps, of the requests in the step."""
    average_batch: float | None
    """Requests: `batch` / `steps`."""
    step_ns: int
    """GPU-ns: what these steps took in all."""
    share: float | None
    """`gpu_time_ns` / `step_ns`."""
    marginal_ns: int
    """GPU-ns: what it added to its steps, by the cost model."""
    common_ns: int
    """GPU-ns: `gpu_time_ns` - `marginal_ns`: its share of what the batch needs anyway."""
    cached: dict[str, int]
    """`tokens` found in the prefix cache, and `saved_estimate_ns`."""
    preempted: dict[str, int]
    """`preemptions`, `recomputed_tokens`, `recomputed_ns`: wasted by preemption."""
    drafts: dict[str, int]
    """`rejected_tokens`, `rejected_ns`: wasted by drafts."""
    cut_off: dict[str, int]
    """`cut_tokens`, `cut_ns`: wasted on tokens that are not in the output."""
    kv_block_ms: int
    """Blocks x ms."""
    usd_per_gpu_hour: str | None
    """USD: the price."""
    price_source: str | None
    """Where it came from, likewise."""
    prices: list[PriceOfTime]
    """Each price of its hours, and the `gpu_time_ns` at that price."""
    cost_nanousd: int | None
    """nano-USD: the sum over these of `gpu_time_ns` x `usd_per_gpu_hour` / 3600."""
    cost_usd: str | None
    """USD: the same as a decimal string."""
    cost_reason: str | None
    """The run and the hour without a price, and why there is none."""
    told_nanousd: int | None
    """nano-USD: what the reply said."""
    method: str
    """How its steps were split (attribution.md)."""
    cost_models: list[ModelInUse]
    """The versions in use while it ran: `version`, `taken_at`, `form`, `planes`."""


class Explanation(TypedDict):
    """How the bills of one exchange came about, to be recomputed by hand."""

    request_id: str | None
    """As in the request row."""
    http_request_id: str | None
    """As in the request row."""
    response_id: str | None
    """As in the request row."""
    x_request_id: str | None
    """As in the request row."""
    tenant: str | None
    """As in the request row."""
    model: str | None
    """As in the request row."""
    route: str | None
    """As in the request row."""
    state: str | None
    """As in the request row."""
    gpu_time_ns: int | None
    """GPU-ns: as in the request row."""
    cost_nanousd: int | None
    """nano-USD: as in the request row."""
    cost_usd: str | None
    """USD: as in the request row."""
    parts: list[ExplainedPart]
    """Each engine request that has ended."""
    formulas: dict[str, str]
    """How the figures follow from each other."""
    text: list[str]
    """All of it in sentences."""
