"""Replies through the real middleware, collector and ledger, message by message.

Method: small ASGI applications whose engine requests are born and billed in the calls that vLLM's
hooks make; what the client gets is compared with what the application sent.
"""

import asyncio
import json
import time

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.world import (
    COST_HEADERS,
    GPU_HOUR_USD,
    JSON,
    SSE,
    Client,
    World,
    no_more_messages,
    replying,
    scope_of,
    worlds,
)
from vllm_cost_meter import collector as collector_module
from vllm_cost_meter.collector import NoCollector
from vllm_cost_meter.exchange import current_exchange
from vllm_cost_meter.middleware import CostMiddleware

BODY = json.dumps(
    {
        "id": "cmpl-1",
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }
).encode()
TOKEN = b'data: {"choices":[{"text":"a","usage":null}],"usage":null}\n\n'
USAGE = b'data: {"id":"cmpl-1","choices":[],"usage":{"prompt_tokens":10,"completion_tokens":5}}\n\n'
DONE = b"data: [DONE]\n\n"
COST = b',"cost":0.000000030,"cost_details":'


@pytest.fixture
def make(tmp_path):
    with worlds(tmp_path) as make:
        yield make


@pytest.fixture
def world(make) -> World:
    return make()


def event_of(name: str, **data: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


# ---- complete replies


@pytest.mark.parametrize(
    "bodies", [[BODY], [BODY[:7], BODY[7:]], [BODY[:9], b"", BODY[9:], b""], [b""]]
)
def test_a_complete_reply_gets_the_five_headers_and_keeps_every_body_message(world, bodies):
    app = replying(JSON, bodies, world.engine.generate, headers=[(b"x-own", b"kept")])
    client = world.run(app, scope_of(headers=[(b"x-request-id", b"mine")]))
    assert client.headers[:2] == [(b"content-type", JSON), (b"x-own", b"kept")]
    assert [name for name, _ in client.headers[2:]] == COST_HEADERS
    assert [m["body"] for m in client.messages[1:]] == bodies
    assert [m["more_body"] for m in client.messages[1:]] == [True] * (len(bodies) - 1) + [False]
    ((own_id, cost, x_request_id, status),) = world.rows(
        "SELECT http_request_id, cost_usd, x_request_id, status FROM http_requests"
    )
    assert client.ours == {
        b"x-cost-meter-cost-usd": b"0.000000030",
        b"x-cost-meter-gpu-seconds": b"0.000003000",
        b"x-cost-meter-request-id": own_id.encode(),
        b"x-cost-meter-tenant": b"unknown",
        b"x-litellm-response-cost": b"0.000000030",
    }
    assert (cost, x_request_id, status) == ("0.000000030", "mine", 200)


def test_a_reply_without_any_body_message_field_is_complete(world):
    async def app(scope, receive, send):
        world.engine.generate()
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", JSON)]}
        )
        await send({"type": "http.response.body"})

    client = world.run(app)
    assert client.messages[1:] == [{"type": "http.response.body"}]
    assert list(client.ours) == COST_HEADERS


def test_without_a_price_gpu_time_is_told_and_cost_is_not(make):
    world = make(gpu_hour_usd=None)
    client = world.run(replying(JSON, [BODY], world.engine.generate))
    assert list(client.ours) == [COST_HEADERS[1], COST_HEADERS[2], COST_HEADERS[3]]
    assert client.ours[b"x-cost-meter-gpu-seconds"] == b"0.000003000"
    assert world.rows("SELECT cost_nanousd, cost_usd FROM requests") == [(None, None)]
    assert world.rows("SELECT gpu_time_ns, cost_nanousd FROM http_requests") == [(3_000, None)]
    stream = world.run(replying(SSE, [USAGE, DONE], lambda: world.engine.generate("s")))
    assert b'"cost":null,"cost_details":{"gpu_seconds":0.000003000' in stream.body
    assert b": cost-meter gpu_seconds=0.000003000 request_id=cost-" in stream.body


