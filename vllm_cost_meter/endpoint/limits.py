"""Limits on what the side endpoint is asked: length of the target, size of the body, known words.

A question costs memory and time before anybody knows who asks. So its size is checked first, in
front of the application. Query words are checked against the route's own description in the OpenAPI
document: a word that is mistyped, given twice or left empty would change the figures in the answer.

Invariant: a handler sees only words that its route knows, each once and none empty (a list may have
several), without control characters.
"""

from collections import Counter
from urllib.parse import parse_qsl

from fastapi import HTTPException, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_cost_meter.endpoint.shapes import AnswerRoute, error_reply
from vllm_cost_meter.units.text import quoted

# Path and query together, in bytes as they were sent.
TARGET_BYTES_MAX = 8 * 1024
# A curve has at most a thousand points.
BODY_BYTES_MAX = 256 * 1024


class LimitSizes:
    """ASGI middleware that refuses a target or a body that is too long."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        target_bytes = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
        if target_bytes > TARGET_BYTES_MAX:
            message = f"expected a URL of at most {TARGET_BYTES_MAX} bytes, got {target_bytes}"
            await error_reply(414, message)(scope, receive, send)
            return
        await self.app(scope, _bounded(receive), send)


def _bounded(receive: Receive) -> Receive:
    size = 0

    async def bounded_receive() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > BODY_BYTES_MAX:
            raise HTTPException(413, f"expected a body of at most {BODY_BYTES_MAX} bytes, got more")
        return message

    return bounded_receive


def refuse_unknown_words(request: Request) -> None:
    """Raise HTTPException (422) for query words that the route does not know as they are given."""
    if any(not text.isprintable() for text in request.path_params.values()):
        raise HTTPException(422, "path: expected text without control characters")
    route: AnswerRoute = request.scope["route"]
    known = route.query_words
    query = request.scope["query_string"].decode("latin-1")
    given = parse_qsl(query, keep_blank_values=True)
    for name, count in Counter(name for name, _ in given).items():
        if name not in known:
            expected = f"one of {', '.join(known)}" if known else "no words"
            raise HTTPException(422, f"query: expected {expected}, got {quoted(name)}")
        if count > 1 and not known[name]:
            raise HTTPException(422, f"{name}: expected once, got it {count} times")
    for name, value in given:
        if not value:
            raise HTTPException(422, f"{name}: expected a value, got none; leave the word out")
        if not value.isprintable():
            raise HTTPException(422, f"{name}: expected text without control characters")
