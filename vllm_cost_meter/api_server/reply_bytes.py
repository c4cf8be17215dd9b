"""The bytes of replies: what they say of usage, and where a measured cost goes into them.

Nothing here does I/O or knows ASGI; bytes go in and bytes come out. A reply is edited in place and
never re-serialised, because only then is everything but our own fields the server's, byte for
byte: number formats, key order, white space, escapes. An ordinary token chunk is put aside by a
search in its bytes, before any JSON is parsed.

JSON is scanned as latin-1 text: each byte is one character, so positions in the text are positions
in the bytes, and all of JSON's own signs are ASCII. Values read that way are right only where they
are ASCII, which every name and number read here is.

Invariants: no function raises on any bytes; `insert_usage` returns its event unchanged, or with
one run of bytes added at the end of its usage object; the chunks that `SseEvents` gives out, and
its rest, are the bytes it was fed.
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

# A longer event is not held back: it passes through in pieces, unedited.
EVENT_BYTES_MAX = 16 * 1024 * 1024
# What a 64-bit ledger column can hold.
_TOKENS_MAX = 2**63 - 1

_DECODER = json.JSONDecoder(strict=False)
_SPACE = re.compile(r"[ \t\n\r]*")
_EVENT_END = re.compile(rb"\n\r?\n")
_DATA_LINE = re.compile(rb"^data:[ ]?([^\r\n]*)\r?$", re.MULTILINE)
# Tells, at a glance, that a message is one whole OpenAI chunk with a choice, as nearly every one of
# a stream is; None says nothing. An event of one line with a choice is neither a final usage event
# nor an end, and no text can pass for the mark: within a JSON string a quote has a backslash before
# it. One call into C and no function of ours, because it is the meter's cost per token.
is_token = re.compile(rb'data: [^\n]*"choices":\[\{[^\n]*\n\n').fullmatch
_RESPONSES_TERMINAL = ("response.completed", "response.incomplete", "response.failed")
_MAYBE_FINAL = re.compile(
    rb'"choices"\s*:\s*\[\s*\]|"message_delta"|"response\.(?:completed|incomplete|failed)"'
)
_END_TYPES = ("message_stop", "error", *_RESPONSES_TERMINAL)
# One of these is in every end.
_END_MARKS = (b"[DONE]", *(f'"{name}"'.encode() for name in _END_TYPES))
# What the meter adds to a usage object.
_OUR_FIELDS = frozenset({"cost", "cost_details"})

# All printable ASCII but "%", so that percent-decoding gives back any text.
_HEADER_SAFE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
_COMMENT_SAFE = _HEADER_SAFE.replace(" ", "")

# Where a value starts and ends.
_Span = tuple[int, int]
# RecursionError: JSON nested thousands deep.
_JSON_ERRORS = (ValueError, RecursionError)


@dataclass(frozen=True, slots=True)
class ReplyCost:
    """What a reply says of its cost, over all its engine requests. No price: costs are None.

    `cost_nanousd` is what it is charged, `marginal_cost_nanousd` what it added to the bill.
    Its amounts are told as exact decimals with nine places, never with an exponent.
    """

    gpu_time_ns: int
    prefill_ns: int
    decode_ns: int
    cost_nanousd: int | None
    marginal_ns: int
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
    """Return the tokens a complete JSON reply tells its client, None where it does not say."""
    if isinstance(body, Mapping):
        return _tokens(body.get("usage"))
    try:
        return _tokens(msgspec.json.decode(body, type=_Reply).usage)
    except (msgspec.MsgspecError, *_JSON_ERRORS):
        return Usage()


def goes_on(body: bytes) -> bool:
    """Tell whether a Responses reply announces a background response that is still generating."""
    try:
        return msgspec.json.decode(body, type=_Reply).status in ("queued", "in_progress")
    except (msgspec.MsgspecError, *_JSON_ERRORS):
        return False


def _tokens(usage: object) -> Usage:
    """Read a usage object of the OpenAI, Anthropic or Responses kind.

    Anthropic's input_tokens leaves out what the cache gave (vLLM 0.32 subtracts it), the others'
    include it; older vLLMs did not subtract and did not send the cache's share either.
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
    """Cuts a stream of bytes into server-sent events, however its chunks fall.

    An event is everything up to and including its blank line; comments are events too.
    """

    def __init__(self, event_bytes_max: int = EVENT_BYTES_MAX) -> None:
        self._event_bytes_max = event_bytes_max
        self._buffer = bytearray()

    @property
    def pending(self) -> bool:
        """True while an event has begun whose end has not come yet."""
        return bool(self._buffer)

    @property
    def rest(self) -> bytes:
        """The bytes of an event whose end has not come yet."""
        return bytes(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that these bytes complete, terminators included."""
        if not self._buffer and data.find(b"\n\n") == len(data) - 2 >= 0 and b"\r" not in data:
            return [data]  # as vLLM sends: one event, one chunk
        # The end may have begun in what was there before: at most two bytes of it.
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
    """Tell, at a glance, that an event is neither a final usage event nor an end.

    So are the tokens of the other APIs. Nothing is parsed; False says nothing.
    """
    return b'"usage"' not in event and not any(mark in event for mark in _END_MARKS)


def final_usage(event: bytes) -> Usage | None:
    """Return the usage of a stream's final usage event, None for every other event.

    Final are: OpenAI's chunk without choices (one with choices carries a running count),
    Anthropic's message_delta, and the terminal events of the Responses API.
    """
    found = _final_usage(event)
    return None if found is None else _tokens(found[1])


def insert_usage(event: bytes, cost: ReplyCost) -> bytes:
    """Return the event with the cost at the end of its usage object, no other byte changed.

    That is `cost` (null without a price) and `cost_details`. Returned as it came: what is not a
    final usage event, and one that has any of the two.
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
    """Tell whether a stream says no more after this event: what we add must go before it.

    That is `[DONE]`, Anthropic's message_stop, a terminal event of the Responses API, and an
    event of type error (of the latter two APIs; OpenAI's error chunk is followed by `[DONE]`).
    """
    if event == b"data: [DONE]\n\n":
        return True
    if event.startswith(b"data: {"):
        return False  # OpenAI: [DONE] is its only end; events of the other APIs start "event:"
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


@lru_cache(maxsize=8)  # a final event is asked twice in a row: what it says, where ours goes
def _final_usage(event: bytes) -> tuple[_Span, Mapping[str, Any]] | None:
    """Return where the usage object of a final usage event is, and what it says."""
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
    """Return what `_span` does, for a final chunk as vLLM writes them; None says nothing.

    Parsed in C, which gives the text of the usage object but not its place: that is told where it
    can be no other.
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
    """Return where the usage object of an event is that may be final, None if it is not."""
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
    """Return where the event's only data line has its text, and that text as latin-1.

    Empty for an event with several data lines: vLLM sends none.
    """
    match = _DATA_LINE.search(event)
    if match is None or _DATA_LINE.search(event, match.end()):
        return 0, ""
    return match.start(1), match[1].decode("latin-1")


def _members(text: str, start: int) -> tuple[dict[str, _Span], int]:
    """Return the spans of the values of the JSON object at `start`, by name, and its end.

    Of equal names the last counts, as for json.loads. Raises ValueError or RecursionError.
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
    """Return the members `cost` (null without a price) and `cost_details` of a usage object."""
    return (
        f'"cost":{format_usd(cost.cost_nanousd) or "null"},'
        f'"cost_details":{{"gpu_seconds":{format_nano(cost.gpu_time_ns)},'
        f'"prefill_gpu_seconds":{format_nano(cost.prefill_ns)},'
        f'"decode_gpu_seconds":{format_nano(cost.decode_ns)},'
        f'"marginal_gpu_seconds":{format_nano(cost.marginal_ns)},'
        f'"marginal_cost":{format_usd(cost.marginal_cost_nanousd) or "null"},'
        f'"method":{json.dumps(cost.method)},'
        f'"request_id":{json.dumps(cost.http_request_id)},"tenant":{json.dumps(cost.tenant)},'
        '"currency":"USD"}'
    )


def comment(cost: ReplyCost) -> bytes:
    """Return a cost as an SSE comment, which clients skip and curl shows.

    Values are percent-encoded, so that they stay on their line; a cost not known is left out.
    """
    usd = format_usd(cost.cost_nanousd)
    priced = f"cost_usd={usd} " if usd is not None else ""
    request_id, tenant = (
        quote(text, safe=_COMMENT_SAFE, errors="replace")
        for text in (cost.http_request_id, cost.tenant)
    )
    seconds = format_nano(cost.gpu_time_ns)
    said = f"{priced}gpu_seconds={seconds} request_id={request_id} tenant={tenant}"
    return f": cost-meter {said}\n\n".encode("ascii")


def headers(cost: ReplyCost) -> list[tuple[bytes, bytes]]:
    """Return the headers of a complete reply; a cost not known is left out.

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
