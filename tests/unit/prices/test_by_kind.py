"""What a deployment costs by the kinds of the price book that are in force."""

from decimal import Decimal
from fractions import Fraction

import pytest

from vllm_cost_meter.prices.book import PriceBook, PriceEntry, RunMatch
from vllm_cost_meter.prices.purchase_kinds import listed, prices_by_kind, usd_per_hour_of

NOW = 500_000


def entry(key, amount, kind, since=NOW, **more):
    return PriceEntry(key, Decimal(amount), f"list of {key}", since, kind=kind, **more)


def host(pattern):
    return {"matches": RunMatch(host=pattern)}


def usd(found, gpus=4):
    return {kind: usd_per_hour_of(price, gpus) for kind, price in found.items()}


def test_each_kind_costs_the_price_of_one_gpu_by_its_scope_and_currency_times_the_gpus():
    book = PriceBook(
        [
            entry("a", "2.5", "on_demand"),
            entry("b", "16", "reserved", scope="node", gpus=8, **host("res-*")),
            entry("c", "1", "spot", currency="EUR", usd_rate=Decimal("1.1"), **host("spot-*")),
        ]
    )
    found = prices_by_kind(book, NOW)
    assert usd(found) == {"on_demand": 10, "reserved": 8, "spot": Fraction("4.4")}
    assert [(one["key"], one["source"]) for one in listed(found)] == [
        ("a", "list of a"), ("b", "list of b"), ("c", "list of c"),
    ]  # fmt: skip


def test_only_what_is_in_force_counts():
    book = PriceBook(
        [
            entry("old", "3", "on_demand", NOW - 10),
            entry("now", "2", "on_demand", NOW),
            entry("later", "1", "on_demand", NOW + 1),
            entry("spot", "1", "spot", NOW + 1, **host("spot-*")),
        ]
    )
    assert usd(prices_by_kind(book, NOW)) == {"on_demand": 8}


def test_two_of_a_kind_are_refused_unless_the_gpu_tells_them_apart():
    book = PriceBook(
        [
            entry("h", "4", "on_demand", matches=RunMatch(gpu_name="*H100*")),
            entry("l", "1", "on_demand", matches=RunMatch(gpu_name="*L4*")),
            entry("any", "9", "on_demand"),
        ]
    )
    with pytest.raises(ValueError, match="expected one on_demand price in force, got any and h"):
        prices_by_kind(book, NOW)
    assert usd(prices_by_kind(book, NOW, "NVIDIA H100 80GB HBM3"), 1) == {"on_demand": 4}
    assert usd(prices_by_kind(book, NOW, "NVIDIA L4"), 1) == {"on_demand": 1}
    assert usd(prices_by_kind(book, NOW, "other"), 1) == {"on_demand": 9}


def test_equally_specific_ones_are_refused_even_for_one_gpu():
    book = PriceBook([entry("a", "4", "on_demand", **host("a")), entry("b", "1", "on_demand",
        **host("b"))])  # fmt: skip
    with pytest.raises(ValueError, match="got a and b$"):
        prices_by_kind(book, NOW, "L4")


def test_the_short_form_stands_for_on_demand_where_nothing_else_does():
    short = PriceEntry("COST_METER_GPU_HOUR_USD", Decimal(2), "s", None)
    spot = entry("s", "1", "spot")
    assert usd(prices_by_kind(PriceBook([short, spot]), NOW)) == {"on_demand": 8, "spot": 4}
    dated = entry("d", "3", "on_demand", **host("x"))
    assert usd(prices_by_kind(PriceBook([short, spot, dated]), NOW))["on_demand"] == 12


@pytest.mark.parametrize(("entries", "got"), [([], "none"), ([entry("s", "1", "spot")], "spot")])
def test_without_a_price_on_demand_there_is_no_comparison(entries, got):
    with pytest.raises(ValueError, match=f"expected an on_demand price in force, got {got}$"):
        prices_by_kind(PriceBook(entries), NOW)


@pytest.mark.parametrize("gpus", [0, -1])
def test_no_gpus_have_no_price(gpus):
    found = prices_by_kind(PriceBook([entry("a", "1", "on_demand")]), NOW)
    with pytest.raises(ValueError, match="gpus: expected a whole number above 0"):
        usd_per_hour_of(found["on_demand"], gpus)
