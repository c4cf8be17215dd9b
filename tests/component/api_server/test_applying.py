"""The process that writes the ledger from the journals: real ones, killed, locked out, behind."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.component.ledger.test_damage import spoil_leaf
from tests.component.ledger.test_reader import http, part
from vllm_cost_meter.api_server.applying.follower import Applying
from vllm_cost_meter.api_server.applying.messages import ApplierHello
from vllm_cost_meter.errors import AwayError, LedgerError
from vllm_cost_meter.journal.places import folder_of_ledger
from vllm_cost_meter.journal.writer import JournalWriter
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.metrics import series
from vllm_cost_meter.side_process.supervisor import Pauses


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "ledger.db"


@contextlib.asynccontextmanager
async def applying(
    path: Path, away_s: float | None = None, **words: float
) -> AsyncIterator[tuple[Applying, JournalWriter]]:
    writer = JournalWriter(folder_of_ledger(path))
    writer.start()
    follower = Applying(ApplierHello(f"sqlite:///{path}"), **words)
    follower.start_timeout_s = 60  # on a busy machine it takes longer than a question waits
    if away_s is not None:  # so long it stays away once it is killed
        follower.process.pauses = Pauses(first=away_s, longest=away_s)
    follower.start()
    try:
        yield follower, writer
    finally:
        await asyncio.to_thread(writer.close)
        await follower.stop()


def bills(path: Path) -> list[int]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return [seq for (seq,) in connection.execute("SELECT seq FROM requests ORDER BY seq")]


async def until(condition, what: str) -> None:
    deadline = time.monotonic() + 180  # Beside other tests, and at a low priority.
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


def test_what_is_journaled_before_the_question_is_in_the_ledger_at_its_answer(path):
    async def ask() -> None:
        async with applying(path, timeout_s=30) as (follower, writer):
            for seq in range(1, 30):
                writer.append(part(seq), http(f"h{seq}")).result(10)
                await follower.catch_up()
                assert bills(path) == list(range(1, seq + 1))

    asyncio.run(ask())


def test_without_a_question_the_ledger_is_a_moment_behind(path):
    async def ask() -> None:
        async with applying(path, timeout_s=30) as (follower, writer):
            await follower.catch_up()
            writer.append(part(1)).result(10)
            await until(lambda: bills(path) == [1], "nobody applies it")
            assert follower.state.is_ours
            assert series.LEDGER_UP._value.get() == 1

    asyncio.run(ask())


def test_a_stop_applies_what_is_journaled(path):
    async def ask() -> None:
        async with applying(path, timeout_s=30) as (follower, writer):
            await follower.catch_up()
            writer.append(*(part(seq) for seq in range(1, 500))).result(10)

    asyncio.run(ask())
    assert bills(path) == list(range(1, 500))
    assert list(folder_of_ledger(path).glob("*/*.segment")) == []


def test_a_locked_ledger_is_said_at_its_beginning_and_end_and_a_question_fails(path, caplog):
    async def ask() -> None:
        async with applying(path, timeout_s=30) as (follower, writer):
            await follower.catch_up()
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as blocker:
                blocker.execute("BEGIN EXCLUSIVE")
                writer.append(part(1)).result(10)
                with pytest.raises((LedgerError, AwayError), match="locked"):
                    await follower.catch_up()
                await until(lambda: follower.state.last_error is not None, "it says nothing")
                assert series.LEDGER_UP._value.get() == 0
                assert series.LEDGER_FAILURES._value.get() > 0
            await until(lambda: follower.state.last_error is None, "it does not recover")
            await follower.catch_up()
            assert bills(path) == [1]

    asyncio.run(ask())
    said = [r.getMessage() for r in caplog.records if "the ledger can" in r.getMessage()]
    assert "cannot be written, trying again: OperationalError: database is locked" in said[0]
    assert "can be written again, after" in said[-1]


def test_one_that_is_killed_is_started_again_and_loses_and_doubles_nothing(path):
    async def ask() -> None:
        async with applying(path, timeout_s=30) as (follower, writer):
            for round in range(3):
                await follower.catch_up()
                first = round * 200 + 1
                futures = [writer.append(part(seq)) for seq in range(first, first + 200)]
                os.kill(follower.process.pid, signal.SIGKILL)
                for future in futures:
                    future.result(10)
                await until(lambda: follower.process.pid is None, "it lives")
                await until(lambda: follower.process.state == "ok", "it is not started again")
            await follower.catch_up()
            assert bills(path) == list(range(1, 601))
            assert follower.process.restarts == 3

    asyncio.run(ask())


def test_the_second_server_on_a_ledger_waits_for_the_first_and_takes_over_when_it_is_gone(path):
    async def ask() -> None:
        async with applying(path, away_s=600, timeout_s=30) as (first, one):
            await first.catch_up()
            async with applying(path, timeout_s=30) as (second, other):
                one.append(part(1)).result(10)
                other.append(part(2)).result(10)
                await second.catch_up()
                assert bills(path) == [1, 2]
                assert not second.state.is_ours
                os.kill(first.process.pid, signal.SIGKILL)
                await until(lambda: second.state.is_ours, "nobody applies")
                other.append(part(3)).result(10)
                await second.catch_up()
                assert bills(path) == [1, 2, 3]

    asyncio.run(ask())


def test_a_ledger_that_is_damaged_under_it_is_set_aside_and_costs_are_told_on(path, caplog):
    async def ask() -> None:
        async with applying(path, timeout_s=30) as (follower, writer):
            writer.append(*(part(seq) for seq in range(1, 300))).result(10)
            await follower.catch_up()
            with contextlib.closing(sqlite3.connect(path)) as connection:
                connection.execute("PRAGMA wal_checkpoint")
            with LedgerReader(f"sqlite:///{path}") as reader:
                spoil_leaf(path)
                for seq in range(300, 320):
                    writer.append(part(seq)).result(1)  # as always
                await until(lambda: follower.state.set_aside == 1, "nobody notices")
                await follower.catch_up()
                assert bills(path)[-1] == 319
                assert reader.find("internal-319")
                assert reader.audit()["reason"] == "set_aside"
            assert series.LEDGER_SET_ASIDE._value.get() == 1
            assert follower.state.last_error is None
            assert follower.process.restarts == 0

    asyncio.run(ask())
    assert "vllm-cost-meter ledger repair" in caplog.text
    assert len(list(path.parent.glob("ledger.db.damaged-*Z"))) == 1
