"""Requests as the ledger keeps them: engine requests, open ones, and the HTTP requests they serve.

A record is built once and never changed. Unknown is None, never 0.

Invariant: an engine request and its `OpenRequest` name the same request, owner and start.
"""

from dataclasses import dataclass

from vllm_cost_meter.records.bill import Bill
from vllm_cost_meter.records.owner import Owner


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

    `prompt_group` is shared by the parts of one prompt (n > 1), so that the prompt can be
    counted once. `announced` tells that an `OpenRequest` went before.
    """

    bill: Bill
    http_request_id: str | None
    response_id: str | None
    external_id: str | None
    prompt_group: str
    owner: Owner
    model: str | None
    lora: str | None
    route: str | None
    cost_nanousd: int | None
    marginal_cost_nanousd: int | None
    started_at_ns: int
    finished_at_ns: int
    latencies: Latencies
    announced: bool = False


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
    owner: Owner
    model: str | None
    lora: str | None
    route: str | None
    started_at_ns: int


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
    owner: Owner
    model: str | None
    route: str
    status: int
    streamed: bool
    usage: Usage
    gpu_time_ns: int | None
    cost_nanousd: int | None
    started_at_ns: int
    finished_at_ns: int


@dataclass(frozen=True, slots=True)
class Price:
    """What one hour costs, as a decimal string in USD, and where the figure came from."""

    price_id: str
    usd_per_gpu_hour: str
    source: str
    effective_from_ns: int
