"""The side endpoint's life: its port, its process, and vLLM's application that it starts with."""

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY

from tests.component.api_server.test_poller import Engines, poller_of, snapshot
from tests.support.ledger_writer import LedgerWriter
from tests.support.logs import lines_of
from tests.support.world import make_runtime, worlds
from vllm_cost_meter.api_server.access.app_routes import each_route
from vllm_cost_meter.api_server.poller import Poller
from vllm_cost_meter.api_server.side_endpoint import SideEndpoint
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.endpoint.answers import NO_METER
from vllm_cost_meter.endpoint.server import metrics_registry
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION
from vllm_cost_meter.tenants.budgets import BudgetFigures
from vllm_cost_meter.version import __version__


@pytest.fixture
def logged(caplog) -> Iterator[pytest.LogCaptureFixture]:
    with lines_of(caplog):
        yield caplog


def said(logged) -> list[str]:
    return list(dict.fromkeys(record.getMessage() for record in logged.records))


def address(logged) -> str:
    (found,) = {m[0] for line in said(logged) if (m := re.search(r"http://[\d.]+:\d+", line))}
    return found


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture
def writer(url: str) -> Iterator[LedgerWriter]:
    writer = LedgerWriter(url)
    writer.start()
    writer.commit().result(10)
    yield writer
    writer.close(5)


async def nothing() -> None:
    """Have nothing to catch up with: the writer of these tests writes into the ledger itself."""


@contextlib.asynccontextmanager
async def serving(settings: Settings, url: str, poller: Poller) -> AsyncIterator[SideEndpoint]:
    """Serve as the runtime does, with figures as new as the poller can have them."""
    side = SideEndpoint(
        lambda: settings,
        url,
        refresh=poller.look,
        catch_up=nothing,
        alive=poller.alive,
        figures=BudgetFigures,
        health=lambda: NO_METER,
    )
    side.start_timeout_s = 60  # on a busy machine it takes longer than a server waits
    await side.serve()
    try:
        yield side
    finally:
        await side.stop()


class Client(Engines):
    """vLLM's engine client, as far as the meter looks at it."""

    def __init__(self, index: int = 0) -> None:
        super().__init__(snapshot)
        self.client_index = index
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(served_model_name=["m", "alias"]),
            parallel_config=SimpleNamespace(world_size=1),
        )


def application(client: Client | None) -> FastAPI:
    app = FastAPI()
    app.state.engine_client = client
    return app


