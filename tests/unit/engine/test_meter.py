"""The engine side between vLLM's hooks and the books: errors, late bills, healing, own time."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.builders import ENGINE
from vllm_cost_meter.engine.books import RequestFacts
from vllm_cost_meter.engine.meter import Clock, EngineMeter, NoMeter, process_created_ns
from vllm_cost_meter.records.bill import Bill
from vllm_cost_meter.records.snapshot import Snapshot
from vllm_cost_meter.vllm_hooks import engine_core


class Scheduler:
    """Calls the meter as the hooks does for a scheduler; time passes in every step."""

    def __init__(self, gpus: int = 1) -> None:
        self.meter = EngineMeter(
            engine=replace(ENGINE, gpus=gpus),
        )
        self.held: set[str] = set()
        self.bills: list[Bill] = []

    def add(self, *names: str) -> None:
        for name in names:
            self.held.add(name)
            self.meter.run("add_request", lambda m, now, name=name: m.books.open(name, 8, now))

    def schedule(self, **tokens: int) -> object:
        key = object()
        self.meter.run("schedule", lambda m, now: m.books.begin_step(key, tokens, now))
        return key

    def update(
        self,
        key: object,
        *finished: str,
        rejected: dict[str, int] | None = None,
        uncut: dict[str, int] | None = None,
    ) -> None:
        time.sleep(0.001)
        self.meter.run(
            "update_from_output", lambda m, now: m.result_came(key, rejected, now, uncut)
        )
        self.meter.riding = True
        for name in finished:
            self.end(name)
        self.meter.riding = False

    def step(self, *finished: str, **tokens: int) -> None:
        self.update(self.schedule(**tokens), *finished)

    def end(self, name: str, client: int = 0) -> Bill | None:
        self.held.discard(name)
        facts = RequestFacts(
            engine_status="stopped",
            prompt_tokens=8,
            cached_tokens=0,
            output_tokens=3,
            preemptions=0,
        )
        bill = self.meter.run("_free_request", lambda m, now: m.ended(name, client, facts, now))
        if bill is not None:
            self.bills.append(bill)
        return bill

    def take_late(self) -> list[tuple[int, Bill]]:
        late = self.meter.take_late()
        self.bills += [bill for _, bill in late]
        return late

    def fail(self, hook: str = "schedule") -> None:
        def body(_meter: EngineMeter, _now_ns: int) -> None:
            raise RuntimeError("boom")

        assert self.meter.run(hook, body) is None

    def snapshot(self) -> Snapshot:
        """The books, which must balance and agree with the bills that came out."""
        snapshot = self.meter.snapshot(0, self.held, len(self.held), 0, 0.5)
        assert snapshot.difference_ns == 0
        assert snapshot.totals.requests == snapshot.billed_ns
        return snapshot

    def settled(self) -> Snapshot:
        snapshot = self.snapshot()
        self.take_late()
        assert sum(bill.gpu_time_ns for bill in self.bills) == snapshot.billed_ns
        assert [bill.seq for bill in self.bills] == list(range(1, snapshot.last_seq + 1))
        return snapshot


@pytest.fixture
def engine() -> Scheduler:
    return Scheduler()


def boom(_meter: EngineMeter, _now_ns: int, *_args: Any) -> None:
    raise RuntimeError("boom")


# ---- bills


def test_a_natural_finish_rides_and_an_end_between_steps_is_late(engine):
    engine.add("a", "b")
    engine.step("a", a=8, b=8)
    assert [bill.request_id for bill in engine.bills] == ["a"]
    assert engine.end("b", client=3) is None
    ((client, bill),) = engine.take_late()
    assert (client, bill.request_id, bill.seq) == (3, "b", 2)
    assert engine.meter.take_late() == []
    assert engine.settled().totals.in_flight == 0


def test_an_aborted_request_pays_for_its_steps_in_flight(engine):
    engine.add("a", "b")
    first = engine.schedule(a=8, b=8)
    second = engine.schedule(a=1, b=1)
    assert engine.end("a") is None
    assert engine.meter.late == []
    engine.update(first, "b")
    assert engine.take_late() == []
    engine.update(second)
    ((_, bill),) = engine.take_late()
    assert bill.request_id == "a"
    assert bill.steps == 2
    finished = engine.bills[0]
    assert finished.request_id == "b"
    assert bill.gpu_time_ns > finished.gpu_time_ns
    assert engine.settled().totals.tail > 0, "what b's last step used after b was billed"


def cut_tokens_of(bill: Bill) -> tuple[int, int]:
    return bill.sum_of("rejected_tokens"), bill.sum_of("cut_tokens")


def test_what_vllm_cut_off_behind_the_end_stands_apart(engine):
    engine.add("a", "b")
    key = engine.schedule(a=5, b=5)
    # Of both, 4 tokens were sampled: a had 2 before, and ends with 3; b goes on.
    engine.update(key, "a", rejected={"a": 1, "b": 1}, uncut={"a": 6, "b": 6})
    engine.step("b", b=1)
    a, b = engine.bills
    assert cut_tokens_of(a) == (1, 3)
    assert 0 < a.sum_of("cut_ns") < a.gpu_time_ns
    assert (cut_tokens_of(b), b.sum_of("cut_ns")) == ((1, 0), 0)
    engine.settled()


def test_a_request_that_ends_between_steps_had_nothing_cut_off(engine):
    engine.add("a")
    engine.update(engine.schedule(a=5), uncut={"a": 6})
    engine.end("a")
    ((_, bill),) = engine.take_late()
    assert cut_tokens_of(bill) == (0, 0)


def test_of_a_step_that_the_books_do_not_know_nothing_is_cut_off(engine):
    engine.add("a")
    engine.step(a=5)
    key = engine.schedule(a=5)
    engine.fail()
    engine.update(key, "a", uncut={"a": 6})
    assert cut_tokens_of(engine.bills[0]) == (0, 0)
    engine.settled()


def test_a_request_that_never_ran_is_billed_nothing(engine):
    engine.add("a")
    engine.end("a")
    ((_, bill),) = engine.take_late()
    assert (bill.gpu_time_ns, bill.steps, bill.seq) == (0, 0, 1)
    engine.settled()


def test_a_request_whose_arrival_was_missed_is_billed(engine):
    engine.step("a", a=8)
    (bill,) = engine.bills
    assert bill.gpu_time_ns > 0
    assert (bill.prompt_tokens, bill.output_tokens) == (8, 3)
    assert engine.settled().missed_arrivals == 1


def test_a_snapshot_shows_the_steps_in_flight(engine):
    engine.add("a")
    engine.schedule(a=8)
    assert engine.snapshot().steps_in_flight == 1


@pytest.mark.parametrize("riding", [True, False])
def test_a_request_that_ends_twice_is_billed_once(engine, riding):
    engine.add("a")
    engine.step(*(["a"] if riding else []), a=8)
    engine.end("a")
    engine.end("a")
    engine.take_late()
    assert [bill.request_id for bill in engine.bills] == ["a"]
    assert engine.settled().last_seq == 1


def test_a_leaving_request_that_ends_again_is_billed_once(engine):
    engine.add("a")
    key = engine.schedule(a=8)
    engine.end("a")
    engine.end("a")
    engine.update(key)
    assert len(engine.take_late()) == 1
    assert engine.settled().last_seq == 1


def test_an_id_that_is_used_again_is_billed_again(engine):
    for _ in range(3):
        engine.add("a")
        engine.step("a", a=8)
    assert [bill.seq for bill in engine.bills] == [1, 2, 3]
    assert all(bill.gpu_time_ns for bill in engine.bills)
    engine.settled()


def test_cached_tokens_are_those_of_the_first_time_and_within_the_prompt(engine):
    engine.add("a", "b")
    for name, computed in (("a", 6), ("a", 2), ("b", 99)):
        engine.meter.run("schedule", lambda m, _now, n=name, c=computed: m.placed(n, c))
    engine.step("a", "b", a=2, b=1)
    assert {bill.request_id: bill.cached_tokens for bill in engine.bills} == {"a": 6, "b": 8}
    assert engine.meter._begun_with == {}


def test_tokens_that_came_over_a_kv_connector_are_apart_from_cached_ones(engine):
    engine.add("a", "b", "c")
    for name, external in (("a", 4), ("b", 0), ("c", None)):
        engine.meter.run("schedule", lambda m, _now, n=name, e=external: m.placed(n, 6, e))
    engine.step("a", "b", "c", a=2, b=2, c=2)
    assert {
        bill.request_id: (bill.cached_tokens, bill.external_tokens) for bill in engine.bills
    } == {"a": (2, 4), "b": (6, 0), "c": (6, None)}


def test_a_request_that_never_ran_began_with_nothing(engine):
    engine.add("a")
    engine.end("a")
    ((_, bill),) = engine.take_late()
    assert (bill.cached_tokens, bill.external_tokens) == (0, 0)


def test_what_a_request_began_with_is_unknown_after_an_error(engine):
    engine.add("a")
    engine.fail("schedule")
    engine.step("a", a=8)
    assert [bill.external_tokens for bill in engine.bills] == [None]


# ---- errors


def test_an_error_is_contained_and_what_it_lost_is_booked(engine):
    engine.add("a")
    engine.schedule(a=8)
    time.sleep(0.002)
    engine.fail()
    snapshot = engine.snapshot()
    assert snapshot.totals.lost >= 2_000_000
    assert (snapshot.errors, snapshot.state) == (1, "on")
    engine.step("a", a=1)
    assert engine.bills[0].gpu_time_ns > 0
    engine.settled()


def test_ten_errors_in_a_row_switch_it_off_and_all_that_follows_is_lost(engine):
    engine.add("a", "b")
    engine.step("b", a=8, b=8)
    for _ in range(9):
        engine.fail()
    assert engine.snapshot().state == "on"
    engine.fail()
    before = engine.settled()
    assert before.state == "off"
    assert before.totals.in_flight == 0
    own_ns = engine.meter.own_ns
    engine.add("c")
    engine.step("a", "c", a=1, c=8)
    assert engine.meter.own_ns == own_ns, "it costs no time any more"
    assert len(engine.bills) == 1, "nobody is billed any more"
    time.sleep(0.002)
    after = engine.settled()
    assert after.totals.lost - before.totals.lost == after.wall_ns - before.wall_ns


def test_a_success_in_between_keeps_it_on(engine):
    for _ in range(5):
        for _ in range(9):
            engine.fail()
        engine.schedule()
    assert engine.snapshot().state == "on"
    assert engine.snapshot().errors == 45


@pytest.mark.parametrize("hook", ["_dummy_began", "_dummy_ended"])
def test_a_dummy_batch_runs_though_the_meter_fails(engine, monkeypatch, hook):
    core = SimpleNamespace(scheduler=SimpleNamespace(cost_meter=engine.meter))
    ran = []

    def execute_dummy_batch(self: object) -> str:
        ran.append(self)
        time.sleep(0.001)
        return "result"

    wrapped = engine_core._wrap_dummy_batch(execute_dummy_batch)
    monkeypatch.setattr(engine_core, hook, boom)
    assert wrapped(core) == "result"
    assert engine.meter.guard.errors == 1
    assert engine.settled().totals.lost > 0
    monkeypatch.undo()
    assert wrapped(core) == "result"
    assert engine.settled().totals.dummy >= 1_000_000
    assert ran == [core, core]


def test_no_meter_does_nothing():
    assert NoMeter().run("hook", boom) is None
    assert NoMeter().riding is False


# ---- healing


def test_a_request_that_the_scheduler_no_longer_holds_is_written_off(engine):
    engine.add("a", "b")
    engine.step(a=8, b=8)
    engine.held.discard("a")  # its end was never told
    snapshot = engine.settled()
    assert snapshot.totals.lost > 0
    assert engine.meter.books.meter.request_ids() == ["b"]
    engine.step("b", b=1)
    assert [bill.request_id for bill in engine.bills] == ["b"]
    assert engine.settled().totals.in_flight == 0


def test_a_leaving_request_whose_steps_were_abandoned_is_still_billed(engine):
    engine.add("a")
    engine.step(a=8)
    engine.schedule(a=1)
    engine.end("a")
    engine.fail()
    assert engine.meter.late == []
    engine.settled()
    assert [bill.request_id for bill in engine.bills] == ["a"]
    assert engine.bills[0].gpu_time_ns > 0


def test_what_cannot_be_healed_is_given_up_and_snapshots_go_on(engine):
    """A leaving request that the books no longer know: it must not end all snapshots."""
    engine.add("a")
    key = engine.schedule(a=8)
    engine.end("a")
    engine.meter.books.write_off("a", time.monotonic_ns())
    for _ in range(20):
        engine.snapshot()
    engine.update(key)
    engine.add("b")
    engine.step("b", b=8)
    assert engine.settled().state == "on"
    assert [bill.request_id for bill in engine.bills] == ["b"]


# ---- time


def test_own_time_grows_with_every_hook(engine):
    engine.add("a")
    before = engine.snapshot().own_ns
    for _ in range(100):
        engine.step(a=1)
    own_ns = engine.snapshot().own_ns - before
    assert 0 < own_ns < 100 * 1_000_000


def test_a_snapshot_is_own_time_of_the_next_one(engine):
    engine.add("a")
    first = engine.snapshot()
    assert engine.meter.own_ns > first.own_ns
    assert engine.snapshot().own_ns > first.own_ns


def test_time_that_a_hook_took_before_it_failed_is_own_time(engine):
    def slow(_meter: EngineMeter, _now_ns: int) -> None:
        time.sleep(0.002)
        raise RuntimeError("boom")

    engine.meter.run("hook", slow)
    assert engine.meter.own_ns >= 2_000_000


def test_gpu_time_is_wall_time_times_gpus():
    engine = Scheduler(gpus=4)
    engine.add("a")
    engine.step("a", a=8)
    snapshot = engine.settled()
    assert snapshot.totals.total() == 4 * snapshot.wall_ns
    assert snapshot.engine.gpus == 4


def test_startup_is_booked_since_the_process_was_created():
    clock = Clock(lambda: 900, lambda: 5_000, lambda: 200)
    snapshot = EngineMeter(engine=ENGINE, clock=clock).snapshot(0, (), 0, 0, None)
    assert (snapshot.totals.startup, snapshot.wall_ns) == (700, 700)
    assert (snapshot.started_at_ns, snapshot.taken_at_ns) == (4_300, 5_000)


def test_the_creation_of_this_process_is_where_psutil_sees_it():
    psutil = pytest.importorskip("psutil")
    created_s = time.time() - (time.monotonic_ns() - process_created_ns()) / 1e9
    # The kernel counts in 10 ms; psutil adds the boot time, which is rounded to a second.
    assert abs(created_s - psutil.Process().create_time()) < 1.05
    assert process_created_ns() == pytest.approx(process_created_ns(), abs=50_000_000)


def test_the_creation_of_a_process_is_right_to_its_clock_tick(tmp_path):
    """The name of the process must not confuse it: it holds what /proc/self/stat is cut at."""
    python = tmp_path / ") R 1 (x y"
    python.symlink_to(sys.executable)
    before_ns = time.monotonic_ns()
    code = "from vllm_cost_meter.engine.meter import process_created_ns as p; print(p())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [python, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    tick_ns = 10_000_000
    assert before_ns - tick_ns <= int(child.stdout) <= time.monotonic_ns()


def test_without_proc_the_time_before_is_not_metered():
    before_ns = time.monotonic_ns()
    assert before_ns <= process_created_ns(Path("/nowhere")) <= time.monotonic_ns()
