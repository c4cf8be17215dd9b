"""Byte for byte: whatever the stream and however it is cut, only our own fields are new.

Goal: nobody must be able to tell from any byte but the documented ones that the meter is there.
Method: arbitrary JSON written in arbitrary styles, arbitrary cuts, plain garbage.
"""

import json
import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cost_meter.api_server.reply_bytes import (
    ReplyCost,
    SseEvents,
    _span,
    _usual_span,
    comment,
    final_usage,
    headers,
    insert_usage,
    is_end,
    is_ordinary,
    is_token,
    usage_of,
)
from vllm_cost_meter.records.requests import Usage

ns = st.integers(0, 10**18)
costs = st.builds(
    ReplyCost,
    *[ns] * 3,
    st.none() | ns,
    ns,
    st.none() | ns,
    st.text(),
    st.text(),
    st.sampled_from(["tokens"]),
)


def nano(amount: int) -> Decimal:
    return Decimal(f"{amount}e-9")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
members = st.dictionaries(st.text().filter(lambda k: k not in {"type", "choices"}), values)
usages = st.dictionaries(st.text().filter(lambda k: not k.startswith("cost")), values, max_size=4)


def written(value: object, style: tuple[bool, bool]) -> bytes:
    compact, ascii_only = style
    separators = (",", ":") if compact else (" ,\t", " : ")
    text = json.dumps(value, separators=separators, ensure_ascii=ascii_only)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def final_events(draw: st.DrawFn) -> tuple[bytes, dict]:
    usage, others = draw(usages), draw(members)
    kind = draw(st.sampled_from(["openai", "anthropic", "responses"]))
    if kind == "responses":
        name = draw(st.sampled_from(["completed", "incomplete", "failed"]))
        inner = draw(members) | {"usage": usage}
        document = others | {"response": inner, "type": f"response.{name}"}
    elif kind == "anthropic":
        document = others | {"type": "message_delta", "usage": usage}
    else:
        document = others | {"choices": [], "usage": usage}
    document = dict(draw(st.permutations(list(document.items()))))
    payload = written(document, draw(st.tuples(st.booleans(), st.booleans())))
    end = draw(st.sampled_from([b"\n\n", b"\r\n\r\n"]))
    before = draw(st.sampled_from([b"data: ", b"data:", b"event: x\ndata: ", b"id: 1\r\ndata: "]))
    return before + payload + end, usage


@given(final_events(), costs)
def test_only_the_documented_bytes_are_new(made, new):
    event, usage = made
    edited = insert_usage(event, new)
    added = len(edited) - len(event)
    assert added > 0
    at = next(i for i in range(len(edited)) if event[i : i + 1] != edited[i : i + 1])
    # The run may be read as starting a little earlier or later; one place must explain it all.
    assert any(edited[:i] + edited[i + added :] == event for i in range(max(0, at - added), at + 1))
    payload = re.search(rb"^data:(.*)$", edited, re.MULTILINE)[1].decode("utf-8", "surrogatepass")
    document = json.loads(payload, parse_float=Decimal)
    got = document.get("response", document) if "choices" not in document else document
    got = got["usage"] if "usage" in got else document["usage"]
    priced = {} if new.cost_nanousd is None else {"cost": nano(new.cost_nanousd)}
    ours = [*priced, "cost_details"]
    assert list(got)[-len(ours) :] == ours
    assert {name: got[name] for name in priced} == priced
    marginal = {
        "marginal_gpu_seconds": new.marginal_ns,
        "marginal_cost": new.marginal_cost_nanousd,
    }
    assert got["cost_details"] == {
        "gpu_seconds": nano(new.gpu_time_ns),
        "prefill_gpu_seconds": nano(new.prefill_ns),
        "decode_gpu_seconds": nano(new.decode_ns),
        **{name: nano(value) for name, value in marginal.items() if value is not None},
        "method": new.method,
        "request_id": new.http_request_id,
        "tenant": new.tenant,
        "currency": "USD",
    }
    assert len(got) == len(usage) + len(ours)
    assert insert_usage(edited, new) == edited


