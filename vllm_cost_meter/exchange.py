"""One HTTP exchange and the engine requests born in it: the link between a reply and its bills.

The middleware puts an `Exchange` into `current_exchange`, a ContextVar. Tasks copy the context of
their creator, so every engine request born on behalf of the exchange, also in background tasks
that outlive the reply, finds it there. An exchange is used by one event loop only.

A context says where work comes from, not which HTTP request it is: uvicorn begins a pipelined
request in the context of the one before. Which requests the meter has seen, and whose a request
is, therefore stands in its ASGI scope (`exchange_of`).

Invariant: `unbilled` counts the births whose bill has not come yet; it never goes below 0.
"""

import asyncio
import os
import random
from collections.abc import MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, Usage


class RequestTimes(Protocol):
    """vLLM's RequestStateStats: `*_ts` are monotonic seconds of the engine."""

    arrival_time: float
    queued_ts: float
    scheduled_ts: float
    first_token_ts: float
    last_token_ts: float
    first_token_latency: float


# Not uuid4: it asks the kernel and so gives up the interpreter's lock, which beside the ledger's
# thread takes hundreds of microseconds to get back. Unique, not secret.
_ids = random.Random()  # noqa: S311
os.register_at_fork(after_in_child=_ids.seed)


_NO_USAGE = Usage()


def new_http_request_id() -> str:
    """Return an id for an HTTP exchange, unique over all processes and servers."""
    return f"cost-{_ids.getrandbits(128):032x}"


# nginx's "client closed request": the client left before any status was sent.
CLIENT_LEFT = 499


@dataclass(slots=True)
class Sent:
    """What the client of an exchange was sent so far, and whether it is still there."""

    status: int | None = None
    streamed: bool = False
    usage: Usage = _NO_USAGE
    # It left before its reply was complete.
    client_left: bool = False

    def final_status(self) -> int:
        """Return the status that the ledger keeps: 499 for a client that was sent no reply."""
        if self.status is None or (self.client_left and not self.streamed):
            return CLIENT_LEFT if self.client_left else 500
        return self.status


@dataclass(frozen=True, slots=True)
class Refusal:
    """A complete reply that refuses a request; `message` is what its body says."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    message: str


@dataclass(slots=True)
class Exchange:
    """One HTTP request being served, and what has been billed for it so far."""

    route: str
    # As it was when the request came: what is declared of tenants may change while it runs.
    owner: Owner
    x_request_id: str | None
    started_at_ns: int
    http_request_id: str = field(default_factory=new_http_request_id)
    response_id: str | None = None
    born: int = 0
    unbilled: int = 0
    gpu_time_ns: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    marginal_ns: int = 0
    # None as soon as one part has no cost.
    cost_nanousd: int | None = 0
    marginal_cost_nanousd: int | None = 0
    method: str = ""
    # A WebSocket: each of its engine requests is a new request to budgets.
    is_socket: bool = False
    # What the client is sent since an engine request was refused: its budget is used up meanwhile.
    refusal: Refusal | None = None
    sent: Sent = field(default_factory=Sent)
    # True once the record of this exchange, as it ended, was made.
    recorded: bool = False
    # The record of an exchange that ended without an engine request. One may still be born, of a
    # background response; without any there is nothing to record.
    unrecorded: HttpRequest | None = None
    _all_billed: asyncio.Event = field(default_factory=asyncio.Event)

    def part_was_born(self, response_id: str | None) -> None:
        """Count an engine request of this exchange."""
        self.born += 1
        self.unbilled += 1
        self._all_billed.clear()
        if self.response_id is None:
            self.response_id = response_id

    def part_was_billed(self, part: EngineRequest) -> None:
        """Add a part's bill."""
        bill = part.bill
        self.unbilled = max(self.unbilled - 1, 0)
        self.prefill_ns += bill.prefill_ns
        self.decode_ns += bill.decode_ns
        self.gpu_time_ns += bill.gpu_time_ns
        self.marginal_ns += bill.marginal_ns
        self.method = bill.method
        self.cost_nanousd = _sum_if_known(self.cost_nanousd, part.cost_nanousd)
        self.marginal_cost_nanousd = _sum_if_known(
            self.marginal_cost_nanousd, part.marginal_cost_nanousd
        )
        if not self.unbilled:
            self._all_billed.set()

    async def all_billed(self) -> None:
        """Wait until every engine request born so far is billed."""
        if self.unbilled:
            await self._all_billed.wait()


def _sum_if_known(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


current_exchange: ContextVar[Exchange | None] = ContextVar("cost_meter_exchange", default=None)

# The key of an ASGI scope under which its exchange stands.
_SCOPE_KEY = "vllm_cost_meter.exchange"


def is_metered(scope: MutableMapping[str, Any]) -> bool:
    """Tell whether the meter has seen this very request already."""
    return _SCOPE_KEY in scope


def set_exchange(scope: MutableMapping[str, Any], exchange: Exchange | None) -> None:
    """Mark a request as seen; `exchange` is None where it could not be metered."""
    scope[_SCOPE_KEY] = exchange


def exchange_of(scope: MutableMapping[str, Any]) -> Exchange | None:
    """Return the exchange of this very request, None where it is not metered."""
    exchange: Exchange | None = scope.get(_SCOPE_KEY)
    return exchange


@dataclass(frozen=True, slots=True)
class Birth:
    """An engine request as its API server saw it born."""

    request_id: str
    external_id: str | None
    prompt_group: str
    lora: str | None
    arrived_at_ns: int
    exchange: Exchange | None
    times: RequestTimes | None
