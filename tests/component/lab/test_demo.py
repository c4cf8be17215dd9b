"""The demo without a server: what does not add up is said, keys stay secret, the screen is plain.

Goal: the demo's exit status means what it says. Method: a small world in which all agrees, and one
thing at a time changed in it.
"""

import asyncio
import hashlib
import io
import json
import stat
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("openai", reason="comes with vLLM")

from rich.console import Console

from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab import server as serving
from vllm_cost_meter.lab.demo import run as demo
from vllm_cost_meter.lab.demo import setup as demo_setup
from vllm_cost_meter.lab.demo import show as demo_show
from vllm_cost_meter.lab.demo.checks import DemoFigures, problems
from vllm_cost_meter.lab.demo.traffic import (
    BATCH,
    BATCH_INPUT_TOKENS,
    BATCH_REQUESTS,
    CHAT,
    LEAVES_MAX,
    SEARCH,
    TENANTS,
    Sightings,
    Told,
    Traffic,
)


def request_row(response_id: str, tenant: str, prompt: int, cached: int, output: int) -> Any:
    return {
        "response_id": response_id,
        "tenant": tenant,
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "output_tokens": output,
        "cost_usd": "0.000000100",
        "gpu_time_ns": 100,
        "status": 200,
        "engine_status": "stop",
    }


def world() -> tuple[Sightings, DemoFigures]:
    batch_prompt, batch_output = BATCH_REQUESTS * BATCH_INPUT_TOKENS + 3, BATCH_REQUESTS * 2
    requests = [
        request_row("chat", CHAT, 10, 0, 5),
        {**request_row("left", CHAT, 10, 0, 7), "engine_status": "aborted"},
        request_row("search", SEARCH, 90, 80, 3),
        *(request_row(f"b{n}", BATCH, BATCH_INPUT_TOKENS, 0, 2) for n in range(BATCH_REQUESTS)),
    ]
    requests[-1]["prompt_tokens"] += 3
    rows = [
        tenant_row(CHAT, 2, (20, 0, 12), 200),
        tenant_row(SEARCH, 1, (90, 80, 3), 100),
        tenant_row(BATCH, BATCH_REQUESTS, (batch_prompt, 0, batch_output), 4800),
        tenant_row("__idle__", 0, (None, None, None), 900),
        tenant_row("__sleep__", 0, (None, None, None), 0),
    ]
    run = {"run_id": "r", "difference_ns": 0, "missing_bills": [], "in_flight_ns": 0}
    seen = Sightings(
        sent=Counter({CHAT: 2, SEARCH: 1, BATCH: BATCH_REQUESTS}),
        told=[
            Told(CHAT, "chat", 10, None, 5, "0.000000100"),
            Told(SEARCH, "search", 90, 80, 3, None),
        ],
        reply_id="chat",
        headers=[("x-cost-meter-cost-usd", "0.000000100")],
        last_chunk='data: {"usage":{"cost_details":{}}}',
        abandoned_id="left",
        batch={
            "completed": BATCH_REQUESTS,
            "total_input_tokens": batch_prompt,
            "total_output_tokens": batch_output,
        },
    )
    tenants = {"tenants": rows, "wall_gpu_ns": 6000, "adds_up": True}
    statement = {
        "adds_up": True,
        "difference_ns": 0,
        "prices": [{"usd_per_gpu_hour": "3600"}],
        "lines": [{"amount_cents": cents} for cents in (100, 0, 51)],
        "whole": {"wall_gpu_ns": 1_512_000_000},
    }
    return seen, DemoFigures(tenants, {"balanced": True, "runs": [run]}, requests, statement)


def tenant_row(name: str, requests: int, tokens: tuple[int | None, ...], gpu_time_ns: int) -> Any:
    counts = dict(zip(("prompt_tokens", "cached_tokens", "output_tokens"), tokens, strict=True))
    cost = {"cost_nanousd": gpu_time_ns, "cost_usd": f"{gpu_time_ns / 1e9:.9f}"}
    return {"tenant": name, "requests": requests, **counts, "gpu_time_ns": gpu_time_ns, **cost}