def test_all_parts_of_a_reply_are_in_its_headers(world):
    async def work():
        for name in ("a", "b"):
            world.engine.born(name)
        world.engine.billed("a", 100, 0)
        await asyncio.sleep(0.02)
        world.engine.billed("b", 0, 200)
        world.engine.generate("c")

    client = world.run(replying(JSON, [BODY], work))
    assert client.ours[b"x-cost-meter-gpu-seconds"] == b"0.000003300"
    assert world.rows("SELECT count(*), count(DISTINCT http_request_id) FROM requests") == [(3, 1)]


def test_what_the_client_was_told_of_tokens_is_recorded(world):
    world.run(replying(JSON, [BODY[:20], BODY[20:]], world.engine.generate))
    world.run(replying(SSE, [TOKEN, USAGE, DONE], lambda: world.engine.generate("s")))
    assert world.rows(
        "SELECT prompt_tokens, cached_tokens, output_tokens, streamed FROM http_requests"
        " ORDER BY streamed"
    ) == [(10, 2, 5, 0), (10, None, 5, 1)]


def test_a_real_http_client_gets_the_headers_and_an_unchanged_body(world):
    async def ask() -> httpx.Response:
        app = CostMiddleware(replying(JSON, [BODY], world.engine.generate))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post("/v1/completions", json={})

    reply = asyncio.run(ask())
    assert reply.content == BODY
    assert reply.headers["x-litellm-response-cost"] == "0.000000030"


# ---- streams


def test_a_stream_with_usage_has_its_cost_there_and_in_one_comment_before_the_end(world):
    client = world.run(replying(SSE, [TOKEN, USAGE, DONE], world.engine.generate))
    assert client.ours == {}
    start, token, usage, done = client.messages
    assert token["body"] == TOKEN
    assert usage["body"].startswith(USAGE[: -len(b"}}\n\n")] + COST)
    details = json.loads(usage["body"][6:])["usage"]["cost_details"]
    ((own_id,),) = world.rows("SELECT http_request_id FROM http_requests")
    assert details == {
        "gpu_seconds": 0.000003,
        "prefill_gpu_seconds": 0.000001,
        "decode_gpu_seconds": 0.000002,
        "method": "tokens",
        "request_id": own_id,
        "tenant": "unknown",
        "currency": "USD",
    }
    assert done["body"] == (
        b": cost-meter cost_usd=0.000000030 gpu_seconds=0.000003000"
        b" request_id=%s tenant=unknown\n\n" % own_id.encode() + DONE
    )
    assert world.rows("SELECT streamed, cost_nanousd FROM http_requests") == [(1, 30)]


def test_a_stream_without_usage_has_the_comment_only(world):
    client = world.run(replying(SSE, [TOKEN, TOKEN, DONE], world.engine.generate))
    assert client.body.replace(DONE, b"") != TOKEN + TOKEN
    before, comment, after = client.body.partition(b": cost-meter ")
    assert (before, comment != b"", after.endswith(b"\n\n" + DONE)) == (TOKEN + TOKEN, True, True)


def test_an_anthropic_stream_has_its_cost_in_message_delta(world):
    delta = event_of("message_delta", usage={"input_tokens": 10, "output_tokens": 5})
    events = [event_of("message_start", message={"usage": {"input_tokens": 10}}), delta]
    stop = event_of("message_stop")
    app = replying(SSE, [*events, stop], world.engine.generate)
    client = world.run(app, scope_of("/v1/messages"))
    _, first, second, last = client.messages
    assert first["body"] == events[0]
    assert COST in second["body"]
    assert last["body"].startswith(b": cost-meter ")
    assert last["body"].endswith(stop)
    assert client.body.count(b": cost-meter ") == 1


