"""The books balance at every instant, whatever the engine does.

A rule-based machine plays an engine: requests come, go and are aborted, steps overlap, hours pass,
the wall clock jumps, the engine sleeps, hooks fail. Whenever somebody looks, the classes must add
up to wall x gpus to the nanosecond, over the run and hour by hour, and the bills to what was
billed; and what the engine waited for is known, however seldom somebody looks.
"""

from collections import Counter
from dataclasses import replace
from functools import reduce

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from tests.support.builders import ENGINE, ENGINE_STATE
from tests.support.examples import examples
from vllm_cost_meter.engine.books import EngineBooks, RequestFacts
from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.bill import Bill, UsagePiece
from vllm_cost_meter.records.engine import OPERATOR, VICTIM
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.units.time import NS_PER_HOUR

START_UNIX_NS = 1_790_000_000 * 10**9


def facts(status: str = "stopped") -> RequestFacts:
    return RequestFacts(
        engine_status=status, prompt_tokens=5, cached_tokens=0, output_tokens=1, preemptions=0
    )


def used_by(bill: Bill) -> Accrued:
    """What a bill says that was accrued in all."""
    names = [name for name in Accrued._fields if name in UsagePiece._fields]
    amounts = {name: bill.sum_of(name) for name in names}
    return Accrued(**amounts, steps=bill.steps, batch=bill.batch)


