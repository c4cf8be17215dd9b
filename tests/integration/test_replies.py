"""Every generating route of a real server: what the client is told is what the ledger holds."""

import asyncio
import json
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.integration.server import ORIGIN, TENANT_KEYS, Server
from tests.integration.traffic import PROMPT, Reply, ask, body_of

ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")


def assert_told_is_kept(server: Server, reply: Reply, *, parts: int, tenant: str = "alpha") -> dict:
    row = server.bill_of(reply.response_id)
    assert row["response_id"] == reply.response_id
    assert row["tenant"] == tenant
    assert row["status"] == reply.status == 200
    assert len(row["parts"]) == parts
    assert len({part["request_id"] for part in row["parts"]}) == parts
    assert row["gpu_time_ns"] == sum(part["gpu_time_ns"] for part in row["parts"]) > 0
    assert row["gpu_time_ns"] == row["prefill_ns"] + row["decode_ns"]
    if reply.usage:
        assert row["prompt_tokens"] == reply.prompt_tokens
        assert row["output_tokens"] == reply.output_tokens
        assert row["cached_tokens"] == reply.cached_tokens
    assert row["ttft_ms"] > 0
    assert row["e2e_ms"] >= row["ttft_ms"]
    return row


@pytest.mark.parametrize("route", ROUTES)
def test_a_complete_reply_carries_its_cost_in_headers(server: Server, route: str) -> None:
    with server.client() as client:
        reply = ask(client, route)
    row = assert_told_is_kept(server, reply, parts=1)
    assert reply.headers["x-cost-meter-cost-usd"] == row["cost_usd"]
    assert reply.headers["x-litellm-response-cost"] == row["cost_usd"]
    assert Decimal(reply.headers["x-cost-meter-gpu-seconds"]) == Decimal(row["gpu_time_ns"]) / 10**9
    assert reply.headers["x-cost-meter-request-id"] == row["http_request_id"]
    assert reply.headers["x-cost-meter-tenant"] == "alpha"
    assert row["cost_nanousd"] == round(row["gpu_time_ns"] * 2.5 / 3600)
    assert row["route"] == route
    server.balanced()


@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_carries_its_cost_in_usage_and_where_asked_in_a_comment(
    server: Server, route: str
) -> None:
    options = {}
    if route in ("/v1/completions", "/v1/chat/completions"):
        options["stream_options"] = {"include_usage": True}
    with server.client(headers={"x-cost-meter-comment": "true"}) as client:
        reply = ask(client, route, stream=True, **options)
    row = assert_told_is_kept(server, reply, parts=1)
    assert reply.usage is not None
    assert Decimal(str(reply.usage["cost"])) == Decimal(row["cost_usd"])
    details = reply.usage["cost_details"]
    assert details["request_id"] == row["http_request_id"]
    assert details["tenant"] == "alpha"
    assert round(details["gpu_seconds"] * 1e9) == row["gpu_time_ns"]
    assert any(f"cost_usd={row['cost_usd']}" in comment for comment in reply.comments)
    assert "x-cost-meter-cost-usd" not in reply.headers
    server.balanced()


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_that_asks_for_nothing_gets_nothing_and_is_billed(
    server: Server, route: str
) -> None:
    with server.client() as client:
        reply = ask(client, route, stream=True)
    row = assert_told_is_kept(server, reply, parts=1)
    assert reply.usage is None
    assert b"cost" not in reply.body
    assert row["output_tokens"] == 12


def test_a_web_page_may_read_what_its_reply_cost(server: Server) -> None:
    """vLLM lets pages of other origins ask; a browser then shows them exposed headers only."""
    with server.client(headers={"origin": ORIGIN}) as client:
        reply = ask(client, "/v1/chat/completions")
    assert reply.headers["access-control-allow-origin"] == ORIGIN
    exposed = reply.headers["access-control-expose-headers"].split(", ")
    assert set(exposed) == {name for name in reply.headers if name.startswith("x-")}


