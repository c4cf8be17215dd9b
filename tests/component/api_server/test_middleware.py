"""Replies through the real middleware, collector and ledger, message by message.

Method: small ASGI applications whose engine requests are born and billed in the calls that vLLM's
hooks make; what the client gets is compared with what the application sent.
"""

import asyncio
import hashlib
import json
import sqlite3

import httpx
import pytest

from tests.support.world import (
    ASKED,
    BODY,
    COST,
    COST_HEADERS,
    DONE,
    JSON,
    SSE,
    TOKEN,
    USAGE,
    Client,
    event_of,
    no_more_messages,
    replying,
    scope_of,
)
from vllm_cost_meter.api_server.middleware import CostMiddleware
from vllm_cost_meter.api_server.reply_editor import ReplyEditor
from vllm_cost_meter.api_server.runtime import NoRuntime
from vllm_cost_meter.exchange import current_exchange
from vllm_cost_meter.ledger.catching_up import catch_up

# ---- complete replies


# How long a reply may wait that should not wait at all.
LONG_S = 60.0


@pytest.mark.parametrize(
    "bodies", [[BODY], [BODY[:7], BODY[7:]], [BODY[:9], b"", BODY[9:], b""], [b""]]
)
def test_a_complete_reply_gets_the_headers_and_keeps_every_body_message(world, bodies):
    app = replying(JSON, bodies, world.engine.generate, headers=[(b"x-own", b"kept")])
    client = world.run(app, scope_of(headers=[(b"x-request-id", b"mine")]))
    assert client.headers[:2] == [(b"content-type", JSON), (b"x-own", b"kept")]
    assert [name for name, _ in client.headers[2:]] == COST_HEADERS
    assert [m["body"] for m in client.messages[1:]] == bodies
    assert [m["more_body"] for m in client.messages[1:]] == [True] * (len(bodies) - 1) + [False]
    ((own_id, cost, x_request_id, status),) = world.rows(
        "SELECT http_request_id, cost_nanousd, x_request_id, status FROM replies"
    )
    assert client.ours == {
        b"x-cost-meter-cost-usd": b"0.000000030",
        b"x-cost-meter-gpu-seconds": b"0.000003000",
        b"x-cost-meter-marginal-cost-usd": b"0.000000020",
        b"x-cost-meter-request-id": own_id.encode(),
        b"x-cost-meter-tenant": b"unknown",
        b"x-litellm-response-cost": b"0.000000030",
    }
    assert (cost, x_request_id, status) == (30, "mine", 200)


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


def test_without_a_price_gpu_time_is_told_and_cost_is_not(make_world):
    world = make_world(gpu_hour_usd=None)
    client = world.run(replying(JSON, [BODY], world.engine.generate))
    assert list(client.ours) == [COST_HEADERS[1], COST_HEADERS[3], COST_HEADERS[4]]
    assert client.ours[b"x-cost-meter-gpu-seconds"] == b"0.000003000"
    assert world.rows("SELECT cost_nanousd FROM requests") == [(None,)]
    assert world.rows("SELECT gpu_time_ns, cost_nanousd FROM replies") == [(3_000, None)]
    stream = world.run(replying(SSE, [USAGE, DONE], lambda: world.engine.generate("s")))
    assert b'"completion_tokens":5,"cost_details":{"gpu_seconds":0.000003000' in stream.body
    assert b'"cost"' not in stream.body


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
        "SELECT prompt_tokens, cached_tokens, output_tokens, streamed FROM replies"
        " ORDER BY streamed"
    ) == [(10, 2, 5, 0), (10, None, 5, 1)]


def test_a_real_http_client_gets_the_headers_and_an_unchanged_body(world):
    async def ask() -> httpx.Response:
        app = world.metered(replying(JSON, [BODY], world.engine.generate))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post("/v1/completions", json={})

    reply = asyncio.run(ask())
    assert reply.content == BODY
    assert reply.headers["x-litellm-response-cost"] == "0.000000030"


