"""What replies say of usage, and where the cost goes. The bodies are shaped as vLLM 0.32 sends."""

import json
from urllib.parse import unquote

import pytest

from vllm_cost_meter.api_server.reply_bytes import (
    ReplyCost,
    SseEvents,
    comment,
    final_usage,
    goes_on,
    headers,
    insert_usage,
    is_end,
    is_ordinary,
    is_token,
    usage_of,
)
from vllm_cost_meter.records.requests import Usage

COST = ReplyCost(
    gpu_time_ns=1_500_000_001,
    prefill_ns=1_000_000_000,
    decode_ns=500_000_001,
    cost_nanousd=12_345,
    marginal_ns=200_000_000,
    marginal_cost_nanousd=678,
    http_request_id="req-1",
    tenant="alice",
    method="tokens",
)
INSERTED = (
    b'"cost":0.000012345,"cost_details":{"gpu_seconds":1.500000001,'
    b'"prefill_gpu_seconds":1.000000000,"decode_gpu_seconds":0.500000001,'
    b'"marginal_gpu_seconds":0.200000000,"marginal_cost":0.000000678,'
    b'"method":"tokens","request_id":"req-1","tenant":"alice","currency":"USD"}'
)

CHAT_TOKEN = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":"x"},"logprobs":null,"finish_reason":null}]}\n\n'
)
CONTINUOUS = CHAT_TOKEN.replace(
    b"}]}\n", b'}],"usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1}}\n'
)
COMPLETION_TOKEN = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m",'
    b'"choices":[{"index":0,"text":"x","finish_reason":null}],"usage":null}\n\n'
)
CHAT_USAGE = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[],"usage":{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2,'
    b'"prompt_tokens_details":{"cached_tokens":1}}}\n\n'
)
ANTHROPIC_START = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"chatcmpl-1",'
    b'"content":[],"usage":{"input_tokens":3,"output_tokens":0}}}\n\n'
)
ANTHROPIC_TOKEN = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
    b'"delta":{"type":"text_delta","text":"x"}}\n\n'
)
ANTHROPIC_DELTA = (
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn",'
    b'"stop_sequence":null},"usage":{"input_tokens":2,"output_tokens":7,'
    b'"cache_read_input_tokens":16,"cache_creation_input_tokens":1}}\n\n'
)
ANTHROPIC_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
ANTHROPIC_ERROR = b'event: error\ndata: {"type":"error","error":{"type":"x","message":"y"}}\n\n'
RESPONSES_CREATED = (
    b'event: response.created\ndata: {"type":"response.created","response":{"id":"resp_1",'
    b'"usage":null}}\n\n'
)
RESPONSES_TOKEN = (
    b'event: response.output_text.delta\ndata: {"delta":"x","item_id":"m","logprobs":[],'
    b'"sequence_number":5,"type":"response.output_text.delta"}\n\n'
)
RESPONSES_COMPLETED = (
    b'event: response.completed\ndata: {"response":{"id":"resp_1","output":[{"usage":{"a":1}}],'
    b'"usage":{"input_tokens":9,"input_tokens_details":{"cached_tokens":4,'
    b'"input_tokens_per_turn":[9]},"output_tokens":2,"total_tokens":11},"user":null},'
    b'"sequence_number":7,"type":"response.completed"}\n\n'
)
DONE = b"data: [DONE]\n\n"
OPENAI_ERROR = b'data: {"error":{"message":"m","type":"BadRequestError","code":400}}\n\n'
KEEP_ALIVE = b": keep-alive\n\n"


# --- usage_of: complete replies


