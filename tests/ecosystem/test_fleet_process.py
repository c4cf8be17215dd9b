"""The process that sends to a fleet: real ones beside a ledger, killed, without a database."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

from tests.component.ledger.test_reader import http, part
from tests.ecosystem.test_postgresql import rows
from vllm_cost_meter.api_server.applying.follower import Applying
from vllm_cost_meter.api_server.applying.messages import ApplierHello
from vllm_cost_meter.api_server.shipping.follower import Shipping
from vllm_cost_meter.api_server.shipping.messages import ShippingHello
from vllm_cost_meter.journal.places import folder_of_ledger
from vllm_cost_meter.journal.writer import JournalWriter
from vllm_cost_meter.side_process.supervisor import Pauses

WAIT_S = 120


@contextlib.asynccontextmanager
async def serving(path: Path, fleet: str) -> AsyncIterator[tuple[Shipping, JournalWriter]]:
    """What an API server has of the ledger and of the fleet."""
    url = f"sqlite:///{path}"
    writer = JournalWriter(folder_of_ledger(path))
    writer.start()
    applying = Applying(ApplierHello(url, sends=True))
    applying.start()
    shipping = Shipping(ShippingHello(url, fleet, 0.1), flush_timeout_s=WAIT_S)
    shipping.process.pauses = Pauses(first=0.1, longest=0.5)
    shipping.start()
    try:
        yield shipping, writer
    finally:
        await asyncio.to_thread(writer.close)
        await applying.stop()
        await shipping.stop()


def bills_in(fleet: str) -> int:
    there = "SELECT 1 FROM information_schema.tables WHERE table_name = 'requests'"
    return rows(fleet, "SELECT count(*) FROM requests")[0][0] if rows(fleet, there) else 0


async def until(is_so, what: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await asyncio.to_thread(is_so):
            await asyncio.sleep(0.05)


def test_bills_reach_the_fleet_while_it_is_killed_and_at_a_stop(tmp_path: Path, url: str) -> None:
    async def run() -> None:
        async with serving(tmp_path / "ledger.db", url) as (shipping, writer):
            for seq in range(1, 41):
                writer.put(part(seq, f"h{seq}"), http(f"h{seq}"))
                if seq == 10:
                    await until(lambda: bills_in(url) == 10, "the first bills")
                if seq in (12, 25) and (pid := shipping.process.pid) is not None:
                    os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(0.02)
            await until(lambda: shipping.process.state == "ok", "the process")
            assert shipping.process.restarts >= 1
        assert shipping.state.last_error is None

    asyncio.run(run())
    # The stop has sent what was left, and said that this was all.
    assert rows(url, "SELECT count(*) FROM sender_ends") == [(1,)]
    assert bills_in(url) == 40
    assert rows(url, "SELECT bills, gpu_time_ns FROM bill_sums") == [(40, 40 * 300)]
    assert rows(url, "SELECT SUM(requests) FROM rollup_hours") == [(40,)]


def test_a_fleet_that_is_away_is_said_and_the_ledger_keeps_all(tmp_path: Path, url: str) -> None:
    away = url.replace("host=", "host=/nowhere")

    async def run() -> None:
        async with serving(tmp_path / "ledger.db", away) as (shipping, writer):
            writer.put(part(1, "h1"), http("h1"))
            await until(lambda: shipping.state.failures >= 2, "failures")
            told = shipping.health()
            assert "fleet postgresql" in (told["last_error"] or "")
            assert (told["sent_at"], told["failures"] >= 2) == (None, True)
            shipping._flush_timeout_s = 0.1

    asyncio.run(run())

    async def run_again() -> None:
        async with serving(tmp_path / "ledger.db", url) as (shipping, _):
            await until(lambda: bills_in(url) == 1, "the bill")
            await until(lambda: shipping.health()["sent_at"], "all is sent")
            assert shipping.health()["waiting_rows"] == 0

    asyncio.run(run_again())
