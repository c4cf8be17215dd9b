"""The poller against engines played here and a real ledger."""

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.builders import make_snapshot
from tests.support.world import full_disk
from vllm_cost_meter.api_server.background import Loops
from vllm_cost_meter.api_server.poller import Poller
from vllm_cost_meter.attribution.cost_model import CURVE, EARLIER_CURVE, FIT_TERMS
from vllm_cost_meter.journal.places import folder_of_ledger
from vllm_cost_meter.journal.writer import JournalWriter
from vllm_cost_meter.ledger.catching_up import catch_up
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.records.snapshot import (
    ClassTotals,
    CostModel,
    EarlierFit,
    LearntCurve,
    Snapshot,
)

T0 = 1_800_000_000 * 10**9


def snapshot(number: int, run_id: str = "run", **changes: Any) -> Snapshot:
    return make_snapshot(number=number, run_id=run_id, **changes)


class Engines:
    """vLLM's engine client with engines that answer as their functions do."""

    def __init__(self, *answers: Callable[[int], Any]) -> None:
        self.core_engines = list(range(len(answers)))
        self.earlier_fits: list[dict] = []
        self.engine_core = self
        self.acknowledged: list[dict[str, int]] = []
        self.calls = 0
        self._answers = answers

    async def _call_utility_async(
        self, method: str, acknowledged: dict, earlier_fits: dict, engine: int
    ) -> Any:
        assert method == "cost_meter_snapshot"
        if engine == 0:
            self.calls += 1
            self.acknowledged.append(acknowledged)
            self.earlier_fits.append(earlier_fits)
        answer = self._answers[engine](self.calls)
        if asyncio.iscoroutine(answer):
            answer = await answer
        if isinstance(answer, BaseException):
            raise answer
        return answer.to_wire() if isinstance(answer, Snapshot) else answer


@pytest.fixture
def writer(tmp_path):
    writer = JournalWriter(folder_of_ledger(tmp_path / "ledger.db"))
    writer.start()
    yield writer
    writer.close(5)


@pytest.fixture
def rows(tmp_path):
    def rows(query: str) -> list[tuple]:
        assert catch_up(f"sqlite:///{tmp_path / 'ledger.db'}") == 0
        with contextlib.closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
            return connection.execute(query).fetchall()

    return rows


def poller_of(
    engines: Engines, writer: JournalWriter, interval_s: float = 0.01, **more: float
) -> Poller:
    return Poller(engines, writer, Loops(), interval_s, **more)


def failures(poller: Poller) -> tuple[int, int]:
    """The failures of the poll itself, and of single engines."""
    return poller._loop.failures, poller._engines_loop.failures


def test_a_refresh_brings_every_engine_into_the_ledger(writer, rows):
    engines = Engines(snapshot, lambda n: snapshot(n, "other", engine_index=1))
    poller = poller_of(engines, writer)
    asyncio.run(poller.refresh())
    assert rows("SELECT run_id, number FROM snapshots ORDER BY 1") == [("other", 1), ("run", 1)]
    assert poller.latest["run"].number == 1


def test_a_snapshot_is_acknowledged_only_once_it_is_journaled(writer, rows):
    engines = Engines(snapshot)

    async def poll() -> None:
        poller = poller_of(engines, writer)
        await poller.refresh()
        with full_disk():
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(poller.refresh(), 0.1)
            # The reader that gave up leaves the poll under way, and the next one shares it.
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(poller.refresh(), 0.1)
            assert engines.calls == 2
        await poller.refresh()
        await poller.refresh()

    asyncio.run(poll())
    assert engines.acknowledged == [{}, {"run": 1}, {"run": 2}]
    assert rows("SELECT number FROM snapshots") == [(3,)]


def test_a_refused_snapshot_is_not_acknowledged(writer):
    engines = Engines(lambda n: snapshot(n, wall_ns=2**70 if n == 1 else n))

    async def poll() -> None:
        poller = poller_of(engines, writer)
        with pytest.raises(ValueError, match="(?i)int"):
            await poller.refresh()
        await poller.refresh()
        await poller.refresh()

    asyncio.run(poll())
    assert engines.acknowledged == [{}, {}, {"run": 2}]


