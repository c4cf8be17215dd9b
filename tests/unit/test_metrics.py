"""The meter's metrics: what is counted, under which names, and that series are bounded."""

import math
import subprocess
import sys
from dataclasses import replace

from prometheus_client import REGISTRY, generate_latest

from tests.component.api_server.test_poller import snapshot
from tests.support.builders import make_bill, make_part
from vllm_cost_meter import metrics
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.energy import RunEnergy
from vllm_cost_meter.records.requests import EngineRequest
from vllm_cost_meter.records.snapshot import CLASSES, ClassTotals
from vllm_cost_meter.tenants.budgets import Budget, Others, Standing


def part(
    tenant: str = "alice", cost: int | None = 5_000_000_000, rule: str = "api_key"
) -> EngineRequest:
    pieces = (UsagePiece(1, 10**9, 2 * 10**9, 1, 1),)
    bill = make_bill(prompt_tokens=1, cached_tokens=0, output_tokens=1, pieces=pieces)
    return make_part(bill, tenant=tenant, cost_nanousd=cost, tenant_rule=rule)


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


def count(*parts, labels=None):
    """Count bills with labels of the test's own: other tests have filled the process's."""
    labels = metrics.TenantLabels() if labels is None else labels
    for each in parts:
        metrics.count_bill(each, labels)
    return labels


def test_a_bill_is_counted_under_its_tenant():
    # One that no other test bills: beside their nanoseconds a second would be rounded.
    prefill = Gained("cost_meter_gpu_seconds_total", tenant="ada", phase="prefill")
    decode = Gained("cost_meter_gpu_seconds_total", tenant="ada", phase="decode")
    cost = Gained("cost_meter_cost_usd_total", tenant="ada")
    bills = Gained("cost_meter_bills_total", tenant="ada", engine_status="stopped")
    count(part("ada"))
    assert (prefill(), decode(), cost(), bills()) == (1.0, 2.0, 5.0, 1.0)


def test_a_cost_that_is_unknown_is_not_a_cost_of_zero():
    count(part("no-price", None))
    assert REGISTRY.get_sample_value("cost_meter_cost_usd_total", {"tenant": "no-price"}) is None


def test_tenants_beyond_the_limit_are_others_and_the_folding_is_counted():
    labels = metrics.TenantLabels(tenants_max=3)
    folded, others = (
        Gained("cost_meter_tenants_folded_total"),
        Gained("cost_meter_bills_total", tenant="other", engine_status="stopped"),
    )
    for number in range(5):
        count(part(f"many-{number}"), labels=labels)
    count(part("many-0"), labels=labels)
    assert (folded(), others()) == (2.0, 2.0)
    text = generate_latest().decode()
    assert 'tenant="many-2"' in text
    assert 'tenant="many-3"' not in text


def test_names_that_clients_chose_take_at_most_half_of_the_labels():
    labels = metrics.TenantLabels(tenants_max=6, clients_max=3)
    folded = Gained("cost_meter_tenants_folded_total")
    for number in range(5):
        count(part(f"noisy/{number}", rule="api_key+user"), labels=labels)
    for number in range(3):
        count(part(f"honest-{number}"), labels=labels)
    count(part("noisy/0", rule="api_key+user"), labels=labels)
    assert folded() == 2.0
    assert labels.tenants == {
        *(f"noisy/{number}" for number in range(3)),
        *(f"honest-{number}" for number in range(3)),
    }


def test_ten_thousand_tenants_are_a_thousand_series():
    labels = metrics.TenantLabels()
    folded = Gained("cost_meter_tenants_folded_total")
    costs = Gained("cost_meter_cost_usd_total", tenant="other")
    for number in range(10_000):
        count(part(f"crowd-{number}"), labels=labels)
    assert (folded(), costs()) == (9_000.0, 45_000.0)
    assert len(labels.tenants) == 1_000


def test_an_engine_shows_every_class_of_its_time():
    totals = ClassTotals(**{name: n * 10**9 for n, name in enumerate(CLASSES)})
    metrics.set_engine(snapshot(1, totals=totals, own_ns=5 * 10**8, engine_index=7))
    for n, name in enumerate(CLASSES):
        labels = {"engine": "7", "class": name}
        assert REGISTRY.get_sample_value("cost_meter_engine_gpu_seconds", labels) == n
    assert REGISTRY.get_sample_value("cost_meter_own_seconds", {"engine": "7"}) == 0.5
    assert REGISTRY.get_sample_value("cost_meter_engine_on", {"engine": "7"}) == 1
    metrics.set_engine(replace(snapshot(2, engine_index=7), state="off"))
    assert REGISTRY.get_sample_value("cost_meter_engine_on", {"engine": "7"}) == 0


