"""The reply editor puts the cost into one reply: in headers, or in the events of a stream.

A complete reply is held until its cost is known, and leaves with the cost in headers. A stream
passes event by event. Its final usage event gets `usage.cost`, and a comment line with the cost
goes before the last event where somebody asked for one. If the cost is not known in time, the reply
leaves unedited.

Invariant: a reply leaves byte for byte as it came, except for the fields that
docs/reference/headers-and-streams.md lists. Every message leaves, whatever fails here.
"""

from collections.abc import Awaitable, Sequence

from starlette.types import Message, Receive, Send

from vllm_cost_meter.api_server import reply_bytes
from vllm_cost_meter.api_server.api_guard import ApiGuard
from vllm_cost_meter.api_server.collector import Collector
from vllm_cost_meter.api_server.refusal import Headers
from vllm_cost_meter.api_server.reply_plan import ReplyPlan
from vllm_cost_meter.api_server.routes import replies_in_bytes
from vllm_cost_meter.exchange import Exchange
from vllm_cost_meter.records.requests import Usage

# Messages that answer a WebSocket handshake, with the HTTP status if they name none.
WEBSOCKET_ANSWERS = {
    "websocket.accept": 101,
    "websocket.close": 403,
    "websocket.http.response.start": 500,
}
BODY = "http.response.body"
BYTES = b"application/octet-stream"