def body(usage: object) -> bytes:
    return json.dumps({"id": "x", "choices": [{"text": "é"}], "usage": usage}).encode()


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}, Usage(5, None, 2)),
        (
            {
                "prompt_tokens": 5,
                "completion_tokens": 2,
                "prompt_tokens_details": {"cached_tokens": 4},
            },
            Usage(5, 4, 2),
        ),
        (
            {"prompt_tokens": 5, "completion_tokens": None, "prompt_tokens_details": None},
            Usage(5, None, None),
        ),
        ({"prompt_tokens": 5, "completion_tokens": 0}, Usage(5, None, 0)),
        ({"input_tokens": 5, "output_tokens": 2}, Usage(5, None, 2)),
        (
            {"input_tokens": 1, "output_tokens": 2, "cache_read_input_tokens": 16},
            Usage(17, 16, 2),
        ),
        (
            {
                "input_tokens": 9,
                "input_tokens_details": {"cached_tokens": 4},
                "output_tokens": 2,
            },
            Usage(9, 4, 2),
        ),
        ({"type": "duration", "seconds": 3}, Usage()),
        ({}, Usage()),
        (None, Usage()),
        ([1], Usage()),
        ({"prompt_tokens": True, "completion_tokens": -1}, Usage()),
        ({"prompt_tokens": 2**63, "completion_tokens": "2"}, Usage()),
    ],
)
def test_usage_of_a_complete_reply(usage, expected):
    assert usage_of(body(usage)) == expected
    assert usage_of({"usage": usage}) == expected


@pytest.mark.parametrize(
    "garbage", [b"", b"null", b"[]", b"{", b"\xff", b"WEBVTT\n", b"[" * 100_000, b'{"usage"']
)
def test_no_usage_where_there_is_no_json_object(garbage):
    assert usage_of(garbage) == Usage()


# --- streams: which event is which


@pytest.mark.parametrize(
    ("event", "usage"),
    [
        (CHAT_USAGE, Usage(3, 1, 2)),
        (CHAT_USAGE.replace(b'"choices":[]', b'"choices": [ ]'), Usage(3, 1, 2)),
        (ANTHROPIC_DELTA, Usage(19, 16, 7)),
        (RESPONSES_COMPLETED, Usage(9, 4, 2)),
        (RESPONSES_COMPLETED.replace(b".completed", b".incomplete"), Usage(9, 4, 2)),
        (RESPONSES_COMPLETED.replace(b".completed", b".failed"), Usage(9, 4, 2)),
        (b'data: {"choices":[],"usage":{}}\n\n', Usage()),
    ],
)
def test_the_final_usage_event_is_known(event, usage):
    assert final_usage(event) == usage


@pytest.mark.parametrize(
    "event",
    [
        CHAT_TOKEN,
        CONTINUOUS,
        ANTHROPIC_START,
        ANTHROPIC_STOP,
        RESPONSES_CREATED,
        DONE,
        OPENAI_ERROR,
        KEEP_ALIVE,
        b'data: {"choices":[],"usage":null}\n\n',
        b'data: {"choices":[]}\n\n',
        b'data: {"choices":[],"prompt_filter":"\\"usage\\""}\n\n',
        b'data: {"choices":[],"usage":{}} {}\n\n',
        b'data: {"choices":[],"usage":{}\n\n',
        b'data: {"choices":[],\ndata: "usage":{}}\n\n',
        b'data: {"type":"response.completed","usage":{}}\n\n',
        b'data: {"type":"response.completed","response":[],"usage":{}}\n\n',
        b'data: {"x":{"choices":[],"usage":{}}}\n\n',
        b'data: {"choices":[],"usage":' + b"[" * 100_000 + b"\n\n",
        b'{"choices":[],"usage":{}}',
        b"",
    ],
)
def test_no_other_event_is_final_and_none_is_changed(event):
    assert final_usage(event) is None
    assert insert_usage(event, COST) == event


def test_the_text_of_a_token_cannot_pass_for_usage():
    content = json.dumps('{"choices":[],"usage":{"prompt_tokens":1},"type":"message_delta"}')
    event = CHAT_TOKEN.replace(b'"x"', content.encode())
    assert final_usage(event) is None
    assert not is_end(event)


@pytest.mark.parametrize(
    "event",
    [
        DONE,
        b"data:[DONE]\r\n\r\n",
        ANTHROPIC_STOP,
        ANTHROPIC_ERROR,
        RESPONSES_COMPLETED,
        RESPONSES_COMPLETED.replace(b".completed", b".failed"),
    ],
)
def test_the_end_is_known(event):
    assert is_end(event)