def test_running_usage_counts_are_left_alone_and_only_the_last_gets_the_cost(
    server: Server,
) -> None:
    with server.client() as client:
        reply = ask(
            client,
            "/v1/chat/completions",
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
    assert_told_is_kept(server, reply, parts=1)
    assert reply.body.count(b'"cost"') == 1
    assert reply.body.count(b'"usage"') > 2


@pytest.mark.parametrize("stream", [False, True])
def test_two_choices_are_two_bills_and_their_prompt_counts_once(
    server: Server, stream: bool
) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    with server.client() as client:
        reply = ask(client, "/v1/chat/completions", n=2, temperature=1, ignore_eos=True, **options)
    row = assert_told_is_kept(server, reply, parts=2)
    assert row["prompt_tokens"] == row["parts"][0]["prompt_tokens"]
    assert row["output_tokens"] == sum(part["output_tokens"] for part in row["parts"]) == 24
    server.balanced()


def test_two_prompts_are_two_bills(server: Server) -> None:
    with server.client() as client:
        reply = ask(client, "/v1/completions", prompt=[PROMPT, "Something else entirely."])
    row = assert_told_is_kept(server, reply, parts=2)
    assert row["prompt_tokens"] == sum(part["prompt_tokens"] for part in row["parts"])
    server.balanced()


def test_every_engine_request_of_a_beam_search_is_billed(server: Server) -> None:
    with server.client() as client:
        reply = ask(client, "/v1/completions", use_beam_search=True, n=2, max_tokens=3)
    row = server.bill_of(reply.response_id)
    assert row["response_id"] == reply.response_id
    assert len(row["parts"]) > 2
    assert row["prompt_tokens"] == reply.prompt_tokens
    server.balanced()


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_billed_once_and_its_cost_still_told(server: Server, stream: bool) -> None:
    with server.client() as client:
        text = ask(client, "/v1/completions", max_tokens=24).body
        stop = json.loads(text)["choices"][0]["text"][8:11]
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        # So many that the engine does not come to their end before it is told of the stop.
        reply = ask(client, "/v1/completions", max_tokens=7000, stop=[stop], **options)
    assert reply.output_tokens < 24
    row = assert_told_is_kept(server, reply, parts=1)
    # The engine learns of the stop afterwards and may have computed a token more.
    assert row["parts"][0]["output_tokens"] >= row["output_tokens"]
    assert row["engine_status"] == "aborted"
    told = reply.usage["cost"] if stream else reply.headers["x-cost-meter-cost-usd"]
    assert Decimal(str(told)) == Decimal(row["cost_usd"])
    server.balanced()


def test_cached_prompt_tokens_are_as_told(server: Server) -> None:
    prompt = " ".join(f"word{i}" for i in range(150))
    with server.client() as client:
        first = ask(client, "/v1/completions", prompt=prompt)
        again = ask(client, "/v1/completions", prompt=prompt)
    assert first.cached_tokens == 0 < again.cached_tokens
    row = assert_told_is_kept(server, again, parts=1)
    assert row["parts"][0]["cached_tokens"] == again.cached_tokens
    computed = row["parts"][0]["prefill_tokens"]
    assert computed == row["prompt_tokens"] - row["cached_tokens"]
    # What that is worth is by the cost model, to which a busy machine may have taught anything.
    assert row["saved_estimate_ns"] >= 0
    assert row["parts"][0]["kv_block_ms"] >= 0


def leave_once(
    server: Server, request_id: str, body: dict[str, Any], is_time: Callable[[Any], bool]
) -> None:
    """Ask for a complete reply and leave without it, once the row of what runs says so."""

    async def run() -> None:
        headers = {"authorization": f"Bearer {TENANT_KEYS['beta']}", "x-request-id": request_id}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60) as client:
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            row = None
            while row is None or not is_time(row):
                assert not asking.done(), "it should have gone on for long"
                await asyncio.sleep(0.05)
                row = await asyncio.to_thread(server.row_of, request_id)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(run())


@pytest.mark.parametrize("after_tokens", [0, 5])
def test_a_disconnect_is_billed_to_whoever_asked(server: Server, after_tokens: int) -> None:
    request_id = f"leaves-after-{after_tokens}"
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 7000, "ignore_eos": True}
    body["stream"] = after_tokens > 0
    if after_tokens:
        with (
            server.client("beta", headers={"x-request-id": request_id}) as client,
            client.stream("POST", "/v1/completions", json=body) as reply,
        ):
            for count, _line in enumerate(reply.iter_lines()):
                if count > 2 * after_tokens:
                    break
    else:
        # At full speed the engine leaves a machine of two cores no time for the side endpoint.
        with server.paced(0.02):
            leave_once(server, request_id, body, lambda row: row["decode_ns"])
    row = server.bill_of(request_id)
    assert row["tenant"] == "beta"
    assert row["engine_status"] == "aborted"
    assert row["status"] == (200 if after_tokens else 499)
    assert 0 < row["parts"][0]["output_tokens"] < 7000
    assert row["gpu_time_ns"] > 0
    server.balanced()


