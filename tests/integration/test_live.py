"""A request that still runs, on the real server: found by its ids, with a cost that grows."""

import contextlib
import json
import os
import signal
import subprocess
import time
from typing import Any

import httpx
import psutil

from tests.integration.running import Watched, watch
from tests.integration.server import Server
from tests.integration.traffic import ask

TOKENS = 100


def test_a_running_request_costs_more_and_more_and_then_what_its_bill_says(server: Server) -> None:
    stream = Watched("live", "beta")
    watch(server, [stream], TOKENS)
    assert stream.grew, f"seen running {len(stream.rows)} times in a stream of {TOKENS} tokens"
    for before, after in zip(stream.rows, stream.rows[1:], strict=False):
        assert before["gpu_time_ns"] <= after["gpu_time_ns"]
        assert before["as_of"] < after["as_of"], "each look asks the engine anew"
    last = stream.rows[-1]
    assert (last["tenant"], last["x_request_id"]) == ("beta", stream.x_request_id)
    assert last["response_id"] == stream.response_id
    assert (last["status"], last["finished_at"], last["engine_status"]) == (None, None, None)
    assert last["parts"][0]["state"] == "running"
    bill = server.bill_of(stream.response_id)
    assert (bill["state"], bill["as_of"]) == ("finished", None)
    assert bill["http_request_id"] == last["http_request_id"]
    assert bill["gpu_time_ns"] >= last["gpu_time_ns"]
    assert bill["cost_nanousd"] >= last["cost_nanousd"] > 0
    assert bill["parts"][0]["run_id"] == last["parts"][0]["run_id"]
    server.balanced()


def test_running_requests_are_listed_and_the_books_balance_meanwhile(server: Server) -> None:
    listed, audits = [], []

    def look(_stream: Watched) -> None:
        page = server.cost("requests")
        listed.extend(row["x_request_id"] for row in page["running"])
        audits.append(server.cost("audit"))

    stream = Watched("listed", "alpha")
    watch(server, [stream], TOKENS, look=look)
    assert stream.x_request_id in listed
    assert all(audit["balanced"] for audit in audits), audits
    assert server.bill_of(stream.x_request_id)["state"] == "finished"
    assert server.cost("requests")["running"] == []


def test_the_side_endpoints_process_may_die_and_nothing_is_missed(server: Server) -> None:
    def process() -> Any:
        found = {each["process"]: each for each in server.cost("health")["side_processes"]}
        return found["side endpoint"]

    before = process()
    os.kill(before["pid"], signal.SIGKILL)
    with server.client() as client:
        replies = [ask(client, "/v1/completions", max_tokens=2) for _ in range(5)]
    assert all("x-cost-meter-cost-usd" in reply.headers for reply in replies)
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(httpx.TransportError):
            after = process()
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (after["state"], after["restarts"]) == ("ok", before["restarts"] + 1)
    assert psutil.Process(after["pid"]).nice() == 19
    for reply in replies:
        assert server.bill_of(reply.response_id)["gpu_time_ns"] > 0
    assert "works again after" in server.log
    server.balanced()


def test_the_doctor_beside_a_server_asks_it_and_changes_nothing(server: Server) -> None:
    """From a shell without any of the server's settings but the name of its ledger."""
    command = ["vllm-cost-meter", "doctor", "--json", "--url", server.side_url]
    with server.client() as client:
        ask(client, "/v1/completions")
    done = subprocess.run(  # noqa: S603
        [*command, "--ledger", server.ledger_url], capture_output=True, text=True, check=False
    )
    answer = json.loads(done.stdout)
    found = {each["name"]: each for each in answer["findings"]}
    assert found["server"]["detail"].startswith(f"{server.side_url} says ok")
    assert found["price"]["detail"].startswith("now 2.5")
    assert f", by {server.side_url}; these settings differ: none now" in found["price"]["detail"]
    for name in ("ledger", "schema", "pages", "books", "cost model"):
        assert found[name]["state"] == "ok", found[name]
    server.balanced()