@pytest.mark.parametrize("name", ["response.completed", "response.incomplete", "response.failed"])
def test_a_responses_stream_has_both_at_its_terminal_event(world, name):
    usage = {"input_tokens": 10, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 2}}
    first = event_of("response.created", response={"usage": None})
    last = event_of(name, response={"id": "resp_1", "usage": usage})
    client = world.run(
        replying(SSE, [first, last], world.engine.generate), scope_of("/v1/responses")
    )
    assert client.messages[1]["body"] == first
    comment, _, event = client.messages[2]["body"].partition(b"\n\n")
    assert comment.startswith(b": cost-meter ")
    cost = json.loads(event.partition(b"data: ")[2])["response"]["usage"]["cost"]
    assert cost == 0.00000003
    assert world.rows("SELECT prompt_tokens, cached_tokens FROM http_requests") == [(10, 2)]


STREAMS = [
    TOKEN + USAGE + DONE,
    TOKEN.replace(b"\n", b"\r\n") + USAGE.replace(b"\n", b"\r\n") + DONE,
    b": ping\n\n"
    + event_of("message_delta", usage={"output_tokens": 5})
    + event_of("message_stop"),
    event_of("response.completed", response={"usage": {"input_tokens": 1}}),
    TOKEN + b"data: [DONE]",
    b"data: half an event",
    b"",
    b"\xff\n\n\n\n" + USAGE + USAGE + DONE + DONE + b"rest",
]


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    stream=st.sampled_from(STREAMS),
    cuts=st.lists(st.integers(0, 400), max_size=12),
    every=st.booleans(),
)
def test_however_a_stream_is_cut_only_our_fields_are_new(world, stream, cuts, every):
    places = range(len(stream) + 1) if every else sorted({c % (len(stream) + 1) for c in cuts})
    edges = [0, *places, len(stream)]
    chunks = [stream[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    name = f"r{world.engine.seq}"
    client = world.run(replying(SSE, chunks, lambda: world.engine.generate(name)))
    bodies = client.messages[1:]
    assert [m["more_body"] for m in bodies] == [True] * (len(bodies) - 1) + [False]
    assert all(m["body"] for m in bodies[:-1]), "an empty message in the middle"
    whole = world.run(replying(SSE, [stream], lambda: world.engine.generate(f"{name}+")))
    assert without_ours(client.body) == without_ours(whole.body) == stream
    assert client.body.count(b": cost-meter ") == (1 if ends(stream) else 0)


def ends(stream: bytes) -> bool:
    return b"[DONE]\n\n" in stream or b"message_stop" in stream or b"response.completed" in stream


def without_ours(body: bytes) -> bytes:
    """What is left of a stream without the fields and the comment of the meter."""
    while (at := body.find(b": cost-meter ")) >= 0:
        end = body.index(b"\n\n", at) + 2
        body = body[:at] + body[end:]
    while (at := body.find(COST)) >= 0:
        end = body.index(b'"currency":"USD"}', at) + len(b'"currency":"USD"}')
        body = body[:at] + body[end:]
    return body


def test_a_token_is_not_held_back(world):
    async def ask():
        client, go = Client(), asyncio.Event()

        async def app(scope, receive, send):
            world.engine.born("r")
            start = {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", SSE)],
            }
            await send(start)
            await send({"type": "http.response.body", "body": TOKEN, "more_body": True})
            await go.wait()
            world.engine.billed("r")
            await send({"type": "http.response.body", "body": DONE})

        task = asyncio.create_task(CostMiddleware(app)(scope_of(), no_more_messages, client.send))
        await asyncio.sleep(0.01)
        assert client.body == TOKEN
        go.set()
        await task
        return client

    assert asyncio.run(ask()).body.endswith(DONE)


# ---- what is left alone


@pytest.mark.parametrize("content_type", [b"text/plain", b"audio/wav", b"image/png", b""])
def test_a_reply_that_is_neither_json_nor_events_is_untouched_and_recorded(world, content_type):
    app = replying(content_type, [b"data: x\n\n", b"\x00\n\n[DONE]"], world.engine.generate)
    client = world.run(app, scope_of("/v1/audio/transcriptions"))
    assert client.headers == [(b"content-type", content_type)]
    assert [m["body"] for m in client.messages[1:]] == [b"data: x\n\n", b"\x00\n\n[DONE]"]
    assert world.rows("SELECT status, cost_nanousd FROM http_requests") == [(200, None)]


@pytest.mark.parametrize("content_type", [JSON, SSE, b"text/html"])
def test_a_route_without_engine_requests_is_untouched_and_unrecorded(world, content_type):
    client = world.run(replying(content_type, [USAGE, DONE]), scope_of("/metrics"))
    assert client.headers == [(b"content-type", content_type)]
    assert client.body == USAGE + DONE
    assert client.waited_s < 0.2
    assert world.rows("SELECT * FROM http_requests") == []


@pytest.mark.parametrize("header", [(b"content-length", b"%d"), (b"content-encoding", b"gzip")])
def test_a_stream_that_cannot_grow_is_untouched(world, header):
    name, value = header
    value = value.replace(b"%d", str(len(USAGE + DONE)).encode())
    app = replying(SSE, [USAGE, DONE], world.engine.generate, headers=[(name, value)])
    assert world.run(app).body == USAGE + DONE


def test_reply_none_tells_and_waits_for_nothing_and_records_all(make):
    world = make(reply="none")
    json_reply = world.run(replying(JSON, [BODY], lambda: world.engine.born("a")))
    stream = world.run(replying(SSE, [USAGE, DONE], lambda: world.engine.generate("b")))
    assert (json_reply.ours, stream.body) == ({}, USAGE + DONE)
    assert json_reply.waited_s < 0.2
    assert world.collector.breaker.misses == 0
    assert world.rows("SELECT prompt_tokens, cost_nanousd FROM http_requests") == [(10, None)] * 2


def test_reply_headers_leaves_streams_alone(make):
    world = make(reply="headers")
    json_reply = world.run(replying(JSON, [BODY], lambda: world.engine.generate("a")))
    stream = world.run(replying(SSE, [USAGE, DONE], lambda: world.engine.generate("b")))
    assert list(json_reply.ours) == COST_HEADERS
    assert (stream.ours, stream.body) == ({}, USAGE + DONE)


def test_what_is_told_may_differ_by_tenant(make):
    import hashlib

    def tenant(name, reply):
        digest = hashlib.sha256(f"key-{name}".encode()).hexdigest()
        return {"name": name, "api_key_sha256": [digest], "reply": reply}

    world = make(reply="none", tenants=(tenant("told", "all"), tenant("quiet", None)))

    def ask(name):
        authorization = (b"authorization", f"Bearer key-{name}".encode())
        app = replying(JSON, [BODY], lambda: world.engine.generate(name))
        return world.run(app, scope_of(headers=[authorization]))

    assert ask("told").ours[b"x-cost-meter-tenant"] == b"told"
    assert ask("quiet").ours == {}
    assert world.rows("SELECT tenant FROM requests ORDER BY seq") == [("told",), ("quiet",)]


@pytest.mark.parametrize("content_type", [JSON, SSE])
def test_installed_twice_it_meters_once(world, content_type):
    app = replying(content_type, [USAGE, DONE], world.engine.generate)
    client = world.run(CostMiddleware(app))
    assert len(client.ours) == (5 if content_type == JSON else 0)
    assert client.body.count(b": cost-meter ") == (0 if content_type == JSON else 1)
    assert client.body.count(b"cost_details") == (0 if content_type == JSON else 1)
    assert world.rows("SELECT count(*) FROM http_requests") == [(1,)]


def test_without_a_collector_everything_passes(monkeypatch):
    monkeypatch.setattr(collector_module, "_collector", NoCollector())
    client = Client()
    app = CostMiddleware(replying(SSE, [USAGE, DONE]))
    asyncio.run(app(scope_of(), no_more_messages, client.send))
    assert client.body == USAGE + DONE


def test_a_head_request_is_untouched(world):
    app = replying(JSON, [b""], headers=[(b"content-length", b"17")])
    client = world.run(app, scope_of("/v1/models", method="HEAD"))
    assert client.headers == [(b"content-type", JSON), (b"content-length", b"17")]


def test_two_exchanges_at_once_are_told_their_own(world):
    def app_of(name, ns):
        async def work():
            world.engine.born(name)
            await asyncio.sleep(0.01)
            world.engine.billed(name, ns, 0)

        return replying(JSON, [BODY], work)

    async def ask():
        return await asyncio.gather(*(world.ask(app_of(f"r{n}", n * 1000)) for n in range(1, 9)))

    clients = asyncio.run(ask())
    seconds = [client.ours[b"x-cost-meter-gpu-seconds"] for client in clients]
    assert seconds == [b"0.00000%d000" % n for n in range(1, 9)]
    assert current_exchange.get() is None


# ---- messages of other kinds


def message_of(kind: str) -> dict:
    return {"type": kind, "path": "/tmp/x", "headers": []}


@pytest.mark.parametrize("content_type", [JSON, SSE, b"text/plain"])
@pytest.mark.parametrize("kind", ["http.response.pathsend", "http.response.zerocopysend", "x.new"])
def test_messages_of_other_kinds_keep_their_place(world, content_type, kind):
    start = {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", content_type)],
    }
    sent = [{"type": "http.response.debug"}, start, message_of(kind)]

    async def app(scope, receive, send):
        world.engine.generate()
        for message in sent:
            await send(message)

    assert world.run(app).messages == sent


def test_trailers_come_after_the_body(world):
    trailers = {"type": "http.response.trailers", "headers": [(b"x", b"y")]}

    async def app(scope, receive, send):
        await replying(JSON, [BODY], world.engine.generate)(scope, receive, send)
        await send(trailers)

    client = world.run(app)
    assert [m["type"] for m in client.messages] == [
        "http.response.start",
        "http.response.body",
        "http.response.trailers",
    ]
    assert len(client.ours) == 5


def test_a_websocket_passes_and_its_engine_requests_are_linked(world):
    heard = iter([{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1000}])
    sent = [{"type": "websocket.accept"}, {"type": "websocket.send", "text": "x"}]

    async def receive():
        return next(heard)

    async def app(scope, receive, send):
        await receive()
        for message in sent:
            await send(message)
        world.engine.generate()
        await receive()

    client = world.run(app, scope_of("/v1/realtime", type="websocket"), receive=receive)
    assert client.messages == sent
    assert world.rows(
        "SELECT route, status FROM http_requests JOIN requests USING (http_request_id, route)"
    ) == [("/v1/realtime", 101)]


# ---- ends that are no ends


@pytest.mark.parametrize("content_type", [JSON, SSE, b"text/plain"])
def test_an_application_that_raises_in_its_reply_loses_no_byte(world, content_type):
    async def app(scope, receive, send):
        world.engine.generate()
        start = {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", content_type)],
        }
        await send(start)
        await send({"type": "http.response.body", "body": b"data: half", "more_body": True})
        raise RuntimeError("boom")

    client = Client()
    with pytest.raises(RuntimeError, match="boom"):
        asyncio.run(CostMiddleware(app)(scope_of(), no_more_messages, client.send))
    assert client.headers == [(b"content-type", content_type)]
    assert client.body == b"data: half"
    assert all(m["more_body"] for m in client.messages[1:])
    assert len(world.rows("SELECT * FROM http_requests")) == 1


def test_an_application_that_raises_before_its_reply_is_recorded_with_500(world):
    async def app(scope, receive, send):
        world.engine.born("r")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        world.run(app)
    assert world.rows("SELECT status, gpu_time_ns FROM http_requests") == [(500, None)]
    assert current_exchange.get() is None


@pytest.mark.parametrize("replies", [True, False])
def test_a_client_that_leaves_before_its_reply_is_recorded_with_499(world, replies):
    async def gone():
        return {"type": "http.disconnect"}

    async def app(scope, receive, send):
        world.engine.born("r")
        assert await receive() == {"type": "http.disconnect"}
        world.engine.billed("r")
        if replies:  # as vLLM does: null, to nobody
            await replying(JSON, [b"null"])(scope, receive, send)

    world.run(app, receive=gone)
    assert world.rows("SELECT status FROM http_requests") == [(499,)]
    assert len(world.rows("SELECT * FROM requests WHERE http_request_id IS NOT NULL")) == 1


def test_a_client_that_leaves_within_a_stream_keeps_the_status_it_was_sent(world):
    async def gone():
        return {"type": "http.disconnect"}

    async def app(scope, receive, send):
        world.engine.born("r")
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", SSE)]}
        )
        await send({"type": "http.response.body", "body": TOKEN, "more_body": True})
        await receive()

    world.run(app, receive=gone)
    assert world.rows("SELECT status, streamed FROM http_requests") == [(200, 1)]


def test_a_client_that_leaves_after_its_reply_changes_nothing(world):
    async def gone():
        return {"type": "http.disconnect"}

    async def app(scope, receive, send):
        await replying(JSON, [BODY], world.engine.generate)(scope, receive, send)
        await receive()

    assert len(world.run(app, receive=gone).ours) == 5
    assert world.rows("SELECT status FROM http_requests") == [(200,)]


def test_a_cancelled_exchange_is_recorded_and_stays_cancelled(world):
    async def ask():
        async def app(scope, receive, send):
            world.engine.born("r")
            await asyncio.Event().wait()

        task = asyncio.create_task(world.ask(app))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ask())
    assert world.rows("SELECT count(*) FROM http_requests") == [(1,)]


