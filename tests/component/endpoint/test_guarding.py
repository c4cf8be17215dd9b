"""Who is not answered by the side endpoint: foreign host names, and guesses faster than allowed."""

import asyncio
import threading
from pathlib import Path

import httpx
import pytest

from tests.support.small_ledger import small_ledger
from vllm_cost_meter.endpoint.access import OPEN, Access, sha256
from vllm_cost_meter.endpoint.app import make_app
from vllm_cost_meter.endpoint.guarding import Failures
from vllm_cost_meter.ledger.reader import LedgerReader

GUARDED = Access(sha256("the-admin-token-of-this-test"))
RIGHT = {"authorization": "Bearer the-admin-token-of-this-test"}
WRONG = {"authorization": "Bearer a-guess"}


@pytest.fixture
def reader(tmp_path: Path):
    reader = small_ledger(tmp_path)
    yield reader
    reader.close()


def get(reader: LedgerReader, access: Access, **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(reader, access=access))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/cost/summary", headers=headers)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:9477", "127.0.0.1:9477", "127.9.9.9", "[::1]:9477", "[::1]"]
)
def test_without_an_admin_token_names_of_loopback_are_answered(reader, host):
    assert get(reader, OPEN, host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "evil.example:9477", "localhost.evil.example", "127.0.0.1.nip.io"]
    + ["10.0.0.1", "[fe80::1]", "[::1].evil.example", "[::1]:x", "user@localhost", "0.0.0.0"],
)
def test_without_an_admin_token_no_other_host_name_is_answered(reader, host):
    """A page whose name resolves to 127.0.0.1 (DNS rebinding) sends its own name as Host."""
    reply = get(reader, OPEN, host=host)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["code"]) == (421, "invalid_request", 421)
    assert "COST_METER_ADMIN_TOKEN" in error["message"]


def test_with_an_admin_token_any_host_name_will_do(reader):
    assert get(reader, GUARDED, host="cost.example", **RIGHT).status_code == 200


class Clock:
    """Sleeps that end when the test says so."""

    def __init__(self) -> None:
        self.sleeping: list[float] = []
        self.go_on = asyncio.Event()

    async def __call__(self, seconds: float) -> None:
        self.sleeping.append(seconds)
        await self.go_on.wait()


async def settled() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


def test_a_flood_of_guesses_waits_a_few_at_a_time_and_holds_no_thread(reader):
    async def flood() -> None:
        clock = Clock()
        failures = Failures(delay_s=7.0, at_once=3, waiting_max=20, sleep=clock)
        transport = httpx.ASGITransport(make_app(reader, access=GUARDED, failures=failures))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            threads = threading.active_count()
            guesses = [asyncio.create_task(client.get("/health", headers=WRONG)) for _ in range(19)]
            await settled()
            assert clock.sleeping == [7.0] * 3
            assert failures.waiting == 19
            assert threading.active_count() == threads
            assert (await client.get("/health", headers=RIGHT)).status_code == 200
            guesses.append(asyncio.create_task(client.get("/health", headers=WRONG)))
            await settled()
            # Twenty wait, so nobody's token is looked at: an answer would help a guesser.
            for headers in (WRONG, RIGHT):
                refused = await client.get("/health", headers=headers)
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            clock.go_on.set()
            assert {reply.status_code for reply in await asyncio.gather(*guesses)} == {401}
            assert (len(clock.sleeping), failures.waiting) == (20, 0)

    asyncio.run(flood())


def test_a_caller_without_a_token_guesses_nothing_and_does_not_wait(reader):
    async def ask() -> None:
        clock = Clock()
        app = make_app(reader, access=GUARDED, failures=Failures(sleep=clock))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            assert (await client.get("/health")).status_code == 401
        assert clock.sleeping == []

    asyncio.run(ask())
