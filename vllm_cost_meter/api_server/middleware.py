"""The ASGI middleware: opens an exchange for each HTTP request and edits the replies.

A complete JSON reply is held until its bills are committed, and leaves with the cost in headers. A
stream passes event by event; the final usage event gets `usage.cost`, and a comment line with the
cost goes before the last event. Bodies of complete replies are never changed. What is told, and
how long is waited, is the collector's to say; without a cost in time the reply leaves as it came.
Where a rule wants to know what the body of a request says, it is read before the application reads
it, and handed on as it came.

Installed by the endpoint plugin (vLLM 0.27 and later) or `--middleware
vllm_cost_meter.middleware.CostMiddleware` (any version), and harmless when installed twice.

Invariant: what leaves is byte for byte what entered, but for the fields listed in
docs/reference/headers-and-streams.md; and every message that entered leaves, whatever fails here.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_cost_meter import metrics
from vllm_cost_meter.api_server import reply_bytes as reply
from vllm_cost_meter.api_server.admission import fails_closed
from vllm_cost_meter.api_server.collector import Collector, get_collector
from vllm_cost_meter.api_server.refusal import Refusal, contradicting, refusal, warning
from vllm_cost_meter.api_server.request_body import claims_of, is_json, read_ahead
from vllm_cost_meter.api_server.routes import reaches_engine, route_of
from vllm_cost_meter.api_server.runtime import start_side
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.exchange import Exchange, current_exchange, is_metered, set_exchange
from vllm_cost_meter.records.owner import CONTRADICTION
from vllm_cost_meter.records.requests import Usage
from vllm_cost_meter.tenants.budgets import Verdict
from vllm_cost_meter.tenants.rules import NO_CLAIMS, BodyClaims

# nginx's "client closed request": the client left before any status was sent.
CLIENT_LEFT = 499
# The HTTP status that accepts a WebSocket.
SWITCHED_PROTOCOLS = 101
BODY = "http.response.body"


class CostMiddleware:
    """Puts the measured cost of a request into its reply."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        collector = get_collector()
        if not isinstance(collector, Collector):
            refused = _refused_while_down(scope, collector.settings)
            await (_refuse(refused, scope, send) if refused else self.app(scope, receive, send))
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, _starting(scope, send, collector))
        elif is_metered(scope):
            await self.app(scope, receive, send)
        else:
            await self._metered(scope, receive, send, collector)

    async def _metered(
        self, scope: Scope, receive: Receive, send: Send, collector: Collector
    ) -> None:
        started_at_ns = time.time_ns()
        claims = NO_CLAIMS
        if collector.settings.resolver.reads_body and collector.run("body", _has_claims, scope):
            claims, receive = await _read_claims(receive, collector)
        exchange = collector.run("new exchange", _new_exchange, scope, claims, started_at_ns)
        judged = collector.run("budgets", _judged, exchange) if exchange else None
        if judged is None:
            judged = Judged(_refused_while_down(scope, collector.settings))
        if judged.refusal is not None:
            await _refuse(judged.refusal, scope, send)
            return
        if judged.delay_s:
            await asyncio.sleep(judged.delay_s)
        editor = None
        if exchange is not None:
            editor = collector.run("new editor", ReplyEditor, exchange, send, judged.warnings)
        # Always set, also to None: the context may be that of another tenant's request.
        exchange = exchange if editor is not None else None
        set_exchange(scope, exchange)
        token = current_exchange.set(exchange)
        try:
            await self._served(scope, receive, send, editor)
        finally:
            current_exchange.reset(token)
            if editor is not None:
                collector.run("end of exchange", lambda _collector: editor.close())

    async def _served(
        self, scope: Scope, receive: Receive, send: Send, editor: "ReplyEditor | None"
    ) -> None:
        """Call the application; what it left of an incomplete reply leaves as it came."""
        if editor is None:
            await self.app(scope, receive, send)
            return
        try:
            await self.app(scope, editor.receiving(receive), editor.sending())
        except Exception:
            with contextlib.suppress(Exception):  # the application's own error counts
                await editor.release()
            raise
        await editor.release()


def _starting(scope: Scope, send: Send, collector: Collector) -> Send:
    """Start and stop the collector's own work with the application."""

    async def starting_send(message: Message) -> None:
        if message["type"] == "lifespan.startup.complete":
            await start_side(collector, scope.get("app"))
        elif message["type"] == "lifespan.shutdown.complete":
            try:
                await collector.stop()
            except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
                collector.guard.failed("stop", error)
        await send(message)

    return starting_send


def _route(scope: Scope) -> str:
    return route_of(scope["path"].removeprefix(scope.get("root_path", "")))