def test_what_a_header_says_is_in_the_journal_already(world):
    async def app(scope, receive, send):
        await replying(JSON, [BODY], world.engine.generate)(scope, receive, send)

    async def ask():
        seen = []

        async def send(message):
            if message["type"] == "http.response.start":
                assert catch_up(world.runtime.ledger_url) == 0  # as any command does
                other = sqlite3.connect(world.path)
                seen.append(other.execute("SELECT cost_nanousd FROM requests").fetchall())
                seen.append(other.execute("SELECT cost_nanousd FROM replies").fetchall())
                other.close()

        await world.metered(app)(scope_of(), no_more_messages, send)
        return seen

    assert asyncio.run(ask()) == [[(30,)], [(30,)]]


def test_a_coarse_reply_tells_gpu_time_to_a_millisecond_and_what_that_costs(make_world):
    world = make_world(tenant_detail="coarse")

    def work():
        world.engine.born("r")
        world.engine.billed("r", 1_700_000, 900_000)

    client = world.run(replying(JSON, [BODY], work))
    told = {name: value for name, value in client.ours.items() if b"id" not in name}
    assert told == {
        b"x-cost-meter-cost-usd": b"0.000030000",
        b"x-cost-meter-gpu-seconds": b"0.003000000",
        b"x-cost-meter-tenant": b"unknown",
        b"x-litellm-response-cost": b"0.000030000",
    }
    exact = "SELECT gpu_time_ns, cost_nanousd FROM replies"
    assert world.rows(exact) == [(2_600_000, 26_000)], "the ledger stays exact"


def test_a_coarse_stream_tells_nothing_more_exact_either(make_world):
    world = make_world(tenant_detail="coarse")
    app = replying(SSE, [TOKEN, USAGE, DONE], world.engine.generate)
    stream = world.run(app, scope_of(headers=[ASKED]))
    usage = next(m["body"] for m in stream.messages[1:] if b"cost_details" in m["body"])
    told = json.loads(usage[6:])["usage"]
    details = told["cost_details"]
    assert (told["cost"], details["gpu_seconds"]) == (0.00001, 0.001)
    assert (details["prefill_gpu_seconds"], details["decode_gpu_seconds"]) == (0.001, 0)
    assert not {"marginal_gpu_seconds", "marginal_cost"} & set(details)
    assert b": cost-meter cost_usd=0.000010000 gpu_seconds=0.001000000 " in stream.body


# ---- streams


def test_a_stream_with_usage_has_its_cost_there_and_nowhere_else(world):
    client = world.run(replying(SSE, [TOKEN, USAGE, DONE], world.engine.generate))
    assert client.ours == {}
    start, token, usage, done = client.messages
    assert token["body"] == TOKEN
    assert usage["body"].startswith(USAGE[: -len(b"}}\n\n")] + COST)
    details = json.loads(usage["body"][6:])["usage"]["cost_details"]
    ((own_id,),) = world.rows("SELECT http_request_id FROM replies")
    assert details == {
        "gpu_seconds": 0.000003,
        "prefill_gpu_seconds": 0.000001,
        "decode_gpu_seconds": 0.000002,
        "marginal_gpu_seconds": 0.000002,
        "marginal_cost": 0.00000002,
        "method": "tokens",
        "request_id": own_id,
        "tenant": "unknown",
        "currency": "USD",
    }
    assert done["body"] == DONE
    assert world.rows("SELECT streamed, cost_nanousd FROM replies") == [(1, 30)]


def test_a_stream_without_usage_is_untouched_and_waits_for_nothing(world):
    app = replying(SSE, [TOKEN, TOKEN, DONE], lambda: world.engine.born("never billed"))
    client = world.run(app)
    assert client.body == TOKEN + TOKEN + DONE
    assert client.at_s[-1] < world.runtime.settings.bill_timeout_ms / 1000


def test_an_anthropic_stream_has_its_cost_in_message_delta(world):
    delta = event_of("message_delta", usage={"input_tokens": 10, "output_tokens": 5})
    events = [event_of("message_start", message={"usage": {"input_tokens": 10}}), delta]
    stop = event_of("message_stop")
    app = replying(SSE, [*events, stop], world.engine.generate)
    client = world.run(app, scope_of("/v1/messages", headers=[ASKED]))
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
        replying(SSE, [first, last], world.engine.generate),
        scope_of("/v1/responses", headers=[ASKED]),
    )
    assert client.messages[1]["body"] == first
    comment, _, event = client.messages[2]["body"].partition(b"\n")
    assert comment.startswith(b": cost-meter ")
    cost = json.loads(event.partition(b"data: ")[2])["response"]["usage"]["cost"]
    assert cost == 0.00000003
    assert world.rows("SELECT prompt_tokens, cached_tokens FROM replies") == [(10, 2)]


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

        task = asyncio.create_task(world.metered(app)(scope_of(), no_more_messages, client.send))
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
    assert world.rows("SELECT status, cost_nanousd FROM replies") == [(200, None)]


