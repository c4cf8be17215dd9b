"""Background loops: each fails for a while, says so once, recovers, and leaves the meter on.

The ledger is a real SQLite file that cannot be read for a while: its tables are gone, or its place
is taken. The engines are played here.
"""

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from tests.component.api_server.test_collector import exchange_of
from tests.component.api_server.test_poller import Engines
from tests.support.builders import make_snapshot
from tests.support.world import BODY, JSON, World, full_disk, journal, replying
from vllm_cost_meter.api_server import background
from vllm_cost_meter.api_server.background import PAUSE_S_MAX, Loop, in_own_thread
from vllm_cost_meter.api_server.budgets.follower import BudgetFollower
from vllm_cost_meter.api_server.budgets.looks import BudgetLooks
from vllm_cost_meter.api_server.poller import Poller
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.guard import ERRORS_IN_A_ROW_MAX
from vllm_cost_meter.logs import SPOKEN_OF_EVERY_NS
from vllm_cost_meter.tenants.budgets import BudgetFigures

SECOND = 10**9
# More than a hook may fail in a row.
LOOKS = ERRORS_IN_A_ROW_MAX + 2


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What was logged, one line each."""
    said: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, logger = Lines(), logging.getLogger("vllm.cost_meter")
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


class Clock:
    """A monotonic clock that a test moves."""

    now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


async def works() -> None:
    """Work that has nothing to do."""


async def cannot() -> None:
    raise LedgerError("ledger x: is away")


# ---- one loop


def test_a_loop_that_fails_waits_twice_as_long_each_time_up_to_a_bound(lines):
    loop = Loop("budgets")
    pauses = [loop.pause_s(0.25)]
    for _ in range(2_000):
        asyncio.run(loop.attempt(cannot)) if len(pauses) < 8 else loop.failed(ValueError())
        pauses.append(loop.pause_s(0.25))
    assert pauses[:8] == [0.25, 0.5, 1.0, 2.0, 4.0, PAUSE_S_MAX, PAUSE_S_MAX, PAUSE_S_MAX]
    assert pauses[-1] == PAUSE_S_MAX
    assert loop.pause_s(60.0) == 60.0, "never sooner than usual"
    loop.succeeded()
    assert loop.pause_s(0.25) == 0.25


def test_a_short_outage_is_logged_when_it_begins_and_when_it_is_over_and_no_more(lines):
    clock = Clock()
    loop = Loop("budgets", clock)
    for _ in range(30):
        asyncio.run(loop.attempt(cannot))
        clock.now_ns += SECOND
    for _ in range(3):
        asyncio.run(loop.attempt(works))
    assert lines == [
        "cost meter: the loop `budgets` failed: LedgerError: ledger x: is away. It tries again,"
        " with pauses of up to 5 s, and says when it works; until then budgets are held to by the"
        " figures of before, and to none once those are stale.",
        "cost meter: the loop `budgets` works again, after 30.0 s and 30 failures",
    ]


def test_an_outage_is_spoken_of_in_each_minute_of_it_with_how_long_it_lasts(lines):
    clock = Clock()
    loop = Loop("poll", clock)
    for _ in range(150):
        loop.failed(OSError("gone"))
        clock.now_ns += SECOND
    loop.succeeded()
    assert [line.partition(":")[2].partition(". It")[0] for line in lines] == [
        " the loop `poll` failed: OSError: gone",
        " the loop `poll` failed (for 60 s and 61 attempts): OSError: gone",
        " the loop `poll` failed (for 120 s and 121 attempts): OSError: gone",
        " the loop `poll` works again, after 150.0 s and 150 failures",
    ]


def test_a_loop_that_fails_and_works_in_turns_speaks_of_it_once_a_minute(lines):
    clock = Clock()
    loop = Loop("poll", clock)
    for _ in range(SPOKEN_OF_EVERY_NS // SECOND):
        loop.failed(OSError("gone"))
        loop.succeeded()
        clock.now_ns += SECOND
    assert len(lines) == 2
    loop.failed(OSError("gone"))
    loop.succeeded()
    assert len(lines) == 4


def test_an_outage_that_began_in_the_quiet_after_another_is_spoken_of_if_it_lasts(lines):
    clock = Clock()
    loop = Loop("poll", clock)
    loop.failed(OSError("gone"))
    loop.succeeded()
    for _ in range(SPOKEN_OF_EVERY_NS // SECOND + 1):
        loop.failed(OSError("gone for long"))
        clock.now_ns += SECOND
    loop.succeeded()
    assert [line.partition(",")[0] for line in lines[2:]] == [
        "cost meter: the loop `poll` failed (for 60 s and 61 attempts): OSError: gone for long. It"
        " tries again",
        "cost meter: the loop `poll` works again",
    ]


def test_the_state_of_a_loop_says_how_long_it_has_failed_and_why():
    clock = Clock()
    loop = Loop("reload", clock)
    assert loop.health() == {
        "loop": "reload",
        "state": "ok",
        "failing_for_s": None,
        "failures_in_a_row": 0,
        "failures": 0,
        "last_error": None,
    }
    loop.failed(TimeoutError())
    clock.now_ns += 90 * SECOND
    loop.failed(OSError("a mount\nthat is away" + 1_000 * "x"))
    state = loop.health()
    assert (state["state"], state["failing_for_s"], state["failures_in_a_row"]) == (
        "failing",
        90.0,
        2,
    )
    assert state["last_error"] == "OSError: a mount"
    loop.succeeded()
    state = loop.health()
    assert (state["state"], state["failing_for_s"], state["failures_in_a_row"]) == ("ok", None, 0)
    assert (state["failures"], state["last_error"]) == (2, "OSError: a mount")


def test_the_metrics_show_whether_a_loop_fails():
    def shown() -> tuple[float | None, float | None]:
        labels = {"loop": "announce"}
        return (
            REGISTRY.get_sample_value("cost_meter_loop_failing", labels),
            REGISTRY.get_sample_value("cost_meter_loop_failures_total", labels),
        )

    before = shown()[1] or 0.0
    loop = Loop("announce")
    assert shown()[0] == 0.0
    loop.failed(OSError("gone"))
    loop.failed(OSError("gone"))
    assert shown() == (1.0, before + 2)
    loop.succeeded()
    assert shown() == (0.0, before + 2)


def test_a_call_that_hangs_takes_no_thread_of_the_pool_and_may_be_given_up():
    async def live() -> list[int]:
        loop = asyncio.get_running_loop()
        hanging = [asyncio.create_task(in_own_thread(time.sleep, 1)) for _ in range(64)]
        await asyncio.sleep(0)
        answers = [await loop.run_in_executor(None, lambda: 1), await in_own_thread(lambda: 2)]
        assert not any(task.done() for task in hanging)
        for task in hanging:
            task.cancel()
        return answers

    assert asyncio.run(live()) == [1, 2]
    with pytest.raises(LedgerError, match="away"):
        asyncio.run(in_own_thread(_away))


def _away() -> None:
    raise LedgerError("ledger x: is away")


# ---- a ledger that cannot be read


@contextlib.contextmanager
def without_table(path: Path, table: str) -> Iterator[None]:
    """Let a table be away, as in a ledger that is restored from a backup."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"ALTER TABLE {table} RENAME TO away")
        try:
            yield
        finally:
            connection.execute(f"ALTER TABLE away RENAME TO {table}")


