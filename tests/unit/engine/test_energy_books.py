"""energy_books.py: who used the energy of each window, in worlds with figures known by hand.

One GPU, windows of a second, and the same power whatever it does where a test is not about power:
so each millijoule stands for as much time.
"""

from typing import Any

import pytest

from vllm_cost_meter.engine.energy.books import UNREPORTED_MAX, EnergyBooks, WindowEnd
from vllm_cost_meter.records.energy import RequestEnergy, RunEnergy
from vllm_cost_meter.records.snapshot import ClassTotals

MS, S = 10**6, 10**9
HOUR = 500_000
STARTUP_NS = 20 * S


class Engine:
    """Tells the energy books what an engine would: time by class and request, readings, bills."""

    def __init__(self, unreported_max: int = UNREPORTED_MAX) -> None:
        self.books = EnergyBooks(gpus=1, unreported_max=unreported_max)
        self.totals = ClassTotals(startup=STARTUP_NS)
        self.open: dict[str, int] = {}
        self.running: dict[str, int] = {}
        self.number = 0
        self.seq = 0
        self.hour = HOUR
        self.acknowledged = 0

    def spend(self, ms: int, name: str) -> None:
        """Let time pass in a class."""
        setattr(self.totals, name, getattr(self.totals, name) + ms * MS)

    def work(self, **ms: int) -> None:
        """Let steps run for requests."""
        for name, each in ms.items():
            self.open[name] = self.open.get(name, 0) + each * MS
            self.spend(each, "in_flight")

    def run(self, ms: int, *names: str) -> None:
        """Let a step run that has no result yet."""
        self.running = dict.fromkeys(names, ms * MS)
        self.running_ns = ms * MS

    def result(self, **ms: int) -> None:
        """Let that step's result come."""
        self.running = {}
        self.work(**ms)

    def bill(self, name: str) -> int:
        self.seq += 1
        gpu_ns = self.open.pop(name)
        self.totals.in_flight -= gpu_ns
        self.totals.requests += gpu_ns
        self.books.billed(self.seq, name, gpu_ns)
        return self.seq

    def read(self, energy_mj: int | None, reason: str = "error: GPU is lost") -> RunEnergy:
        """End a window; the energy must add up, whatever it was."""
        self.number += 1
        running_ns = max(self.running.values(), default=0)
        end = WindowEnd(
            self.number,
            self.hour,
            self.totals.plus(ClassTotals(in_flight=running_ns)),
            dict(self.open),
            running_ns,
            list(self.running),
        )
        self.books.close_window(end, energy_mj, reason if energy_mj is None else None, None)
        energy = self.books.energy(self.acknowledged, [("a GPU", "GPU-1")])
        assert sum(energy.classes.values()) == (energy.energy_mj or 0)
        return energy


@pytest.fixture
def engine() -> Engine:
    return Engine()


def used(energy: RunEnergy) -> dict[str, int]:
    """Return the classes that used something."""
    return {name: mj for name, mj in energy.classes.items() if mj}


# A window


def test_a_window_is_divided_over_requests_and_classes(engine):
    engine.work(a=600, b=200)
    engine.spend(150, "tail")
    engine.spend(50, "idle")
    a, b = engine.bill("a"), engine.bill("b")
    energy = engine.read(100_000)
    assert used(energy) == {"requests": 80_000, "tail": 15_000, "idle": 5_000}
    assert energy.reported == (
        RequestEnergy(a, HOUR, 60_000, None),
        RequestEnergy(b, HOUR, 20_000, None),
    )
    assert (energy.energy_mj, energy.reason, energy.unknown_ns) == (100_000, None, 0)
    assert energy.devices == (("a GPU", "GPU-1"),)


def test_quiet_time_pays_for_idle_power_once_the_engine_was_idle(engine):
    engine.spend(1_000, "idle")
    assert used(engine.read(70_000)) == {"idle": 70_000}
    engine.work(a=100)
    engine.spend(900, "idle")
    assert used(engine.read(123_000)) == {"idle": 70_000 + 63_000, "in_flight": 60_000}


def test_a_request_that_lives_for_many_windows_is_told_once_with_all_of_them(engine):
    for _ in range(3):
        engine.work(a=500)
        engine.spend(500, "tail")
        energy = engine.read(1_000)
        assert energy.reported == ()
    assert used(energy) == {"in_flight": 1_500, "tail": 1_500}
    engine.work(a=1_000)
    seq = engine.bill("a")
    energy = engine.read(2_000)
    assert energy.reported == (RequestEnergy(seq, HOUR, 3_500, None),)
    assert used(energy) == {"requests": 3_500, "tail": 1_500}


def test_a_request_that_never_ran_used_no_energy(engine):
    engine.open["a"] = 0
    seq = engine.bill("a")
    engine.spend(1_000, "idle")
    assert engine.read(70_000).reported == (RequestEnergy(seq, HOUR, 0, None),)


