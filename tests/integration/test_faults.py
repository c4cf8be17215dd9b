"""Metering may fail, serving may not: every hook of a real server is made to raise.

One server; the file that names the failing hooks is rewritten while it serves. The last tests drive
the meter until it gives up, and hold the ledger locked.
"""

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.server import Server
from tests.integration.traffic import ask
from tests.support.waiting import wait_for
from vllm_cost_meter.lab.server import meter_arguments

ENGINE_HOOKS = ("_scheduled", "_result_came", "_carry_late_bills", "_added", "_freed", "snapshot")
SLEEP_HOOKS = ("_slept", "_woke")
API_HOOKS = ("_born", "_take_bills", "_billed", "poll_engines", "set_engine", "count_bill")
REPLY_HOOKS = ("_new_exchange", "usage_of", "headers", "final_usage", "insert_usage")
REPLY_HOOKS += ("all_billed", "http_request")
STAT_LOGGER = ("count_inter_token_latencies",)
HOOKS = (*ENGINE_HOOKS, *API_HOOKS, *REPLY_HOOKS, *STAT_LOGGER)
# Longer than the default: what does not wait for a bill is well below it, on a busy machine too.
BILL_TIMEOUT_S = 1.0
RETURNS_WITHIN_S = 30


@pytest.fixture(scope="module")
def faults(work: Path) -> Path:
    file = work / "faults"
    file.write_text("")
    return file


@pytest.fixture(scope="module")
def faulty(work: Path, faults: Path) -> Iterator[Server]:
    server = Server(
        work / "faulty",
        arguments=meter_arguments(),
        environment={
            "CMT_FAULTS": str(faults),
            "COST_METER_BILL_TIMEOUT_MS": str(round(BILL_TIMEOUT_S * 1000)),
            "VLLM_SERVER_DEV_MODE": "1",  # its /sleep and /wake_up
        },
    )
    try:
        yield server.start()
    finally:
        server.stop()


def serves(server: Server) -> None:
    """Assert that complete and streamed replies come, whole."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with server.client() as client:
        for extra in ({}, options):
            reply = ask(client, "/v1/chat/completions", max_tokens=3, **extra)
            assert reply.status == 200
            assert reply.output_tokens == 3


def tells_its_cost_again(client: httpx.Client) -> None:
    """Wait until a reply carries its cost."""
    wait_for(
        lambda: ask(client, "/v1/completions", max_tokens=1).headers,
        lambda headers: "x-cost-meter-cost-usd" in headers,
        timeout_s=RETURNS_WITHIN_S,
    )


@pytest.mark.parametrize("hook", HOOKS)
def test_serving_goes_on_while_a_hook_fails_and_metering_returns_after(
    faulty: Server, faults: Path, hook: str
) -> None:
    faults.write_text(hook)
    serves(faulty)
    faults.write_text("")
    serves(faulty)
    with faulty.client() as client:
        reply = ask(client, "/v1/completions")
        tells_its_cost_again(client)
    assert faulty.bill_of(reply.response_id)["gpu_time_ns"] > 0
    audit = faulty.cost("audit")
    for run in audit["runs"]:
        assert run["difference_ns"] == 0, audit
        assert run["hours_difference_ns"] == 0, audit
        assert run["state"] == "on"


def test_what_a_failed_hook_did_not_measure_is_booked_as_lost(faulty: Server) -> None:
    time.sleep(1.5)
    run = faulty.cost("audit")["runs"][0]
    assert run["lost_ns"] > 0
    assert run["in_flight_ns"] == 0
    assert faulty.log.count("failed and was contained") <= 2 * len(HOOKS + SLEEP_HOOKS), (
        "each kind of failure is logged once, on each side"
    )


@pytest.mark.parametrize("hook", SLEEP_HOOKS)
def test_an_engine_sleeps_and_wakes_though_the_meter_fails(
    faulty: Server, faults: Path, hook: str
) -> None:
    lost_ns = faulty.cost("audit")["runs"][0]["lost_ns"]
    faults.write_text(hook)
    with faulty.client() as client:
        assert client.post("/sleep?level=0").status_code == 200
        assert client.get("/is_sleeping").json() == {"is_sleeping": True}
        assert client.post("/wake_up?tags=scheduling").status_code == 200
        assert client.get("/is_sleeping").json() == {"is_sleeping": False}
    faults.write_text("")
    serves(faulty)
    run = faulty.cost("audit")["runs"][0]
    assert run["difference_ns"] == 0
    assert run["lost_ns"] > lost_ns


def test_while_the_ledger_is_locked_costs_are_told_and_none_of_them_is_lost(faulty: Server) -> None:
    logged = len(faulty.log)
    lock = sqlite3.connect(faulty.ledger_file, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    told = {}
    with faulty.client() as client:
        for _ in range(8):
            reply = ask(client, "/v1/completions", max_tokens=1)
            told[reply.response_id] = reply.headers["x-cost-meter-cost-usd"]
        # Whoever asks meanwhile is told that figures are behind, not that there is no such cost.
        behind = httpx.get(f"{faulty.side_url}/cost/requests/{reply.response_id}", timeout=30)
        assert behind.status_code == 503, behind.text
        lock.execute("ROLLBACK")
        lock.close()
        for response_id, cost_usd in told.items():
            assert faulty.bill_of(response_id)["cost_usd"] == cost_usd
    log = faulty.log[logged:]
    assert "the ledger cannot be written, trying again: OperationalError" in log
    assert "the ledger can be written again, after" in log


def test_a_meter_that_cannot_work_switches_itself_off_and_says_so(
    faulty: Server, faults: Path
) -> None:
    # Last: it leaves the engine unmetered.
    faults.write_text("_scheduled")
    for _ in range(6):
        serves(faulty)
    faults.write_text("")
    seconds = []
    with faulty.client() as client:
        for _ in range(8):
            start = time.monotonic()
            reply = ask(client, "/v1/completions", max_tokens=1)
            seconds.append(time.monotonic() - start)
            assert "x-cost-meter-cost-usd" not in reply.headers
    assert all(s < BILL_TIMEOUT_S for s in seconds[5:]), "nobody waits for bills that do not come"
    assert "switched itself off" in faulty.log
    before = faulty.cost("audit")["runs"][0]
    time.sleep(1.2)
    after = faulty.cost("audit")["runs"][0]
    assert before["state"] == after["state"] == "off"
    assert after["difference_ns"] == 0
    assert after["lost_ns"] - before["lost_ns"] == after["wall_ns"] - before["wall_ns"]
    metrics = httpx.get(f"{faulty.side_url}/metrics").text
    assert 'cost_meter_engine_on{engine="0"} 0.0' in metrics
    assert "cost_meter_reply_misses_total" in metrics
