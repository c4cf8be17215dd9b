"""energy_meter.py: an engine's energy, from the counter of its GPUs to its snapshots.

Goal: whatever the driver does, a figure is what the counter said, and null says why.
Method: the real engine side on the real binding, a library that the tests compile (`nvml.py`), and
a clock that the tests move.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from msgspec import msgpack

from tests.support.builders import ENGINE, make_part
from tests.support.ledger_writer import LedgerWriter
from tests.support.nvml import GPU_IS_LOST, TIMEOUT, A, B, Card, Machine, S
from vllm_cost_meter.engine.books import RequestFacts
from vllm_cost_meter.engine.energy import books as energy_books
from vllm_cost_meter.engine.energy.nvml import RETRY_NS, EnergyCounter
from vllm_cost_meter.engine.meter import Clock, EngineMeter
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import EnergyPrice, PriceBook
from vllm_cost_meter.records.bill import Bill
from vllm_cost_meter.records.energy import RequestEnergy, RunEnergy
from vllm_cost_meter.records.snapshot import Snapshot
from vllm_cost_meter.units.time import NS_PER_HOUR

HOUR = 500_000
MS = 10**6
ENVIRON = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


class Engine:
    """An engine whose steps take as long as the test says."""

    def __init__(self, ordinals: tuple[int, ...] = (0,)) -> None:
        self.now_ns = 1_000 * S
        clock = Clock(
            monotonic_ns=lambda: self.now_ns,
            unix_ns=lambda: HOUR * NS_PER_HOUR + self.now_ns - 1_000 * S,
            created_ns=lambda: self.now_ns - 20 * S,
        )
        self.meter = EngineMeter(
            engine=replace(ENGINE, gpus=max(len(ordinals), 1)),
            energy=EnergyCounter(ordinals, ENVIRON),
            clock=clock,
        )
        self.known: set[str] = set()
        self.acknowledged = 0

    def idle(self, ms: int) -> None:
        self.now_ns += ms * MS

    def step(self, ms: int, *names: str) -> None:
        """Run a step with one token of each request."""
        key = object()
        for name in names:
            self.known.add(name)
            self.meter.books.open(name, 8, self.now_ns)
        self.meter.books.begin_step(key, dict.fromkeys(names, 1), self.now_ns)
        self.now_ns += ms * MS
        self.meter.result_came(key, None, self.now_ns)

    def end(self, name: str) -> Bill:
        self.known.discard(name)
        self.meter.riding = True
        facts = RequestFacts(
            engine_status="stopped",
            prompt_tokens=8,
            cached_tokens=0,
            output_tokens=1,
            preemptions=0,
        )
        bill = self.meter.ended(name, 0, facts, self.now_ns)
        self.meter.riding = False
        assert bill is not None
        return bill

    def snapshot(self) -> Snapshot:
        """Take a snapshot, as it comes over the wire; it is acknowledged at once."""
        wire = self.meter.snapshot(self.acknowledged, self.known, 0, 0, None).to_wire()
        snapshot = Snapshot.from_wire(msgpack.decode(msgpack.encode(wire)))
        assert snapshot.difference_ns == 0
        self.acknowledged = snapshot.number
        return snapshot

    def look(self) -> RunEnergy:
        energy = self.snapshot().energy
        assert sum(energy.classes.values()) == (energy.energy_mj or 0)
        return energy


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    return lambda *ordinals: Engine(ordinals)


def known(seq: int, mj: int) -> tuple[RequestEnergy]:
    return (RequestEnergy(seq, HOUR, mj, None),)


def unknown(seq: int, code: str) -> tuple[RequestEnergy]:
    return (RequestEnergy(seq, HOUR, None, code),)


def test_a_request_uses_what_the_counter_moved_while_it_ran(make, machine):
    machine.add(Card(A, energy_mj=5_000_000))
    engine = make(0)
    engine.idle(1_000)
    machine.use(70_000)
    assert engine.look().classes["idle"] == 70_000
    engine.step(800, "a")
    engine.idle(200)  # it waits for nothing: its engine does
    machine.use(534_000)
    assert engine.look().classes["in_flight"] == 520_000
    engine.end("a")
    engine.idle(1_000)
    machine.use(70_000)
    energy = engine.look()
    assert energy.reported == known(1, 520_000)
    assert (energy.energy_mj, energy.reason, energy.unknown_ns) == (674_000, None, 0)
    assert energy.devices == (("NVIDIA H100 80GB HBM3", A),)


def test_an_aborted_request_is_told_too(make, machine):
    machine.add(Card(A))
    engine = make(0)
    engine.step(1_000, "a")
    facts = RequestFacts(
        engine_status="aborted", prompt_tokens=8, cached_tokens=0, output_tokens=1, preemptions=0
    )
    engine.known.discard("a")
    assert engine.meter.ended("a", 0, facts, engine.now_ns) is None
    machine.use(600_000)
    assert engine.look().reported == known(1, 600_000)


def test_two_gpus_are_one_engine(make, machine):
    machine.add(Card(A), Card(B, name="NVIDIA L4"))
    engine = make(0, 1)
    engine.step(1_000, "a")
    engine.end("a")
    machine.use(600_000, 70_001)
    energy = engine.look()
    assert energy.reported == known(1, 670_001)
    assert energy.devices == (("NVIDIA H100 80GB HBM3", A), ("NVIDIA L4", B))


def test_a_counter_that_wraps_is_not_noticed(make, machine):
    machine.add(Card(A, energy_mj=2**32 - 100_000))
    engine = make(0)
    engine.step(1_000, "a")
    engine.end("a")
    machine.cards[0].energy_mj = 500_000
    machine.tell()
    assert engine.look().reported == known(1, 600_000)


def run_windows(engine: Engine, machine: Machine, *names: str) -> list[RunEnergy]:
    """Let one request after another run for a window each; the GPU uses 600 J in each."""
    energies = []
    for name in names:
        engine.step(1_000, name)
        engine.end(name)
        for card in machine.cards:
            card.energy_mj += 600_000
        machine.tell()
        energies.append(engine.look())
    return energies


def test_an_error_of_the_driver_makes_two_windows_unknown_and_no_more(make, machine):
    machine.add(Card(A))
    engine = make(0)
    (before,) = run_windows(engine, machine, "a")
    machine.cards[0].energy_result = TIMEOUT
    (during,) = run_windows(engine, machine, "b")
    machine.cards[0].energy_result = 0
    after, later = run_windows(engine, machine, "c", "d")
    assert before.reported == known(1, 600_000)
    assert during.reported == unknown(2, "error")
    assert during.reason.startswith("error: NVML says")
    assert after.reported == unknown(3, "first")
    assert later.reported == known(4, 600_000)
    assert (later.energy_mj, later.unknown_ns) == (1_200_000, 2 * S)


def test_a_card_that_is_lost_and_found_costs_the_windows_without_it(make, machine):
    machine.add(Card(A))
    engine = make(0)
    run_windows(engine, machine, "a")
    machine.cards[0].energy_result = GPU_IS_LOST
    run_windows(engine, machine, "b")
    machine.cards[0].energy_result = 0
    (lost,) = run_windows(engine, machine, "c")
    assert lost.reported == unknown(3, "error"), "its handle stays dead"
    engine.idle(RETRY_NS // MS)
    found, later = run_windows(engine, machine, "d", "e")
    assert found.reported == unknown(4, "first")
    assert later.reported == known(5, 600_000)
    assert later.energy_mj == 1_200_000


def test_a_request_that_outlives_a_lost_card_has_no_energy_and_others_do(make, machine):
    machine.add(Card(A))
    engine = make(0)
    engine.step(1_000, "long")
    run_windows(engine, machine, "a")
    machine.cards[0].energy_result = TIMEOUT
    engine.step(1_000, "long")
    run_windows(engine, machine, "b")
    machine.cards[0].energy_result = 0
    run_windows(engine, machine, "c", "d")
    engine.end("long")
    (energy,) = run_windows(engine, machine, "e")
    assert energy.reported == unknown(5, "error") + known(6, 600_000)
    assert energy.classes["unattributed"] == 300_000


@pytest.mark.parametrize("card", [Card(A, mig_mode=1), Card(A, energy_result=3), None])
def test_gpus_that_cannot_count_make_no_rows_and_no_work(make, machine, card):
    if card is not None:
        machine.add(card)
    engine = make(*([0] if card else []))
    (energy,) = run_windows(engine, machine, "a")
    assert (energy.energy_mj, energy.classes, energy.reported) == (None, {}, ())
    assert energy.reason.partition(":")[0] in ("mig", "no_counter", "no_device")
    assert energy.unknown_ns == S * engine.meter.books.gpus
    assert not engine.meter.energy._books._billed


def test_a_reading_is_made_once_a_snapshot_and_never_on_the_way_of_a_step(make, monkeypatch):
    reads = itertools.count()
    read = EnergyCounter.read
    monkeypatch.setattr(EnergyCounter, "read", lambda *args: (next(reads), read(*args))[1])
    engine = make(0)
    assert next(reads) == 1, "the first window begins with the engine"
    for _ in range(5):
        engine.step(10, "a")
    engine.end("a")
    assert next(reads) == 2
    engine.look()
    assert next(reads) == 4


def boom(*_args: object, **_kwargs: object) -> None:
    raise RuntimeError("no such luck")


@pytest.mark.parametrize("name", ["billed", "close_window", "energy"])
def test_an_error_of_the_energy_books_costs_the_energy_and_nothing_else(
    make, machine, monkeypatch, caplog, name
):
    machine.add(Card(A))
    engine = make(0)
    (before,) = run_windows(engine, machine, "a")
    monkeypatch.setattr(energy_books.EnergyBooks, name, boom)
    caplog.set_level(logging.ERROR)
    *_, after = run_windows(engine, machine, "b", "c", "d")
    assert after.energy_mj == before.energy_mj == 600_000
    assert after.unknown_ns == 3 * S
    assert after.reason == "error: the meter failed with RuntimeError('no such luck')"
    assert engine.meter.guard.errors == 0
    assert [record.name for record in caplog.records] == ["vllm.cost_meter"]


# All the way to the reports


class Books:
    """A ledger that the engine's bills and snapshots go into, as they do in a server.

    Energy is priced at a nano-USD for each millijoule.
    """

    def __init__(self, url: str) -> None:
        self.writer = LedgerWriter(url)
        self.writer.start()
        self.writer.commit().result(10)
        energy_price = EnergyPrice("energy_prices[0]", Decimal("3.6"), "the bill", 0)
        self.reader = LedgerReader(url, book=PriceBook(energy_prices=[energy_price]))

    def run(self, engine: Engine, machine: Machine, name: str, ms: int = 1_000) -> None:
        """Let a request run alone, bill it, and end the window: the GPU used 600 W."""
        engine.step(ms, name)
        self.writer.put(make_part(engine.end(name), tenant="alice", http_request_id=name))
        for card in machine.cards:
            card.energy_mj += 600 * ms
        machine.tell()
        self.writer.commit(engine.snapshot()).result(10)

    def energies(self) -> dict[str, tuple[int | None, str | None]]:
        rows = self.reader.requests()["requests"]
        found = {r["http_request_id"]: (r["energy_mj"], r["energy_reason"]) for r in rows}
        return dict(sorted(found.items()))


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    books = Books(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield books
    books.writer.close()
    books.reader.close()


def test_reports_have_what_was_read_and_null_for_what_was_not(make, machine, books):
    machine.add(Card(A, energy_mj=2**32 - 900_000))
    engine = make(0)
    books.run(engine, machine, "a")
    machine.cards[0].energy_mj -= 2**32  # it wraps in the next window
    books.run(engine, machine, "b")
    machine.cards[0].energy_result = GPU_IS_LOST
    books.run(engine, machine, "c")
    machine.cards[0].energy_result = 0
    engine.idle(RETRY_NS // MS)
    books.run(engine, machine, "d")
    books.run(engine, machine, "e", ms=500)
    assert books.energies() == {
        "a": (600_000, None),
        "b": (600_000, None),
        "c": (None, "error"),
        "d": (None, "first"),
        "e": (300_000, None),
    }
    now_ns = HOUR * NS_PER_HOUR + 60 * S
    report = books.reader.tenants(as_of=AsOf(now_ns, 0))
    alice = report["tenants"][0]
    assert (alice["energy_mj"], alice["energy_unknown_requests"]) == (1_500_000, 2)
    assert report["energy_mj"] == 1_500_000
    assert alice["energy_cost_nanousd"] == report["energy_cost_nanousd"] == 1_500_000
    (run,) = report["runs"]
    assert run["energy_unknown_ns"] == 2 * S + RETRY_NS
    assert run["energy_reason"].startswith("first: ")
    assert run["devices"] == [{"name": "NVIDIA H100 80GB HBM3", "uuid": A}]
    (audit,) = books.reader.audit(as_of=AsOf(now_ns, 0))["runs"]
    assert (audit["energy_difference_mj"], audit["balanced"]) == (0, True)


def test_reports_of_an_engine_on_the_cpu_say_why_they_have_no_energy(make, machine, books):
    engine = make()
    books.run(engine, machine, "a")
    reason = "no_device: expected the ordinals of the engine's GPUs, got []"
    assert books.energies() == {"a": (None, reason)}
    report = books.reader.tenants(as_of=AsOf(HOUR * NS_PER_HOUR, 0))
    assert report["energy_mj"] is None
    assert {row["energy_mj"] for row in report["tenants"]} == {None}
    assert (report["runs"][0]["devices"], report["runs"][0]["energy_reason"]) == (None, reason)
    assert books.reader.audit(as_of=AsOf(HOUR * NS_PER_HOUR, 0))["balanced"]