def _has_claims(_collector: Collector, scope: Scope) -> bool:
    """Tell whether the body of a request may say something of its tenant."""
    return scope["type"] == "http" and reaches_engine(_route(scope)) and is_json(scope["headers"])


async def _read_claims(receive: Receive, collector: Collector) -> tuple[BodyClaims, Receive]:
    # A function of its own, so that the body does not live as long as the exchange.
    body, replayed = await read_ahead(receive)
    claims = collector.run("claims", lambda c: claims_of(body, c.served))
    return claims or NO_CLAIMS, replayed


def _new_exchange(
    collector: Collector, scope: Scope, claims: BodyClaims, started_at_ns: int
) -> Exchange:
    headers = scope["headers"]
    request_ids = [value for name, value in headers if name == b"x-request-id"]
    return Exchange(
        route=_route(scope),
        owner=collector.settings.resolver.resolve(headers, claims),
        x_request_id=request_ids[0].decode("latin-1")[:256] if request_ids else None,
        started_at_ns=started_at_ns,
    )


@dataclass(frozen=True, slots=True)
class Judged:
    """What its budgets make of a new request: refused, delayed, or warned in its reply."""

    refusal: Refusal | None = None
    delay_s: float = 0.0
    warnings: Sequence[tuple[bytes, bytes]] = ()


_ADMITTED = Judged()
_DOWN = Verdict("unavailable", stale="the meter of this server is off")


def _judged(collector: Collector, exchange: Exchange) -> Judged:
    if collector.admission is None or not reaches_engine(exchange.route):
        return _ADMITTED
    if exchange.owner == CONTRADICTION:
        metrics.count_refused("contradicting", "")
        return Judged(contradicting(exchange.route))
    verdict = collector.admission.verdict(exchange.owner)
    if verdict.kind in ("blocked", "unavailable"):
        return Judged(refusal(verdict, exchange.owner.tenant, exchange.route))
    if verdict.kind == "throttled":
        return Judged(delay_s=collector.settings.budget_throttle_s)
    return Judged(warnings=warning(verdict.soft))


def _refused_while_down(scope: Scope, settings: Settings | None) -> Refusal | None:
    """Return what those who are to fail closed are told while nothing is measured, else None."""
    if settings is None or not settings.failing_closed or scope["type"] == "lifespan":
        return None
    with contextlib.suppress(Exception):  # metering may fail, serving may not
        route = _route(scope)
        owner = settings.resolver.resolve(scope["headers"])
        if not reaches_engine(route):
            return None
        if owner == CONTRADICTION:
            return contradicting(route)
        if fails_closed(owner, settings.failing_closed):
            return refusal(_DOWN, owner.tenant, route)
    return None