@pytest.mark.parametrize(
    "event",
    [
        CHAT_TOKEN,
        CHAT_USAGE,
        CONTINUOUS,
        ANTHROPIC_START,
        ANTHROPIC_DELTA,
        RESPONSES_CREATED,
        OPENAI_ERROR,
        KEEP_ALIVE,
        b": [DONE]\n\n",
        CHAT_TOKEN.replace(b'"x"', b'"[DONE]"'),
        b'data: ["message_stop"]\n\n',
        b'data: {"message_stop\n\n',
        b"",
    ],
)
def test_nothing_else_is_the_end(event):
    assert not is_end(event)


@pytest.mark.parametrize("event", [CHAT_TOKEN, CONTINUOUS, COMPLETION_TOKEN])
def test_a_token_is_known_at_a_glance(event):
    assert is_token(event)


@pytest.mark.parametrize(
    "event",
    [
        CHAT_USAGE,
        DONE,
        OPENAI_ERROR,
        KEEP_ALIVE,
        ANTHROPIC_STOP,
        RESPONSES_COMPLETED,
        CHAT_TOKEN[:-1],
        CHAT_TOKEN[:-2],
        CHAT_TOKEN.replace(b"\n", b"\r\n"),
        CHAT_TOKEN + CHAT_USAGE,
        CHAT_TOKEN + DONE,
        KEEP_ALIVE + CHAT_TOKEN,
        CHAT_USAGE.replace(b'"m"', json.dumps('"choices":[{').encode()),
        b"",
    ],
)
def test_what_is_not_one_whole_token_is_looked_at(event):
    assert not is_token(event)


@pytest.mark.parametrize("event", [ANTHROPIC_TOKEN, RESPONSES_TOKEN, KEEP_ALIVE])
def test_tokens_of_the_other_apis_are_not_parsed(event):
    assert is_ordinary(event)


# --- streams: what is put in


@pytest.mark.parametrize(
    ("event", "before", "after"),
    [
        (CHAT_USAGE, b'"cached_tokens":1}', b"}}\n\n"),
        (ANTHROPIC_DELTA, b'"cache_creation_input_tokens":1', b"}}\n\n"),
        (RESPONSES_COMPLETED, b'"total_tokens":11', b'},"user":null},'),
    ],
)
def test_the_cost_goes_to_the_end_of_usage(event, before, after):
    assert insert_usage(event, COST) == event.replace(
        before + after, before + b"," + INSERTED + after
    )
    assert insert_usage(event, COST) != event


def test_an_empty_usage_object_gets_no_comma():
    event = b'data: {"choices":[],"usage":{ }}\n\n'
    expected = b'data: {"choices":[],"usage":{ ' + INSERTED + b"}}\n\n"
    assert insert_usage(event, COST) == expected


def test_everything_around_usage_stays_as_odd_as_it_was():
    event = (
        b'id: 7\r\nevent: x\r\ndata:{ "choices" : [],"f":1.0e2,"s":"\\u00e9\xc3\xa9\xff",'
        b'"usage":{"n":1 } ,"usage2":{}} \r\nretry: 1\r\n\r\n'
    )
    expected = event.replace(b'{"n":1 }', b'{"n":1 ,' + INSERTED + b"}")
    assert insert_usage(event, COST) == expected


def test_of_two_usages_the_last_counts_as_for_every_json_reader():
    event = b'data: {"usage":{"a":1},"choices":[],"usage":{"b":1}}\n\n'
    assert insert_usage(event, COST) == event.replace(b'"b":1', b'"b":1,' + INSERTED)


@pytest.mark.parametrize("name", ["cost", "cost_details"])
def test_a_cost_that_is_there_already_is_left_alone(name):
    event = CHAT_USAGE.replace(b'"usage":{', b'"usage":{"%s":1,' % name.encode())
    assert insert_usage(event, COST) == event


def test_inserting_twice_is_inserting_once():
    once = insert_usage(CHAT_USAGE, COST)
    assert insert_usage(once, COST) == once


def test_what_is_not_known_is_left_out_and_never_null_or_zero():
    """Typed clients refuse a null where they expect a number."""
    unpriced = ReplyCost(1, 1, 0, None, None, None, "r", "t", "tokens")
    event = insert_usage(CHAT_USAGE, unpriced)
    usage = json.loads(event[6:])["usage"]
    assert "cost" not in usage
    assert not {"marginal_gpu_seconds", "marginal_cost"} & set(usage["cost_details"])
    assert usage["cost_details"]["gpu_seconds"] == 1e-9
    assert b"e-" not in event
    assert b"null" not in event