def test_a_background_response_born_after_its_reply_is_an_exchange_too(world):
    async def ask():
        tasks = []

        async def later():
            await asyncio.sleep(0.02)
            world.engine.born("resp_1_0", external_id="resp_1_0")
            world.engine.billed("resp_1_0")
            world.engine.generate("resp_1_1")

        async def app(scope, receive, send):
            tasks.append(asyncio.create_task(later()))
            await replying(JSON, [b'{"id":"resp_1","status":"queued"}'])(scope, receive, send)

        client = await world.ask(app, scope_of("/v1/responses", [(b"x-request-id", b"x")]))
        await asyncio.gather(*tasks)
        return client

    client = asyncio.run(ask())
    assert client.ours == {}
    assert world.rows(
        "SELECT h.response_id, h.x_request_id, h.status, count(*) FROM http_requests h"
        " JOIN requests USING (http_request_id) GROUP BY 1"
    ) == [("resp_1", "x", 200, 2)]
    assert world.rows("SELECT count(*) FROM http_requests") == [(1,)]


# ---- lifespan


def test_lifespan_messages_pass_also_of_an_application_without_an_engine(world):
    sent = [{"type": "lifespan.startup.complete"}, {"type": "lifespan.shutdown.complete"}]

    async def app(scope, receive, send):
        for message in sent:
            await send(message)

    for more in ({}, {"app": object()}):
        scope = {"type": "lifespan", **more}
        assert world.run(CostMiddleware(app), scope).messages == sent


