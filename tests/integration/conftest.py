"""Servers for the integration tests: real ones, each started once and shared where it can be."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.probe import Probe
from tests.integration.server import BUDGETS, CHILDREN, ORIGIN, Server
from vllm_cost_meter.lab.server import meter_arguments

KV_BLOCKS = "24"  # of 128 tokens


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def shared(work: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, Server]]:
    """The servers `server` and `hard`, if any test needs them: they start at the same time."""
    needed = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    makers = {"server": plain_server, "hard": hard_server}
    servers = {name: make(work) for name, make in makers.items() if name in needed}
    try:
        for each in servers.values():
            each.launch()
        yield servers
    finally:
        for each in servers.values():
            each.stop()


@pytest.fixture(scope="session")
def server(shared: dict[str, Server]) -> Server:
    """A plain metered server with three tenants, a price, and replies teed to files."""
    return shared["server"].wait()


@pytest.fixture(scope="session")
def hard(shared: dict[str, Server]) -> Server:
    """Two API servers, async scheduling, a small KV cache, a clock to move, budgets, children.

    test_engines.py ends it by kill -9, last.
    """
    return shared["hard"].wait(until_side_answers=True)


def plain_server(work: Path) -> Server:
    tee = work / "tee"
    tee.mkdir()
    return Server(
        work / "plain",
        arguments=[
            *(*meter_arguments(), "--enable-prompt-tokens-details"),
            *("--allowed-origins", json.dumps([ORIGIN])),
        ],
        environment={
            "CMT_TEE": str(tee),
            "CMT_SEEN": str(work / "seen"),
            "COST_METER_LABELS": "pool=spot,zone=a",
            **{"POD_NAME": "chat-0", "POD_NAMESPACE": "models", "NODE_NAME": "gpu-3"},
            "VLLM_ENABLE_RESPONSES_API_STORE": "1",  # background responses need it
        },
    )


def hard_server(work: Path) -> Server:
    clock = work / "clock"
    clock.write_text("0")
    tee = work / "hard-tee"
    tee.mkdir()
    return Server(
        work / "hard",
        arguments=[
            *(*meter_arguments(), "--api-server-count", "2"),
            *("--num-gpu-blocks-override", KV_BLOCKS, "--max-model-len", "2900"),
            "--enable-prompt-tokens-details",
        ],
        config=BUDGETS + CHILDREN,
        environment={"CMT_ASYNC": "1", "CMT_CLOCK": str(clock), "CMT_TEE": str(tee)},
    )


@pytest.fixture(scope="session")
def zygote() -> Iterator[subprocess.Popen[str]]:
    script = str(Path(__file__).parent / "zygote.py")
    with subprocess.Popen(  # noqa: S603
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def probe(zygote: subprocess.Popen[str], tmp_path: Path) -> Probe:
    return Probe(zygote, tmp_path)