def test_a_tenants_name_cannot_break_out():
    evil = 'x"}}\n\ndata: [DONE]\n\né'
    event = insert_usage(CHAT_USAGE, ReplyCost(1, 1, 0, 1, 1, 1, "r", evil, "tokens"))
    assert event.count(b"\n") == 2
    assert json.loads(event[6:])["usage"]["cost_details"]["tenant"] == evil


def test_the_comment_is_one_line():
    assert comment(COST) == (
        b": cost-meter cost_usd=0.000012345 gpu_seconds=1.500000001 request_id=req-1 tenant=alice\n"
    )
    evil = comment(ReplyCost(1, 1, 0, None, 1, None, "r\r\n", "a b\n\ndata: x\x00é%", "tokens"))
    assert evil.startswith(b": cost-meter gpu_seconds=0.000000001 request_id=r%0D%0A tenant=")
    assert evil.endswith(b"\n")
    assert evil[:-1].isascii()
    assert evil[:-1].decode().isprintable()
    assert unquote(evil[:-1].decode().rpartition("=")[2]) == "a b\n\ndata: x\x00é%"


# --- headers


def test_headers_of_a_priced_reply():
    assert headers(COST) == [
        (b"x-cost-meter-cost-usd", b"0.000012345"),
        (b"x-cost-meter-gpu-seconds", b"1.500000001"),
        (b"x-cost-meter-marginal-cost-usd", b"0.000000678"),
        (b"x-cost-meter-request-id", b"req-1"),
        (b"x-cost-meter-tenant", b"alice"),
        (b"x-litellm-response-cost", b"0.000012345"),
    ]


def test_what_is_not_known_has_no_header():
    names = [name for name, _ in headers(ReplyCost(1, 1, 0, None, 1, None, "r", "t", "tokens"))]
    assert names == [
        b"x-cost-meter-gpu-seconds",
        b"x-cost-meter-request-id",
        b"x-cost-meter-tenant",
    ]


@pytest.mark.parametrize("tenant", ["münchen", "100%", "a b", "x\r\nset-cookie: 1", "日本"])
def test_a_tenant_header_is_printable_ascii_and_decodes(tenant):
    value = dict(headers(ReplyCost(1, 1, 0, 1, 1, 1, "r", tenant, "tokens")))[
        b"x-cost-meter-tenant"
    ].decode("ascii")
    assert value.isprintable()
    assert unquote(value) == tenant


# --- the splitter


def test_one_chunk_may_hold_many_events():
    events = SseEvents()
    assert events.feed(CHAT_TOKEN + KEEP_ALIVE + DONE + b"data: x") == [
        CHAT_TOKEN,
        KEEP_ALIVE,
        DONE,
    ]
    assert events.rest == b"data: x"


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_an_event_may_come_byte_by_byte(end):
    events = SseEvents()
    stream = b"data: a" + end + b"data: b" + end
    got = [event for i in range(len(stream)) for event in events.feed(stream[i : i + 1])]
    assert got == [b"data: a" + end, b"data: b" + end]
    assert events.rest == b""


def test_an_event_too_long_passes_through_in_pieces():
    events = SseEvents(event_bytes_max=10)
    assert events.feed(b"data: 12345") == [b"data: 12345"]
    assert events.feed(b"67\n\ndata: x\n\n") == [b"67\n\n", b"data: x\n\n"]
    assert events.rest == b""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"id":"resp_1","status":"queued","usage":null}', True),
        (b'{"id":"resp_1","status":"in_progress"}', True),
        (b'{"id":"resp_1","status":"completed","usage":{"input_tokens":1}}', False),
        (b'{"id":"chatcmpl-1","usage":{"prompt_tokens":1}}', False),
        (b"not json", False),
        (b"[]", False),
    ],
)
def test_a_background_response_is_known_by_its_status(body: bytes, expected: bool) -> None:
    assert goes_on(body) is expected