# ---- the bound


def test_a_bill_that_never_comes_delays_the_reply_by_the_bound_and_is_counted(make):
    world = make(bill_timeout_ms=100)
    client = world.run(replying(JSON, [BODY], lambda: world.engine.born("r")))
    assert client.ours == {}
    assert client.body == BODY
    assert 0.1 <= client.waited_s < 0.6
    assert world.collector.breaker.misses == 1
    assert world.rows("SELECT gpu_time_ns, cost_nanousd FROM http_requests") == [(None, None)]


def test_a_stream_waits_once_for_a_bill_that_never_comes(make):
    world = make(bill_timeout_ms=100)
    client = world.run(replying(SSE, [TOKEN, USAGE, DONE], lambda: world.engine.born("r")))
    assert client.body == TOKEN + USAGE + DONE
    assert 0.1 <= client.at_s[-1] < 0.6
    assert client.at_s[1] < 0.1, "tokens do not wait"
    assert world.collector.breaker.misses == 1


def test_after_five_misses_nobody_waits_until_a_bill_comes(make):
    world = make(bill_timeout_ms=120)

    def ask(before) -> Client:
        return world.run(replying(JSON, [BODY], before))

    def never(number: int) -> Client:
        return ask(lambda: world.engine.born(f"never-{number}"))

    waits = [never(number).waited_s for number in range(8)]
    assert all(wait >= 0.12 for wait in waits[:5])
    assert all(wait < 0.12 for wait in waits[5:])
    assert world.collector.breaker.misses == 8
    # The first that comes is not waited for, the next is told.
    assert ask(lambda: world.engine.generate("a")).ours == {}
    assert world.rows("SELECT count(*) FROM requests") == [(1,)]
    deadline = time.monotonic() + 5
    while world.collector.breaker.open and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(ask(lambda: world.engine.generate("b")).ours) == 5


