"""The meter's metrics: what is counted, under which names, and that series are bounded."""

import math
import subprocess
import sys
from dataclasses import replace

from prometheus_client import REGISTRY

from tests.component.api_server.test_poller import snapshot
from vllm_cost_meter.metrics import series
from vllm_cost_meter.records.energy import RunEnergy
from vllm_cost_meter.records.snapshot import CLASSES, ClassTotals
from vllm_cost_meter.tenants.budgets import Budget, Others, Standing


class Gained:
    """What a sample has gained since this was made."""

    def __init__(self, name: str, **labels: str) -> None:
        self._key = name, labels
        self._before = self._now()

    def _now(self) -> float:
        name, labels = self._key
        return REGISTRY.get_sample_value(name, labels) or 0.0

    def __call__(self) -> float:
        return self._now() - self._before


def test_an_engine_shows_every_class_of_its_time():
    totals = ClassTotals(**{name: n * 10**9 for n, name in enumerate(CLASSES)})
    series.set_engine(snapshot(1, totals=totals, own_ns=5 * 10**8, engine_index=7))
    for n, name in enumerate(CLASSES):
        labels = {"engine": "7", "class": name}
        assert REGISTRY.get_sample_value("cost_meter_engine_gpu_seconds", labels) == n
    assert REGISTRY.get_sample_value("cost_meter_own_seconds", {"engine": "7"}) == 0.5
    assert REGISTRY.get_sample_value("cost_meter_engine_on", {"engine": "7"}) == 1
    series.set_engine(replace(snapshot(2, engine_index=7), state="off"))
    assert REGISTRY.get_sample_value("cost_meter_engine_on", {"engine": "7"}) == 0


def test_an_engines_time_and_energy_are_counters_that_never_shrink():
    growth = series.Growth()
    names = ("requests", "idle", "recomputed")
    seconds = {
        name: Gained("cost_meter_engine_class_gpu_seconds_total", engine="6", **{"class": name})
        for name in names
    }
    joules = Gained(
        "cost_meter_engine_class_energy_joules_total", engine="6", **{"class": "requests"}
    )
    own = Gained("cost_meter_engine_own_seconds_total", engine="6")

    def told(number: int, **totals: int) -> dict[str, float]:
        energy = RunEnergy(1, None, classes={"requests": 1_000 * number, "in_flight": 500})
        times = ClassTotals(**{name: seconds * 10**9 for name, seconds in totals.items()})
        series.count_engine(
            snapshot(number, totals=times, energy=energy, own_ns=10**9, engine_index=6), growth
        )
        return {name: gained() for name, gained in seconds.items()}

    first = told(1, requests=2, in_flight=3, idle=4)
    assert first == {"requests": 5, "idle": 4, "recomputed": 0}
    # A preempted request had two of its seconds in vain; then it goes on.
    assert told(2, requests=2, in_flight=1, idle=4, recomputed=2)["requests"] == 5
    assert told(3, requests=6, idle=9, recomputed=2) == {"requests": 6, "idle": 9, "recomputed": 2}
    assert (joules(), own()) == (3.5, 1.0)
    other = snapshot(1, run_id="next", totals=ClassTotals(idle=10**9), engine_index=6)
    series.count_engine(other, growth)
    assert seconds["idle"]() == 10


def test_an_engine_shows_the_odd_events_of_its_run():
    odd = {"equal_splits": 2, "missed_arrivals": 3, "steps_in_flight": 1}
    series.set_engine(replace(snapshot(1, engine_index=9), **odd))
    for event, count in (("equal_split", 2), ("missed_arrival", 3)):
        labels = {"engine": "9", "event": event}
        assert REGISTRY.get_sample_value("cost_meter_engine_events", labels) == count
    in_flight = REGISTRY.get_sample_value("cost_meter_engine_steps_in_flight", {"engine": "9"})
    assert in_flight == 1


def test_an_engine_shows_its_energy_by_class_and_nothing_where_it_is_unknown():
    def shown(name: str) -> float | None:
        labels = {"engine": "8", "class": name}
        return REGISTRY.get_sample_value("cost_meter_engine_energy_joules", labels)

    series.set_engine(snapshot(1, engine_index=8))
    assert shown("idle") is None
    energy = RunEnergy(75_500, None, classes={"idle": 70_000, "requests": 5_500})
    series.set_engine(snapshot(2, engine_index=8, energy=energy))
    assert (shown("idle"), shown("requests")) == (70.0, 5.5)


def test_inter_token_latencies_are_counted_by_their_bound():
    bounds = {
        le: Gained("cost_meter_inter_token_latencies_total", le=le)
        for le in ("0.01", "0.02", "+Inf")
    }
    series.count_inter_token_latencies([0.01, 0.0100001, 0.02, 99.0, float("inf")])
    assert {le: gained() for le, gained in bounds.items()} == {"0.01": 1, "0.02": 2, "+Inf": 2}


def test_a_budget_whose_use_is_unknown_shows_no_number_rather_than_its_last_one():
    def shown() -> float:
        labels = {"budget": "whose price ended"}
        return REGISTRY.get_sample_value("cost_meter_budget_used_ratio", labels)

    budget = Budget("whose price ended", 10, "usd", "day", tenant="acme")
    series.set_budgets([Standing(budget, {0: 4}, 0)])
    assert shown() == 0.4
    series.set_budgets([Standing(budget, None, 0, "no price")])
    assert math.isnan(shown())


def test_only_a_budget_over_a_fleet_shows_how_fresh_the_part_of_other_servers_is():
    def shown(name: str, of: str) -> float | None:
        return REGISTRY.get_sample_value(f"cost_meter_fleet_figures_{name}", {"budget": of})

    def standing(name: str, others: Others | None) -> Standing:
        return Standing(Budget(name, 10, "usd", "day", tenant="acme"), {0: 4}, 0, others=others)

    late = Others(1, 12 * 10**9, "12 s old", is_counted=True)
    never = Others(1, None, "not read yet", is_counted=False)
    series.set_fleet_figures(
        [standing("alone", None), standing("late", late), standing("never", never)]
    )
    assert shown("fresh", "alone") is shown("age_seconds", "alone") is None
    assert (shown("fresh", "late"), shown("age_seconds", "late")) == (0.0, 12.0)
    assert math.isnan(shown("age_seconds", "never"))
    series.set_fleet_figures([standing("late", replace(late, stale=None))])
    assert shown("fresh", "late") == 1.0


def test_misses_and_errors_are_counted():
    misses, errors = (
        Gained("cost_meter_reply_misses_total"),
        Gained("cost_meter_errors_total", side="api"),
    )
    series.count_miss()
    series.count_error("api")
    assert (misses(), errors()) == (1.0, 1.0)


def test_vllm_does_not_take_our_metrics_for_its_own():
    """vLLM unregisters every collector whose name holds "vllm"."""
    ours = [c for c in vars(series).values() if hasattr(c, "_name")]
    assert len(ours) >= 10
    assert all(c._name.startswith("cost_meter_") and "vllm" not in c._name for c in ours)


def test_they_are_imported_without_vllm():
    """Metrics are core to the side endpoint: importing them must not cost vLLM's seconds."""
    code = "import sys, vllm_cost_meter.metrics; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