def test_callers_share_a_refresh_that_is_under_way(writer):
    engines = Engines(snapshot)

    async def poll() -> None:
        poller = poller_of(engines, writer)
        await asyncio.gather(*(poller.refresh() for _ in range(20)))
        assert engines.calls == 1
        await poller.refresh()
        assert engines.calls == 2

    asyncio.run(poll())


def test_a_caller_that_is_cancelled_takes_no_other_with_it(writer):
    gate = asyncio.Event()

    async def slow() -> Snapshot:
        await gate.wait()
        return snapshot(1)

    async def poll() -> None:
        poller = poller_of(Engines(lambda _: slow()), writer)
        impatient = asyncio.create_task(poller.refresh())
        patient = asyncio.create_task(poller.refresh())
        await asyncio.sleep(0.01)
        impatient.cancel()
        await asyncio.sleep(0.01)
        gate.set()
        await asyncio.wait_for(patient, 5)
        assert impatient.cancelled()

    asyncio.run(poll())


def test_an_engine_that_fails_does_not_hide_the_others(writer, rows):
    engines = Engines(lambda _: RuntimeError("dead"), lambda n: snapshot(n, "alive"))
    poller = poller_of(engines, writer)
    asyncio.run(poller.refresh())
    assert rows("SELECT run_id FROM snapshots") == [("alive",)]
    assert failures(poller) == (0, 1)


def test_an_engine_that_is_not_metered_is_no_error(writer, rows):
    poller = poller_of(Engines(lambda _: None, snapshot), writer)
    asyncio.run(poller.refresh())
    assert rows("SELECT count(*) FROM snapshots") == [(1,)]
    assert failures(poller) == (0, 0)


def test_an_engine_that_fails_now_and_then_is_asked_again(writer):
    """For months, if need be."""
    engines = Engines(lambda n: RuntimeError("busy") if n % 2 else snapshot(n))

    async def poll() -> Poller:
        poller = poller_of(engines, writer)
        for _ in range(30):
            await poller.refresh()
        return poller

    poller = asyncio.run(poll())
    assert failures(poller) == (0, 15)
    assert poller.latest["run"].number == 30


def test_an_engine_that_is_busy_for_minutes_is_no_failure(writer):
    """It answers between two steps; new weights or a first compilation take longer than that."""

    async def answer(call: int) -> Snapshot:
        if call < 20:
            await asyncio.Event().wait()
        return snapshot(call)

    async def poll() -> Poller:
        poller = poller_of(Engines(answer), writer, interval_s=0, answer_timeout_s=0.001)
        polling = asyncio.create_task(poller.run())
        while not poller.latest:
            await asyncio.sleep(0.005)
        polling.cancel()
        return poller

    assert failures(asyncio.run(asyncio.wait_for(poll(), 20))) == (0, 0)


def test_an_engine_that_is_busy_for_20_s_lives_and_what_it_has_in_flight_is_not_lost(
    writer, tmp_path
):
    """A long prefill: it was asked and has not answered yet; only who asks knows that it lives."""
    later = AsOf(T0 + 20 * 10**9, settle_s=0)
    answers = iter(
        [
            snapshot(1, taken_at_ns=T0, totals=ClassTotals(in_flight=70)),
            asyncio.Event().wait(),  # it never comes
            RuntimeError("the engine is dead"),
        ]
    )

    async def poll() -> list[list[tuple[bool, int, int]]]:
        poller = poller_of(Engines(lambda _: next(answers)), writer, answer_timeout_s=0.001)
        readers = [
            LedgerReader(f"sqlite:///{tmp_path / 'ledger.db'}", late=True, alive=alive)
            for alive in (poller.alive, tuple)
        ]
        seen = []
        for _ in range(3):
            await poller.refresh()
            await asyncio.wrap_future(writer.append())
            assert catch_up(f"sqlite:///{tmp_path / 'ledger.db'}") == 0
            summaries = [reader.summary(as_of=later) for reader in readers]
            seen.append(
                [(s["runs"][0]["alive"], s["in_flight_ns"], s["lost_ns"]) for s in summaries]
            )
        for reader in readers:
            reader.close()
        return seen

    living, dead = (True, 70, 0), (False, 0, 70)
    assert asyncio.run(poll()) == [[living, dead], [living, dead], [dead, dead]]


