"""Read the usage in the bytes of a reply, and insert the measured cost into them.

Nothing here does I/O or knows ASGI: bytes go in and bytes come out. A reply is edited in place and
never serialised again. Only so do all bytes except our own fields stay the server's: number
formats, key order, white space, escapes. A search in the bytes recognises an ordinary token chunk
before any JSON is parsed.

JSON is scanned as latin-1 text. Each byte is then one character, so a position in the text is the
position in the bytes. JSON's own signs are all ASCII. Values read this way are right only if they
are ASCII, and every name and number read here is.

Invariant: no function raises on any bytes. `insert_usage` returns its event unchanged, or with one
run of bytes added at the end of its usage object. The events of `SseEvents` and its rest are
exactly the bytes it was fed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import msgspec

from vllm_cost_meter.records.requests import Usage
from vllm_cost_meter.units.money import format_nano, format_usd

# A longer event is not held back. It passes in pieces, unedited.
EVENT_BYTES_MAX = 16 * 1024 * 1024
# The largest number that a 64-bit ledger column can hold.
_TOKENS_MAX = 2**63 - 1

_DECODER = json.JSONDecoder(strict=False)
_SPACE = re.compile(r"[ \t\n\r]*")
_EVENT_END = re.compile(rb"\n\r?\n")
_DATA_LINE = re.compile(rb"^data:[ ]?([^\r\n]*)\r?$", re.MULTILINE)
# A match means that a message is one whole OpenAI chunk with a choice, as nearly all in a stream
# are. No match means nothing. A one-line event with a choice is neither a final usage event nor an
# end. No generated text can imitate the mark, because a quote inside a JSON string has a backslash
# before it. This is one call into C and no function of ours, because it runs for every token.
is_token = re.compile(rb'data: [^\n]*"choices":\[\{[^\n]*\n\n').fullmatch
_RESPONSES_TERMINAL = ("response.completed", "response.incomplete", "response.failed")
_MAYBE_FINAL = re.compile(
    rb'"choices"\s*:\s*\[\s*\]|"message_delta"|"response\.(?:completed|incomplete|failed)"'
)
_END_TYPES = ("message_stop", "error", *_RESPONSES_TERMINAL)
# Every end event contains one of these.
_END_MARKS = (b"[DONE]", *(f'"{name}"'.encode() for name in _END_TYPES))
# The fields that the meter adds to a usage object.
_OUR_FIELDS = frozenset({"cost", "cost_details"})

# All printable ASCII except "%", so that percent-decoding restores any text.
_HEADER_SAFE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
_COMMENT_SAFE = _HEADER_SAFE.replace(" ", "")

# A span is the start and the end of a value.
_Span = tuple[int, int]
# JSON that is nested thousands deep raises RecursionError.
_JSON_ERRORS = (ValueError, RecursionError)


@dataclass(frozen=True, slots=True)
class ReplyCost:
    """The cost that a client is told, over all engine requests of a reply.

    `cost_nanousd` is the charge, and `marginal_cost_nanousd` is what the request added to the
    server's cost. Both are None without a price. The client is told exact decimals with nine
    places, never with an exponent.
    """

    gpu_time_ns: int
    prefill_ns: int
    decode_ns: int
    cost_nanousd: int | None
    # None where clients see coarse figures only.
    marginal_ns: int | None
    marginal_cost_nanousd: int | None
    http_request_id: str
    tenant: str
    method: str


class _Reply(msgspec.Struct):
    usage: Any = None
    status: Any = None


class _Chunk(msgspec.Struct):
    choices: msgspec.Raw
    usage: msgspec.Raw
    type: Any = None


_CHUNK = msgspec.json.Decoder(_Chunk)


def usage_of(body: bytes | Mapping[str, Any]) -> Usage:
    """Return the token counts that a complete JSON reply tells its client; None where missing."""
    if isinstance(body, Mapping):
        return _tokens(body.get("usage"))
    try:
        return _tokens(msgspec.json.decode(body, type=_Reply).usage)
    except (msgspec.MsgspecError, *_JSON_ERRORS):
        return Usage()


def goes_on(body: bytes) -> bool:
    """Return whether a Responses reply announces a background response that still generates."""
    try:
        return msgspec.json.decode(body, type=_Reply).status in ("queued", "in_progress")
    except (msgspec.MsgspecError, *_JSON_ERRORS):
        return False


def _tokens(usage: object) -> Usage:
    """Read a usage object of the OpenAI, Anthropic or Responses API.

    Anthropic's input_tokens excludes cached tokens (vLLM 0.32 subtracts them); the other APIs
    include them. Older vLLMs neither subtracted cached tokens nor sent their number.
    """
    if not isinstance(usage, Mapping):
        return Usage()
    if "prompt_tokens" in usage:
        return Usage(
            prompt_tokens=_count(usage, "prompt_tokens"),
            cached_tokens=_count(usage.get("prompt_tokens_details"), "cached_tokens"),
            output_tokens=_count(usage, "completion_tokens"),
        )
    prompt, output = _count(usage, "input_tokens"), _count(usage, "output_tokens")
    if "input_tokens_details" in usage:
        cached = _count(usage["input_tokens_details"], "cached_tokens")
        return Usage(prompt, cached, output)
    cached = _count(usage, "cache_read_input_tokens")
    if prompt is not None:
        prompt += (cached or 0) + (_count(usage, "cache_creation_input_tokens") or 0)
    return Usage(prompt, cached, output)


def _count(holder: object, name: str) -> int | None:
    value = holder.get(name) if isinstance(holder, Mapping) else None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _TOKENS_MAX:
        return value
    return None


class SseEvents:
    """Cuts a stream of bytes into server-sent events, wherever its chunks begin and end.

    An event is everything up to and including its blank line. Comments are events too.
    """

    def __init__(self, event_bytes_max: int = EVENT_BYTES_MAX) -> None:
        self._event_bytes_max = event_bytes_max
        self._buffer = bytearray()

    @property
    def pending(self) -> bool:
        """True while an event has begun and its end has not come yet."""
        return bool(self._buffer)

    @property
    def rest(self) -> bytes:
        """The bytes of an incomplete event."""
        return bytes(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that these bytes complete, terminators included."""
        if not self._buffer and data.find(b"\n\n") == len(data) - 2 >= 0 and b"\r" not in data:
            return [data]  # vLLM sends one event per chunk.
        # Up to two bytes of an event's end may already be in the buffer.
        seen = max(0, len(self._buffer) - 2)
        self._buffer += data
        events, start = [], 0
        for match in _EVENT_END.finditer(self._buffer, seen):
            events.append(bytes(self._buffer[start : match.end()]))
            start = match.end()
        del self._buffer[:start]
        if len(self._buffer) > self._event_bytes_max:
            events.append(bytes(self._buffer))
            self._buffer.clear()
        return events


