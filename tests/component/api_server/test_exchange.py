"""How exchanges end, and that each is recorded once, with the status that HTTP said."""

import asyncio

import pytest

from tests.support.world import (
    BODY,
    COST_HEADERS,
    JSON,
    SSE,
    TOKEN,
    Client,
    no_more_messages,
    replying,
    scope_of,
)
from vllm_cost_meter.exchange import current_exchange


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
        asyncio.run(world.metered(app)(scope_of(), no_more_messages, client.send))
    assert client.headers == [(b"content-type", content_type)]
    assert client.body == b"data: half"
    assert all(m["more_body"] for m in client.messages[1:])
    assert len(world.rows("SELECT * FROM replies")) == 1


def test_an_application_that_raises_before_its_reply_is_recorded_with_500(world):
    async def app(scope, receive, send):
        world.engine.born("r")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        world.run(app)
    assert world.rows("SELECT status, gpu_time_ns FROM replies") == [(500, None)]
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
    assert world.rows("SELECT status FROM replies") == [(499,)]
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
    assert world.rows("SELECT status, streamed FROM replies") == [(200, 1)]


def test_a_client_that_leaves_after_its_reply_changes_nothing(world):
    async def gone():
        return {"type": "http.disconnect"}

    async def app(scope, receive, send):
        await replying(JSON, [BODY], world.engine.generate)(scope, receive, send)
        await receive()

    assert len(world.run(app, receive=gone).ours) == len(COST_HEADERS)
    assert world.rows("SELECT status FROM replies") == [(200,)]


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
    assert world.rows("SELECT count(*) FROM replies") == [(1,)]


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
        "SELECT h.response_id, h.x_request_id, h.status, count(*) FROM replies h"
        " JOIN requests USING (http_request_id) GROUP BY 1"
    ) == [("resp_1", "x", 200, 2)]
    assert world.rows("SELECT count(*) FROM replies") == [(1,)]