def test_a_world_that_agrees_has_no_problems() -> None:
    assert problems(*world()) == []


Change = Callable[[Sightings, Any], Any]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s, f: f.tenants["tenants"][3].update(gpu_time_ns=899), "the rows add up to 5999"),
        (lambda s, f: f.tenants.update(adds_up=False), "wall x GPUs is 6000"),
        (lambda s, f: f.audit.update(balanced=False), "the audit does not balance"),
        (lambda s, f: f.audit["runs"].clear(), "no engine run"),
        (lambda s, f: f.audit["runs"][0].update(difference_ns=-1), "-1 ns too many or too few"),
        (lambda s, f: f.audit["runs"][0].update(missing_bills=[7]), "[7] are missing"),
        (lambda s, f: f.statement.update(adds_up=False, difference_ns=4), "statement misses 4 ns"),
        (
            lambda s, f: f.statement["lines"].pop(),
            "lines add up to 100 cents, wall time x price is 151",
        ),
        (lambda s, f: s.sent.update([CHAT]), "chat-team: 3 requests sent, 2 billed"),
        (
            lambda s, f: f.tenants["tenants"].append(tenant_row("unknown", 1, (0, 0, 0), 0)),
            "unknown: 0 requests sent, 1 billed",
        ),
        (lambda s, f: f.requests[0].update(output_tokens=4), "output_tokens told 5"),
        (lambda s, f: f.requests[0].update(tenant=SEARCH), "tenant told chat-team"),
        (lambda s, f: f.requests[0].update(cost_usd=None), "cost_usd told 0.000000100"),
        (lambda s, f: f.requests[2].update(cached_tokens=0), "cached_tokens told 80"),
        (lambda s, f: f.requests.pop(0), "chat: not in the ledger"),
        (lambda s, f: f.requests.pop(1), "left in mid-stream (left) is missing"),
        (lambda s, f: f.requests[1].update(engine_status="stop"), "expected it aborted"),
        (lambda s, f: f.requests[1].update(gpu_time_ns=0), "expected it aborted"),
        (lambda s, f: f.requests[-1].update(output_tokens=1), "its requests have 95"),
        (lambda s, f: s.batch.update(total_output_tokens=1), "batch-team: 1 output tokens told"),
        (lambda s, f: s.batch.update(total_input_tokens=1), "batch-team: 1 prompt tokens told"),
        (lambda s, f: s.batch.update(completed=47), "47 of 48 requests completed"),
        (lambda s, f: s.headers.clear(), "no complete reply carried a cost"),
        (lambda s, f: setattr(s, "last_chunk", ""), "last chunk carried no cost"),
    ],
)
def test_one_thing_that_disagrees_is_said(change: Change, said: str) -> None:
    seen, figures = deepcopy(world())
    change(seen, figures)
    assert any(said in problem for problem in problems(seen, figures)), problems(seen, figures)


def test_streams_are_read_as_they_come_until_one_carries_its_cost() -> None:
    import openai

    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    costs = [{}, {"cost": 0.5, "cost_details": {}}, {"cost": 0.25, "cost_details": {}}]
    answers = iter(costs)

    def answer(_request: httpx.Request) -> httpx.Response:
        chunk = {"id": "c", "choices": [], "usage": {**usage, **next(answers)}}
        chunk |= {"object": "chat.completion.chunk", "created": 1, "model": "tiny"}
        stream = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, text=stream)

    async def ask() -> Sightings:
        traffic = Traffic("http://server", "tiny", "tiny", {})
        transport = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        client = openai.AsyncOpenAI(base_url="http://server/v1", api_key="k", http_client=transport)
        for _ in costs:
            await traffic._stream(client, "?")
        await client.close()
        return traffic.seen

    seen = asyncio.run(ask())
    assert [told.cost_usd for told in seen.told] == [None, "0.500000000", "0.250000000"]
    assert json.loads(seen.last_chunk.removeprefix("data: "))["usage"]["cost"] == 0.5