def is_ordinary(event: bytes) -> bool:
    """Return True if an event surely is neither a final usage event nor an end.

    The tokens of all APIs give True. Nothing is parsed, and False means nothing.
    """
    return b'"usage"' not in event and not any(mark in event for mark in _END_MARKS)


def final_usage(event: bytes) -> Usage | None:
    """Return the usage in a stream's final usage event; None for every other event.

    Final usage events are OpenAI's chunk without choices, Anthropic's message_delta, and the
    terminal events of the Responses API. OpenAI's chunks with choices have a running count only.
    """
    found = _final_usage(event)
    return None if found is None else _tokens(found[1])


def insert_usage(event: bytes, cost: ReplyCost) -> bytes:
    """Add the cost at the end of an event's usage object; no other byte changes.

    The new fields are `cost` (left out without a price) and `cost_details`. An event that is not a
    final usage event, or has one of these fields already, is returned unchanged.
    """
    found = _final_usage(event)
    if found is None:
        return event
    (_, end), usage = found
    if not usage.keys().isdisjoint(_OUR_FIELDS):
        return event
    brace = end - 1
    comma = b"," if usage else b""
    return event[:brace] + comma + _usage_fields(cost).encode("ascii") + event[brace:]


def is_end(event: bytes) -> bool:
    """Return whether an event ends a stream; the cost comment must go before it.

    The ends are `[DONE]`, Anthropic's message_stop, a terminal event of the Responses API, and an
    event of type error of the latter two APIs. OpenAI's error chunk is followed by `[DONE]`.
    """
    if event == b"data: [DONE]\n\n":
        return True
    if event.startswith(b"data: {"):
        return False  # Only OpenAI's events start like this, and its only end is [DONE].
    if not any(mark in event for mark in _END_MARKS):
        return False
    _, payload = _payload(event)
    if payload.strip() == "[DONE]":
        return True
    try:
        members, _ = _members(payload, 0)
        return _value(payload, members.get("type")) in _END_TYPES
    except _JSON_ERRORS:
        return False


@lru_cache(maxsize=8)  # Each final event is asked twice in a row: for its usage, for our place.
def _final_usage(event: bytes) -> tuple[_Span, Mapping[str, Any]] | None:
    """Return the span and the contents of a final usage event's usage object."""
    if b'"usage"' not in event or not _MAYBE_FINAL.search(event):
        return None
    span = _usual_span(event) or _span(event)
    if span is None:
        return None
    try:
        usage = json.loads(event[slice(*span)].decode("latin-1"), strict=False)
    except _JSON_ERRORS:
        return None
    return span, usage


def _usual_span(event: bytes) -> _Span | None:
    """Return the same as `_span` for a final chunk in vLLM's usual form; None means nothing.

    The chunk is parsed in C, which gives the usage object's text but not its place. The place is
    clear if that text occurs only once.
    """
    if not event.startswith(b"data: {") or event.count(b"\n") != 2 or not event.endswith(b"\n\n"):
        return None
    try:
        chunk = _CHUNK.decode(event[6:])
    except (msgspec.MsgspecError, *_JSON_ERRORS):
        return None
    usage = bytes(chunk.usage)
    member = b'"usage":' + usage
    if chunk.type is not None or bytes(chunk.choices) != b"[]" or not usage.startswith(b"{"):
        return None
    if event.count(member) != 1:
        return None
    end = event.index(member) + len(member)
    return end - len(usage), end


