"""One HTTP request being served and its engine requests: the link between a reply and its bills.

The middleware puts an `Exchange` into the ContextVar `current_exchange`. A task copies the context
of its creator, so each engine request of the exchange finds it there, even in a background task
that outlives the reply. Only one event loop uses an exchange.

A context does not identify an HTTP request: uvicorn begins a pipelined request in the context of
the request before. The ASGI scope does identify it, so the exchange also stands there
(`exchange_of`).

Invariant: `unbilled` counts the engine requests whose bill has not come yet. It is never negative.
"""

import asyncio
import os
import random
import time
from collections.abc import MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, Usage
from vllm_cost_meter.units.time import NS_PER_MS


class RequestTimes(Protocol):
    """The part of vLLM's RequestStateStats that we read; `*_ts` are monotonic engine seconds."""

    arrival_time: float
    queued_ts: float
    scheduled_ts: float
    first_token_ts: float
    last_token_ts: float
    first_token_latency: float


# We do not use uuid4: it asks the kernel and so releases the interpreter's lock. With the ledger's
# thread running, getting the lock back takes hundreds of microseconds. Ids are unique, not secret.
_ids = random.Random()  # noqa: S311
os.register_at_fork(after_in_child=_ids.seed)


_NO_USAGE = Usage()


def new_http_request_id() -> str:
    """Return an id for an HTTP exchange, unique over all processes and servers.

    It begins with the time in ms, as UUIDs of version 7 do. So in an index what comes together
    stands together: of ids at random each would change a page of its own.
    """
    return f"cost-{time.time_ns() // NS_PER_MS:012x}{_ids.getrandbits(80):020x}"


# nginx's "client closed request": the client left before any status was sent.
CLIENT_LEFT = 499


@dataclass(slots=True)
class SentReply:
    """The reply as far as it was sent, and whether the client is still connected."""

    status: int | None = None
    streamed: bool = False
    usage: Usage = _NO_USAGE
    # True if the client left before its reply was complete.
    client_left: bool = False

    def final_status(self) -> int:
        """Return the status for the ledger: 499 if the client left before it was sent a reply."""
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
    """One HTTP request being served, and the bills that have come for it so far."""

    route: str
    # The owner is fixed when the request comes; tenant settings may change while it runs.
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
    # The cost is None as soon as one part has no cost.
    cost_nanousd: int | None = 0
    marginal_cost_nanousd: int | None = 0
    method: str = ""
    # A WebSocket: each of its engine requests is a new request to budgets.
    is_socket: bool = False
    # The reply to the client since an engine request was refused, as its budget is used up.
    refusal: Refusal | None = None
    sent: SentReply = field(default_factory=SentReply)
    # True once the final record of this exchange was made.
    recorded: bool = False
    # The record of an exchange that ended before it had an engine request. It is written if a
    # background response still brings one; without an engine request there is nothing to record.
    unrecorded: HttpRequest | None = None
    _all_billed: asyncio.Event = field(default_factory=asyncio.Event)

    def part_was_born(self, response_id: str | None) -> None:
        """Count a new engine request of this exchange."""
        self.born += 1
        self.unbilled += 1
        self._all_billed.clear()
        if self.response_id is None:
            self.response_id = response_id

    def part_was_billed(self, part: EngineRequest) -> None:
        """Add the bill of one engine request."""
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

# The ASGI scope holds its exchange under this key.
_SCOPE_KEY = "vllm_cost_meter.exchange"


def is_metered(scope: MutableMapping[str, Any]) -> bool:
    """Return whether the meter has already seen this HTTP request."""
    return _SCOPE_KEY in scope


def set_exchange(scope: MutableMapping[str, Any], exchange: Exchange | None) -> None:
    """Mark a request as seen; `exchange` is None if it cannot be metered."""
    scope[_SCOPE_KEY] = exchange


def exchange_of(scope: MutableMapping[str, Any]) -> Exchange | None:
    """Return the exchange of this HTTP request; None if it is not metered."""
    exchange: Exchange | None = scope.get(_SCOPE_KEY)
    return exchange


@dataclass(frozen=True, slots=True)
class Birth:
    """A new engine request, as its API server sees it before any bill."""

    request_id: str
    external_id: str | None
    prompt_group: str
    lora: str | None
    arrived_at_ns: int
    exchange: Exchange | None
    times: RequestTimes | None
    # Which half of a request this is, as in `EngineRequest`.
    kv_role: str | None = None