@pytest.fixture
def held(make_world):
    """A world with a budget, whose poller and admission a test moves by hand."""
    world = make_world(
        tenants=[{"name": "acme"}],
        budgets=[{"name": "b", "tenant": "acme", "gpu_seconds": 1}],
        bill_timeout_ms=50,
    )
    runtime = world.runtime

    looks = BudgetLooks(runtime.ledger_url)

    async def follow(budgets, book) -> BudgetFigures | None:
        # In this process: every attempt of these tests has an event loop of its own.
        return looks.look(budgets, book)

    async def hold() -> None:
        runtime._hold_to_budgets(None)
        runtime._tasks["budgets"].cancel()
        runtime.admission._follow = follow

    asyncio.run(hold())
    yield world
    looks.close()


def attempt(world: World, times: int = 1) -> None:
    """Let the budgets' loop look at the ledger."""
    admission = world.runtime.admission
    for _ in range(times):
        asyncio.run(admission._loop.attempt(admission.follow))


def costs(world: World, request_id: str) -> dict[bytes, bytes]:
    """Ask for a completion; return the headers of the meter in its reply."""
    app = replying(JSON, [BODY], lambda: world.engine.generate(request_id))
    client = world.run(app)
    assert client.status == 200
    return client.ours


def test_a_ledger_that_cannot_be_read_for_twelve_looks_leaves_metering_on(held, lines):
    runtime = held.runtime
    journal(runtime, make_snapshot(number=1, taken_at_ns=time.time_ns()))
    attempt(held)
    assert runtime.figures().as_of_ns is not None
    with without_table(held.path, "snapshots"):
        attempt(held, LOOKS)
        health = runtime.health()
        assert (health["status"], runtime.guard.off, runtime.guard.errors) == ("failing", False, 0)
        (budgets,) = health["loops"]
        assert (budgets["loop"], budgets["failures_in_a_row"]) == ("budgets", LOOKS)
        assert budgets["last_error"] == (
            f"LedgerError: ledger sqlite:///{held.path}: cannot be read: no such table: snapshots"
        )
        assert b"x-cost-meter-cost-usd" in costs(held, "meanwhile")
    journal(runtime, make_snapshot(number=2, taken_at_ns=time.time_ns()))
    attempt(held, 2)
    assert runtime.health()["status"] == "ok"
    assert runtime.figures().standings[0].total is not None
    assert b"x-cost-meter-cost-usd" in costs(held, "afterwards")
    assert [line.partition(":")[2].split(",")[0].split(":")[0] for line in lines] == [
        " the loop `budgets` failed",
        " the loop `budgets` works again",
    ]
    assert held.rows("SELECT count(*) FROM requests") == [(2,)]


