"""The side endpoint beside a serving API server: what becomes of each when the other dies.

Goal: metering goes on whatever becomes of the side endpoint's process, and nothing of it is lost; a
tenant's question on vLLM's port takes no time from serving. Method: the real middleware, runtime
and ledger behind a real uvicorn, and an engine that bills when told.
"""

import asyncio
import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import psutil
import pytest
from fastapi import FastAPI, Request

from tests.component.endpoint.test_server import Client
from tests.support.logs import lines_of
from tests.support.orphans import is_running
from tests.support.waiting import wait_for
from tests.support.world import Engine, World, listening, worlds
from vllm_cost_meter.api_server.middleware import CostMiddleware
from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.side_process.supervisor import Pauses

ROOT = Path(__file__).parents[3]
WAIT_S = 60
TENANTS = [
    {"name": name, "api_key_sha256": [hashlib.sha256(f"sk-{name}".encode()).hexdigest()]}
    for name in ("acme", "rival")
]


class Serving:
    """An API server that serves over a socket, with its side endpoint."""

    def __init__(self, world: World, url: str) -> None:
        self.world = world
        self.side = world.runtime.side_endpoint
        self.client = httpx.AsyncClient(base_url=url, trust_env=False, timeout=WAIT_S)

    @property
    def pid(self) -> int:
        pid = self.side.process.pid
        assert pid is not None
        return pid

    async def complete(self, name: str = "acme") -> httpx.Response:
        return await self.client.post("/v1/completions", headers=key_of(name))

    async def own(self, name: str = "acme", path: str = "me") -> httpx.Response:
        return await self.client.get(f"/v1/cost/{path}", headers=key_of(name))

    async def ask(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False, timeout=WAIT_S) as client:
            return await client.get(f"http://127.0.0.1:{self.side.port}{path}")

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not is_so():
                await asyncio.sleep(0.01)


