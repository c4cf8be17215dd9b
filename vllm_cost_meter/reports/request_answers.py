"""Answer types of requests and explanations: each JSON field, its meaning and its unit.

A docstring below a field is its description. Money is nano-USD where it is an integer and USD where
it is text; unknown is null.

Invariant: an answer has these fields and no other.
"""

from typing_extensions import TypedDict

from vllm_cost_meter.reports.price_answers import PriceOfTime


class RequestRow(TypedDict):
    """One HTTP exchange: what the client was told, and what its engine requests cost."""

    request_id: str | None
    """vLLM's internal id of the engine request; of the first one, if there are several."""
    response_id: str | None
    """The id in the reply that the client got, such as `chatcmpl-...`."""
    http_request_id: str | None
    """The meter's own id of the exchange, as in the header `x-cost-meter-request-id`."""
    x_request_id: str | None
    """The client's `X-Request-Id`; null if it sent none."""
    tenant: str
    """The tenant who pays."""
    tenant_rule: str | None
    """The rule by which the tenant was found."""
    model: str | None
    """The name that the model is served by; the first one, if it has several."""
    route: str | None
    """The path of the HTTP request, such as `/v1/chat/completions`."""
    status: int | None
    """The HTTP status that was sent."""
    streamed: bool | None
    """Whether the reply was sent as a stream."""
    state: str
    """`running`, `finished`, or `lost` if an engine died before its bill came."""
    engine_status: str | None
    """How the engine ended it: `stopped`, `length_capped`, `aborted`, `ignored`, `error`."""
    prompt_tokens: int | None
    """Tokens: the length of the prompt, as the client was told."""
    cached_tokens: int | None
    """Tokens: the part of the prompt that was found in the engine's own prefix cache."""
    external_tokens: int | None
    """Tokens: the part of the prompt that came over a KV connector; null where it is unknown."""
    output_tokens: int | None
    """Tokens: the length of the output, as the client was told, else as the engine counted."""
    gpu_time_ns: int | None
    """GPU-ns: the GPU time that it used, summed over its parts."""
    prefill_ns: int | None
    """GPU-ns: the part in which the prompt was computed, or computed again after a preemption."""
    decode_ns: int | None
    """GPU-ns: the part in which the output was computed."""
    marginal_ns: int | None
    """GPU-ns: what its steps took longer because of it, by the cost model."""
    recomputed_ns: int | None
    """GPU-ns: the time for what was computed again after a preemption: part of `prefill_ns`, or
    beside it where the operator pays."""
    rejected_ns: int | None
    """GPU-ns: the time spent on draft tokens that were rejected."""
    cut_ns: int | None
    """GPU-ns: the time spent on tokens that were computed for the output and are not in it."""
    kv_block_ms: int | None
    """Blocks x ms: KV residency: how many blocks the context filled, x how long."""
    saved_estimate_ns: int | None
    """GPU-ns: **an estimate**: what computing the `cached_tokens` would have taken."""
    cost_nanousd: int | None
    """nano-USD: GPU time and KV residency by the prices of its hours, summed over its parts."""
    cost_usd: str | None
    """USD: the same as a decimal string."""
    cost_reason: str | None
    """Why `cost_nanousd` is null, from the first part without a cost."""
    marginal_cost_usd: str | None
    """USD: the price of `marginal_ns` at the time, summed over the parts."""
    method: str | None
    """How steps were split between requests: `shapley`, `tokens` or `equal`."""
    started_at: str
    """RFC 3339 UTC: the instant at which the request reached the middleware."""
    finished_at: str | None
    """RFC 3339 UTC: the instant at which its record was written; null while it runs."""
    as_of: str | None
    """RFC 3339 UTC: for running and lost requests, the snapshot that the figures are from."""
    queue_ms: float | None
    """ms: the wait in the engine's queue, the shortest of all parts."""
    ttft_ms: float | None
    """ms: the time from arrival to the first token, the shortest of all parts."""
    tpot_ms: float | None
    """ms: the mean time between two output tokens; null with several parts."""
    e2e_ms: float | None
    """ms: the time from arrival to the bill, the longest of all parts."""
    energy_mj: int | None
    """mJ: the GPU energy that it used, summed over its parts."""
    energy_reason: str | None
    """Why `energy_mj` is null: `pending` until the first snapshot after its end."""
    kv_role: str | None
    """`kv_producer` if it computed a prompt for another server, `kv_consumer` if another server
    computed its prompt, both with a plus sign if these are joined; null if no router split it."""
    prefill_http_request_id: str | None
    """The HTTP request of the prefill server that is joined with this one; null without one."""