async def get(base: str, path: str, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(base + path, headers=headers)


def test_it_answers_on_a_port_of_its_own_with_the_engines_newest_figures(writer, url, logged):
    async def ask() -> httpx.Response:
        engines = Engines(snapshot)
        async with serving(Settings(port=0), url, poller_of(engines, writer)):
            return await get(address(logged), "/cost/summary")

    reply = asyncio.run(ask())
    assert reply.status_code == 200
    assert reply.json()["wall_gpu_ns"] == 10, "the first snapshot, taken for this answer"


def test_a_dead_engine_means_older_figures_and_no_error(writer, url, logged):
    engines = Engines(lambda _: RuntimeError("dead"))

    async def ask() -> httpx.Response:
        writer.commit(snapshot(7)).result(5)
        async with serving(Settings(port=0), url, poller_of(engines, writer)):
            return await get(address(logged), "/cost/summary")

    reply = asyncio.run(ask())
    assert reply.json()["wall_gpu_ns"] == 70
    assert engines.calls == 1, "nobody asks a dead engine again for the same answer"


def test_with_an_admin_token_it_demands_it(writer, url, logged):
    async def ask() -> list[int]:
        settings = Settings(port=0, admin_token="s3cret-of-the-operator")
        async with serving(settings, url, poller_of(Engines(snapshot), writer)) as side:
            base = address(logged)
            asked = (
                await get(base, "/health"),
                await get(base, "/health", authorization="Bearer s3cret-of-the-operator"),
            )
            command = Path(f"/proc/{side.process.pid}/cmdline").read_bytes()
            environment = Path(f"/proc/{side.process.pid}/environ").read_bytes()
            assert b"s3cret-of-the-operator" not in command + environment
            return [reply.status_code for reply in asked]

    assert asyncio.run(ask()) == [401, 200]
    assert not any("s3cret" in line for line in said(logged))


def test_a_taken_port_is_one_warning(writer, url, logged):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        async def start() -> None:
            async with serving(Settings(port=port), url, poller_of(Engines(snapshot), writer)):
                pass

        asyncio.run(start())
    (line,) = said(logged)
    assert f"could not listen on 127.0.0.1 port {port} (Address already in use)" in line
    assert "COST_METER_PORT" in line


def test_port_off_runs_none(writer, url, logged):
    async def start() -> None:
        poller = poller_of(Engines(snapshot), writer)
        async with serving(Settings(port="off"), url, poller) as side:
            assert side.process.pid is None

    asyncio.run(start())
    assert said(logged) == []


def test_a_ledger_that_is_away_is_a_503_until_it_is_there(tmp_path, writer, logged):
    place = tmp_path / "away" / "ledger.db"
    place.mkdir(parents=True)  # a folder is in the ledger's place

    async def ask() -> list[tuple[int, str]]:
        poller = poller_of(Engines(snapshot), writer)
        async with serving(Settings(port=0), f"sqlite:///{place}", poller):
            answers = [await get(address(logged), "/cost/audit")]
            place.rmdir()
            # As the process that applies journals does.
            open_database(f"sqlite:///{place}").dispose()
            answers.append(await get(address(logged), "/cost/audit"))
            return [(answer.status_code, answer.text) for answer in answers]

    (away, why), (there, _) = asyncio.run(ask())
    assert (away, there) == (503, 200)
    assert f"ledger sqlite:///{place}: cannot be opened" in why


def test_the_health_of_the_meter_names_each_loop(logged, tmp_path):
    runtime = make_runtime(tmp_path, port=0, snapshot_interval_s=0.05)
    runtime.side_endpoint.start_timeout_s = 60

    async def ask() -> tuple[dict, dict]:
        await runtime.start(application(Client()))
        base = address(logged)
        healthy = (await get(base, "/cost/health")).json()
        runtime.loops["poll"].failed(OSError("gone"))
        runtime.loops["poll"].succeeded = lambda: None
        failing = (await get(base, "/cost/health")).json()
        await runtime.stop()
        return healthy, failing

    healthy, failing = asyncio.run(ask())
    assert [loop["loop"] for loop in healthy["loops"]] == ["announce", "engines", "poll"]
    side, ledger = healthy["side_processes"]
    assert (ledger["process"], ledger["state"]) == ("ledger", "ok")
    assert (side["process"], side["state"], side["restarts"]) == ("side endpoint", "ok", 0)
    assert healthy["questions"]["running"] == 0
    for each in ("loops", "side_processes", "questions"):
        del healthy[each]
    assert healthy == {
        "status": "ok",
        "errors": 0,
        "fleet": None,
        "waiting": 0,
        "dropped": 0,
        "ledger_error": None,
        "version": __version__,
        "ledger": runtime.ledger_url,
        "schema_version": SCHEMA_VERSION,
    }
    assert failing["status"] == "failing"
    (poll,) = [loop for loop in failing["loops"] if loop["loop"] == "poll"]
    assert (poll["state"], poll["last_error"]) == ("failing", "OSError: gone")


def test_it_listens_on_ipv6_too(writer, url, logged):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 loopback")

    async def ask() -> int:
        settings = Settings(port=0, host="::1")
        async with serving(settings, url, poller_of(Engines(snapshot), writer)):
            (base,) = {m[0] for line in said(logged) if (m := re.search(r"http://\S+:\d+", line))}
            return (await get(base, "/health")).status_code

    assert asyncio.run(ask()) == 200


def test_the_first_api_server_polls_and_serves_and_the_others_do_not(tmp_path, logged):
    async def start() -> None:
        for index in (0, 1):
            folder = tmp_path / str(index)
            folder.mkdir()
            runtime = make_runtime(folder, port=0, snapshot_interval_s=0.05)
            runtime.side_endpoint.start_timeout_s = 60
            client = Client(index)
            await runtime.start(application(client))
            assert (runtime.poller is not None) is (index == 0)
            if index == 0:
                async with asyncio.timeout(20):
                    while client.calls < 2:
                        await asyncio.sleep(0.01)
            else:
                await asyncio.sleep(0.2)
                assert client.calls == 0
            await runtime.stop()
            assert runtime.guard.errors == 0

    asyncio.run(start())
    assert sum("side endpoint at" in line for line in said(logged)) == 1


def test_with_the_application_it_starts_once_though_installed_twice_and_takes_a_last_look(
    tmp_path, logged
):
    async def app(scope, receive, send):
        await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})

    async def live(scope) -> list[str]:
        sent = []

        async def send(message):
            sent.append(message["type"])

        await world.metered(world.metered(app))(scope, None, send)
        return sent

    with worlds(tmp_path) as make:
        world = make(port=0, snapshot_interval_s=3_600)
        world.runtime.side_endpoint.start_timeout_s = 60  # on a busy machine it takes longer
        client = Client()
        served = application(client)
        scope = {"type": "lifespan", "app": served}
        sent = asyncio.run(live(scope))
        assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        assert client.calls >= 1
        assert world.runtime.guard.errors == 0
        assert [each.path for each in each_route(served.routes)].count("/v1/cost/me") == 1
        assert world.runtime.writer.waiting == 0
    assert sum("side endpoint at" in line for line in said(logged)) == 1


def test_a_start_that_fails_is_contained(tmp_path):
    runtime = make_runtime(tmp_path, port=0)
    broken = application(SimpleNamespace())
    asyncio.run(runtime.start(broken))
    assert runtime.guard.errors == 1
    asyncio.run(runtime.start(application(None)))
    asyncio.run(runtime.start(SimpleNamespace()))
    assert runtime.guard.errors == 1
    runtime.writer.close(5)


def test_the_registry_covers_all_processes_where_there_are_several(tmp_path, monkeypatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    assert metrics_registry() is REGISTRY
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert metrics_registry() is not REGISTRY
