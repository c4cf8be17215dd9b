"""From engine ids to the ids clients saw. The forms are those vLLM 0.32's routes build."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cost_meter.api_server.routes import response_id_of, route_of

UUID16 = "0123456789abcdef"
UUID32 = UUID16 * 2
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"

# What a client may send as X-Request-Id: all of these must come back whole.
CLIENT_IDS = [
    UUID16,
    "550e8400-e29b-41d4-a716-446655440000",
    "job-7",
    "job_0",
    "a_0-1",
    "-1",
    "_2",
    "x-beam-3",
    "cmpl-1",
    "chatcmpl-chatcmpl-0",
    "a prompt-0-chunk-",
    "ünïcode ✓-5",
]


@pytest.mark.parametrize("base", CLIENT_IDS)
@pytest.mark.parametrize(
    ("route", "prefix", "added"),
    [
        (CHAT, "chatcmpl-", ""),
        (CHAT, "chatcmpl-", f"-{UUID16}-beam-3"),
        (CHAT, "chatcmpl-", f"-{UUID32}-beam-0"),
        ("/v1/messages", "chatcmpl-", ""),
        ("/cohere/v2/chat", "chatcmpl-", ""),
        ("/v1/chat/completions/batch", "chatcmpl-", "_12"),
        (COMPLETIONS, "cmpl-", "-0"),
        (COMPLETIONS, "cmpl-", "-31"),
        (COMPLETIONS, "cmpl-", f"-{UUID16}-beam-1"),
        (RESPONSES, "", "_0"),
        (RESPONSES, "resp_", "_14"),
        ("/inference/v1/generate", "generate-tokens-", ""),
        ("/v1/embeddings", "embd-", "-0"),
        ("/v1/embeddings", "embd-", "-prompt-1-chunk-2"),
        ("/v1/score", "score-", "-3"),
        ("/rerank", "score-", "-3"),
        ("/pooling", "pooling-", "-3"),
        ("/classify", "classify-", "-3"),
        ("/generative_scoring", "generative-scoring-", "-3"),
        ("/v1/systemone", "decision-", "-0"),
        ("/invocations", "chatcmpl-", ""),
        ("/invocations", "cmpl-", "-0"),
        ("/invocations", "embd-", "-4"),
    ],
)
def test_only_what_the_route_adds_is_stripped(route, prefix, added, base):
    assert response_id_of(route, f"{prefix}{base}{added}") == f"{prefix}{base}"


@given(base=st.text(max_size=80), turn=st.integers(0, 99))
def test_any_client_id_comes_back_whole(base, turn):
    assert response_id_of(COMPLETIONS, f"cmpl-{base}-{turn}") == f"cmpl-{base}"
    assert response_id_of(RESPONSES, f"{base}_{turn}") == base


@pytest.mark.parametrize(
    ("external_id", "expected"),
    [
        (f"transcribe-{UUID16}", f"transcribe-{UUID16}"),
        (f"transcribe-{UUID16}-11", f"transcribe-{UUID16}"),
        (f"transcribe-{UUID16}-lang_detect", f"transcribe-{UUID16}"),
        (f"translate-{UUID32}-0-{UUID16}-beam-2", f"translate-{UUID32}"),
        ("transcribe-call", "transcribe-call"),
        ("transcribe-call-7", None),  # the client's own -7, or the eighth piece?
    ],
)
def test_audio_is_told_where_it_can_be(external_id, expected):
    assert response_id_of("/v1/audio/transcriptions", external_id) == expected


@pytest.mark.parametrize(
    ("route", "external_id"),
    [
        (COMPLETIONS, "no-number"),
        (RESPONSES, "resp_"),
        ("/v1/score", f"late-interaction-{UUID16}-query-0"),
        ("/v1/realtime", "rt-ws-1-2"),
        ("/invocations", "other-1"),
        ("/some/plugin", "cmpl-x-0"),
    ],
)
def test_what_cannot_be_told_is_none(route, external_id):
    assert response_id_of(route, external_id) is None


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, "/v1/messages", "/invocations"])
def test_known_paths_are_their_own_label(path):
    assert route_of(path) == path


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/v1/responses/resp_abc", "/v1/responses/{response_id}"),
        ("/v1/responses/resp_abc/cancel", "/v1/responses/{response_id}/cancel"),
        ("/v1/responses/render", "/v1/responses/render"),
        ("/v1/cost/requests/cmpl-1", "/v1/cost/requests/{request_id}"),
        ("/v1/models", "/v1/models"),
        ("/" + "x" * 500, "/" + "x" * 127),
        ("", ""),
    ],
)
def test_labels_are_bounded(path, label):
    assert route_of(path) == label
