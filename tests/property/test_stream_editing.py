"""However a stream's bytes fall into messages, only our fields are new, and messages stay sane.

Through the real middleware: streams of all shapes and of garbage, cut anywhere, also byte by byte.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.support.world import COST, DONE, SSE, TOKEN, USAGE, event_of, replying, worlds
from vllm_cost_meter.api_server.reply_bytes import SseEvents, is_end

BLOCKS = [
    TOKEN,
    TOKEN.replace(b"\n", b"\r\n"),
    USAGE,
    USAGE.replace(b"\n", b"\r\n"),
    DONE,
    b": ping\n\n",
    event_of("message_delta", usage={"output_tokens": 5}),
    event_of("message_stop"),
    event_of("response.completed", response={"usage": {"input_tokens": 1}}),
    event_of("error", error={"message": "x"}),
    b"\n",
    b"data: half",
]
streams = st.lists(st.sampled_from(BLOCKS) | st.binary(max_size=5), max_size=6).map(b"".join)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with worlds(tmp_path_factory.mktemp("stream")) as make:
        yield make(stream_comment="always")


@settings(max_examples=examples(200))
@given(
    stream=streams, cuts=st.lists(st.integers(0, 1_000), max_size=12), byte_by_byte=st.booleans()
)
def test_however_a_stream_is_cut_only_our_fields_are_new(world, stream, cuts, byte_by_byte):
    size = len(stream)
    places = range(size + 1) if byte_by_byte else sorted(cut % (size + 1) for cut in cuts)
    edges = [0, *places, size]
    chunks = [stream[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    name = f"r{world.engine.seq}"
    client = world.run(replying(SSE, chunks, lambda: world.engine.generate(name)))
    bodies = client.messages[1:]
    assert [m["more_body"] for m in bodies] == [True] * (len(bodies) - 1) + [False]
    assert all(m["body"] for m in bodies[:-1]), "an empty message in the middle"
    assert without_ours(client.body) == stream
    ends = any(is_end(event) for event in SseEvents().feed(stream))
    assert client.body.count(b": cost-meter ") == ends


def without_ours(body: bytes) -> bytes:
    """What is left of a stream without the fields and the comment of the meter."""
    for start, end in ((b": cost-meter ", b"\n"), (COST, b'"currency":"USD"}')):
        while (at := body.find(start)) >= 0:
            body = body[:at] + body[body.index(end, at) + len(end) :]
    return body