def test_an_engine_whose_meter_is_off_costs_five_waits_and_no_more(make):
    world = make(bill_timeout_ms=120)

    async def ask():
        clients = []
        for number in range(50):
            app = replying(JSON, [BODY], lambda number=number: world.engine.born(f"r{number}"))
            clients.append(await world.ask(app))
        return clients

    clients = asyncio.run(ask())
    assert sum(client.waited_s >= 0.12 for client in clients) == 5
    assert all(client.body == BODY and client.ours == {} for client in clients)
    assert len(world.rows("SELECT * FROM http_requests")) == 50


def test_a_locked_ledger_delays_five_replies_and_loses_nothing(make):
    world = make(bill_timeout_ms=120)
    with world.locked():
        clients = [
            world.run(replying(JSON, [BODY], lambda n=n: world.engine.generate(f"r{n}")))
            for n in range(8)
        ]
        stream = world.run(replying(SSE, [USAGE, DONE], lambda: world.engine.generate("s")))
        assert world.collector.writer.committed == 0
    assert all(client.ours == {} for client in clients)
    assert stream.body == USAGE + DONE
    assert all(0.12 <= client.waited_s < 0.6 for client in clients[:5])
    assert all(client.waited_s < 0.12 for client in clients[5:])
    assert world.rows("SELECT count(*), count(http_request_id) FROM requests") == [(9, 9)]
    assert world.rows("SELECT count(*) FROM http_requests") == [(9,)]
    assert world.collector.writer.dropped == 0
    assert len(world.run(replying(JSON, [BODY], lambda: world.engine.generate("z"))).ours) == 5


def test_what_a_header_says_is_in_the_file_already(world):
    async def app(scope, receive, send):
        await replying(JSON, [BODY], world.engine.generate)(scope, receive, send)

    async def ask():
        seen = []

        async def send(message):
            if message["type"] == "http.response.start":
                import sqlite3

                other = sqlite3.connect(world.path)
                seen.append(other.execute("SELECT cost_nanousd FROM requests").fetchall())
                seen.append(other.execute("SELECT cost_nanousd FROM http_requests").fetchall())
                other.close()

        await CostMiddleware(app)(scope_of(), no_more_messages, send)
        return seen

    assert asyncio.run(ask()) == [[(30,)], [(30,)]]
    assert world.collector.price.usd_per_gpu_hour == GPU_HOUR_USD