@pytest.mark.parametrize(
    ("took_s", "left"), [([0.1], 1), ([14, 0.1], 2), ([14] * 9, LEAVES_MAX)], ids=str
)
def test_a_client_that_stood_still_leaves_another_reply(took_s: list[float], left: int) -> None:
    import openai

    asked = []

    def answer(_request: httpx.Request) -> httpx.Response:
        asked.append(f"c{len(asked) + 1}")
        chunk = {"id": asked[-1], "choices": [], "object": "chat.completion.chunk"}
        stream = f"data: {json.dumps(chunk | {'created': 1, 'model': 'tiny'})}\n\n" * 20
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, text=stream)

    async def leave() -> Sightings:
        times = iter([time for took in took_s for time in (0.0, took)])
        traffic = Traffic("http://server", "tiny", "tiny", {}, clock=lambda: next(times))
        transport = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        client = openai.AsyncOpenAI(base_url="http://server/v1", api_key="k", http_client=transport)
        await traffic._leave(client)
        await client.close()
        return traffic.seen

    seen = asyncio.run(leave())
    assert (seen.sent[CHAT], seen.abandoned_id, len(asked)) == (left, f"c{left}", left)


def test_an_older_bench_that_reports_what_it_asked_for_agrees() -> None:
    seen, figures = world()
    seen.batch = {**seen.batch, "total_input_tokens": BATCH_REQUESTS * BATCH_INPUT_TOKENS}
    assert problems(seen, figures) == []


def test_what_does_not_add_up_fails_the_demo_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = demo._verdict(Console(file=io.StringIO()), ["one\x1b[2J", "two"], world()[0])
    said = capsys.readouterr().err
    assert status == demo.FAILED
    assert said == "vllm-cost-meter demo: does not add up: one\\x1b[2J; two\n"


def test_the_bill_shows_every_class_that_is_not_zero_and_the_total() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(demo_show.bill_table(world()[1].tenants["tenants"]))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert [line[0] for line in lines] == ["tenant", *TENANTS, "__idle__", "total"]
    assert lines[-2] == ["__idle__", "0.000000900", "0.000000900"]
    assert lines[-1] == ["total", "51", "6257", "80", "111", "0.000006000", "0.000006000"]
    assert "\x1b" not in out.getvalue()


def test_the_line_under_the_bill_says_what_is_missing() -> None:
    _, figures = world()
    assert (
        demo_show.sum_line(figures.tenants) == "sum: the rows are all of 0.000006000 s wall x GPUs"
    )
    figures.tenants["tenants"].pop(3)
    assert "900 ns are missing of" in demo_show.sum_line(figures.tenants)


def test_a_bill_without_a_price_has_no_total_cost() -> None:
    rows = [{**tenant_row(CHAT, 1, (1, 0, 1), 5), "cost_nanousd": None, "cost_usd": None}]
    out = io.StringIO()
    Console(file=out, width=100).print(demo_show.bill_table(rows))
    assert [line.split()[-1] for line in out.getvalue().splitlines()[1:]] == ["-", "-"]


def test_the_settings_file_names_tenants_by_hash_and_is_private(tmp_path: Path) -> None:
    keys = {tenant: f"key-of-{tenant}" for tenant in TENANTS}
    path = tmp_path / "meter.toml"
    demo_setup.write_private(path, demo_setup.settings_file(keys))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not any(key in path.read_text() for key in keys.values())
    digest = hashlib.sha256(keys[CHAT].encode()).hexdigest()
    assert tomllib.loads(path.read_text())["tenants"][0]["api_key_sha256"] == [digest]
    header = (b"authorization", f"Bearer {keys[CHAT]}".encode())
    assert load_settings({}, path).resolver.resolve([header]).tenant == CHAT


def test_a_private_file_never_follows_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        demo_setup.write_private(tmp_path / "keys.yaml", "secret")
    assert not (tmp_path / "elsewhere").exists()