def test_an_engine_shows_the_odd_events_of_its_run():
    odd = {"equal_splits": 2, "missed_arrivals": 3, "steps_in_flight": 1}
    metrics.set_engine(replace(snapshot(1, engine_index=9), **odd))
    for event, count in (("equal_split", 2), ("missed_arrival", 3)):
        labels = {"engine": "9", "event": event}
        assert REGISTRY.get_sample_value("cost_meter_engine_events", labels) == count
    in_flight = REGISTRY.get_sample_value("cost_meter_engine_steps_in_flight", {"engine": "9"})
    assert in_flight == 1


def test_an_engine_shows_its_energy_by_class_and_nothing_where_it_is_unknown():
    def shown(name: str) -> float | None:
        labels = {"engine": "8", "class": name}
        return REGISTRY.get_sample_value("cost_meter_engine_energy_joules", labels)

    metrics.set_engine(snapshot(1, engine_index=8))
    assert shown("idle") is None
    energy = RunEnergy(75_500, None, classes={"idle": 70_000, "requests": 5_500})
    metrics.set_engine(snapshot(2, engine_index=8, energy=energy))
    assert (shown("idle"), shown("requests")) == (70.0, 5.5)


def test_inter_token_latencies_are_counted_by_their_bound():
    bounds = {
        le: Gained("cost_meter_inter_token_latencies_total", le=le)
        for le in ("0.01", "0.02", "+Inf")
    }
    metrics.count_inter_token_latencies([0.01, 0.0100001, 0.02, 99.0, float("inf")])
    assert {le: gained() for le, gained in bounds.items()} == {"0.01": 1, "0.02": 2, "+Inf": 2}


def test_a_budget_whose_use_is_unknown_shows_no_number_rather_than_its_last_one():
    def shown() -> float:
        labels = {"budget": "whose price ended"}
        return REGISTRY.get_sample_value("cost_meter_budget_used_ratio", labels)

    budget = Budget("whose price ended", 10, "usd", "day", tenant="acme")
    metrics.set_budgets([Standing(budget, {0: 4}, 0)])
    assert shown() == 0.4
    metrics.set_budgets([Standing(budget, None, 0, "no price")])
    assert math.isnan(shown())


def test_only_a_budget_over_a_fleet_shows_how_fresh_the_part_of_other_servers_is():
    def shown(name: str, of: str) -> float | None:
        return REGISTRY.get_sample_value(f"cost_meter_fleet_figures_{name}", {"budget": of})

    def standing(name: str, others: Others | None) -> Standing:
        return Standing(Budget(name, 10, "usd", "day", tenant="acme"), {0: 4}, 0, others=others)

    late = Others(1, 12 * 10**9, "12 s old", is_counted=True)
    never = Others(1, None, "not read yet", is_counted=False)
    metrics.set_fleet_figures(
        [standing("alone", None), standing("late", late), standing("never", never)]
    )
    assert shown("fresh", "alone") is shown("age_seconds", "alone") is None
    assert (shown("fresh", "late"), shown("age_seconds", "late")) == (0.0, 12.0)
    assert math.isnan(shown("age_seconds", "never"))
    metrics.set_fleet_figures([standing("late", replace(late, stale=None))])
    assert shown("fresh", "late") == 1.0


def test_misses_and_errors_are_counted():
    misses, errors = (
        Gained("cost_meter_reply_misses_total"),
        Gained("cost_meter_errors_total", side="api"),
    )
    metrics.count_miss()
    metrics.count_error("api")
    assert (misses(), errors()) == (1.0, 1.0)


def test_vllm_does_not_take_our_metrics_for_its_own():
    """vLLM unregisters every collector whose name holds "vllm"."""
    ours = [c for c in vars(metrics).values() if hasattr(c, "_name")]
    assert len(ours) >= 10
    assert all(c._name.startswith("cost_meter_") and "vllm" not in c._name for c in ours)


def test_they_are_imported_without_vllm():
    """Metrics are core to the side endpoint: importing them must not cost vLLM's seconds."""
    code = "import sys, vllm_cost_meter.metrics; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