class Engine(RuleBasedStateMachine):
    paid_by = VICTIM

    def __init__(self) -> None:
        super().__init__()
        self.now_ns = 50_000_000
        self.unix_ahead_ns = START_UNIX_NS
        self.books = EngineBooks(
            run_id="run",
            engine=replace(ENGINE, gpus=3, kv_block_size=None, preemption_paid_by=self.paid_by),
            created_ns=7,
            now_ns=self.now_ns,
            unix_ns=self.unix_ahead_ns + self.now_ns,
        )
        self.open: list[str] = []
        self.leaving: list[str] = []
        self.steps: list[tuple[object, dict[str, int]]] = []
        self.bills: list[Bill] = []
        self.hours: dict[int, ClassTotals] = {}
        self.live: dict[str, Accrued] = {}
        self.acknowledged = 0
        self.names = 0
        self.asleep = False
        self.waited: Counter[str] = Counter()

    @rule(ns=st.one_of(st.integers(0, 10**7), st.integers(0, 3 * NS_PER_HOUR)))
    def time_passes(self, ns: int) -> None:
        self.now_ns += ns
        if not self.steps:
            awake = "host" if self.open or self.leaving else "idle"
            self.waited["sleep" if self.asleep else awake] += ns * self.books.gpus

    @rule(ns=st.integers(-2 * NS_PER_HOUR, 2 * NS_PER_HOUR))
    def the_wall_clock_is_set(self, ns: int) -> None:
        self.unix_ahead_ns += ns

    @rule()
    def a_request_comes(self) -> None:
        self.names += 1
        self.open.append(f"r{self.names}")
        self.books.open(self.open[-1], 5, self.now_ns)

    @precondition(lambda self: self.open and len(self.steps) < 4)
    @rule(data=st.data())
    def a_step_is_scheduled(self, data: st.DataObject) -> None:
        batch = data.draw(st.lists(st.sampled_from(self.open), min_size=1, unique=True))
        key = object()
        tokens = {name: data.draw(st.integers(1, 500)) for name in batch}
        self.books.begin_step(key, tokens, self.now_ns)
        self.steps.append((key, tokens))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def a_request_is_preempted_and_begins_again(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.open))
        self.books.preempt(name, self.now_ns)
        self.books.meter.position(name, 0, True)

    @precondition(lambda self: self.steps)
    @rule(skip=st.booleans())
    def a_result_comes(self, skip: bool) -> None:
        if skip and len(self.steps) > 1:
            self.steps.pop(0)
        key, _ = self.steps.pop(0)
        assert self.books.end_step(key, self.now_ns)
        for name in self.books.meter.drained():
            self.leaving.remove(name)
            self.bills.append(self.books.bill(name, facts("aborted"), self.now_ns))

    @rule()
    def a_result_of_an_unknown_step_comes(self) -> None:
        assert not self.books.end_step(object(), self.now_ns)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), looked=st.booleans())
    def a_request_finishes(self, data: st.DataObject, looked: bool) -> None:
        name = data.draw(st.sampled_from(self.open))
        if looked:
            self.the_books_balance()
        self.open.remove(name)
        bill = self.books.bill(name, facts(), self.now_ns)
        self.bills.append(bill)
        if looked:
            assert used_by(bill) == self.live.get(name, Accrued())

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def a_request_is_aborted(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.open))
        self.open.remove(name)
        if self.books.leave(name):
            self.bills.append(self.books.bill(name, facts("aborted"), self.now_ns))
        else:
            self.leaving.append(name)

    @rule(asleep=st.booleans())
    def it_sleeps_or_wakes(self, asleep: bool) -> None:
        self.asleep = asleep
        (self.books.fall_asleep if asleep else self.books.wake_up)(self.now_ns)

    @rule(ns=st.integers(0, 10**9))
    def a_dummy_batch_runs(self, ns: int) -> None:
        self.books.begin_dummy(self.now_ns)
        self.now_ns += ns
        self.books.end_dummy(self.now_ns)

    @rule()
    def a_hook_fails(self) -> None:
        self.the_books_balance()  # what was not booked before would be lost
        self.books.abandon(self.now_ns)
        self.steps.clear()
        for name in self.leaving:
            assert self.books.leave(name)
            self.bills.append(self.books.bill(name, facts("aborted"), self.now_ns))
        self.leaving.clear()

    @precondition(lambda self: self.open)
    @rule()
    def a_request_is_forgotten(self) -> None:
        self.books.write_off(self.open.pop(), self.now_ns)

    @rule()
    def somebody_looks(self) -> None:
        self.the_books_balance()

    def teardown(self) -> None:
        self.the_books_balance()

    def the_books_balance(self) -> None:
        snapshot = self.books.snapshot(
            self.now_ns, self.unix_ahead_ns + self.now_ns, self.acknowledged, ENGINE_STATE
        )
        assert snapshot.difference_ns == 0
        waited = {name: getattr(snapshot.totals, name) for name in ("idle", "host", "sleep")}
        assert {name: ns for name, ns in waited.items() if ns} == +self.waited
        assert all(amount >= 0 for amount in snapshot.totals.as_dict().values())
        self.hours.update(snapshot.hours)
        total = reduce(ClassTotals.plus, self.hours.values(), ClassTotals())
        assert total == snapshot.totals
        assert all(
            amount >= 0 for cell in self.hours.values() for amount in cell.as_dict().values()
        )
        assert snapshot.live_ns + snapshot.step_ns == snapshot.totals.in_flight
        assert {name for name, _ in snapshot.live} <= {*self.open, *self.leaving}
        self.live = dict(snapshot.live)
        assert [bill.seq for bill in self.bills] == list(range(1, snapshot.last_seq + 1))
        assert sum(bill.gpu_time_ns for bill in self.bills) == snapshot.billed_ns
        assert snapshot.billed_ns == snapshot.totals.requests
        assert snapshot.totals.recomputed == self.books.meter.uncharged_ns
        assert self.paid_by == OPERATOR or not snapshot.totals.recomputed
        by_hour: Counter[int] = Counter()
        for bill in self.bills:
            for piece in bill.pieces:
                by_hour[piece.hour] += piece.gpu_time_ns
        assert {h: c.requests for h, c in self.hours.items() if c.requests} == +by_hour
        self.acknowledged = snapshot.number


class EngineWhoseOperatorPaysPreemptions(Engine):
    paid_by = OPERATOR


TestBooksWherePreemptionsAreTheOperators = EngineWhoseOperatorPaysPreemptions.TestCase
TestBooksWherePreemptionsAreTheOperators.settings = settings(
    max_examples=examples(60), stateful_step_count=40
)
TestBooks = Engine.TestCase
TestBooks.settings = settings(max_examples=examples(60), stateful_step_count=40)