@pytest.mark.parametrize("content_type", [JSON, SSE, b"text/html"])
def test_a_route_without_engine_requests_is_untouched_and_unrecorded(world, content_type):
    world.let_replies_wait(LONG_S)
    client = world.run(replying(content_type, [USAGE, DONE]), scope_of("/metrics"))
    assert client.headers == [(b"content-type", content_type)]
    assert client.body == USAGE + DONE
    assert (client.waited_s < LONG_S, world.misses) == (True, 0)
    assert world.rows("SELECT * FROM replies") == []


@pytest.mark.parametrize("header", [(b"content-length", b"%d"), (b"content-encoding", b"gzip")])
def test_a_stream_that_cannot_grow_is_untouched(world, header):
    name, value = header
    value = value.replace(b"%d", str(len(USAGE + DONE)).encode())
    app = replying(SSE, [USAGE, DONE], world.engine.generate, headers=[(name, value)])
    assert world.run(app).body == USAGE + DONE


def test_reply_none_tells_and_waits_for_nothing_and_records_all(make_world):
    world = make_world(reply="none")
    world.let_replies_wait(LONG_S)
    json_reply = world.run(replying(JSON, [BODY], lambda: world.engine.born("a")))
    stream = world.run(replying(SSE, [USAGE, DONE], lambda: world.engine.generate("b")))
    assert (json_reply.ours, stream.body) == ({}, USAGE + DONE)
    assert json_reply.waited_s < LONG_S
    assert world.misses == 0
    assert world.rows("SELECT prompt_tokens, cost_nanousd FROM replies") == [(10, None)] * 2


def test_reply_headers_leaves_streams_alone(make_world):
    world = make_world(reply="headers")
    json_reply = world.run(replying(JSON, [BODY], lambda: world.engine.generate("a")))
    stream = world.run(replying(SSE, [USAGE, DONE], lambda: world.engine.generate("b")))
    assert list(json_reply.ours) == COST_HEADERS
    assert (stream.ours, stream.body) == ({}, USAGE + DONE)


def test_what_is_told_may_differ_by_tenant(make_world):
    def tenant(name, reply):
        digest = hashlib.sha256(f"key-{name}".encode()).hexdigest()
        return {"name": name, "api_key_sha256": [digest], "reply": reply}

    world = make_world(reply="none", tenants=(tenant("told", "all"), tenant("quiet", None)))

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
    client = world.run(world.metered(app), scope_of(headers=[ASKED]))
    assert len(client.ours) == (len(COST_HEADERS) if content_type == JSON else 0)
    assert client.body.count(b": cost-meter ") == (0 if content_type == JSON else 1)
    assert client.body.count(b"cost_details") == (0 if content_type == JSON else 1)
    assert world.rows("SELECT count(*) FROM replies") == [(1,)]


def test_without_a_runtime_everything_passes():
    client = Client()
    app = CostMiddleware(replying(SSE, [USAGE, DONE]), NoRuntime)
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
    assert len(client.ours) == len(COST_HEADERS)


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
        "SELECT route, status FROM replies JOIN requests USING (http_request_id, route)"
    ) == [("/v1/realtime", 101)]


# ---- lifespan


def test_lifespan_messages_pass_also_of_an_application_without_an_engine(world):
    sent = [{"type": "lifespan.startup.complete"}, {"type": "lifespan.shutdown.complete"}]

    async def app(scope, receive, send):
        for message in sent:
            await send(message)

    for more in ({}, {"app": object()}):
        scope = {"type": "lifespan", **more}
        assert world.run(world.metered(app), scope).messages == sent


def test_a_reply_that_cannot_be_edited_passes_as_it_came(world, monkeypatch):
    def broken(*_args) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(ReplyEditor, "__init__", broken)
    client = world.run(replying(JSON, [BODY], world.engine.generate))
    assert (client.status, client.body, client.ours) == (200, BODY, {})
    assert world.runtime.guard.errors == 1