def test_a_long_step_is_not_charged_to_the_idle_moment_before_it(engine):
    engine.spend(100, "idle")
    engine.run(900, "a")
    assert used(engine.read(1_000)) == {"idle": 100, "in_flight": 900}
    engine.run(1_900, "a")
    assert used(engine.read(1_000)) == {"idle": 100, "in_flight": 1_900}
    engine.result(a=2_400)
    engine.spend(500, "idle")
    seq = engine.bill("a")
    energy = engine.read(1_000)
    assert used(energy) == {"idle": 600, "requests": 2_400}
    assert energy.reported == (RequestEnergy(seq, HOUR, 2_400, None),)


def test_a_window_of_no_time_is_read_together_with_the_next(engine):
    assert used(engine.read(300)) == {"in_flight": 300}
    engine.spend(1_000, "idle")
    assert used(engine.read(700)) == {"idle": 1_000}


def test_what_was_written_off_is_lost_with_its_energy(engine):
    engine.work(a=1_000)
    engine.read(1_000)
    engine.work(a=500)
    engine.spend(500, "host")
    written_off_ns = engine.open.pop("a")
    engine.totals.in_flight -= written_off_ns
    engine.totals.lost += written_off_ns
    assert used(engine.read(1_000)) == {"lost": 1_500, "host": 500}


def test_an_id_that_is_used_again_is_another_request(engine):
    engine.work(a=600)
    engine.read(600)
    engine.work(a=200)
    first = engine.bill("a")
    engine.work(a=100)
    second = engine.bill("a")
    engine.work(a=50)
    energy = engine.read(350)
    assert energy.reported == (
        RequestEnergy(first, HOUR, 800, None),
        RequestEnergy(second, HOUR, 100, None),
    )
    assert used(energy) == {"requests": 900, "in_flight": 50}


# Hours


def test_energy_belongs_to_the_hour_in_which_its_window_ends(engine):
    engine.work(a=1_000)
    first = engine.read(1_000)
    assert first.hours[HOUR]["in_flight"] == 1_000
    engine.acknowledged = engine.number
    engine.hour += 1
    engine.work(a=500)
    engine.spend(500, "idle")
    seq = engine.bill("a")
    energy = engine.read(1_000)
    assert energy.reported == (
        RequestEnergy(seq, HOUR, 1_000, None),
        RequestEnergy(seq, HOUR + 1, 500, None),
    )
    assert {n: mj for n, mj in energy.hours[HOUR].items() if mj} == {"requests": 1_000}
    now = energy.hours[HOUR + 1]
    assert {n: mj for n, mj in now.items() if mj} == {"requests": 500, "idle": 500}


def test_an_hour_that_has_ended_no_longer_holds_what_was_not_divided_then(engine):
    engine.spend(500, "idle")
    engine.read(500)
    engine.acknowledged = engine.number
    engine.run(1_000, "a")
    assert engine.read(1_000).hours[HOUR]["in_flight"] == 1_000
    engine.acknowledged = engine.number
    engine.hour += 1
    engine.result(a=2_000)
    energy = engine.read(1_000)
    assert energy.hours[HOUR]["in_flight"] == 0
    assert energy.hours[HOUR + 1]["in_flight"] == 2_000


def test_an_hour_is_sent_until_it_is_acknowledged(engine):
    engine.spend(1_000, "idle")
    engine.read(1_000)
    engine.hour += 1
    for _ in range(3):
        engine.spend(1_000, "idle")
        assert set(engine.read(1_000).hours) == {HOUR, HOUR + 1}
    engine.acknowledged = engine.number
    engine.spend(1_000, "idle")
    assert set(engine.read(1_000).hours) == {HOUR + 1}


# Unknown windows


def test_who_ran_while_the_energy_was_unknown_has_none_that_is_known(engine):
    engine.work(a=500, b=500)
    engine.read(1_000)
    engine.work(a=1_000)
    energy = engine.read(None)
    assert (energy.reason, energy.unknown_ns) == ("error: GPU is lost", S)
    engine.work(a=500, b=300, c=200)
    a, b, c = (engine.bill(name) for name in "abc")
    energy = engine.read(1_000)
    assert energy.reported == (
        RequestEnergy(a, HOUR, None, "error"),
        RequestEnergy(b, HOUR, 800, None),
        RequestEnergy(c, HOUR, 200, None),
    )
    assert used(energy) == {"requests": 1_000, "unattributed": 1_000}


def test_a_step_that_ran_while_the_energy_was_unknown_makes_that_of_its_requests_unknown(engine):
    engine.open |= {"a": 0, "b": 0}
    engine.spend(100, "idle")
    engine.run(900, "a")
    engine.read(None)
    engine.result(a=1_000)
    engine.work(b=1_000)
    a, b = engine.bill("a"), engine.bill("b")
    energy = engine.read(1_000)
    assert [(each.seq, each.energy_mj is None) for each in energy.reported] == [
        (a, True),
        (b, False),
    ]
    assert used(energy) == {"unattributed": 500, "requests": 500}