def fake_vllm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a `vllm` in the place of the environment's, and a folder in the place of the cache."""
    command = folder / "bin" / "vllm"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{script}\n")
    command.chmod(0o700)
    # It runs the helper that ties a server to its command, by the true Python.
    python = command.parent / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o700)
    monkeypatch.setattr(serving.sys, "executable", str(python))
    monkeypatch.setattr(serving.metadata, "version", lambda _name: "0.32.0+cpu")
    monkeypatch.setattr(demo_setup, "default_path", lambda: folder / "cache" / "tiny-llama")
    monkeypatch.setattr(demo_setup, "make_tiny_model", lambda _path: None)


def test_a_server_that_dies_fails_the_demo_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = """
seen = {"argv": sys.argv, "env": dict(os.environ), "keys": open(sys.argv[-1]).read()}
open(os.environ["SEEN"], "w").write(json.dumps(seen))
print("boom \\x1b[31m here")
sys.exit(3)
"""
    fake_vllm(tmp_path, monkeypatch, script)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.json"))
    monkeypatch.setenv("COST_METER_REPLY", "none")
    monkeypatch.setenv("COST_METER_GPU_HOUR_USD", "7")
    assert demo.run_demo(None, keep=False) == demo.FAILED
    shown = capsys.readouterr()
    assert "vLLM ended with status 3" in shown.err
    assert "boom \\x1b[31m here" in shown.err
    assert "price: 7 USD per GPU-hour (as set)" in shown.out
    assert "\x1b" not in shown.out + shown.err

    seen = json.loads((tmp_path / "seen.json").read_text())
    keys = json.loads(seen["keys"].removeprefix("api-key: "))
    assert len(set(keys)) == len(TENANTS)
    # No key on the command line, in the environment or, afterwards, in any file.
    [folder] = (tmp_path / "cache" / "demo").iterdir()
    kept = "".join(path.read_text() for path in folder.iterdir())
    assert not any(key in str(seen["argv"]) + str(seen["env"]) + kept for key in keys)
    # The demo's settings are its own; only the price is the user's.
    assert "COST_METER_REPLY" not in seen["env"]
    assert seen["env"]["COST_METER_GPU_HOUR_USD"] == "7"
    assert seen["env"]["COST_METER_LEDGER"] == f"sqlite:///{folder / 'ledger.db'}"


def test_a_wrong_price_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_vllm(tmp_path, monkeypatch, "open('started', 'w')")
    monkeypatch.setenv("COST_METER_GPU_HOUR_USD", "cheap")
    monkeypatch.chdir(tmp_path)
    assert demo.run_demo(None, keep=False) == demo.WRONG_SETTING
    assert "COST_METER_GPU_HOUR_USD" in capsys.readouterr().err
    assert not (tmp_path / "started").exists()


def test_a_signal_while_it_starts_stops_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = """
import signal
open(os.environ["PID_FILE"], "w").write(str(os.getpid()))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""
    fake_vllm(tmp_path, monkeypatch, script)
    monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))
    assert demo.run_demo(None, keep=False) == demo.INTERRUPTED
    assert "the server was stopped" in capsys.readouterr().err
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_stages_follow_the_log() -> None:
    assert serving.stage_of("") == "importing vLLM"
    assert serving.stage_of("Resolved architecture\nLoading weights took 1 s\n") == (
        "measuring the memory"
    )


def test_an_environment_without_vllm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise serving.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(serving.metadata, "version", version)
    with pytest.raises(ServerError, match="found none"):
        serving.is_cpu_build()


def test_users_caches_are_kept_and_proxies_stay_out_of_loopback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/mine")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "example.org")
    environment = serving.environment_of(tmp_path, offline=False)
    assert environment["VLLM_CACHE_ROOT"] == "/mine"
    assert environment["NO_PROXY"] == f"example.org,{serving.LOOPBACK}"
    assert "HF_HUB_OFFLINE" not in environment