class PartRow(TypedDict):
    """One engine request of an exchange; a prompt with n > 1 has several."""

    run_id: str | None
    """The id of the engine run that computed it."""
    seq: int | None
    """The bill's number in its run, from 1 without gaps; null before the bill."""
    request_id: str | None
    """vLLM's internal id of the engine request."""
    external_id: str | None
    """The id by which the API server handed it to the engine."""
    prompt_group: str | None
    """A text that the parts of one prompt share (n > 1)."""
    lora: str | None
    """Name of the LoRA adapter; null without one."""
    state: str
    """`running`, `finished` or `lost`, as in the request row."""
    engine_status: str | None
    """How the engine ended it, as in the request row."""
    method: str | None
    """How steps were split between requests, as in the request row."""
    prompt_tokens: int | None
    """Tokens: the length of the prompt."""
    cached_tokens: int | None
    """Tokens: the part of the prompt in the engine's own prefix cache when it was first
    scheduled; where `external_tokens` is null, what came over a KV connector may be in it."""
    external_tokens: int | None
    """Tokens: the part of the prompt that came over a KV connector; null where it is unknown."""
    output_tokens: int | None
    """Tokens: the output that the engine produced."""
    prefill_tokens: int | None
    """Tokens: the tokens computed in prefill: the prompt less its cached and external part."""
    decode_tokens: int | None
    """Tokens: the tokens computed in decode, rejected drafts and cut tokens included."""
    gpu_time_ns: int | None
    """GPU-ns: the GPU time that it used: `prefill_ns` + `decode_ns`."""
    prefill_ns: int | None
    """GPU-ns: the part in which the prompt was computed, or computed again."""
    decode_ns: int | None
    """GPU-ns: the part in which the output was computed."""
    cost_nanousd: int | None
    """nano-USD: GPU time x price and KV residency x price, hour by hour, each rounded half to
    even."""
    cost_usd: str | None
    """USD: the same as a decimal string."""
    cost_reason: str | None
    """Why `cost_nanousd` is null; null if it is known."""
    marginal_ns: int | None
    """GPU-ns: what its steps took longer because of it, by the cost model."""
    marginal_cost_nanousd: int | None
    """nano-USD: the price of `marginal_ns`."""
    recomputed_ns: int | None
    """GPU-ns: the time that computed tokens again after a preemption: part of `prefill_ns`, or
    beside it where the operator pays."""
    recomputed_tokens: int | None
    """Tokens: the part of `prefill_tokens` that was computed again after a preemption."""
    rejected_ns: int | None
    """GPU-ns: the time spent on draft tokens that were rejected."""
    rejected_tokens: int | None
    """Tokens: the draft tokens that were rejected."""
    cut_ns: int | None
    """GPU-ns: the time spent on tokens that were computed for the output and are not in it."""
    cut_tokens: int | None
    """Tokens: the tokens that were computed for the output and are not in it."""
    kv_block_ms: int | None
    """Blocks x ms: KV residency: how many blocks the context filled, x how long."""
    step_ns: int | None
    """GPU-ns: the whole time of the steps that it was part of."""
    saved_estimate_ns: int | None
    """GPU-ns: **an estimate**: what computing the `cached_tokens` would have taken."""
    charge_error_ns: int | None
    """GPU-ns: **an estimate**: how much of `gpu_time_ns` may belong to other requests, in about 95
    of 100 cases; null where it is unknown."""
    preemptions: int | None
    """How often the engine preempted it: took its KV cache and put it back in the queue."""
    steps: int | None
    """Number of engine steps that it was part of."""
    batch: int | None
    """The number of requests in each of these steps, summed over the steps."""
    first_model: int | None
    """The version of the cost model in use when the request came."""
    last_model: int | None
    """The version of the cost model in use when it was billed."""
    started_at: str | None
    """RFC 3339 UTC: the instant at which it reached the API server."""
    finished_at: str | None
    """RFC 3339 UTC: the instant at which the bill came; null before."""
    as_of: str | None
    """RFC 3339 UTC: while it runs or if it was lost, the snapshot that the figures are from."""
    queue_ms: float | None
    """ms: the wait in the engine's queue."""
    ttft_ms: float | None
    """ms: the time from arrival to the first token."""
    tpot_ms: float | None
    """ms: the mean time between two output tokens."""
    e2e_ms: float | None
    """ms: the time from arrival to the bill."""
    energy_mj: int | None
    """mJ: the GPU energy that it used, summed over the hours."""
    energy_reason: str | None
    """Why `energy_mj` is null: `pending` until the first snapshot after its end."""
    kv_role: str | None
    """`kv_producer` if it computed a prompt for another server, `kv_consumer` if another server
    computed its prompt; null if no router split it, as far as is known."""