class ReplyEditor:
    """Edits the messages between application and client for one exchange."""

    def __init__(
        self,
        collector: Collector,
        guard: ApiGuard,
        exchange: Exchange,
        send: Send,
        plan: ReplyPlan,
    ) -> None:
        """Make an editor. `plan` says what the client is told, and where."""
        self._collector = collector
        self._guard = guard
        self._exchange = exchange
        self._sent = exchange.sent
        self._send = send
        self._plan = plan
        self._complete = False
        # The messages of a held reply so far: its start and parts of its body.
        self._held: list[Message] | None = None
        self._events: reply_bytes.SseEvents | None = None
        # True while an edited stream is between two events.
        self._between_events = False
        # The cost for the whole reply; still None after `_has_settled` if there is none.
        self._cost: reply_bytes.ReplyCost | None = None
        self._has_settled = False
        self._commented = False
        # The body that is sent in place of the application's.
        self._instead: bytes | None = None

    def receiving(self, receive: Receive) -> Receive:
        """Wrap `receive` to notice if the client leaves before its reply is complete."""

        async def noticing() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not self._complete:
                self._sent.client_left = True
            return message

        return noticing

    def sending(self) -> Send:
        """Wrap `send` for the application: tokens of a stream pass, other messages go to `take`."""
        # This is called for each token, with CPU caches that the model's work has emptied. So all
        # it needs is bound here, and it creates no coroutine of ours.
        send, take, is_token = self._send, self.take, reply_bytes.is_token

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
        """Pass on, hold or edit one message from the application."""
        if message["type"] == "http.response.start":
            await self._start(self._refusing(message))
        elif message["type"] == BODY:
            if self._instead is not None:
                body = b"" if message.get("more_body", False) else self._instead
                message = {**message, "body": body}
            self._complete = not message.get("more_body", False)
            if self._held is not None:
                await self._hold(self._held, message)
            elif self._events is not None:
                await self._stream(self._events, message)
            else:
                await self._send(message)
        else:
            if message["type"] in WEBSOCKET_ANSWERS and self._sent.status is None:
                self._sent.status = message.get("status", WEBSOCKET_ANSWERS[message["type"]])
            await self.release()
            await self._send(message)

    async def release(self) -> None:
        """Send everything held, unedited; the rest of the reply also passes unedited."""
        held, self._held = self._held, None
        for message in held or ():
            await self._send(message)
        events, self._events = self._events, None
        self._between_events = False
        if events is not None and not self._complete and events.rest:
            await self._send({"type": BODY, "body": events.rest, "more_body": True})

    async def _start(self, message: Message) -> None:
        self._sent.status = message["status"]
        if self._plan.warnings:
            message = self._with_headers(message, self._plan.warnings)
        if _content_type(message) == b"text/event-stream":
            self._sent.streamed = True
            if _can_grow(message):
                self._events = reply_bytes.SseEvents()
                self._between_events = True
        elif self._exchange.born and self._comes_whole(message):
            self._held = [message]
            return
        await self._send(message)

    def _refusing(self, start: Message) -> Message:
        """Answer with the budget's own reply where the application answers with its error.

        What it knows of the refusal of an engine request is the message; and before vLLM 0.30 it
        answers each client's error with 400.
        """
        refusal = self._exchange.refusal
        if refusal is None or start["status"] < 400:
            return start
        self._instead = refusal.body
        headers = self._plan.exposed(refusal.headers)
        return {**start, "status": refusal.status, "headers": headers}

    def _comes_whole(self, start: Message) -> bool:
        """Return whether all of a reply is there when it begins, so that holding it delays nothing.

        Where a client asks for bytes, vLLM sends them as a stream of one piece.
        """
        content_type = _content_type(start)
        return (
            content_type == b"application/json"
            or bool(_header(start, b"content-length"))
            or (content_type == BYTES and replies_in_bytes(self._exchange.route))
        )

    def _with_headers(self, start: Message, added: Sequence[tuple[bytes, bytes]]) -> Message:
        return {**start, "headers": [*start.get("headers", ()), *self._plan.exposed(added)]}

    # -- complete replies -------------------------------------------------------------------

    async def _hold(self, held: list[Message], message: Message) -> None:
        held.append(message)
        if not self._complete:
            return
        self._held = None
        start = held[0]
        if headers := await self._cost_headers(start, held[1:]):
            start = self._with_headers(start, headers)
        await self._send(start)
        for body in held[1:]:
            await self._send(body)

    async def _cost_headers(self, start: Message, bodies: list[Message]) -> Headers:
        said = _said_of_usage(start, bodies)
        self._sent.usage = self._guard.run("usage", reply_bytes.usage_of, said) or Usage()
        if self._plan.detail == "none" or reply_bytes.goes_on(said):
            return []
        cost = await self._settled_cost()
        if cost is None:
            return []
        return self._guard.run("headers", reply_bytes.headers, cost) or []

    # -- streams ----------------------------------------------------------------------------

    async def _stream(self, events: reply_bytes.SseEvents, message: Message) -> None:
        out = b""
        for event in events.feed(message.get("body", b"")):
            out += event if reply_bytes.is_ordinary(event) else await self._edited(event)
        self._between_events = not events.pending
        if self._complete:
            out += events.rest
        if out or self._complete:
            await self._send({**message, "body": out})

    async def _edited(self, event: bytes) -> bytes:
        if not self._exchange.born:
            return event
        usage = self._guard.run("final usage", reply_bytes.final_usage, event)
        is_end = reply_bytes.is_end(event)
        if usage is not None:
            self._sent.usage = usage
        has_comment = is_end and self._plan.comments and not self._commented
        if (usage is None and not has_comment) or self._plan.detail != "all":
            return event
        cost = await self._settled_cost()
        if cost is None:
            return event
        return self._guard.run("stream", self._with_cost, event, cost, has_comment) or event

    def _with_cost(self, event: bytes, cost: reply_bytes.ReplyCost, has_comment: bool) -> bytes:
        edited = reply_bytes.insert_usage(event, cost)
        if not has_comment:
            return edited
        self._commented = True
        return reply_bytes.comment(cost) + edited

    # -- the cost ---------------------------------------------------------------------------

    async def _settled_cost(self) -> reply_bytes.ReplyCost | None:
        """Wait for the cost once, and keep the result for the rest of the reply."""
        if not self._has_settled:
            self._has_settled = True
            self._cost = await self._collector.settle(self._exchange)
        return self._cost


def _header(start: Message, wanted: bytes) -> bytes:
    for name, value in start.get("headers", ()):
        if name.lower() == wanted:
            return bytes(value)
    return b""


def _content_type(start: Message) -> bytes:
    return _header(start, b"content-type").partition(b";")[0].strip().lower()


def _said_of_usage(start: Message, bodies: list[Message]) -> bytes:
    """Return the JSON that tells a reply's usage: its body, or a header beside a body of bytes."""
    if _content_type(start) == BYTES:
        return _header(start, b"metadata")
    return b"".join(message.get("body", b"") for message in bodies)


def _can_grow(start: Message) -> bool:
    """Return whether bytes may be added to a body: its length is open and it is not compressed."""
    return not (_header(start, b"content-length") or _header(start, b"content-encoding"))
