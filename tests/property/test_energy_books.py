"""Whatever the engine does and the counter says, no millijoule of a run is made or lost.

A rule-based machine plays an engine whose energy is read now and then: requests come, go and are
forgotten, steps run across the readings, readings fail, hours pass, snapshots are lost on their
way. After each snapshot the classes must add up to the energy read, over the run and over the hours
that the reader has, and what was told of requests to the class `requests`. Who ran while the energy
was unknown is known from the books' own figures, by a judge of a few lines.
"""

from collections import defaultdict
from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from tests.property.test_books import START_UNIX_NS, facts
from tests.support.builders import ENGINE, ENGINE_STATE
from vllm_cost_meter.engine.books import EngineBooks
from vllm_cost_meter.engine.energy.books import EnergyBooks, WindowEnd
from vllm_cost_meter.records.bill import Bill
from vllm_cost_meter.records.energy import RunEnergy
from vllm_cost_meter.units.time import NS_PER_HOUR


class MeteredEngine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_ns = 50_000_000
        self.books = EngineBooks(
            run_id="run",
            engine=replace(ENGINE, gpus=2, kv_block_size=None),
            created_ns=7,
            now_ns=self.now_ns,
            unix_ns=START_UNIX_NS + self.now_ns,
        )
        self.energy = EnergyBooks(2)
        self.open: list[str] = []
        self.steps: list[object] = []
        self.names = 0
        self.read_mj = 0
        self.seqs: dict[str, int] = {}
        # The judge's: GPU-ns at the window before, who ran while the energy was unknown.
        self.had: dict[str, int] = {}
        self.missed: set[str] = set()
        self.billed: dict[str, int] = {}
        # The reader's.
        self.acknowledged = 0
        self.hours: dict[int, dict[str, int]] = {}
        self.told: dict[tuple[int, int], int | None] = {}

    @rule(ns=st.integers(0, 2 * NS_PER_HOUR))
    def hours_pass(self, ns: int) -> None:
        self.now_ns += ns

    @rule()
    def a_request_comes(self) -> None:
        self.names += 1
        self.open.append(f"r{self.names}")
        self.books.open(self.open[-1], 5, self.now_ns)

    @precondition(lambda self: self.open and len(self.steps) < 3)
    @rule(data=st.data(), ns=st.integers(0, 10**9))
    def a_step_is_scheduled(self, data: st.DataObject, ns: int) -> None:
        self.now_ns += ns
        batch = data.draw(st.lists(st.sampled_from(self.open), min_size=1, unique=True))
        key = object()
        tokens = {name: data.draw(st.integers(1, 500)) for name in batch}
        self.books.begin_step(key, tokens, self.now_ns)
        self.steps.append(key)

    @precondition(lambda self: self.steps)
    @rule(ns=st.integers(1, 10**9))
    def a_result_comes(self, ns: int) -> None:
        self.now_ns += ns
        self.books.end_step(self.steps.pop(0), self.now_ns)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def a_request_finishes(self, data: st.DataObject) -> None:
        self.bill(data.draw(st.sampled_from(self.open)))

    def bill(self, name: str) -> Bill:
        self.open.remove(name)
        bill = self.books.bill(name, facts(), self.now_ns)
        self.energy.billed(bill.seq, name, bill.gpu_time_ns)
        self.billed[name] = bill.gpu_time_ns
        self.seqs[name] = bill.seq
        return bill

    @precondition(lambda self: self.open)
    @rule()
    def a_request_is_forgotten(self) -> None:
        self.books.write_off(self.open.pop(), self.now_ns)

    @rule()
    def a_hook_fails(self) -> None:
        self.books.abandon(self.now_ns)
        self.steps.clear()

    @rule(
        energy_mj=st.none() | st.integers(1, 10**7),
        ns=st.sampled_from((0, 1, 10**9)),
        arrives=st.booleans(),
        acknowledges=st.booleans(),
    )
    def it_is_read(self, energy_mj: int | None, ns: int, arrives: bool, acknowledges: bool) -> None:
        self.now_ns += ns
        unix_ns = START_UNIX_NS + self.now_ns
        snapshot = self.books.snapshot(self.now_ns, unix_ns, 0, ENGINE_STATE)
        end = WindowEnd(
            snapshot.number,
            unix_ns // NS_PER_HOUR,
            snapshot.totals,
            self.books.open_gpu_ns(),
            snapshot.step_ns,
            self.books.running(),
        )
        self.judge(end, is_known=energy_mj is not None)
        self.read_mj += energy_mj or 0
        reason = "error: no luck" if energy_mj is None else None
        self.energy.close_window(end, energy_mj, reason, 700_000)
        energy = self.energy.energy(self.acknowledged, [])
        self.check(energy)
        if ns and energy_mj is not None and not self.open and not self.steps:
            assert energy.classes.get("in_flight", 0) == 0
        if arrives:
            self.arrive(energy)
            if acknowledges:
                self.acknowledged = snapshot.number

    def judge(self, end: WindowEnd, is_known: bool) -> None:
        now = {**end.open_gpu_ns, **self.billed}
        if not is_known:
            self.missed |= {name for name, ns in now.items() if ns > self.had.get(name, 0)}
            if end.running_ns:
                self.missed |= {name for name in end.running if name in end.open_gpu_ns}
        self.had, self.billed = now, {}

    def check(self, energy: RunEnergy) -> None:
        if energy.energy_mj is None:
            assert self.read_mj == 0
            return
        assert energy.energy_mj == self.read_mj == sum(energy.classes.values())
        assert min(energy.classes.values()) >= 0

    def arrive(self, energy: RunEnergy) -> None:
        self.hours |= energy.hours
        for told in energy.reported:
            key = (told.seq, told.hour)
            assert self.told.setdefault(key, told.energy_mj) == told.energy_mj
            assert (told.reason is None) == (told.energy_mj is not None)
        by_seq: dict[int, list[int | None]] = defaultdict(list)
        for (seq, _), mj in self.told.items():
            by_seq[seq].append(mj)
        assert set(by_seq) == set(self.seqs.values())
        for name, seq in self.seqs.items():
            assert (None in by_seq[seq]) == (name in self.missed)
        if energy.energy_mj is not None:
            known_mj = sum(mj for mj in self.told.values() if mj is not None)
            assert known_mj == energy.classes["requests"]
            for name, mj in energy.classes.items():
                assert mj == sum(cell[name] for cell in self.hours.values())


TestEnergyBooks = MeteredEngine.TestCase
TestEnergyBooks.settings = settings(stateful_step_count=60)
