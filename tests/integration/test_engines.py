"""Engines that are harder to meter: async scheduling, preemption, several API servers, data
parallelism, an hour that ends in mid-request, and the end of everything by kill -9.

One server forces async scheduling (the GPU default, which CPU vLLM switches off), has two API
servers, a KV cache too small for its load, and a wall clock that tests can move.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.integration.adapter import make_adapter
from tests.integration.running import Watched, watch
from tests.integration.server import SEVERAL_ENGINES, TENANT_KEYS, Server
from tests.integration.traffic import PROMPT, Reply, ask
from vllm_cost_meter.ledger.opening import open_ledger
from vllm_cost_meter.ledger.queries.cut import DEAD_AFTER_NS, AsOf
from vllm_cost_meter.records.snapshot import OTHER_CLASSES

REACHED_WITHIN_S = 60


def class_ns(server: Server, name: str) -> int:
    return sum(run[f"{name}_ns"] for run in server.cost("audit")["runs"])


def ask_each_on_its_own_connection(server: Server, count: int, **options: object) -> list[Reply]:
    def one(index: int) -> Reply:
        tenant = list(TENANT_KEYS)[index % len(TENANT_KEYS)]
        with server.client(tenant) as client:
            return ask(client, "/v1/completions", prompt=f"{index} {PROMPT}", **options)

    with ThreadPoolExecutor(max_workers=16) as pool:
        return list(pool.map(one, range(count)))


def test_async_scheduling_really_runs(hard: Server) -> None:
    assert "engine 0 is metered (AsyncScheduler" in hard.log


def test_requests_of_all_api_servers_are_billed_and_shown_by_one(hard: Server) -> None:
    replies = ask_each_on_its_own_connection(hard, 60)
    deadline = time.monotonic() + REACHED_WITHIN_S
    while len(api_servers_that_replied(hard)) < 2:  # the kernel chooses who accepts
        assert time.monotonic() < deadline, "the connections should have reached both API servers"
        replies += ask_each_on_its_own_connection(hard, 60)
    for reply in replies:
        row = hard.bill_of(reply.response_id)
        assert row["cost_usd"] == reply.headers["x-cost-meter-cost-usd"]
        assert row["output_tokens"] == reply.output_tokens == 12
        assert len(row["parts"]) == 1
    hard.balanced()


def api_servers_that_replied(hard: Server) -> set[str]:
    tee = hard.folder.parent / "hard-tee"
    return {file.name.split("-")[0] for file in tee.glob("*.left")}


def test_a_stop_token_leaves_a_tail_that_no_request_pays(hard: Server) -> None:
    with hard.client() as client:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
        full = client.post("/v1/completions", json={**body, "return_token_ids": True}).json()
        token = full["choices"][0]["token_ids"][7]
        before = class_ns(hard, "tail")
        stopped = client.post("/v1/completions", json={**body, "stop_token_ids": [token]}).json()
    assert stopped["usage"]["completion_tokens"] <= 8
    row = hard.bill_of(stopped["id"])
    assert row["engine_status"] == "stopped"
    hard.balanced()
    assert class_ns(hard, "tail") > before


def test_an_abort_pays_for_its_steps_in_flight(hard: Server) -> None:
    before = hard.balanced()["runs"][0]["last_seq"]
    rows = [leave_early(hard, index) for index in range(4)]
    for row in rows:
        assert row["engine_status"] == "aborted"
        part = row["parts"][0]
        # Under async scheduling the device is a step ahead of the tokens that came out.
        assert part["steps"] >= part["output_tokens"]
    after = hard.balanced()["runs"][0]
    assert after["last_seq"] - before == len(rows)
    assert after["in_flight_ns"] == 0


def leave_early(server: Server, index: int) -> dict:
    """Leave a long stream after some tokens, and return its row."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2800, "stream": True}
    body["ignore_eos"] = True
    request_id = f"async-abort-{index}"
    with (
        server.paced(0.01),
        server.client("beta", headers={"x-request-id": request_id}) as client,
        client.stream("POST", "/v1/completions", json=body) as reply,
    ):
        for count, _line in enumerate(reply.iter_lines()):
            if count > 4 + 6 * index:
                break
    return server.bill_of(request_id, timeout_s=20)