@given(final_events())
def test_the_usage_read_from_an_event_is_that_of_the_same_body(made):
    event, usage = made
    assert final_usage(event) == usage_of({"usage": usage})


@given(final_events())
def test_the_usual_way_finds_what_the_thorough_one_does(made):
    event, _ = made
    assert _usual_span(event) in (None, _span(event))


def test_an_event_as_vllm_writes_it_goes_the_usual_way():
    event = (
        b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":1,"d":{"a":1}},"f":"\xc3\xa9"}\n\n'
    )
    assert event[slice(*_usual_span(event))] == b'{"prompt_tokens":1,"d":{"a":1}}'


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in zip(places, places[1:], strict=False)]


streams = st.lists(
    st.sampled_from(
        [
            b"\n",
            b"\r\n",
            b"\r",
            b"data: ",
            b": keep-alive\n\n",
            b'data: {"choices":[],"usage":{}}\n\n',
            b"data: [DONE]\n\n",
        ]
    )
    | st.binary(max_size=8)
).map(b"".join)


@given(streams, st.lists(st.integers(0, 10_000)))
def test_the_splitter_loses_and_adds_nothing(stream, cuts):
    events = SseEvents()
    out = [event for piece in pieces(stream, cuts) for event in events.feed(piece)]
    assert b"".join(out) + events.rest == stream
    whole = SseEvents()
    assert whole.feed(stream) == out
    assert whole.rest == events.rest
    assert all(re.search(rb"\n\r?\n\Z", event) for event in out)


@given(streams, st.lists(st.integers(0, 10_000)), st.integers(0, 20))
def test_the_splitter_holds_a_bounded_amount(stream, cuts, limit):
    events, out = SseEvents(limit), []
    for piece in pieces(stream, cuts):
        out += events.feed(piece)
        assert len(events.rest) <= limit
    assert b"".join(out) + events.rest == stream


MARKS = [
    b"data: ",
    b"\n",
    b'{"choices":[],',
    b'"usage":{',
    b'"type":"message_delta",',
    b'"type":"response.completed","response":{',
    b"}",
    b'"error"',
    b"[DONE]",
    b"[",
    b'"',
    b"9" * 5_000,
]


@given(st.lists(st.sampled_from(MARKS) | st.binary(max_size=4)).map(b"".join), costs)
def test_garbage_never_raises(garbage, new):
    assert isinstance(usage_of(garbage), Usage)
    assert isinstance(is_end(garbage), bool)
    if final_usage(garbage) is None:
        assert insert_usage(garbage, new) == garbage
    else:
        assert len(insert_usage(garbage, new)) >= len(garbage)


@given(costs)
def test_nothing_added_can_break_a_line(new):
    said = comment(new)
    assert said.endswith(b"\n")
    assert all(0x20 <= byte < 0x7F for byte in said[:-1])
    for name, value in headers(new):
        assert all(0x20 <= byte < 0x7F for byte in name + value)


@pytest.mark.parametrize("depth", [1_000, 100_000])
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_deep_nesting_never_raises(opening, depth):
    event = b'data: {"choices":[],"usage":{"x":' + opening * depth + b"\n\n"
    assert insert_usage(event, ReplyCost(1, 1, 0, None, 1, None, "r", "t", "tokens")) == event
    assert final_usage(event) is None
    assert usage_of(event[6:]) == Usage()


@given(final_events(), st.binary(max_size=80))
def test_what_is_put_aside_at_a_glance_is_no_final_event_and_no_end(final, garbage):
    for event in (final[0], garbage, b"data: [DONE]\n\n", b"data: " + garbage + b"\n\n"):
        if is_ordinary(event) or is_token(event):
            assert final_usage(event) is None
            assert not is_end(event)