def _span(event: bytes) -> _Span | None:
    """Return the span of the usage object in a final usage event; None for other events."""
    start, payload = _payload(event)
    try:
        members, end = _members(payload, 0)
        if payload[end:].strip():
            return None
        kind = _value(payload, members.get("type"))
        if kind in _RESPONSES_TERMINAL:
            members, _ = _members(payload, members["response"][0])
        elif kind != "message_delta" and _value(payload, members.get("choices")) != []:
            return None
        first, last = members["usage"]
    except (KeyError, *_JSON_ERRORS):
        return None
    return (start + first, start + last) if payload[first] == "{" else None


def _payload(event: bytes) -> tuple[int, str]:
    """Return the start and the text (as latin-1) of the event's only data line.

    The text is empty for an event with several data lines, which vLLM never sends.
    """
    match = _DATA_LINE.search(event)
    if match is None or _DATA_LINE.search(event, match.end()):
        return 0, ""
    return match.start(1), match[1].decode("latin-1")


def _members(text: str, start: int) -> tuple[dict[str, _Span], int]:
    """Return the spans of a JSON object's values by name, and the object's end.

    The object begins at `start`. If a name repeats, the last value counts, as for json.loads.
    Raises ValueError or RecursionError.
    """
    at = _skip_space(text, start)
    if text[at : at + 1] != "{":
        raise ValueError("expected a JSON object")
    spans: dict[str, _Span] = {}
    at = _skip_space(text, at + 1)
    if text[at : at + 1] == "}":
        return spans, at + 1
    while True:
        name, at = _DECODER.raw_decode(text, at)
        at = _skip_space(text, at)
        if not isinstance(name, str) or text[at : at + 1] != ":":
            raise ValueError("expected a member of a JSON object")
        first = _skip_space(text, at + 1)
        _, last = _DECODER.raw_decode(text, first)
        spans[name] = (first, last)
        at = _skip_space(text, last)
        if text[at : at + 1] == "}":
            return spans, at + 1
        if text[at : at + 1] != ",":
            raise ValueError("expected a comma between JSON members")
        at = _skip_space(text, at + 1)


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _value(text: str, span: _Span | None) -> object:
    return json.loads(text[slice(*span)], strict=False) if span else None


def _usage_fields(cost: ReplyCost) -> str:
    """Return the members `cost` and `cost_details` of a usage object.

    What is not known is left out: typed clients expect numbers, and refuse a null.
    """
    marginal = None if cost.marginal_ns is None else format_nano(cost.marginal_ns)
    details = {
        "gpu_seconds": format_nano(cost.gpu_time_ns),
        "prefill_gpu_seconds": format_nano(cost.prefill_ns),
        "decode_gpu_seconds": format_nano(cost.decode_ns),
        "marginal_gpu_seconds": marginal,
        "marginal_cost": format_usd(cost.marginal_cost_nanousd),
        "method": json.dumps(cost.method),
        "request_id": json.dumps(cost.http_request_id),
        "tenant": json.dumps(cost.tenant),
        "currency": '"USD"',
    }
    usage = {"cost": format_usd(cost.cost_nanousd), "cost_details": f"{{{_members_of(details)}}}"}
    return _members_of(usage)


def _members_of(values: Mapping[str, str | None]) -> str:
    """Return the members of a JSON object, given their values as JSON; None is left out."""
    return ",".join(f'"{name}":{value}' for name, value in values.items() if value is not None)


def comment(cost: ReplyCost) -> bytes:
    """Return a cost as an SSE comment for the front of an event; clients skip it, curl shows it.

    Values are percent-encoded, so that they stay on one line. An unknown cost is left out. No blank
    line follows: it would end an event without data, and some decoders pass that on.
    """
    usd = format_usd(cost.cost_nanousd)
    priced = f"cost_usd={usd} " if usd is not None else ""
    request_id, tenant = (
        quote(text, safe=_COMMENT_SAFE, errors="replace")
        for text in (cost.http_request_id, cost.tenant)
    )
    seconds = format_nano(cost.gpu_time_ns)
    said = f"{priced}gpu_seconds={seconds} request_id={request_id} tenant={tenant}"
    return f": cost-meter {said}\n".encode("ascii")


def headers(cost: ReplyCost) -> list[tuple[bytes, bytes]]:
    """Return the headers for a complete reply; an unknown cost is left out.

    Text outside printable ASCII is percent-encoded, and so is the percent sign.
    """
    usd = format_usd(cost.cost_nanousd)
    said = {
        "x-cost-meter-cost-usd": usd,
        "x-cost-meter-gpu-seconds": format_nano(cost.gpu_time_ns),
        "x-cost-meter-marginal-cost-usd": format_usd(cost.marginal_cost_nanousd),
        "x-cost-meter-request-id": cost.http_request_id,
        "x-cost-meter-tenant": cost.tenant,
        "x-litellm-response-cost": usd,
    }
    return [
        (name.encode("ascii"), quote(text, safe=_HEADER_SAFE, errors="replace").encode("ascii"))
        for name, text in said.items()
        if text is not None
    ]