def test_preempted_requests_are_billed_once_with_what_was_computed_again(hard: Server) -> None:
    # Eight choices of one request grow side by side: 48 blocks of 128 tokens are wanted.
    with hard.client() as client:
        options = {"n": 8, "temperature": 1, "max_tokens": 700, "ignore_eos": True}
        reply = ask(client, "/v1/completions", **options)
    row = hard.bill_of(reply.response_id)
    parts = row["parts"]
    assert len(parts) == len({part["request_id"] for part in parts}) == 8
    assert sum(part["preemptions"] for part in parts) > 0, "the KV cache should have been too small"
    assert sum(part["recomputed_tokens"] for part in parts) > 0
    assert row["output_tokens"] == reply.output_tokens == 8 * 700
    assert row["prompt_tokens"] == reply.prompt_tokens
    for part in parts:
        # What was computed again stands apart; the chunk that ends it may go one token further,
        # to one that was sampled and not yet computed. Where all its blocks were still in the
        # cache, nothing is computed again.
        once = part["prompt_tokens"] - part["cached_tokens"]
        new_tokens = part["prefill_tokens"] - once - part["recomputed_tokens"]
        assert 0 <= new_tokens <= part["preemptions"]
        assert new_tokens + part["decode_tokens"] == part["output_tokens"] - 1
        assert part["preemptions"] or not part["recomputed_tokens"]
        assert (0 < part["recomputed_ns"] < part["prefill_ns"]) == (part["recomputed_tokens"] > 0)
    hard.balanced()


def test_a_request_across_an_hours_end_is_cut_there(hard: Server) -> None:
    clock = hard.folder.parent / "clock"
    now_s = time.time()
    hours = [now_s // 3600, now_s // 3600 + 1]
    streams = [Watched(f"hour-{index}", "gamma") for index in range(8)]

    def move_the_clock(stream: Watched) -> None:
        if stream.rows[-1]["gpu_time_ns"] and clock.read_text() == "0":  # in the first hour
            clock.write_text(str(hours[1] * 3600 + 60 - now_s))

    before = {hour: gamma_ns(hard, hour) for hour in hours}
    all_before = gamma_ns_of_all_time(hard)
    watch(hard, streams, max_tokens=100, look=move_the_clock)
    hard.balanced()
    spent = {hour: gamma_ns(hard, hour) - before[hour] for hour in hours}
    assert all(ns > 0 for ns in spent.values())
    assert sum(spent.values()) == gamma_ns_of_all_time(hard) - all_before
    clock.write_text("0")


def gamma_ns(server: Server, hour: float) -> int:
    answer = server.cost(f"tenants?window={window_of(hour)}")
    assert answer["adds_up"]
    return sum(row["gpu_time_ns"] for row in answer["tenants"] if row["tenant"] == "gamma")


def gamma_ns_of_all_time(server: Server) -> int:
    rows = server.cost("tenants")["tenants"]
    return sum(row["gpu_time_ns"] for row in rows if row["tenant"] == "gamma")


def window_of(hour: float) -> str:
    ends = (hour * 3600, hour * 3600 + 3600)
    stamps = [time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(end)) for end in ends]
    return ",".join(stamps)


def test_running_requests_of_all_api_servers_show_their_cost_as_it_grows(hard: Server) -> None:
    streams = [Watched(f"live-{index}", "beta") for index in range(3)]
    watch(hard, streams, max_tokens=100)
    for stream in streams:
        assert stream.grew, f"seen running {len(stream.rows)} times"
        bill = hard.bill_of(stream.x_request_id)
        assert bill["state"] == "finished"
        assert bill["gpu_time_ns"] >= stream.rows[-1]["gpu_time_ns"]
        assert bill["http_request_id"] == stream.rows[-1]["http_request_id"]
    hard.balanced()


@dataclass
class Killed:
    """What was told before the end: a reply with its cost, and a request that still ran."""

    reply: Reply
    running: dict


@pytest.fixture(scope="module")
def killed(hard: Server) -> Killed:
    """End the engine's process by kill -9 in mid-request, then all others. For the last tests."""
    told = []

    def end_the_engine(stream: Watched) -> None:
        if stream.rows[-1]["gpu_time_ns"] and not told:
            told.append(stream.rows[-1])
            os.kill(hard.engine_pid, signal.SIGKILL)

    hard.balanced()  # the ledger has its first snapshot
    for command in ("audit", "report", "doctor"):
        # A command that closes the ledger beside the server must not take its WAL away.
        environment = {**os.environ, "COST_METER_LEDGER": hard.ledger_url}
        subprocess.run(["vllm-cost-meter", command], env=environment, check=True)  # noqa: S603
    with hard.client() as client:
        reply = ask(client, "/v1/chat/completions")
    # The stream ends with its engine, and so does the endpoint that is looked at.
    with contextlib.suppress(httpx.TransportError):
        watch(hard, [Watched("killed", "gamma")], max_tokens=400, look=end_the_engine)
    hard.kill()
    return Killed(reply, told[0])


def test_a_cost_seen_in_a_header_survives_kill_9_of_everything(
    hard: Server, killed: Killed
) -> None:
    reader = open_ledger(hard.ledger_url)
    [match] = reader.find(killed.reply.response_id)
    row = reader.request(match)
    assert row is not None
    assert row["cost_usd"] == killed.reply.headers["x-cost-meter-cost-usd"]
    assert row["output_tokens"] == killed.reply.output_tokens
    reader.close()


