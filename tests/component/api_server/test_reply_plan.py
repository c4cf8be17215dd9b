"""What a reply may carry: comments where asked for, headers of bytes and texts, other origins.

Through the real middleware, with small applications in place of vLLM's.
"""

import pytest

from tests.component.api_server.test_admission import TENANTS, as_tenant, ask, held, used
from tests.support.world import (
    ASKED,
    BODY,
    COST_HEADERS,
    DONE,
    JSON,
    SSE,
    TOKEN,
    USAGE,
    replying,
    scope_of,
)

# ---- comments in streams


@pytest.mark.parametrize(
    ("setting", "header", "has_comment"),
    [
        ("asked", None, False),
        ("asked", b"true", True),
        ("asked", b" YES", True),
        ("asked", b"0", False),
        ("asked", b"perhaps", False),
        ("always", None, True),
        ("always", b"false", False),
        ("always", b"1", True),
    ],
)
def test_a_stream_has_a_comment_before_its_end_where_somebody_asked(
    make_world, setting, header, has_comment
):
    world = make_world(stream_comment=setting)
    app = replying(SSE, [TOKEN, DONE], world.engine.generate)
    headers = [] if header is None else [(ASKED[0], header)]
    client = world.run(app, scope_of(headers=headers))
    assert client.messages[1]["body"] == TOKEN
    if not has_comment:
        assert client.body == TOKEN + DONE
        return
    ((own_id,),) = world.rows("SELECT http_request_id FROM replies")
    assert client.messages[2]["body"] == (
        b": cost-meter cost_usd=0.000000030 gpu_seconds=0.000003000"
        b" request_id=%s tenant=unknown\n" % own_id.encode() + DONE
    )


def test_no_client_is_told_what_its_tenant_is_not_to_be_told(make_world):
    world = make_world(reply="headers")
    app = replying(SSE, [TOKEN, USAGE, DONE], world.engine.generate)
    assert world.run(app, scope_of(headers=[ASKED])).body == TOKEN + USAGE + DONE


def test_with_a_comment_a_strict_decoder_sees_the_events_that_were_sent(world):
    """Each blank line ends an event, and each line is a field or a comment, as in the standard."""
    app = replying(SSE, [TOKEN, USAGE, DONE], world.engine.generate)
    client = world.run(app, scope_of(headers=[ASKED]))
    events = client.body.removesuffix(b"\n\n").split(b"\n\n")
    assert len(events) == 3
    for event in events:
        assert sum(line.startswith(b"data: ") for line in event.split(b"\n")) == 1


# ---- replies of bytes and texts, and pages of another origin


def typed(content_type, chunks, work, *headers):
    """An application that replies so, with these headers beside its content type."""

    async def app(scope, receive, send):
        work()
        start = [(b"content-type", content_type), *headers]
        await send({"type": "http.response.start", "status": 200, "headers": start})
        for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


def test_a_reply_of_bytes_carries_headers_and_its_usage_is_known(world):
    """As vLLM answers with embeddings: numbers in the body, their shape and the usage beside."""
    usage = (b"metadata", b'{"id":"embd-1","usage":{"prompt_tokens":10,"total_tokens":10}}')
    body = [b"\x00\x01{", b'"usage"']
    app = typed(b"application/octet-stream", body, world.engine.generate, usage)
    client = world.run(app, scope_of("/v1/embeddings"))
    assert list(client.ours) == COST_HEADERS
    assert client.body == b"".join(body)
    assert world.rows("SELECT prompt_tokens, output_tokens FROM replies") == [(10, None)]


def test_a_text_of_known_length_carries_headers(world):
    app = typed(b"text/plain", [b"hello"], world.engine.generate, (b"content-length", b"5"))
    client = world.run(app, scope_of("/v1/audio/transcriptions"))
    assert list(client.ours) == COST_HEADERS


@pytest.mark.parametrize("content_type", [b"audio/wav", b"application/octet-stream"])
def test_a_reply_that_is_sent_while_it_is_made_is_not_held(world, content_type):
    app = typed(content_type, [b"a", b"b"], lambda: world.engine.born("never billed"))
    client = world.run(app, scope_of("/v1/audio/speech"))
    assert client.ours == {}
    assert client.at_s[-1] < world.runtime.settings.bill_timeout_ms / 1000


ORIGIN = (b"origin", b"https://chat.example")


def exposed(client) -> list[bytes]:
    """The headers that a browser shows to a page of another origin."""
    lines = [value for name, value in client.headers if name == b"access-control-expose-headers"]
    return [name for line in lines for name in line.split(b", ")]


def test_a_page_of_another_origin_may_read_every_header_of_ours(world):
    app = replying(JSON, [BODY], world.engine.generate)
    assert exposed(world.run(app, scope_of(headers=[ORIGIN]))) == COST_HEADERS
    assert exposed(world.run(app)) == []


def test_where_nothing_is_added_nothing_is_exposed(make_world):
    world = make_world(reply="none")
    app = replying(JSON, [BODY], world.engine.generate)
    assert exposed(world.run(app, scope_of(headers=[ORIGIN]))) == []


def test_such_a_page_may_read_why_it_was_refused_or_warned(make_world):
    world = make_world(tenants=TENANTS)
    held(world.runtime)

    def shown(amount: int) -> list[bytes]:
        used(world, amount, soft_limit=800_000_000)
        scope = as_tenant("acme")
        return exposed(ask(world, {**scope, "headers": [*scope["headers"], ORIGIN]}))

    refused = [b"x-should-retry", b"x-cost-meter-budget", b"x-cost-meter-budget-reset"]
    assert shown(1_500_000_000) == refused
    assert shown(900_000_000) == [b"x-cost-meter-budget-warning", *COST_HEADERS]
