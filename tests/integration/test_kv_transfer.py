"""A real server with a KV connector: what came over it, and the half of a request that it has.

vLLM's ExampleConnector keeps the KV cache of prompts in a folder, so one server sends to itself.
Its own prefix cache is off: nothing of a prompt is cached by itself.
"""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.server import LONG_PROMPT, RECEIVED, SENT_ON, Server, kv_arguments
from tests.integration.traffic import ask
from vllm_cost_meter.lab.server import meter_arguments


@pytest.fixture(scope="module")
def connected(work: Path) -> Iterator[Server]:
    server = Server(
        work / "connected",
        arguments=[
            *(*meter_arguments(), "--enable-prompt-tokens-details"),
            *kv_arguments("kv_both", work / "shared"),
        ],
    )
    try:
        yield server.start()
    finally:
        server.stop()


def test_what_came_over_a_connector_is_neither_cached_nor_saved(connected: Server) -> None:
    with connected.client() as client:
        first = ask(client, "/v1/completions", prompt=LONG_PROMPT, max_tokens=1)
        again = ask(client, "/v1/completions", prompt=LONG_PROMPT)
    # vLLM tells its client that these tokens were cached.
    assert first.cached_tokens == 0 < again.cached_tokens
    for reply, external_tokens in ((first, 0), (again, again.cached_tokens)):
        row = connected.bill_of(reply.headers["x-cost-meter-request-id"])
        (part,) = row["parts"]
        for shown in (row, part):
            assert (shown["cached_tokens"], shown["external_tokens"]) == (0, external_tokens)
            assert shown["saved_estimate_ns"] == 0
        assert part["prefill_tokens"] == part["prompt_tokens"] - external_tokens
    connected.balanced()


def test_two_requests_of_one_server_are_no_pair_whatever_their_router_says(
    connected: Server,
) -> None:
    own = []
    for id, params in (("chosen", SENT_ON), ("chosen", RECEIVED)):
        with connected.client() as client:
            client.headers["x-request-id"] = id
            reply = ask(client, "/v1/completions", max_tokens=2, kv_transfer_params=params)
        own.append(reply.headers["x-cost-meter-request-id"])
    rows = [connected.bill_of(id) for id in own]
    assert [row["kv_role"] for row in rows] == ["kv_producer", "kv_consumer"]
    assert [row["prefill_http_request_id"] for row in rows] == [None, None]
    both = httpx.get(f"{connected.side_url}/cost/requests/chosen", timeout=30)
    assert both.status_code == 300
    assert {row["http_request_id"] for row in both.json()["matches"]} == set(own)
