"""How many questions run at once, how long each may take, and what becomes of the others.

Goal: whatever is asked, the database works for a bounded number of askers who still wait. Method:
the real application with a question more, whose query would never end by itself, over a real
socket.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import httpx
import pytest
from sqlalchemy import text

from tests.support.small_ledger import small_ledger
from tests.support.world import listening
from vllm_cost_meter.endpoint.app import make_app
from vllm_cost_meter.endpoint.questions import Questions
from vllm_cost_meter.errors import OverdueError
from vllm_cost_meter.ledger.deadline import Deadline, deadline

ENDLESS = text(
    "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n"
)
WAIT_S = 60


@pytest.fixture
def reader(tmp_path):
    reader = small_ledger(tmp_path)
    yield reader
    reader.close()


class Side:
    """The side endpoint with an endless question, and how many of those the database works at."""

    def __init__(self, reader, questions: Questions) -> None:
        self.at_work = 0
        self.ended: list[str] = []
        self.questions = questions
        self.app = make_app(reader, questions=questions)

        @self.app.get("/endless")
        def endless() -> None:
            self.at_work += 1
            try:
                with reader.transaction() as connection:
                    connection.execute(ENDLESS)
            except Exception as error:
                self.ended.append(type(error).__name__)
                raise
            finally:
                self.at_work -= 1

    def run(self, test: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        async def serve() -> None:
            async with listening(self.app) as (host, port):
                url = f"http://{host}:{port}"
                async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=WAIT_S) as ask:
                    await test(ask)

        asyncio.run(serve())

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not is_so():
                await asyncio.sleep(0.01)


def test_a_question_that_takes_too_long_is_a_503_and_its_query_is_ended(reader):
    side = Side(reader, Questions(timeout_s=0.3))

    async def test(ask: httpx.AsyncClient) -> None:
        reply = await ask.get("/endless")
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
        error = reply.json()["error"]
        assert error["type"] == "unavailable"
        assert "took longer than 0.3 s and was ended" in error["message"]
        assert "COST_METER_QUESTION_TIMEOUT_S" in error["message"]
        await side.until(lambda: side.at_work == 0)
        assert side.ended == ["OverdueError"]
        assert (await ask.get("/cost/summary")).status_code == 200, "the connection is as before"

    side.run(test)


def test_so_many_run_at_once_and_health_is_answered_all_the_same(reader):
    side = Side(reader, Questions(at_once=2, timeout_s=3))

    async def test(ask: httpx.AsyncClient) -> None:
        asked = [asyncio.create_task(ask.get("/endless")) for _ in range(5)]
        await side.until(lambda: side.questions.counts()["waiting"] == 3)
        assert side.at_work == 2
        health = (await ask.get("/cost/health")).json()["questions"]
        assert {name: health[name] for name in ("running", "waiting", "at_once")} == {
            "running": 2,
            "waiting": 3,
            "at_once": 2,
        }
        assert (await ask.get("/health")).status_code == 200
        replies = await asyncio.gather(*asked)
        assert {reply.status_code for reply in replies} == {503}
        counts = side.questions.counts()
        assert (counts["overdue"], counts["waiting"]) == (5, 0)
        await side.until(lambda: side.questions.counts()["running"] == 0)
        assert (await ask.get("/cost/summary")).status_code == 200

    side.run(test)


def test_one_that_waited_has_its_turn(reader):
    side = Side(reader, Questions(at_once=1, timeout_s=WAIT_S))

    async def test(ask: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.ReadTimeout):
            await ask.get("/endless", timeout=0.3)  # the asker gives up
        assert (await ask.get("/cost/summary")).status_code == 200

    side.run(test)


def test_who_leaves_holds_no_place_and_its_query_is_ended(reader):
    side = Side(reader, Questions(at_once=1, timeout_s=WAIT_S))

    async def test(ask: httpx.AsyncClient) -> None:
        asked = [asyncio.create_task(ask.get("/endless", timeout=1)) for _ in range(3)]
        await side.until(lambda: side.questions.counts()["waiting"] == 2)
        await asyncio.wait(asked)
        await side.until(lambda: side.questions.counts()["running"] == 0)
        assert side.questions.counts()["waiting"] == 0
        assert side.ended == ["OverdueError"]

    side.run(test)


def test_more_than_may_wait_are_refused_at_once(reader):
    side = Side(reader, Questions(at_once=1, timeout_s=1, waiting_max=1))

    async def test(ask: httpx.AsyncClient) -> None:
        asked = [asyncio.create_task(ask.get("/endless")) for _ in range(2)]
        await side.until(lambda: side.questions.counts()["waiting"] == 1)
        reply = await ask.get("/endless")
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
        assert "1 questions wait already" in reply.text
        assert side.questions.counts()["refused"] == 1
        await asyncio.wait(asked)

    side.run(test)


def test_no_place_is_lost_whatever_comes_between_a_question_and_its_turn():
    async def test() -> None:
        questions = Questions(at_once=2, timeout_s=0.02, waiting_max=100)
        go_on = threading.Event()
        for _ in range(10):
            go_on.clear()
            asked = [
                asyncio.create_task(questions.answer(lambda: go_on.wait(WAIT_S))) for _ in range(8)
            ]
            await asyncio.sleep(0.01)
            asked[3].cancel()
            asked[0].cancel()
            await asyncio.sleep(0.011)
            go_on.set()
            await asyncio.wait(asked)
        async with asyncio.timeout(WAIT_S):
            while questions.counts()["running"]:
                await asyncio.sleep(0.01)
        patient = Questions(at_once=2, timeout_s=WAIT_S)
        patient._turns = questions._turns
        assert await asyncio.gather(*(patient.answer(lambda: 1) for _ in range(4))) == [1] * 4
        assert not questions._turns.locked()

    asyncio.run(test())


def test_an_error_of_a_question_is_its_askers():
    async def test() -> None:
        questions = Questions()
        with pytest.raises(ZeroDivisionError):
            await questions.answer(lambda: 1 // 0)
        assert questions.counts()["running"] == 0

    asyncio.run(test())


def test_a_query_begun_after_the_deadline_does_not_begin(reader):
    token = deadline.set(Deadline(0))
    try:
        with pytest.raises(OverdueError):
            reader.summary()
    finally:
        deadline.reset(token)
    assert reader.summary()["requests"] == 1


def test_the_next_question_on_a_connection_has_the_deadline_of_the_one_before_no_more(reader):
    token = deadline.set(Deadline(0.2))
    with pytest.raises(OverdueError), reader.transaction() as connection:
        connection.execute(ENDLESS)
    deadline.reset(token)
    time.sleep(0.1)
    many = text(ENDLESS.text.replace("FROM n)", "FROM n WHERE x < 200000)"))
    with reader.transaction() as connection:
        assert connection.execute(many).scalar() == 200_000