def test_a_disconnect_in_mid_prefill_pays_for_what_was_computed(server: Server) -> None:
    # Prompts of several chunks, one after the other: some are always in the middle of theirs.
    prompts = [[10, number, *([9] * 6_000)] for number in range(1, 9)]
    request_id = "leaves-in-prefill"
    body = {"model": "tiny", "prompt": prompts, "max_tokens": 500, "ignore_eos": True}
    with server.paced(0.3):
        leave_once(server, request_id, body, lambda row: row["prefill_ns"])
    server.balanced()  # all its parts are billed
    row = server.bill_of(request_id)
    assert (row["tenant"], row["engine_status"], row["status"]) == ("beta", "aborted", 499)
    mid_prefill = [
        part
        for part in row["parts"]
        if 0 < part["prefill_tokens"] + part["cached_tokens"] < part["prompt_tokens"]
    ]
    assert mid_prefill
    for part in mid_prefill:
        assert part["output_tokens"] == part["decode_ns"] == 0 < part["prefill_ns"]


def test_a_bill_is_recomputed_by_hand_from_its_explanation(server: Server) -> None:
    with server.client() as client:
        reply = ask(client, "/v1/completions", n=2, temperature=1, max_tokens=20)
    server.bill_of(reply.response_id)
    explanation = server.cost(f"requests/{reply.response_id}/explain")
    nanousd = 0
    for part in explanation["parts"]:
        prefill, decode = part["phases"]["prefill"], part["phases"]["decode"]
        gpu_time_ns = prefill["gpu_time_ns"] + decode["gpu_time_ns"]
        assert gpu_time_ns == part["gpu_time_ns"]
        assert gpu_time_ns == pytest.approx(part["share"] * part["step_ns"])
        assert 1 <= part["average_batch"] == part["batch"] / part["steps"]
        assert part["common_ns"] + part["marginal_ns"] == gpu_time_ns <= part["step_ns"]
        assert part["kv_block_ms"] > 0
        versions = {model["version"] for model in part["cost_models"]}
        assert versions
        cost = Decimal(gpu_time_ns) * Decimal(part["usd_per_gpu_hour"]) / 3600
        nanousd += int(cost.quantize(Decimal(1), ROUND_HALF_EVEN))
    assert nanousd == explanation["cost_nanousd"]
    assert Decimal(nanousd) / 10**9 == Decimal(reply.headers["x-cost-meter-cost-usd"])


def test_a_background_response_is_not_waited_for_and_billed_when_it_ends(server: Server) -> None:
    with server.client("gamma") as client:
        misses = _misses(server)
        announced = client.post("/v1/responses", json=body_of("/v1/responses", background=True))
        assert _misses(server) == misses
        start = time.monotonic()
        response_id = announced.json()["id"]
        going_on = ("queued", "in_progress")
        while client.get(f"/v1/responses/{response_id}").json()["status"] in going_on:
            assert time.monotonic() - start < 20
            time.sleep(0.1)
    assert announced.json()["status"] in ("queued", "in_progress")
    assert "x-cost-meter-cost-usd" not in announced.headers
    row = server.bill_of(response_id)
    assert row["tenant"] == "gamma"
    assert row["output_tokens"] == 12
    assert row["gpu_time_ns"] > 0
    server.balanced()


def test_tenants_are_told_apart_by_key_and_a_header_is_not_believed(server: Server) -> None:
    for tenant in TENANT_KEYS:
        with server.client(tenant, headers={"x-tenant-id": "somebody-else"}) as client:
            reply = ask(client, "/v1/completions")
        assert reply.headers["x-cost-meter-tenant"] == tenant
    with server.client("nobody") as client:
        reply = ask(client, "/v1/completions")
    assert reply.headers["x-cost-meter-tenant"] == "unknown"


def test_a_refused_request_is_nobodys_and_gets_no_cost(server: Server) -> None:
    refused = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "a"})
    assert refused.status_code == 401
    with server.client() as client:
        models = client.get("/v1/models")
        # Last, because vLLM 0.25 closes the connection of a request that is wrong.
        wrong = client.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT, "n": -1})
        assert wrong.status_code == 400
    for reply in (refused, wrong, models):
        assert not [name for name in reply.headers if name.startswith("x-cost-meter")]


