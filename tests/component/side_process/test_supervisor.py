"""A side process: what it may know, what it costs when it dies, and that it never outlives us.

Goal: whatever becomes of the side process, the asker has an answer or one error in time, and it
comes back by itself. Method: real processes, killed as the kernel or an operator would.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from tests.support.logs import lines_of
from tests.support.orphans import is_running
from tests.support.waiting import wait_for
from vllm_cost_meter.errors import AwayError
from vllm_cost_meter.side_process.channel import RefusedError, decoded
from vllm_cost_meter.side_process.supervisor import Pauses, SideProcess

ROOT = Path(__file__).parents[3]
QUICK = Pauses(first=0.05, longest=0.2, silent=60)
WAIT_S = 60


class Echo:
    """A supervised process that does what tests ask, and what came from it."""

    def __init__(self, pauses: Pauses = QUICK, **hello: str) -> None:
        self.about: list[dict] = []
        self.news: list[tuple[str, object]] = []
        self.hello = {"secret": "s3cret", **hello}
        self.side = SideProcess(
            "the echo",
            "tests.support.side_echo",
            hello=lambda: self.hello,
            answer=self._answer,
            take=lambda name, value: self.news.append((name, decoded(value, object))),
            ready=lambda about: self.about.append(decoded(about, dict)),
            pauses=pauses,
            environment=lambda: {**os.environ, "PYTHONPATH": str(ROOT), "COST_METER_PORT": "1"},
        )

    async def _answer(self, name: str, given: msgspec.Raw) -> object:
        if decoded(given, object) == "refuse":
            raise ValueError("not today")
        return [name, decoded(given, object)]

    async def ask(self, name: str, given: object = None, timeout_s: float = WAIT_S) -> object:
        return await self.side.ask(name, given, object, timeout_s)

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not is_so():
                await asyncio.sleep(0.01)


@asynccontextmanager
async def echoing(pauses: Pauses = QUICK, **hello: str) -> AsyncIterator[Echo]:
    echo = Echo(pauses, **hello)
    echo.side.start()
    try:
        yield echo
    finally:
        await echo.side.stop()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())


@pytest.fixture(params=["asyncio", "uvloop"])
def run_on(request) -> Callable[[Callable[[], Awaitable[None]]], None]:
    """Run a test on the loop of Python, and on the one that vLLM has."""
    if request.param == "asyncio":
        return run
    import uvloop  # comes with vLLM

    return lambda test: uvloop.run(test())


def test_it_answers_asks_back_and_tells_news_and_both_ends_are_told_of_errors(run_on):
    async def test() -> None:
        async with echoing() as echo:
            value = {"bytes": b"\0\xff", "int": 2**62, "text": "é"}
            assert await echo.ask("echo", value) == value
            assert await echo.ask("ask back", [1]) == ["from the side", [1]]
            for question, said in (("fail", "no"), ("ask back", "refuse")):
                with pytest.raises(RefusedError) as refused:
                    await echo.ask(question, said)
                assert refused.value.kind == "ValueError"
            echo.side.tell("x", 5)
            await echo.until(lambda: ("news came", ["x", 5]) in echo.news)

    run_on(test)


def test_many_questions_at_once_have_each_its_own_answer(run_on):
    async def test() -> None:
        async with echoing() as echo:
            large = "x" * 200_000
            answers = await asyncio.gather(*(echo.ask("echo", [n, large]) for n in range(30)))
            assert [answer[0] for answer in answers] == list(range(30))

    run_on(test)


def test_it_has_its_secrets_from_us_only_and_gives_way_to_everything_else():
    async def test() -> None:
        async with echoing() as echo:
            await echo.ask("echo")
            (about,) = echo.about
            assert about["secret"] == "s3cret"
            assert about["settings"] == []
            assert not any("s3cret" in argument for argument in about["arguments"])
            assert about["nice"] == 19
            # Its group is its own, for Ctrl-C; its session is ours, for its priority.
            assert about["group"] == about["pid"] != os.getpgrp()
            assert about["session"] == os.getsid(0)

    run(test)


def test_its_log_is_ours(caplog):
    async def test() -> None:
        with lines_of(caplog) as lines:
            async with echoing() as echo:
                await echo.ask("log", "a line from a thread")
                await echo.until(lambda: "a line from a thread" in lines())

    run(test)


def test_after_kill_9_it_comes_back_and_the_log_says_so_once_each(caplog, run_on):
    async def test() -> None:
        with lines_of(caplog) as lines:
            async with echoing() as echo:
                await echo.ask("echo")
                waiting = asyncio.create_task(echo.ask("sleep", 60))
                await asyncio.sleep(0.05)
                first = echo.side.pid
                assert first is not None
                os.kill(first, signal.SIGKILL)
                with pytest.raises(AwayError):
                    await waiting
                assert await echo.ask("echo", 1) == 1, "one that starts is waited for"
                assert (echo.side.restarts, echo.side.state) == (1, "ok")
                assert echo.side.pid != first
                assert echo.side.last_end == "was ended by SIGKILL"
                assert not is_running(first)
            assert len([line for line in lines() if "was ended by SIGKILL" in line]) == 1
            assert len([line for line in lines() if "works again" in line]) == 1

    run_on(test)


def test_one_that_cannot_work_is_started_again_more_and_more_seldom_until_it_can(caplog):
    async def test() -> None:
        with lines_of(caplog) as lines:
            async with echoing(fails="ledger x: away") as echo:
                await echo.until(lambda: echo.side.restarts == 3)
                assert echo.side.last_end == "ended: ledger x: away"
                with pytest.raises(AwayError):
                    await echo.ask("echo", timeout_s=0.01)
                assert [line for line in lines() if "ledger x: away" in line] == lines()[:1]
                del echo.hello["fails"]
                assert await echo.ask("echo", 1) == 1
            assert len(lines()) == 2

    run(test)


def test_one_that_cannot_be_started_at_all_is_tried_again(caplog, monkeypatch):
    async def test() -> None:
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        async with echoing() as echo:
            await echo.until(lambda: echo.side.restarts == 1)
            assert "No such file" in str(echo.side.last_end)
            monkeypatch.undo()
            assert await echo.ask("echo", 1) == 1

    run(test)


def test_the_pause_before_each_start_is_twice_the_one_before(monkeypatch):
    pauses: list[float] = []
    told = SideProcess._note_end

    def note(side: SideProcess, how: str, pause_s: float) -> None:
        pauses.append(pause_s)
        told(side, how, pause_s)

    async def test() -> None:
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        monkeypatch.setattr(SideProcess, "_note_end", note)
        async with echoing(Pauses(first=0.001, longest=60)) as echo:
            # Then it pauses for half a second, in which it is stopped.
            await echo.until(lambda: len(pauses) == 10)

    run(test)
    assert pauses == [0.001 * 2**number for number in range(10)]


def test_one_that_answers_nothing_any_more_is_ended_and_comes_back():
    async def test() -> None:
        async with echoing(Pauses(first=0.05, longest=0.2, silent=3)) as echo:
            await echo.ask("echo")
            with pytest.raises(AwayError):
                await echo.ask("hang", 600)
            await echo.until(lambda: "did not answer for 3 s" in str(echo.side.last_end))
            assert await echo.ask("echo", 1) == 1

    run(test)


def test_a_stopped_one_is_gone_even_if_it_is_deaf():
    async def test() -> None:
        async with echoing() as echo:
            await echo.ask("echo")
            pid = echo.side.pid
            assert pid is not None
            echo.side.tell("x", 1)
            busy = asyncio.create_task(echo.ask("busy", 600))
            await asyncio.sleep(0.2)
            await echo.side.stop()
            assert not is_running(pid)
            assert (echo.side.state, echo.side.pid) == ("off", None)
            with pytest.raises(AwayError):
                await busy
            await echo.side.stop()

    run(test)


def test_our_loop_is_not_held_up_by_a_deaf_one():
    async def test() -> None:
        async with echoing() as echo:
            await echo.ask("echo")
            asked = [asyncio.create_task(echo.ask("hang", 2))]
            asked += [asyncio.create_task(echo.ask("echo", "x" * 4_000_000)) for _ in range(6)]
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            assert "does not read" in str(next(iter(done)).exception())
            await asyncio.wait(asked)
            assert await echo.ask("echo", 1) == 1

    run(test)


PARENT = """
import asyncio, sys
sys.path.insert(0, {root!r})
from tests.component.side_process.test_supervisor import echoing

async def live():
    async with echoing() as echo:
        await echo.ask("echo")
        print(echo.side.pid, flush=True)
        if {busy}:
            asyncio.create_task(echo.ask("busy", 600))
        await asyncio.sleep(600)

asyncio.run(live())
"""


@pytest.mark.parametrize("busy", [False, True])
def test_it_ends_with_its_api_server_by_kill_9_even_if_it_is_deaf(busy):
    code = PARENT.format(root=str(ROOT), busy=busy)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.5 if busy else 0)
        assert is_running(pid)
        parent.kill()
    wait_for(lambda: not is_running(pid), timeout_s=WAIT_S)


def test_by_hand_it_says_what_it_is():
    program = [sys.executable, "-m", "tests.support.side_echo"]
    done = subprocess.run(program, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 1
    assert "started by the API server, not by hand" in done.stderr
