"""Programs that people use understand what a metered server replies, with a price and without.

Method: each client asks real servers in all ways that it has, from an environment that has nothing
of ours. It fails where it would fail for its user. What it was told is held against the ledger.
"""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.ecosystem.clients.environments import ask_in_node, ask_in_python
from tests.ecosystem.clients.proxy import Proxy, Upstream, litellm_proxy
from tests.integration.server import MODEL, SIDE_BY_SIDE, TENANT_KEYS, Server
from tests.support.waiting import wait_for
from vllm_cost_meter.lab.server import meter_arguments
from vllm_cost_meter.units.time import rfc3339

# A start of two servers on a busy machine takes minutes.
pytestmark = pytest.mark.timeout(600)

WAYS = {
    "openai": 11,
    "anthropic": 2,
    "langchain": 5,
    "llama-index": 3,
    "litellm": 5,
    "pydantic-ai": 2,
    "openai-node": 7,
    "ai-sdk openai-compatible": 4,
    "ai-sdk openrouter": 4,
}
# What shows its user a cost. The others drop what they do not know.
SHOW_COST = {
    *(f"openai: {way}" for way in ("complete", "streamed, with usage", "typed events", "n=2")),
    *(f"openai: {way}" for way in ("n=2, streamed, with usage", "tool call")),
    "openai: tool call, streamed, with usage",
    "openai: response, streamed",
    "langchain: complete",
    "llama-index: streamed, with usage",
    *(f"litellm: {way}" for way in ("complete", "streamed, with usage", "n=2", "tool call")),
    *(f"openai-node: {way}" for way in ("complete", "streamed, with usage", "n=2", "tool call")),
    *(f"openai-node: {way}, streamed, with usage" for way in ("n=2", "tool call")),
    *(
        f"ai-sdk {provider}: {way}"
        for provider in ("openai-compatible", "openrouter")
        for way in ("complete", "tool call", "streamed, with usage")
    ),
    *(
        f"ai-sdk {provider}: tool call, streamed, with usage"
        for provider in ("openai-compatible", "openrouter")
    ),
}
STREAM = {"stream": True}
WITH_USAGE = {**STREAM, "stream_options": {"include_usage": True}}
MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"messages": MESSAGES}
TEXT = {"prompt": "hi"}
Replies = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    folder = tmp_path_factory.mktemp("servers")
    made = {
        name: Server(
            folder / name,
            arguments=[
                *(*meter_arguments(), "--enable-prompt-tokens-details"),
                *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
            ],
            environment=SIDE_BY_SIDE,
            price=price,
        )
        for name, price in (("priced", "2.50"), ("unpriced", None))
    }
    try:
        for server in made.values():
            server.launch()
        yield {name: server.wait() for name, server in made.items()}
    finally:
        for server in made.values():
            server.stop()


@pytest.fixture(scope="module")
def told(servers: dict[str, Server]) -> dict[str, Replies]:
    """Return what each client was told by each server."""
    with ThreadPoolExecutor(len(servers)) as pool:
        asked = [
            (name, pool.submit(ask, server.url, MODEL))
            for ask in (ask_in_python, ask_in_node)
            for name, server in servers.items()
        ]
        found: dict[str, Replies] = {name: {} for name in servers}
        for name, replies in asked:
            found[name] |= replies.result()
        return found


@pytest.fixture(scope="module", params=[False, True], ids=["python", "rust"])
def proxy(
    tmp_path_factory: pytest.TempPathFactory,
    servers: dict[str, Server],
    request: pytest.FixtureRequest,
) -> Iterator[Proxy]:
    """Run a proxy, with its path in Rust switched off and on."""
    folder = tmp_path_factory.mktemp("proxy") / "litellm"
    upstream = Upstream(servers["priced"].url, MODEL, TENANT_KEYS["alpha"])
    with litellm_proxy(folder, upstream, has_rust=request.param) as proxy:
        yield proxy


# ---- libraries


def test_no_client_fails_in_any_way_of_asking(told: dict[str, Replies]) -> None:
    for name, replies in told.items():
        failed = {id: reply["error"] for id, reply in replies.items() if "error" in reply}
        assert failed == {}, name
        asked = [id.split(":")[0] for id in replies]
        assert {client: asked.count(client) for client in asked} == WAYS


def test_each_request_is_billed_once_with_the_tokens_that_its_client_saw(
    servers: dict[str, Server], told: dict[str, Replies]
) -> None:
    for name, server in servers.items():
        for id, reply in told[name].items():
            bill = server.bill_of(id)
            for field in ("prompt_tokens", "output_tokens"):
                assert reply[field] in (None, bill[field]), (id, field)
            assert (bill["tenant"], bill["status"]) == ("alpha", 200), id


def test_a_cost_that_a_client_shows_is_that_of_the_ledger(
    servers: dict[str, Server], told: dict[str, Replies]
) -> None:
    shown = {id: reply["cost"] for id, reply in told["priced"].items() if reply["cost"] is not None}
    assert shown.keys() == SHOW_COST
    for id, cost in shown.items():
        assert cost == float(servers["priced"].bill_of(id)["cost_usd"]), id


def test_without_a_price_no_client_shows_a_cost(told: dict[str, Replies]) -> None:
    assert {reply["cost"] for reply in told["unpriced"].values()} == {None}


