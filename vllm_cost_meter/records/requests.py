"""Request records of the ledger: billed engine requests, open ones, and HTTP requests.

A record is built once and never changed. An unknown value is None, never 0.

Invariant: an engine request and its `OpenRequest` name the same request, owner and start.
"""

from dataclasses import dataclass

from vllm_cost_meter.records.bill import Bill
from vllm_cost_meter.records.owner import Owner

# Which half of a request a server has, by vLLM's names: the one that computes the prompt for
# another server, and that other one.
KV_PRODUCER = "kv_producer"
KV_CONSUMER = "kv_consumer"


@dataclass(frozen=True, slots=True)
class Latencies:
    """Latencies of one engine request as its API server saw them, in ms; None if unknown.

    `queue_ms` and `tpot_ms` lie between two instants of the engine. The others start when the
    request arrives in its API server. `tpot_ms` is (last token - first token) / (output tokens -
    1), and None for fewer than two tokens.
    """

    queue_ms: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A billed engine request as the ledger keeps it: the bill and its owner.

    All parts of one prompt (n > 1) share a `prompt_group`, so that the prompt can be counted once.
    `announced` is True if an `OpenRequest` was written before. `kv_role` is KV_PRODUCER or
    KV_CONSUMER; None unless a router has split the request.
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
    kv_role: str | None = None


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """A running engine request and its owner; the ledger keeps it until the bill comes.

    `request_id` and `started_at_ns` identify it, and its bill will have the same values.
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
    kv_role: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts that the client was told; None where the reply did not say."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One HTTP request as the ledger keeps it: its owner, its times, and what the client was told.

    `status` is the HTTP status sent, or 499 if the client left before one was sent. `cost_nanousd`
    and `gpu_time_ns` repeat the reply; they are None if the reply had no cost.
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
    """The price of a GPU-hour, as a decimal string in USD, and the source of that figure.

    `usd_per_kv_block_hour` is a decimal string too; None if KV blocks cost nothing.
    """

    price_id: str
    usd_per_gpu_hour: str
    source: str
    effective_from_ns: int
    usd_per_kv_block_hour: str | None = None