async def _refuse(told: Refusal, scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        # Before it was accepted: the server answers the handshake with 403.
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": told.status, "headers": told.headers})
    await send({"type": BODY, "body": told.body})


class ReplyEditor:
    """Stands between the application and the client for one exchange."""

    def __init__(
        self,
        collector: Collector,
        exchange: Exchange,
        send: Send,
        warnings: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        self._collector = collector
        self._exchange = exchange
        self._send = send
        self._mode = collector.settings.reply_for(exchange.owner.tenant)
        self._warnings = warnings if self._mode != "none" else ()
        self._status: int | None = None
        self._usage = Usage()
        self._complete = False
        self._client_left = False
        self._recorded = False
        # A held reply: its start and the body messages so far.
        self._held: list[Message] | None = None
        self._events: reply.SseEvents | None = None
        # True while a stream is edited and stands between two events.
        self._between_events = False
        self._streamed = False
        self._told: bool | None = None
        self._commented = False

    def receiving(self, receive: Receive) -> Receive:
        """Wrap `receive` to notice a client that leaves before its reply is complete."""

        async def noticing() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not self._complete:
                self._client_left = True
            return message

        return noticing

    def sending(self) -> Send:
        """Wrap `send` for the application: a token of a stream passes, all else is taken."""
        # Called for each token, in caches that the model's work has emptied: what it needs is
        # bound here, and no coroutine of ours is made.
        send, take, is_token = self._send, self.take, reply.is_token

        def editing_send(message: Message) -> Awaitable[None]:
            if (
                self._between_events
                and is_token(message.get("body", b""))
                and message.get("more_body", False)
            ):
                return send(message)
            return take(message)

        return editing_send

    async def take(self, message: Message) -> None:
        """Pass on, hold or edit one message of the application."""
        if message["type"] == "http.response.start":
            await self._start(message)
        elif message["type"] == BODY:
            self._complete = not message.get("more_body", False)
            if self._held is not None:
                await self._hold(self._held, message)
            elif self._events is not None:
                await self._stream(self._events, message)
            else:
                await self._send(message)
        else:
            if message["type"] == "websocket.accept":
                self._status = SWITCHED_PROTOCOLS
            await self.release()
            await self._send(message)

    async def release(self) -> None:
        """Let go of what is held, as it came; the rest of the reply passes unedited."""
        held, self._held = self._held, None
        for message in held or ():
            await self._send(message)
        events, self._events = self._events, None
        self._between_events = False
        if events is not None and not self._complete and events.rest:
            await self._send({"type": BODY, "body": events.rest, "more_body": True})

    def close(self) -> None:
        """The application is done: make sure that the exchange is recorded."""
        if self._recorded:
            return
        record = self._http_record(told=False)
        if self._exchange.born:
            self._collector.writer.put(record)
        else:
            self._exchange.unrecorded = record

    async def _start(self, message: Message) -> None:
        self._status = message["status"]
        if self._warnings:
            message = {**message, "headers": [*message.get("headers", ()), *self._warnings]}
        content_type = _header(message, b"content-type").partition(b";")[0].strip().lower()
        if content_type == b"text/event-stream":
            self._streamed = True
            if _can_grow(message):
                self._events = reply.SseEvents()
                self._between_events = True
        elif content_type == b"application/json" and self._exchange.born:
            self._held = [message]
            return
        await self._send(message)

    # -- complete replies -------------------------------------------------------------------

    async def _hold(self, held: list[Message], message: Message) -> None:
        held.append(message)
        if not self._complete:
            return
        self._held = None
        start = held[0]
        if headers := await self._cost_headers(held[1:]):
            start = {**start, "headers": [*start.get("headers", ()), *headers]}
        await self._send(start)
        for body in held[1:]:
            await self._send(body)

    async def _cost_headers(self, bodies: list[Message]) -> list[tuple[bytes, bytes]]:
        body = b"".join(message.get("body", b"") for message in bodies)
        self._usage = self._collector.run("usage", lambda _: reply.usage_of(body)) or Usage()
        if self._mode == "none" or reply.goes_on(body) or not await self._settle():
            return []
        return self._collector.run("headers", lambda _: reply.headers(self._cost())) or []

    # -- streams ----------------------------------------------------------------------------

    async def _stream(self, events: reply.SseEvents, message: Message) -> None:
        out = b""
        for event in events.feed(message.get("body", b"")):
            out += event if reply.is_ordinary(event) else await self._edited(event)
        self._between_events = not events.pending
        if self._complete:
            out += events.rest
        if out or self._complete:
            await self._send({**message, "body": out})

    async def _edited(self, event: bytes) -> bytes:
        if not self._exchange.born:
            return event
        usage = self._collector.run("final usage", lambda _: reply.final_usage(event))
        is_end = reply.is_end(event)
        if usage is not None:
            self._usage = usage
        if (usage is None and not is_end) or self._mode != "all":
            return event
        if not await self._settle():
            return event
        return self._collector.run("stream", lambda _: self._with_cost(event, is_end)) or event

    def _with_cost(self, event: bytes, is_end: bool) -> bytes:
        cost = self._cost()
        edited = reply.insert_usage(event, cost)
        if not is_end or self._commented:
            return edited
        self._commented = True
        return reply.comment(cost) + edited

    def _cost(self) -> reply.Cost:
        exchange = self._exchange
        return reply.Cost(
            gpu_time_ns=exchange.gpu_time_ns,
            prefill_ns=exchange.prefill_ns,
            decode_ns=exchange.decode_ns,
            cost_nanousd=exchange.cost_nanousd,
            marginal_ns=exchange.marginal_ns,
            marginal_cost_nanousd=exchange.marginal_cost_nanousd,
            http_request_id=exchange.http_request_id,
            tenant=exchange.owner.tenant,
            method=exchange.method,
        )

    # -- the record -------------------------------------------------------------------------

    async def _settle(self) -> bool:
        """Wait for the bills once; the answer holds for the rest of the reply."""
        if self._told is None:
            self._told = await self._collector.settle(
                self._exchange, lambda: self._http_record(told=True)
            )
        return self._told

    def _http_record(self, *, told: bool) -> Any:
        status = self._status
        if status is None or (self._client_left and not self._streamed):
            status = CLIENT_LEFT if self._client_left else 500
        self._recorded = True
        return self._collector.http_record(
            self._exchange, status, self._streamed, self._usage, told
        )


def _header(start: Message, wanted: bytes) -> bytes:
    for name, value in start.get("headers", ()):
        if name.lower() == wanted:
            return bytes(value)
    return b""


def _can_grow(start: Message) -> bool:
    """Tell whether bytes may be added to a body: its length is open and it is plain text."""
    return not (_header(start, b"content-length") or _header(start, b"content-encoding"))