class RequestWithParts(RequestRow):
    """One HTTP exchange with its engine requests."""

    parts: list[PartRow]
    """Its engine requests, in the order in which they started."""


class RequestsPage(TypedDict):
    """A page of exchanges, the newest first."""

    tenant: str | None
    """The tenant whose exchanges these are; null for all tenants."""
    covers: str | None
    """`with_children`: those of all tenants below it too, or `own`; null for all tenants."""
    requests: list[RequestRow]
    """The exchanges that ended, the newest first."""
    running: list[RequestRow]
    """The newest exchanges that still run; on the first page only."""
    rows_kept_from: str | None
    """Requests that ended before this instant may have been dropped, and are not listed then; null
    if none were."""
    next: str | None
    """The token of the next page; null on the last."""


class ShownCurve(TypedDict):
    """The curve of a cost model: how a step's time depends on what is in it."""

    form: str
    """`curve with features`; `curve` in models of earlier versions, which have no terms of them."""
    terms: dict[str, float]
    """GPU-ns: `fixed_ns` of a step, `prefill_ns` if any prefill is in it, `sequence_ns` of a
    request; of attention `pair_ns`, `prefill_compute_ns`, `decode_compute_ns`, `read_ns`; and of
    features `lora_ns` if any request has LoRA, `lora_token_ns` of each of their tokens,
    `guided_ns` if any is guided, `guided_row_ns` of each row that is sampled so, `encoder_ns` if an
    encoder runs, `encoder_token_ns` of each token that it computes."""
    token_ns: dict[str, float]
    """GPU-ns of a further token in the batch, by the number of tokens from which it holds."""
    expert_ns: float
    """GPU-ns to read one more distinct expert in all layers."""
    experts: dict[str, int]
    """The `number` of experts in a layer, and how many each token chooses: `per_token`."""
    layers: dict[str, int]
    """How many layers see all of the context (`whole`), how many the last `window` tokens."""
    captured: list[int]
    """Batch sizes in tokens, ascending, that smaller batches are padded to."""


class ModelInUse(TypedDict):
    """A version of the cost model that was in use while an engine request ran."""

    version: int
    """The number of the cost model in its run, from 0, the prior."""
    taken_at: str | None
    """RFC 3339 UTC: the first snapshot that contained it."""
    form: str
    """`curve with features` or `two planes`; models of earlier versions may have `curve` or
    `one plane`."""
    planes: dict[str, dict[str, float]]
    """GPU-ns: of `compute`, `memory` (and once `one`): `fixed_ns`, `token_ns`, `sequence_ns`."""
    curve: ShownCurve | None
    """The curve; null in models of earlier versions."""
    steps: int
    """Number of engine steps that it was learnt from."""
    error: float
    """The mean relative error of the form in use (MAPE)."""
    explained: float
    """The share of the variance of step times that the form in use explains."""
    charge_errors: dict[str, float] | None
    """The part by which charges may be off, by kind: of prefills by the tokens computed in a step,
    of decodes by their context; 1 where it is unknown. Null in models of earlier versions."""