def test_an_id_that_two_clients_chose_lists_both(server: Server) -> None:
    for tenant in ("alpha", "beta"):
        with server.client(tenant, headers={"x-request-id": "chosen-twice"}) as client:
            ask(client, "/v1/chat/completions")
    reply = httpx.get(f"{server.side_url}/cost/requests/chosen-twice")
    assert reply.status_code == 300
    assert {match["tenant"] for match in reply.json()["matches"]} == {"alpha", "beta"}
    missing = httpx.get(f"{server.side_url}/cost/requests/never-seen")
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "not_found"


def test_the_openai_client_sees_the_cost(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=TENANT_KEYS["gamma"])
    raw = client.chat.completions.with_raw_response.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=5,
        extra_body={"ignore_eos": True},
    )
    assert float(raw.headers["x-cost-meter-cost-usd"]) > 0
    assert raw.parse().usage.completion_tokens == 5
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].usage.model_extra["cost"] > 0
    client.close()


def test_two_thousand_requests_at_concurrency_64_are_each_billed_once(server: Server) -> None:
    before = server.cost("tenants")
    command = [
        *(str(Path(sys.executable).parent / "vllm"), "bench", "serve", "--backend", "openai"),
        *("--base-url", server.url, "--model", "tiny", "--tokenizer", _model_path()),
        *("--dataset-name", "random", "--random-input-len", "20", "--random-output-len", "4"),
        *("--num-prompts", "2000", "--max-concurrency", "64", "--ignore-eos", "--seed", "7"),
        *("--num-warmups", "0", "--ready-check-timeout-sec", "0"),
    ]
    environment = {"OPENAI_API_KEY": TENANT_KEYS["gamma"]}
    done = subprocess.run(  # noqa: S603
        command, env={**_environ(), **environment}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"Successful requests:\s+2000", done.stdout), done.stdout
    server.balanced()
    after = server.cost("tenants")
    assert _requests(after, "gamma") - _requests(before, "gamma") == 2000
    assert _output_tokens(after, "gamma") - _output_tokens(before, "gamma") == 8000


def test_what_left_the_middleware_is_what_entered_but_for_our_fields(server: Server) -> None:
    # Runs last on this server's replies: all that the tests above received.
    folder = server.folder.parent / "tee"
    compared = 0
    for left in sorted(folder.glob("*.left")):
        entered = left.with_suffix(".entered").read_bytes()
        ours = left.read_bytes()
        ours = re.sub(rb": cost-meter [^\n]*\n", b"", ours)
        ours = re.sub(rb',"cost":[0-9.]+,"cost_details":\{[^{}]*\}', b"", ours)
        assert ours == entered
        compared += left.read_bytes() != entered
    assert compared >= len(ROUTES), "each route has streams that were edited"


def _misses(server: Server) -> float:
    """Return how many replies waited in vain for a bill."""
    text = httpx.get(f"{server.side_url}/metrics").text
    return float(re.findall(r"^cost_meter_reply_misses_total (\S+)$", text, re.MULTILINE)[0])


def _requests(answer: dict, tenant: str) -> int:
    return sum(row["requests"] for row in answer["tenants"] if row["tenant"] == tenant)


def _output_tokens(answer: dict, tenant: str) -> int:
    return sum(row["output_tokens"] for row in answer["tenants"] if row["tenant"] == tenant)


def _model_path() -> str:
    from vllm_cost_meter.lab.tiny_model import default_path

    return str(default_path())


def _environ() -> dict[str, str]:
    import os

    return dict(os.environ)


def test_an_engine_without_a_gpu_has_no_energy_and_says_why(server: Server) -> None:
    with server.client() as client:
        reply = ask(client, "/v1/completions")
    row = server.bill_of(reply.response_id)
    server.balanced()  # a snapshot after the bill
    reason = "no_device: vLLM runs on cpu, not on NVIDIA GPUs"
    assert (row["energy_mj"], row["energy_reason"]) == (None, reason)
    tenants = server.cost("tenants")
    assert {row["energy_mj"] for row in tenants["tenants"]} == {None}
    assert [(run["devices"], run["energy_reason"]) for run in tenants["runs"]] == [(None, reason)]
    with sqlite3.connect(server.ledger_file) as ledger:
        assert ledger.execute("SELECT count(*) FROM request_energy").fetchone() == (0,)