def test_it_polls_for_ever_and_contains_errors(writer, rows):
    engines = Engines(lambda n: SimpleNamespace() if n < 4 else snapshot(n))
    bad = iter([{"no": "snapshot"}, {}])
    engines._answers = (lambda n: next(bad, None) or snapshot(n),)

    async def poll() -> Poller:
        poller = poller_of(engines, writer, interval_s=0)
        polling = asyncio.create_task(poller.run())
        while len(engines.acknowledged) < 6 or "run" not in engines.acknowledged[-1]:
            await asyncio.sleep(0.005)
        polling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await polling
        return poller

    poller = asyncio.run(asyncio.wait_for(poll(), 20))
    assert 1 <= sum(failures(poller)) <= 2
    assert rows("SELECT count(*) FROM snapshots") == [(1,)]


def test_while_the_server_stops_engines_that_are_gone_are_no_error(writer):
    poller = poller_of(Engines(lambda _: RuntimeError("gone")), writer)
    poller.stopping = True
    asyncio.run(poller.refresh())
    assert failures(poller) == (0, 0)


def test_an_engine_that_switched_its_meter_off_is_said_once(writer, caplog):
    import logging

    logger = logging.getLogger("vllm.cost_meter")
    logger.addHandler(caplog.handler)
    engines = Engines(lambda n: snapshot(n, state="off" if n > 1 else "on", errors=10))

    async def poll() -> None:
        poller = poller_of(engines, writer)
        for _ in range(4):
            await poller.refresh()

    try:
        asyncio.run(poll())
    finally:
        logger.removeHandler(caplog.handler)
    said = {id(r) for r in caplog.records if "engine 0 switched its meter off" in r.getMessage()}
    assert len(said) == 1


def test_a_new_engine_is_told_once_what_one_like_it_had_learnt(writer, tmp_path):
    planes, coefficients = ((1.0,) * 5, (2.0,) * 5), (3.0,) * FIT_TERMS
    curve = LearntCurve(coefficients, (0, 0), (1, 0, 0), (), CURVE)
    earlier = CostModel(9, "two planes", planes, 4096, 0.01, 0.02, 0.99, curve)
    of_another = replace(earlier, planes=((7.0,) * 5,) * 2)
    # A version long before had one plane, and no curve: that is no prior for a curve.
    of_old = CostModel(12, "one plane", (*planes, (3.0,) * 5), 9000, 0.01, 0.02, 0.99)
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    writer.append(
        # A pod that is replaced has another name, and its fit is still that of an engine like it.
        make_snapshot(run_id="earlier", labels={"pod": "before"}, cost_models=(earlier,)),
        make_snapshot(run_id="older", cost_models=(of_old,)),
        make_snapshot(run_id="elsewhere", hardware="another GPU", cost_models=(of_another,)),
        make_snapshot(run_id="too little", cost_models=(replace(of_another, steps=100),)),
    ).result(10)
    assert catch_up(url) == 0
    reader = LedgerReader(url)
    engines = Engines(snapshot)

    async def earlier_fit(taken: Snapshot) -> EarlierFit | None:
        return reader.earlier_fit(taken)

    poller = Poller(engines, writer, Loops(), 60.0, earlier_fit)

    async def poll() -> None:
        for _ in range(3):
            await poller.refresh()

    asyncio.run(poll())
    assert engines.earlier_fits == [{}, {"run": (planes, coefficients, True)}, {}]


@pytest.mark.parametrize("form", [EARLIER_CURVE, "a later form"])
def test_a_fit_of_another_form_is_no_prior(writer, tmp_path, form):
    """What LoRA took is somewhere in the terms of a curve without features."""
    planes, count = ((1.0,) * 5, (2.0,) * 5), 33 if form == EARLIER_CURVE else FIT_TERMS
    for model_form in (form, "two planes"):
        curve = LearntCurve((3.0,) * count, (0, 0), (1, 0, 0), (), form)
        fit = CostModel(9, model_form, planes, 4096, 0.01, 0.02, 0.99, curve)
        writer.append(make_snapshot(run_id=f"earlier, {model_form}", cost_models=(fit,))).result(10)
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    assert catch_up(url) == 0
    assert LedgerReader(url).earlier_fit(snapshot(1)) is None