def test_an_hour_is_unknown_and_another_of_the_same_request_is_not(engine):
    engine.work(a=1_000)
    engine.read(1_000)
    engine.hour += 1
    engine.work(a=1_000)
    engine.read(None)
    seq = engine.bill("a")
    engine.spend(1_000, "idle")
    energy = engine.read(1_000)
    assert energy.reported == (
        RequestEnergy(seq, HOUR, 1_000, None),
        RequestEnergy(seq, HOUR + 1, None, "error"),
    )
    assert used(energy) == {"requests": 1_000, "idle": 1_000}


def test_before_anything_was_read_the_energy_is_unknown_and_not_0(engine):
    engine.work(a=1_000)
    seq = engine.bill("a")
    energy = engine.read(None)
    assert (energy.energy_mj, energy.classes, energy.hours) == (None, {}, {})
    assert energy.reported == (RequestEnergy(seq, HOUR, None, "error"),)
    engine.spend(1_000, "idle")
    assert engine.read(70_000).energy_mj == 70_000


def test_where_the_energy_can_never_be_known_nothing_is_kept_of_requests(engine):
    engine.books.give_up("no_device: none")
    engine.work(a=1_000)
    engine.bill("a")
    energy = engine.read(None, "no_device: none")
    assert energy == RunEnergy(None, "no_device: none", S, devices=(("a GPU", "GPU-1"),))
    assert not engine.books._billed


def test_what_was_read_before_giving_up_still_adds_up(engine):
    engine.work(a=400)
    engine.run(600, "a")
    engine.read(1_000)
    engine.books.give_up("error: gone")
    energy = engine.read(None, "error: gone")
    assert used(energy) == {"unattributed": 1_000}
    assert energy.hours[HOUR]["unattributed"] == 1_000


# Telling


def test_a_request_is_told_until_a_snapshot_that_told_it_is_acknowledged(engine):
    def told() -> list[int]:
        engine.spend(1_000, "idle")
        return [each.seq for each in engine.read(1_000).reported]

    engine.work(a=1, b=1)
    engine.bill("a")
    assert told() == [1]
    engine.bill("b")
    assert told() == [1, 2]
    engine.acknowledged = 1
    assert told() == [2]
    engine.acknowledged = 3
    assert told() == []


def test_an_api_side_that_never_takes_them_does_not_make_the_engine_grow():
    engine = Engine(unreported_max=3)

    def bill(*names: str) -> None:
        for name in names:
            engine.work(**{name: 100})
            engine.bill(name)

    bill("a", "b", "c", "d", "e")
    energy = engine.read(500)
    assert [each.seq for each in energy.reported] == [3, 4, 5]
    assert used(energy) == {"requests": 300, "unattributed": 200}
    bill("f")
    energy = engine.read(100)
    assert [each.seq for each in energy.reported] == [4, 5, 6]
    assert used(energy) == {"requests": 300, "unattributed": 300}
    assert energy.hours[HOUR]["unattributed"] == 300
    assert engine.books.dropped == 3


def test_what_was_dropped_between_two_snapshots_changes_the_hour_it_was_in():
    engine = Engine(unreported_max=1)
    engine.work(a=1_000)
    engine.bill("a")
    engine.read(1_000)
    engine.hour += 1
    engine.spend(1_000, "idle")
    engine.read(1_000)
    # The reader has the first hour, but its answer is still on the way when it is asked again.
    engine.work(b=1_000)
    engine.bill("b")
    engine.acknowledged = 2
    assert engine.read(1_000).hours[HOUR]["unattributed"] == 1_000


def test_the_wire_brings_everything_over(engine):
    engine.work(a=600, b=400)
    engine.bill("a")
    energy = engine.read(1_000)
    wire: dict[str, Any] = energy.to_wire()
    assert RunEnergy.from_wire(wire) == energy
    assert wire["reported"] == [1, HOUR, 600, None]


def test_an_energy_is_known_or_has_a_reason():
    with pytest.raises(ValueError, match="expected an energy or a reason"):
        RunEnergy(None, None)


def test_of_two_snapshots_the_newer_stands_and_nothing_that_was_told_is_forgotten():
    one, two = RequestEnergy(1, HOUR, 5, None), RequestEnergy(2, HOUR, 6, None)
    older = RunEnergy(5, None, hours={1: {"idle": 1}, 2: {"idle": 2}}, reported=(one,))
    newer = RunEnergy(11, "x: y", 3, {"idle": 9}, (), {2: {"idle": 8}}, (one, two))
    merged = newer.merged_over(older)
    assert merged == RunEnergy(
        11, "x: y", 3, {"idle": 9}, (), {1: {"idle": 1}, 2: {"idle": 8}}, (one, two)
    )