def test_a_disk_that_takes_no_cost_costs_headers_and_no_hook(held, lines):
    """Replies go out without their cost; what they used is written once there is room."""
    runtime = held.runtime
    with full_disk():
        for number in range(LOOKS):
            costs(held, f"r{number}")
        assert (runtime.guard.off, runtime.guard.errors) == (False, 0)
        deadline = time.monotonic() + 10
        while runtime.health()["ledger_error"] is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert runtime.health()["ledger_error"] == "OSError: [Errno 28] No space left on device"
        assert runtime.health()["status"] == "failing"
        assert runtime.health()["waiting"] > 0
    assert held.rows("SELECT count(*) FROM requests") == [(LOOKS,)]
    assert runtime.health()["ledger_error"] is None
    begins, ends = lines
    assert begins.startswith("cost meter: the journal ")
    assert "cannot be written, trying again: OSError: [Errno 28] No space left" in begins
    assert ends.startswith("cost meter: the journal can be written again, after ")


def test_a_locked_ledger_costs_no_header(held, lines):
    """Replies tell their cost from the journal; the ledger has it once the lock is gone."""
    with held.locked():
        for number in range(LOOKS):
            assert b"x-cost-meter-cost-usd" in costs(held, f"r{number}")
    assert held.rows("SELECT count(*) FROM requests") == [(LOOKS,)]
    assert lines == []


def test_records_that_the_ledger_refuses_are_counted_by_its_writer_and_are_no_hooks_errors(world):
    async def settle() -> bool:
        exchange = exchange_of()
        exchange.sent.status = object()
        world.collector.breaker.bill_came()  # or nobody would wait any more
        return await world.collector.settle(exchange) is not None

    for _ in range(12):
        assert asyncio.run(settle()) is False
    assert (world.runtime.guard.off, world.runtime.guard.errors) == (False, 0)
    assert world.runtime.writer.dropped == 12


def test_a_server_whose_ledger_is_away_at_the_start_is_whole_once_it_is_back(tmp_path, make_world):
    """Its tenants' routes and budgets too: nothing waits for a restart."""
    from tests.support.world import make_runtime

    place = tmp_path / "away"
    (place / "ledger.db").mkdir(parents=True)  # a folder is in the ledger's place

    async def live() -> None:
        from starlette.applications import Starlette

        given = {"tenants": [{"name": "acme", "fail_closed": True}], "port": 0}
        runtime = make_runtime(place, opens=False, snapshot_interval_s=0.05, **given)
        app = Starlette()
        app.state.engine_client = EngineClient()
        app.include_router = lambda router: app.routes.extend(router.routes)
        await runtime.start(app)
        assert runtime.guard.errors == 0
        assert "/v1/cost/me" in [getattr(route, "path", "") for route in app.routes]
        async with asyncio.timeout(30):
            while runtime.loops["budgets"].failures < 2:
                await asyncio.sleep(0.01)
            assert runtime.figures().as_of_ns is None
            (place / "ledger.db").rmdir()
            while runtime.figures().as_of_ns is None or runtime.health()["status"] != "ok":
                await asyncio.sleep(0.01)
        await runtime.stop()
        assert (runtime.guard.off, runtime.guard.errors) == (False, 0)

    asyncio.run(live())