def test_clients_see_tool_calls(told: dict[str, Replies]) -> None:
    calls = [reply["text"] for id, reply in told["priced"].items() if "tool call" in id]
    assert any('"city"' in text for text in calls), calls


# ---- programs that read lines


@pytest.mark.parametrize("options", [STREAM, WITH_USAGE, {**WITH_USAGE, "n": 2}])
@pytest.mark.parametrize("name", ["priced", "unpriced"])
def test_a_parser_that_takes_each_line_for_data_reads_every_stream(
    servers: dict[str, Server], name: str, options: dict[str, Any]
) -> None:
    lines = [line for line in _stream(servers[name], options).split("\n") if line]
    assert [line[:6] for line in lines] == ["data: "] * len(lines)
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line[6:])["object"] for line in lines[:-1])


@pytest.mark.parametrize("headers", [{}, {"x-cost-meter-comment": "true"}])
@pytest.mark.parametrize("options", [STREAM, WITH_USAGE])
def test_a_decoder_that_ends_an_event_at_each_blank_line_finds_data_in_each(
    servers: dict[str, Server], options: dict[str, Any], headers: dict[str, str]
) -> None:
    text = _stream(servers["priced"], options, headers)
    assert text.endswith("\n\n")
    comments = 0
    for event in text.removesuffix("\n\n").split("\n\n"):
        lines = event.split("\n")
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        comments += sum(line.startswith(":") for line in lines)
        assert len(data) == 1
        assert data[0] == "[DONE]" or json.loads(data[0])
    assert comments == len(headers)


def _stream(server: Server, options: dict[str, Any], headers: dict[str, str] | None = None) -> str:
    asked = {"model": MODEL, "max_tokens": 4, **CHAT}
    with server.client(headers=headers or {}) as client:
        return client.post("/v1/chat/completions", json={**asked, **options}).text


def test_curl_shows_the_cost_of_a_reply_and_of_a_stream(servers: dict[str, Server]) -> None:
    server = servers["priced"]
    asked = {"model": MODEL, "prompt": "hi", "max_tokens": 4}
    command = ["curl", "--silent", "--show-error", "--no-buffer", "--fail", "--include"]
    command += ["--header", f"Authorization: Bearer {TENANT_KEYS['alpha']}"]
    command += ["--header", "Content-Type: application/json", f"{server.url}/v1/completions"]

    def curl(**more: Any) -> str:
        data = json.dumps({**asked, **more})
        done = subprocess.run(
            [*command, "--data", data], capture_output=True, check=True, text=True
        )
        return done.stdout

    head, _, body = curl().partition("\n\n")
    headers = dict(line.split(": ", 1) for line in head.splitlines()[1:])
    bill = server.bill_of(headers["x-cost-meter-request-id"])
    assert headers["x-cost-meter-cost-usd"] == bill["cost_usd"]
    assert json.loads(body)["usage"]["completion_tokens"] == bill["output_tokens"]
    usage = json.loads(curl(**WITH_USAGE).strip().splitlines()[-3].removeprefix("data: "))["usage"]
    assert usage["cost"] == float(server.bill_of(usage["cost_details"]["request_id"])["cost_usd"])


# ---- a proxy


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "n": 2}),
        ("/v1/chat/completions", {**CHAT, **WITH_USAGE}),
        # The proxy asks for usage all the same.
        ("/v1/chat/completions", {**CHAT, **STREAM}),
        ("/v1/completions", {**TEXT, **STREAM}),
        ("/v1/messages", CHAT),
        ("/v1/messages", {**CHAT, **STREAM}),
    ],
)
def test_what_a_litellm_proxy_records_is_what_the_ledger_has(
    servers: dict[str, Server], proxy: Proxy, path: str, asked: dict[str, Any]
) -> None:
    recorded, bill = _by_proxy(servers["priced"], proxy, path, asked)
    assert recorded == float(bill["cost_usd"]) > 0


def test_of_a_complete_text_completion_a_litellm_proxy_records_no_cost(
    servers: dict[str, Server], proxy: Proxy
) -> None:
    # It does not look at the headers there; the docs say so.
    recorded, bill = _by_proxy(servers["priced"], proxy, "/v1/completions", TEXT)
    assert recorded == 0 < float(bill["cost_usd"])


def _by_proxy(
    server: Server, proxy: Proxy, path: str, asked: dict[str, Any]
) -> tuple[float | None, Any]:
    """Return what the proxy records of a request, and the bill of it."""
    began_at = rfc3339(time.time_ns())
    with proxy.client() as client:
        reply = client.post(path, json={"model": MODEL, "max_tokens": 4, **asked})
    assert reply.status_code == 200, reply.text
    id = re.search(r'"id": ?"([^"]+)"', reply.text)[1]  # type: ignore[index]
    wait_for(lambda: proxy.recorded(id), timeout_s=30, what="nothing was recorded")
    (cost,) = proxy.recorded(id)
    if id.startswith("msg_"):  # Of the proxy's own making. A list of requests may be behind.
        wait_for(lambda: _since(server, began_at), timeout_s=30, what="no request was listed")
        (id,) = _since(server, began_at)
    return cost, server.bill_of(id)


def _since(server: Server, began_at: str) -> list[str]:
    """Return the ids of the requests that came since an instant."""
    listed = server.cost("requests")["requests"]
    return [row["http_request_id"] for row in listed if row["started_at"] >= began_at]