class ExplainedPart(TypedDict):
    """How the bill of one engine request came about."""

    run_id: str
    """The id of the engine run that billed it."""
    seq: int
    """The bill's number in its run, from 1 without gaps."""
    request_id: str
    """vLLM's internal id of the engine request."""
    lora: str | None
    """Name of the LoRA adapter; null without one."""
    engine_status: str | None
    """How the engine ended it, as in the request row."""
    kv_role: str | None
    """Which half of a request it is, as in the request row."""
    phases: dict[str, dict[str, int]]
    """`prefill` and `decode`, each with `gpu_time_ns` and the `tokens` computed in it."""
    gpu_time_ns: int
    """GPU-ns: the GPU time of both phases."""
    steps: int
    """Number of engine steps that it was part of."""
    batch: int
    """The number of requests in each of these steps, summed over the steps."""
    average_batch: float | None
    """Requests: the average number in a step: `batch` / `steps`."""
    step_ns: int
    """GPU-ns: the whole time of these steps."""
    share: float | None
    """Its part of the steps' time, 0 to 1: `gpu_time_ns` / `step_ns`."""
    marginal_ns: int
    """GPU-ns: what its steps took longer because of it, by the cost model."""
    common_ns: int
    """GPU-ns: its part of the time that the batch takes anyway: `gpu_time_ns` - `marginal_ns`, plus
    `recomputed_ns` where the operator pays that."""
    charge_error_ns: int | None
    """GPU-ns: **an estimate**: how much of `gpu_time_ns` may belong to other requests, in about 95
    of 100 cases; null where it is unknown, 0 if it had all its steps for itself."""
    charge_error: float | None
    """The part by which its GPU time may be off: `charge_error_ns` / `gpu_time_ns`."""
    cached: dict[str, int]
    """`tokens` found in the engine's own prefix cache, and `saved_estimate_ns`."""
    external_tokens: int | None
    """Tokens: the part of the prompt that came over a KV connector; null where it is unknown."""
    preempted: dict[str, int | str | None]
    """`preemptions`, `recomputed_tokens`, `recomputed_ns`: wasted by preemption; and who pays:
    `paid_by` is `victim` (the time is part of `gpu_time_ns`) or `operator` (it is not), null if
    only the bills of the run are known."""
    drafts: dict[str, int]
    """`rejected_tokens`, `rejected_ns`: wasted by drafts."""
    cut_off: dict[str, int]
    """`cut_tokens`, `cut_ns`: wasted on tokens that are not in the output."""
    kv_block_ms: int
    """Blocks x ms: KV residency: how many blocks the context filled, x how long."""
    usd_per_gpu_hour: str | None
    """USD: the price of one GPU-hour; null if it has several prices, or none."""
    price_source: str | None
    """Where the price comes from; null if it has several prices, or none."""
    prices: list[PriceOfTime]
    """Each price of its hours, with the `gpu_time_ns` and `kv_block_ms` at that price."""
    time_cost_nanousd: int | None
    """nano-USD: the sum over `prices` of `gpu_time_ns` x `usd_per_gpu_hour` / 3600."""
    kv_cost_nanousd: int | None
    """nano-USD: the sum over `prices` of `kv_block_ms` x `usd_per_kv_block_hour` x 10^9 / 3600000;
    0 without such a price."""
    cost_nanousd: int | None
    """nano-USD: `time_cost_nanousd` + `kv_cost_nanousd`."""
    cost_usd: str | None
    """USD: the same as a decimal string."""
    cost_reason: str | None
    """The run and the hour without a price, and why there is none."""
    told_nanousd: int | None
    """nano-USD: the cost that the reply told the client."""
    method: str
    """How steps were split between requests: `shapley`, `tokens` or `equal`."""
    cost_models: list[ModelInUse]
    """The versions in use while it ran: `version`, `taken_at`, `form`, `planes`."""


class Explanation(TypedDict):
    """How the bills of one exchange came about, to be recomputed by hand."""

    request_id: str | None
    """vLLM's internal id of the engine request; of the first one, if there are several."""
    http_request_id: str | None
    """The meter's own id of the exchange."""
    response_id: str | None
    """The id in the reply that the client got."""
    x_request_id: str | None
    """The client's `X-Request-Id`; null if it sent none."""
    tenant: str | None
    """The tenant who pays."""
    model: str | None
    """The name that the model is served by."""
    route: str | None
    """The path of the HTTP request."""
    state: str | None
    """`running`, `finished` or `lost`, as in the request row."""
    gpu_time_ns: int | None
    """GPU-ns: the GPU time that the exchange used, summed over its parts."""
    cost_nanousd: int | None
    """nano-USD: the cost by the prices of its hours, summed over its parts."""
    cost_usd: str | None
    """USD: the same as a decimal string."""
    parts: list[ExplainedPart]
    """Each engine request that has ended."""
    formulas: dict[str, str]
    """How the figures follow from each other."""
    text: list[str]
    """The whole explanation in sentences, line by line."""