class EngineClient(Engines):
    """What the runtime asks of vLLM's engine client in the API server that polls."""

    client_index = 0

    class vllm_config:  # noqa: N801
        class model_config:  # noqa: N801
            served_model_name = "m"

        class parallel_config:  # noqa: N801
            world_size = 1

    def __init__(self) -> None:
        super().__init__(lambda n: make_snapshot(number=n, taken_at_ns=time.time_ns()))


def test_every_loop_of_a_server_may_fail_for_long_and_none_switches_metering_off(
    tmp_path, make_world, monkeypatch
):
    """The loops as the start wires them; what each of them does fails."""
    monkeypatch.setattr(background, "PAUSE_S_MAX", 0.001)
    monkeypatch.setattr(BudgetFollower, "follow", lambda *_: cannot())
    config = tmp_path / "settings.toml"
    config.write_text("")
    world = make_world(
        tenants=[{"name": "acme"}],
        budgets=[{"name": "b", "tenant": "acme", "gpu_seconds": 1}],
        config=str(config),
        snapshot_interval_s=0.05,
    )
    runtime = world.runtime
    runtime._reload_interval_s = 0.01
    runtime._announce = runtime._reload = lambda *_: cannot()

    class Broken(EngineClient):
        """One engine that fails, and one of which the ledger takes no snapshot."""

        def __init__(self) -> None:
            Engines.__init__(
                self,
                lambda _: RuntimeError("busy"),
                lambda n: make_snapshot(number=n, wall_ns=2**70),
            )

    async def live() -> dict[str, int]:
        await runtime.start_work(Broken())
        async with asyncio.timeout(60):
            while min(failed().values()) < LOOKS:
                await asyncio.sleep(0.01)
        await runtime.stop()
        return failed()

    def failed() -> dict[str, int]:
        return {each["loop"]: each["failures"] for each in runtime.loops.health()}

    assert set(asyncio.run(live())) == {"announce", "budgets", "engines", "poll", "reload"}
    assert (runtime.guard.off, runtime.guard.errors) == (False, 0)


# ---- the other loops


def test_announcing_that_fails_leaves_metering_on_and_hides_no_other_request(world):
    """Requests of which the meter understands nothing, one in each round."""
    runtime, loop = world.runtime, world.runtime.loops["announce"]
    world.engine.born("first")
    for number in range(LOOKS):
        world.engine.born(f"bad-{number}", exchange=5)
        asyncio.run(loop.attempt(runtime._announce))
        world.engine.born(f"good-{number}")
        runtime.guard.succeeded("add_request")
    born = runtime.guard.errors
    assert loop.health()["failures_in_a_row"] == LOOKS - 1
    assert loop.health()["last_error"] == "AttributeError: 'int' object has no attribute 'route'"
    for _ in range(3):
        asyncio.run(loop.attempt(runtime._announce))
    assert not loop.failing
    assert (runtime.guard.off, runtime.guard.errors) == (False, born)
    assert world.rows("SELECT count(*) FROM open_requests") == [(1 + LOOKS,)]


def test_engines_that_fail_leave_metering_on_and_are_asked_again(world):
    engines = Engines(lambda n: RuntimeError("busy") if n <= LOOKS else make_snapshot(number=n))
    poller = Poller(engines, world.runtime.writer, world.runtime.loops, 1.0)
    loop = world.runtime.loops["engines"]

    async def poll(times: int) -> None:
        for _ in range(times):
            await poller.refresh()

    asyncio.run(poll(LOOKS))
    assert loop.health()["failures_in_a_row"] == LOOKS
    assert loop.health()["last_error"] == "RuntimeError: busy"
    assert (world.runtime.guard.off, world.runtime.guard.errors) == (False, 0)
    asyncio.run(poll(1))
    assert not loop.failing
    assert b"x-cost-meter-cost-usd" in costs(world, "afterwards")


def test_a_poll_whose_snapshots_the_ledger_refuses_leaves_metering_on(world):
    """Each of them alone is dropped; the next one that can be written is."""
    engines = Engines(lambda n: make_snapshot(number=n, wall_ns=2**70 if n <= LOOKS else n))
    poller = Poller(engines, world.runtime.writer, world.runtime.loops, 1.0)
    loop = world.runtime.loops["poll"]

    async def poll(times: int) -> None:
        for _ in range(times):
            await loop.attempt(poller.refresh)

    asyncio.run(poll(LOOKS))
    assert loop.health()["failures_in_a_row"] == LOOKS
    assert (world.runtime.guard.off, world.runtime.guard.errors) == (False, 0)
    asyncio.run(poll(1))
    assert not loop.failing
    assert world.rows("SELECT number FROM snapshots") == [(LOOKS + 1,)]