def test_kill_9_of_an_engine_leaves_what_its_request_had_used_and_the_audit_names_it(
    hard: Server, killed: Killed
) -> None:
    running = killed.running
    reader = open_ledger(hard.ledger_url)
    later = AsOf(now_ns=time.time_ns() + DEAD_AFTER_NS)
    [match] = reader.find(running["x_request_id"])
    row = reader.request(match, later)
    assert row is not None
    assert (row["state"], row["tenant"]) == ("lost", "gamma")
    # Nothing that was told is taken back: what is lost came after the last snapshot.
    assert row["as_of"] >= running["as_of"]
    assert row["gpu_time_ns"] >= running["gpu_time_ns"] > 0
    assert row["cost_nanousd"] >= running["cost_nanousd"] > 0
    audit = reader.audit(later)
    assert audit["balanced"], audit
    [run] = audit["runs"]
    assert run["lost_requests"] == [
        {
            "request_id": row["request_id"],
            "http_request_id": row["http_request_id"],
            "tenant": "gamma",
            "gpu_time_ns": row["gpu_time_ns"],
            "as_of": row["as_of"],
        }
    ]
    assert run["lost_requests_ns"] == row["gpu_time_ns"]
    assert run["lost_ns"] == run["lost_requests_ns"] + run["lost_step_ns"]
    reader.close()


@pytest.fixture(scope="module")
def parallel(work: Path) -> Iterator[Server]:
    adapter = make_adapter(work / "adapter")
    server = Server(
        work / "parallel",
        arguments=[
            *("--data-parallel-size", "2", "--max-model-len", "1024"),
            *("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tuned={adapter}"),
        ],
        environment={
            "VLLM_PLUGINS": "cost_meter,cost_meter_tests",
            "VLLM_SERVER_DEV_MODE": "1",  # its /sleep and /wake_up
            **SEVERAL_ENGINES,
        },
    )
    try:
        yield server.start()
    finally:
        server.stop()


def test_a_server_that_never_saw_a_request_has_true_books(parallel: Server) -> None:
    for run in parallel.balanced()["runs"]:
        assert run["requests_ns"] == run["last_seq"] == 0
        assert run["startup_ns"] > 0
        assert run["startup_ns"] + run["idle_ns"] + run["host_ns"] == run["wall_ns"]
    rows = {row["tenant"]: row for row in parallel.cost("tenants")["tenants"]}
    assert set(rows) == {f"__{name}__" for name in (*OTHER_CLASSES, "in_flight")}


def test_each_data_parallel_engine_is_a_run_of_its_own(parallel: Server) -> None:
    replies = ask_each_on_its_own_connection(parallel, 40)
    for reply in replies:
        row = parallel.bill_of(reply.response_id)
        assert row["output_tokens"] == reply.output_tokens
    audit = parallel.balanced()
    assert sorted(run["engine_index"] for run in audit["runs"]) == [0, 1]
    assert all(run["requests_ns"] > 0 for run in audit["runs"])
    assert sum(run["last_seq"] for run in audit["runs"]) == 40
    assert parallel.cost("summary")["gpus"] == 2


def test_a_bill_names_the_adapter_and_the_served_model(parallel: Server) -> None:
    with parallel.client() as client:
        tuned = ask(client, "/v1/completions", model="tuned")
        plain = ask(client, "/v1/completions")
    for reply, adapter in ((tuned, "tuned"), (plain, None)):
        row = parallel.bill_of(reply.response_id)
        assert (row["model"], [part["lora"] for part in row["parts"]]) == ("tiny", [adapter])


def test_a_sleeping_engine_is_booked_as_asleep_until_it_wakes(parallel: Server) -> None:
    with parallel.client() as client:
        assert client.post("/sleep?level=0").status_code == 200
        time.sleep(1.0)
        asleep = parallel.balanced()["runs"]
        metrics = httpx.get(f"{parallel.side_url}/metrics").text
        assert client.post("/wake_up?tags=scheduling").status_code == 200
        awake = parallel.balanced()["runs"]
        time.sleep(0.5)
        after = parallel.balanced()["runs"]
        assert ask(client, "/v1/completions").status == 200
    assert "cost_meter_engine_awake 0.0" in metrics
    for first, second, third in zip(asleep, awake, after, strict=True):
        assert first["sleep_ns"] > 0.9e9
        assert second["sleep_ns"] == third["sleep_ns"] >= first["sleep_ns"]
        assert third["idle_ns"] - second["idle_ns"] > 0.4e9


def test_sigterm_leaves_books_that_balance(parallel: Server) -> None:
    # Last: it ends this server.
    parallel.stop()
    reader = open_ledger(parallel.ledger_url)
    assert reader.audit()["balanced"]
    assert json.dumps(reader.tenants())
    reader.close()
