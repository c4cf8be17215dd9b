"""Read a request's body before the application does, find tenant claims in it, and pass it on.

This happens only if a tenant rule needs the body (`tenants.rules.ChildRule`). The messages are kept
and replayed one by one, so the application receives the same messages, even that a client has left.

vLLM reads a body with Python's `json.loads`: UTF-8, UTF-16 or UTF-32, with a byte order mark or
without, and NaN is a number. It goes by the first Content-Type. We read the same. Nearly every body
is plain JSON in UTF-8, so msgspec tries first: it parses three fields only, skips the rest, and
does not decode a value too long for a name. Only what it does not understand goes to `json.loads`.
A field that vLLM may find and we do not read (in a form, on a WebSocket, in a very long body) is
`unread`; then the request counts against all children's budgets.

Invariant: any body is passed on byte for byte in its original messages. Nothing here raises, except
that errors of `receive` pass through.
"""

import json
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec
from starlette.types import Message, Receive

from vllm_cost_meter.records.owner import CHILD_KINDS, ChildKind
from vllm_cost_meter.tenants.rules import NAME_CHARS_MAX, NO_CLAIMS, BodyClaims

# A longer body is neither parsed nor kept.
BODY_BYTES_MAX = 64 * 1024 * 1024
# JSON may write one character with six bytes ("\u0041"), and adds two quotes.
_TEXT_BYTES_MAX = 6 * NAME_CHARS_MAX + 2
# OpenAI allows 16 keys of 64 characters with values of 512.
_METADATA_BYTES_MAX = 64 * 1024
_NOTHING = msgspec.Raw()
# The fields that a form (a recording's) or the messages of a WebSocket may contain.
_FIELDS_OF_OTHERS: tuple[ChildKind, ...] = ("lora", "model")


class _Body(msgspec.Struct):
    user: msgspec.Raw = _NOTHING
    metadata: msgspec.Raw = _NOTHING
    model: msgspec.Raw = _NOTHING


_BODY = msgspec.json.Decoder(_Body)


def media_type(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the media type of a request's body, as vLLM sees it; empty if it is not declared."""
    for name, value in headers:
        if name.lower() == b"content-type":
            return value.partition(b";")[0].strip().lower()
    return b""


def is_json(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether the (ASGI) headers of a request declare a JSON body."""
    return media_type(headers) == b"application/json"


def unread_claims(
    headers: Iterable[tuple[bytes, bytes]], is_websocket: bool, needed: Collection[ChildKind]
) -> BodyClaims:
    """Return the claims of a request without a JSON body; `needed` are the fields of the rules."""
    is_form = media_type(headers) in (b"multipart/form-data", b"application/x-www-form-urlencoded")
    if not (is_websocket or is_form):
        return NO_CLAIMS
    unread = frozenset(needed).intersection(_FIELDS_OF_OTHERS)
    return BodyClaims(unread=unread) if unread else NO_CLAIMS


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


def claims_of(body: bytes | None, served: Sequence[str]) -> BodyClaims:
    """Return the tenant claims in a body; every field is unread without a body. Never raises.

    `served` are the names of the served model; vLLM takes the first where a request has none.
    """
    if body is None:
        return _ALL_UNREAD
    try:
        return _claims(_plain_fields(body), served)
    except msgspec.ValidationError:
        return NO_CLAIMS  # This is JSON, but no object. vLLM refuses it.
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass  # `json.loads` may understand it.
    try:
        found = json.loads(body)
    except (RecursionError, MemoryError):
        return _ALL_UNREAD
    except ValueError:
        return NO_CLAIMS  # vLLM refuses what is no JSON.
    return _claims(found, served) if isinstance(found, dict) else NO_CLAIMS


_ALL_UNREAD = BodyClaims(unread=frozenset(CHILD_KINDS))
_UNREAD_METADATA: Collection[ChildKind] = frozenset(("metadata",))


def _plain_fields(body: bytes) -> dict[str, object]:
    """Return the three fields of a plain body. Raises an error of msgspec for others."""
    found = _BODY.decode(body)
    return {
        "user": _decoded(found.user, _TEXT_BYTES_MAX),
        "metadata": _decoded(found.metadata, _METADATA_BYTES_MAX),
        "model": _decoded(found.model, _TEXT_BYTES_MAX),
    }


def _decoded(raw: msgspec.Raw, bytes_max: int) -> object:
    size = len(memoryview(raw))
    if size > bytes_max:
        return _TOO_LONG
    return msgspec.json.decode(raw) if size else None


# It stands for a value that is longer than a name or our bound.
_TOO_LONG = object()


def _claims(fields: Mapping[str, object], served: Sequence[str]) -> BodyClaims:
    user, metadata, model = fields.get("user"), fields.get("metadata"), fields.get("model")
    if served and (model is None or model == ""):
        model = served[0]
    name = model if served and isinstance(model, str) else None
    is_served = name in served
    return BodyClaims(
        user=user if isinstance(user, str) else None,
        metadata=metadata if isinstance(metadata, dict) else {},
        lora=None if is_served else name,
        model=name if is_served else None,
        unread=_UNREAD_METADATA if metadata is _TOO_LONG else NO_CLAIMS.unread,
    )
