"""What a change of prices moves in hours that began: held against the prices of each such hour."""

import itertools
import random
from decimal import Decimal

import pytest

from vllm_cost_meter.config.moved_money import moved_money
from vllm_cost_meter.prices.book import EnergyPrice, PriceBook, PriceEntry, RunFacts, RunMatch
from vllm_cost_meter.prices.overheads import Overhead

NOW = 20
HOSTS = ("a", "b")
RUNS = [RunFacts("model", "gpu", host) for host in HOSTS]
MATCHES = [
    RunMatch(),
    *(RunMatch(host=host) for host in HOSTS),
    RunMatch(model="model"),
    RunMatch(labels=(("pool", "spot"),)),
]


def entry(amount: object, start: int, matches: RunMatch = MATCHES[0], key: str = "p") -> PriceEntry:
    return PriceEntry(key, Decimal(str(amount)), "a contract", start, matches=matches)


def moved(before: list[PriceEntry], after: list[PriceEntry]) -> list[tuple[object, ...]]:
    found = moved_money(PriceBook(before), PriceBook(after), NOW)
    return [(each.line, each.from_hour, each.until_hour, each.before, each.after) for each in found]


def test_another_amount_moves_the_hours_from_its_date_up_to_the_end_of_the_present_one() -> None:
    assert moved([entry(2, 10)], [entry(3, 10)]) == [
        ("every run", 10, NOW + 1, "2 USD per GPU-hour", "3 USD per GPU-hour")
    ]


def test_a_price_from_the_present_hour_on_moves_that_hour_and_from_the_next_none() -> None:
    old = entry(2, 10)
    assert [each[1] for each in moved([old], [old, entry(3, NOW, key="q")])] == [NOW]
    assert moved([old], [old, entry(3, NOW + 1, key="q")]) == []


def test_an_end_moves_what_the_entry_priced_until_the_next_one() -> None:
    old, later = entry(2, 10), entry(4, 15, key="q")
    assert moved([old, later], [later]) == [("every run", 10, 15, "2 USD per GPU-hour", None)]


def test_a_new_source_or_the_same_number_written_otherwise_moves_nothing() -> None:
    other = PriceEntry("z", Decimal("2.10"), "an invoice", 10)
    assert moved([entry("2.1", 10)], [other]) == []


def test_overheads_and_energy_are_told_by_their_own_lines() -> None:
    def book(percent: int, per_kwh: str) -> PriceBook:
        overhead = Overhead("o", "rack", "a lease", percent=Decimal(percent))
        return PriceBook([], [EnergyPrice("e", Decimal(per_kwh), "a bill", 5)], [overhead])

    assert [each.text for each in moved_money(book(10, "0.3"), book(12, "0.4"), NOW)] == [
        "energy_prices for every run, from 1970-01-01T05Z to 1970-01-01T21Z: 0.3 USD per kWh"
        " becomes 0.4 USD per kWh",
        "overheads for 'rack', from ever to 1970-01-01T21Z: 10 % becomes 12 %",
    ]


def test_an_overhead_that_ends_moves_the_hours_after_its_end() -> None:
    def book(until: int | None) -> PriceBook:
        line = Overhead("o", "rack", "x", usd_per_month=Decimal(5), effective_until_hour=until)
        return PriceBook([], [], [line])

    [only] = moved_money(book(None), book(8), NOW)
    assert (only.from_hour, only.until_hour, only.after) == (8, NOW + 1, None)
    assert moved_money(book(None), book(NOW + 1), NOW) == []


@pytest.mark.parametrize("seed", range(200))
def test_no_hour_that_began_has_another_price_unless_that_is_said(seed: int) -> None:
    """The independent truth: each run's price in each hour, by both books."""
    chance = random.Random(seed)

    def book() -> PriceBook:
        places = list(itertools.product(MATCHES, range(0, 40, 4)))
        return PriceBook(
            entry(chance.choice([1, 2, "2.0"]), start, matches, key=str(number))
            for number, (matches, start) in enumerate(chance.sample(places, 3))
        )

    before = book()
    after = chance.choice([book(), PriceBook([*before.entries, entry(1, 38, key="x")])])
    said = moved_money(before, after, NOW)
    for run, hour in itertools.product(RUNS, range(NOW + 1)):
        old, new = (each.price_at(run, hour) for each in (before, after))
        if (old and old.usd_per_gpu_hour) != (new and new.usd_per_gpu_hour):
            assert any(
                (each.from_hour is None or each.from_hour <= hour) and hour < each.until_hour
                for each in said
            ), (run, hour)