def key_of(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer sk-{name}"}


@contextlib.asynccontextmanager
async def serving(world: World, index: int = 0) -> AsyncIterator[Serving]:
    runtime, engine = world.runtime, Engine(world.runtime)
    runtime.side_endpoint.process.pauses = Pauses(first=0.05, longest=0.2)
    app = FastAPI()
    app.state.engine_client = Client(index)
    numbers = iter(range(1_000_000))

    @app.post("/v1/completions")
    async def complete(_request: Request) -> dict[str, object]:
        number = next(numbers)
        engine.generate(f"cmpl-{number}")
        return {"id": f"cmpl-{number}", "usage": {"prompt_tokens": 10, "completion_tokens": 5}}

    runtime.side_endpoint.start_timeout_s = WAIT_S
    await runtime.start(app)
    try:
        async with listening(CostMiddleware(app, lambda: runtime)) as (host, port):
            server = Serving(world, f"http://{host}:{port}")
            async with server.client:
                yield server
    finally:
        await runtime.stop()


def run(tmp_path: Path, test: Callable[[Serving], Awaitable[None]], index: int = 0, **settings):
    async def live(world: World) -> None:
        async with serving(world, index) as server:
            await test(server)

    with worlds(tmp_path) as make:
        given = {"port": 0, "tenants": TENANTS, "snapshot_interval_s": 0.1, **settings}
        asyncio.run(live(make(**given)))


def test_killed_under_load_it_comes_back_and_no_reply_and_no_bill_is_missed(tmp_path, caplog):
    async def test(server: Serving) -> None:
        replies: list[httpx.Response] = []
        is_over = asyncio.Event()

        async def load() -> None:
            while not is_over.is_set():
                replies.append(await server.complete())

        async def questions() -> None:
            while not is_over.is_set():
                with contextlib.suppress(httpx.TransportError):
                    await server.ask("/cost/report")

        loads = [asyncio.create_task(each) for each in (load(), load(), questions(), questions())]
        for restarts in (1, 2, 3):
            await asyncio.sleep(0.2)
            before, port = len(replies), server.side.port
            os.kill(server.pid, signal.SIGKILL)
            await server.until(lambda before=before: len(replies) > before + 20)
            await server.until(
                lambda restarts=restarts: (
                    server.side.process.restarts == restarts and server.side.process.state == "ok"
                )
            )
            assert server.side.port == port, "whoever has its address finds it again"
        is_over.set()
        await asyncio.gather(*loads)
        assert {reply.status_code for reply in replies} == {200}
        assert all("x-cost-meter-cost-usd" in reply.headers for reply in replies)
        report = (await server.own()).json()
        assert report["requests"] == len(replies)
        assert server.world.rows("SELECT count(*) FROM requests") == [(len(replies),)]
        assert server.world.runtime.guard.errors == 0

    with lines_of(caplog) as lines:
        run(tmp_path, test)
        assert sum("works again" in line for line in lines()) == 3
        assert sum("was ended by SIGKILL" in line for line in lines()) >= 1


async def once_there(server: Serving) -> dict:
    """Ask again and again, as a client does; a busy machine needs its time."""
    async with asyncio.timeout(WAIT_S):
        while (reply := await server.own()).status_code == 503:
            pass
    return reply.json()


def test_while_it_is_away_tenants_are_told_to_ask_again_and_serving_goes_on(tmp_path):
    async def test(server: Serving) -> None:
        server.side.answer_slack_s = 0.5
        assert await once_there(server) == {
            "tenant": "acme",
            "covers": "with_children",
            "requests": 0,
            "gpu_time_ns": 0,
            "budgets": [],
        }
        os.kill(server.pid, signal.SIGSTOP)
        asked = asyncio.create_task(server.own())
        assert (await server.complete()).status_code == 200
        reply = await asked
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
        os.kill(server.pid, signal.SIGCONT)
        assert (await once_there(server))["requests"] == 1

    run(tmp_path, test, question_timeout_s=1)


@pytest.mark.parametrize(("index", "port"), [(1, 0), (0, "off")])
def test_an_api_server_without_the_endpoint_starts_a_process_for_tenants_when_one_asks(
    tmp_path, index, port
):
    async def test(server: Serving) -> None:
        await server.complete()
        await asyncio.sleep(0.1)
        assert server.side.process.state == "off"
        await once_there(server)
        asked = await asyncio.gather(*(server.own() for _ in range(4)))
        assert [reply.json()["requests"] for reply in asked] == [1] * 4
        assert (await server.own(path="requests/cmpl-0")).json()["tenant"] == "acme"
        assert (await server.own("rival", "requests/cmpl-0")).status_code == 404
        connections = psutil.Process(server.pid).net_connections("inet")
        assert connections == [], "it listens nowhere"

    run(tmp_path, test, index, port=port)


def test_a_settings_file_that_was_spoilt_neither_stops_nor_changes_it(tmp_path, monkeypatch):
    """It has what the server took over, also when it is started again."""
    for name in [name for name in os.environ if name.startswith("COST_METER_")]:
        monkeypatch.delenv(name)
    file = tmp_path / "meter.toml"
    monkeypatch.setenv("COST_METER_CONFIG", str(file))
    monkeypatch.setenv("COST_METER_LEDGER", f"sqlite:///{tmp_path / 'ledger.db'}")

    def say(*names: str) -> None:
        digests = {name: hashlib.sha256(f"sk-{name}".encode()).hexdigest() for name in names}
        file.write_text(
            "port = 0\nadmin_token = 'operator-of-this-server'\n"
            + "".join(
                f'[[tenants]]\nname = "{name}"\napi_key_sha256 = ["{digest}"]\n'
                for name, digest in digests.items()
            )
        )

    async def test(server: Serving) -> None:
        async def status(name: str) -> int:
            url = f"http://127.0.0.1:{server.side.port}/cost/requests"
            async with httpx.AsyncClient(trust_env=False, headers=key_of(name)) as client:
                return (await client.get(url)).status_code

        assert [await status(name) for name in ("acme", "rival")] == [200, 401]
        before = server.world.runtime.settings
        say("acme", "rival")
        await server.until(lambda: server.world.runtime.settings is not before)
        assert [await status(name) for name in ("acme", "rival")] == [200, 200]
        file.write_text("[[tenants]\n")
        os.kill(server.pid, signal.SIGKILL)
        await server.until(lambda: server.side.process.restarts == 1)
        assert await server.side.process.wait(WAIT_S)
        assert [await status(name) for name in ("acme", "rival")] == [200, 200]

    say("acme")
    with worlds(tmp_path) as make:
        world = make()
        world.runtime.writer.close(5)
        world.runtime = type(world.runtime)(load_settings(), reload_interval_s=0.05)

        async def live() -> None:
            async with serving(world) as server:
                await test(server)

        asyncio.run(live())


def test_it_shows_the_metrics_of_the_serving_process(tmp_path):
    async def test(server: Serving) -> None:
        await server.complete()
        text = (await server.ask("/metrics")).text
        assert re.search(r"cost_meter_bills_total{.*tenant=.acme", text)

    run(tmp_path, test)


PARENT = """
import asyncio, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.component.api_server.test_side_endpoint import run

async def test(server):
    print(server.pid, flush=True)
    await server.own()
    await asyncio.sleep(600)

run(Path({folder!r}), test)
"""


def test_it_ends_with_its_api_server_by_kill_9(tmp_path):
    code = PARENT.format(root=str(ROOT), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.Process(pid).nice() == 19
        parent.kill()
    wait_for(lambda: not is_running(pid), timeout_s=WAIT_S)
