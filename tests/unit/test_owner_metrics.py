"""What bills add up to, as metrics: by tenant, model and adapter, and in few series."""

from typing import Any

from prometheus_client import REGISTRY, generate_latest

from tests.support.builders import make_bill, make_part
from tests.unit.test_metrics import Gained
from vllm_cost_meter.metrics.owners import BillCounts, TenantLabels
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.requests import EngineRequest


def part(
    tenant: str = "alice", cost: int | None = 5_000_000_000, rule: str = "api_key", **more: Any
) -> EngineRequest:
    pieces = (UsagePiece(1, 10**9, 2 * 10**9, 1, 1),)
    tokens = {"prompt_tokens": 9, "cached_tokens": 2, "output_tokens": 1, "external_tokens": 3}
    bill = make_bill(pieces=pieces, **tokens, **more.pop("bill", {}))
    return make_part(bill, tenant=tenant, cost_nanousd=cost, tenant_rule=rule, **more)


def counted(*parts: EngineRequest, counts: BillCounts | None = None) -> BillCounts:
    """Count bills with labels of the test's own: other tests have filled the process's."""
    counts = BillCounts() if counts is None else counts
    for each in parts:
        counts.count(each)
    return counts


def owned_by(tenant: str, model: str = "m", lora: str = "") -> dict[str, str]:
    return {"tenant": tenant, "model": model, "lora": lora}


def test_a_bill_is_counted_under_its_tenant_model_and_adapter() -> None:
    # One that no other test bills: beside their nanoseconds a second would be rounded.
    owner = owned_by("ada", "small", "polite")
    prefill = Gained("cost_meter_gpu_seconds_total", **owner, phase="prefill")
    decode = Gained("cost_meter_gpu_seconds_total", **owner, phase="decode")
    cost = Gained("cost_meter_cost_usd_total", **owner)
    bills = Gained("cost_meter_bills_total", tenant="ada", engine_status="stopped")
    counted(part("ada", model="small", lora="polite"))
    assert (prefill(), decode(), cost(), bills()) == (1.0, 2.0, 5.0, 1.0)


def test_tokens_are_of_one_kind_each_and_a_prompt_of_several_parts_counts_once() -> None:
    kinds = {
        kind: Gained("cost_meter_tokens_total", **owned_by("tokens"), kind=kind)
        for kind in ("prompt_uncached", "prompt_cached", "prompt_external", "output")
    }
    counted(
        part("tokens", prompt_group="one prompt", bill={"request_id": "0_a"}),
        part("tokens", prompt_group="one prompt", bill={"request_id": "1_a"}),
        part("tokens", prompt_group="own", bill={"request_id": "own"}),
    )
    assert {kind: gained() for kind, gained in kinds.items()} == {
        "prompt_uncached": 8,
        "prompt_cached": 4,
        "prompt_external": 6,
        "output": 3,
    }


def test_a_cost_that_is_unknown_is_not_a_cost_of_zero() -> None:
    counted(part("no-price", None))
    sample = REGISTRY.get_sample_value("cost_meter_cost_usd_total", owned_by("no-price"))
    assert sample is None


def test_tenants_beyond_the_limit_are_others_and_the_folding_is_counted() -> None:
    counts = BillCounts(TenantLabels(tenants_max=3))
    folded, others = (
        Gained("cost_meter_tenants_folded_total"),
        Gained("cost_meter_bills_total", tenant="other", engine_status="stopped"),
    )
    counted(*(part(f"many-{number}") for number in range(5)), part("many-0"), counts=counts)
    assert (folded(), others()) == (2.0, 2.0)
    text = generate_latest().decode()
    assert 'tenant="many-2"' in text
    assert 'tenant="many-3"' not in text


def test_names_that_clients_chose_take_at_most_half_of_the_labels() -> None:
    labels = TenantLabels(tenants_max=6, clients_max=3)
    folded = Gained("cost_meter_tenants_folded_total")
    counted(
        *(part(f"noisy/{number}", rule="api_key+user") for number in range(5)),
        *(part(f"honest-{number}") for number in range(3)),
        part("noisy/0", rule="api_key+user"),
        counts=BillCounts(labels),
    )
    assert folded() == 2.0
    assert labels.tenants == {
        *(f"noisy/{number}" for number in range(3)),
        *(f"honest-{number}" for number in range(3)),
    }


def test_ten_thousand_tenants_are_a_thousand_series() -> None:
    labels = TenantLabels()
    folded = Gained("cost_meter_tenants_folded_total")
    costs = Gained("cost_meter_cost_usd_total", **owned_by("other"))
    counted(*(part(f"crowd-{number}") for number in range(10_000)), counts=BillCounts(labels))
    assert (folded(), costs()) == (9_000.0, 45_000.0)
    assert len(labels.tenants) == 1_000


def test_where_models_and_adapters_are_too_many_they_are_others_and_no_tenant_is() -> None:
    folded = Gained("cost_meter_models_folded_total")
    others = Gained("cost_meter_cost_usd_total", **owned_by("tuner", "other", "other"))
    tuned = (part("tuner", lora=f"adapter-{number}") for number in range(5))
    counts = counted(*tuned, counts=BillCounts(models_max=3))
    assert (folded(), others()) == (2.0, 10.0)
    text = generate_latest().decode()
    assert 'lora="adapter-2"' in text
    assert 'lora="adapter-3"' not in text
    counted(part("tuner", lora="adapter-0"), counts=counts)
    assert folded() == 2.0


def test_combinations_are_bounded_and_sums_by_tenant_stay_right() -> None:
    folded = Gained("cost_meter_models_folded_total")
    counts = BillCounts(owners_max=4)
    owners = [(f"t{tenant}", f"l{lora}") for tenant in range(3) for lora in range(3)]
    counted(*(part(f"crossed-{name}", lora=lora) for name, lora in owners), counts=counts)
    assert folded() == 5.0
    for tenant in range(3):
        name = f"crossed-t{tenant}"
        costs = [
            sample.value
            for metric in REGISTRY.collect()
            for sample in metric.samples
            if sample.name == "cost_meter_cost_usd_total" and sample.labels["tenant"] == name
        ]
        assert sum(costs) == 15.0
