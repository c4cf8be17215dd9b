"""Read a request's body before the application does, find tenant claims in it, and pass it on.

This happens only if a tenant rule needs the body (`tenants.rules.ChildRule`). The messages are kept
and replayed one by one, so the application receives the same messages, even that a client has left.
Only three fields of the body are parsed. The rest is skipped, and a value too long for a name is
not decoded.

Invariant: any body is passed on byte for byte in its original messages. Nothing here raises, except
that errors of `receive` pass through.
"""

from collections import deque
from collections.abc import Collection, Iterable
from typing import Any

import msgspec
from starlette.types import Message, Receive

from vllm_cost_meter.tenants.rules import NAME_CHARS_MAX, NO_CLAIMS, BodyClaims

# A longer body is neither parsed nor kept.
BODY_BYTES_MAX = 64 * 1024 * 1024
# JSON may write one character with six bytes ("\u0041"), and adds two quotes.
_TEXT_BYTES_MAX = 6 * NAME_CHARS_MAX + 2
# OpenAI allows 16 keys of 64 characters with values of 512.
_METADATA_BYTES_MAX = 64 * 1024
_NOTHING = msgspec.Raw()
# JSON that is nested thousands deep raises RecursionError.
_JSON_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)


class _Body(msgspec.Struct):
    user: msgspec.Raw = _NOTHING
    metadata: msgspec.Raw = _NOTHING
    model: msgspec.Raw = _NOTHING


_BODY = msgspec.json.Decoder(_Body)


def is_json(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether the (ASGI) headers of a request declare a JSON body."""
    types = [value for name, value in headers if name.lower() == b"content-type"]
    return len(types) == 1 and types[0].partition(b";")[0].strip().lower() == b"application/json"


async def read_ahead(
    receive: Receive, bytes_max: int = BODY_BYTES_MAX
) -> tuple[bytes | None, Receive]:
    """Return the body, and a `receive` that replays its messages.

    The body is None if it is longer than `bytes_max`, or if the client left before its end.
    """
    messages: deque[Message] = deque()
    size, is_whole = 0, False
    while not is_whole and size <= bytes_max:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request":
            break
        size += len(message.get("body", b""))
        is_whole = not message.get("more_body", False)

    async def replayed() -> Message:
        return messages.popleft() if messages else await receive()

    if not is_whole or size > bytes_max:
        return None, replayed
    return b"".join(message.get("body", b"") for message in messages), replayed


def claims_of(body: bytes | None, served: Collection[str]) -> BodyClaims:
    """Parse the tenant claims in a body; `served` are the served model names. Never raises."""
    if body is None:
        return NO_CLAIMS
    try:
        found = _BODY.decode(body)
    except _JSON_ERRORS:
        return NO_CLAIMS
    user, metadata, model = found.user, found.metadata, found.model
    asked_for = _decoded(model, str, _TEXT_BYTES_MAX) if served else None
    is_served = asked_for in served
    return BodyClaims(
        user=_decoded(user, str, _TEXT_BYTES_MAX),
        metadata=_decoded(metadata, dict[str, Any], _METADATA_BYTES_MAX) or {},
        lora=None if is_served else asked_for,
        model=asked_for if is_served else None,
    )


def _decoded(raw: msgspec.Raw, kind: Any, bytes_max: int) -> Any:
    if not 0 < len(memoryview(raw)) <= bytes_max:
        return None
    try:
        return msgspec.json.decode(raw, type=kind)
    except _JSON_ERRORS:
        return None
