"""The price book: which entry holds for a run in an hour, what it comes to, and why none does."""

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import pytest

from vllm_cost_meter.prices.book import (
    NO_PRICES,
    EnergyPrice,
    GpuHourPrice,
    PriceBook,
    PriceEntry,
    RunFacts,
    RunMatch,
    by_price,
    described,
    kv_nanousd,
    label_pairs,
    time_nanousd,
    total_nanousd,
)
from vllm_cost_meter.prices.cost import NO_QUANTITIES, Quantities

HOUR = 500_000  # 2027-01-15T08Z
RUN = RunFacts(gpus=8, model="Llama-8B", gpu_name="NVIDIA H100 80GB HBM3", host="node-1")


def entry(key: str, amount: str = "2", since: int | None = HOUR, **more) -> PriceEntry:
    matches = RunMatch(**{n: more.pop(n) for n in ("model", "gpu_name", "host") if n in more})
    return PriceEntry(key, Decimal(amount), "the invoice", since, matches=matches, **more)


def chosen(entries: list[PriceEntry], hour: int = HOUR, run: RunFacts = RUN) -> str | None:
    price = PriceBook(entries).price_at(run, hour)
    return None if price is None else price.key


# ---- what a price comes to


@pytest.mark.parametrize(
    ("more", "usd", "text"),
    [
        ({"amount": "2.50"}, Fraction(5, 2), "2.50"),
        ({"amount": "1e-7"}, Fraction(1, 10**7), "0.0000001"),
        ({"amount": "98.32", "scope": "node", "gpus": 8}, Fraction("12.29"), "12.29"),
        ({"amount": "3", "currency": "EUR", "usd_rate": Decimal("1.17")}, Fraction("3.51"), "3.51"),
        ({"amount": "10", "scope": "node", "gpus": 3}, Fraction(10, 3), "3." + "3" * 18),
        (
            {"amount": "20", "scope": "deployment", "gpus": 3},
            Fraction(20, 3),
            "6." + "6" * 17 + "7",
        ),
        ({"amount": "0"}, Fraction(0), "0"),
    ],
)
def test_a_price_is_exact_for_one_gpu_and_shown_as_a_decimal(more, usd, text):
    price = GpuHourPrice.of(entry("p", **more))
    assert (price.usd_per_gpu_hour, price.text) == (usd, text)


def test_a_price_in_words_names_amount_scope_kind_date_and_source():
    node = entry("p", "98.32", scope="node", gpus=8, kind="reserved")
    assert described(GpuHourPrice.of(node).as_dict()) == (
        "12.29 USD per GPU-hour (98.32 USD per node of 8 GPUs, reserved, from 2027-01-15T08Z,"
        " the invoice)"
    )
    euro = entry("p", "3", None, currency="EUR", usd_rate=Decimal("1.17"))
    assert described(GpuHourPrice.of(euro).as_dict()) == (
        "3.51 USD per GPU-hour (3 EUR per gpu, 1.17 USD per EUR, the invoice)"
    )
    assert described(GpuHourPrice.of(entry("p", "2.49", None)).as_dict()) == (
        "2.49 USD per GPU-hour (gpu, the invoice)"
    )


# ---- when


def test_an_entry_holds_from_its_hour_until_the_next_with_the_same_matches():
    entries = [entry("second", since=HOUR + 10), entry("first")]
    held = [chosen(entries, hour) for hour in (HOUR - 1, HOUR, HOUR + 9, HOUR + 10, HOUR + 10**6)]
    assert held == [None, "first", "first", "second", "second"]
    shown = PriceBook(entries).listed()["prices"]
    assert [(row["key"], row["effective_from"], row["effective_until"]) for row in shown] == [
        ("first", "2027-01-15T08:00:00.000000Z", "2027-01-15T18:00:00.000000Z"),
        ("second", "2027-01-15T18:00:00.000000Z", None),
    ]
    assert PriceBook(entries).price_changes() == [HOUR, HOUR + 10]


def test_an_entry_without_a_date_stands_behind_all_that_have_one():
    always = entry("always", since=None)
    dated = entry("dated")
    special = entry("special", host="node-1", since=HOUR + 5)
    for entries in ([always, dated, special], [special, dated, always]):
        assert [chosen(entries, HOUR + n) for n in (-1, 0, 5)] == ["always", "dated", "special"]
    assert PriceBook([always]).price_changes() == []


def test_two_entries_for_the_same_runs_from_the_same_hour_are_refused():
    for pair in (
        [entry("a"), entry("b", "3", kind="spot")],
        [entry("a", model="X*"), entry("b", model="x*")],
        [entry("a", since=None), entry("b", since=None)],
    ):
        with pytest.raises(ValueError, match="got a and b"):
            PriceBook(pair)


# ---- for which run


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("node-1", True),
        ("NODE-1", True),
        ("node-*", True),
        ("*", True),
        ("node-?", True),
        ("node-[0-4]", True),
        ("node-[!1]", False),
        ("node", False),
        ("node-10", False),
    ],
)
def test_a_match_is_a_name_or_a_glob_in_any_case(pattern, fits):
    assert (chosen([entry("p", host=pattern)]) == "p") is fits


def test_all_matches_of_an_entry_must_fit():
    assert chosen([entry("p", host="node-1", gpu_name="*H100*", model="llama-*")]) == "p"
    assert chosen([entry("p", host="node-1", gpu_name="*A100*")]) is None


def test_a_name_with_brackets_matches_itself():
    run = RunFacts(gpu_name="GPU [rev a]")
    assert chosen([entry("p", gpu_name="gpu [REV A]")], run=run) == "p"


def test_what_is_not_known_of_a_run_fits_no_match():
    entries = [entry("any", "1"), entry("host", host="*")]
    assert chosen(entries, run=RunFacts()) == "any"
    assert chosen(entries) == "host"


def certain(entries, run) -> str | None:
    price = PriceBook(entries).certain_price_at(run, HOUR)
    return None if price is None else price.key


def test_a_price_is_certain_unless_a_fact_that_is_not_known_may_choose_another():
    without_host = RunFacts(RUN.gpus, RUN.model, RUN.gpu_name, None)
    entries = [entry("any"), entry("host", host="node-9")]
    assert certain(entries, RUN) == "any"
    assert certain(entries, without_host) is None
    assert certain(entries[:1], without_host) == certain(entries[:1], RunFacts()) == "any"
    # What goes before it, what is not in force and what is for another model changes nothing.
    assert certain([*entries, entry("two", model="llama-8b", gpu_name="*h100*")], without_host) == (
        "two"
    )
    later, other = entry("later", host="*", since=HOUR + 1), entry("qwen", host="*", model="qwen")
    assert certain([entries[0], later, other], without_host) == "any"
    # An equally specific one would make it no price.
    assert certain([entry("model", model="llama-8b"), entries[1]], without_host) is None
    assert certain([], without_host) is None


@pytest.mark.parametrize(
    ("run", "has_price"),
    [
        (RUN, False),
        (RunFacts(), True),
        (RunFacts(8, None, None, "node-1"), False),
        (RunFacts(8, None, None, "node-9"), True),
        (RunFacts(8, "qwen", None, "node-9"), False),
    ],
)
def test_a_run_may_have_a_price_as_far_as_its_facts_are_known(run, has_price):
    book = PriceBook([entry("p", host="node-9", model="llama-*")])
    assert book.may_have_price(run, HOUR) is has_price
    assert not book.may_have_price(run, HOUR - 1)


# ---- labels


def labelled(key: str, more_than: str | None = None, **labels: str) -> PriceEntry:
    return replace(entry(key), matches=RunMatch(host=more_than, labels=label_pairs(labels)))


SPOT = replace(RUN, labels=(("pool", "Spot-eu"), ("zone", "a")))


def test_all_labels_of_an_entry_must_fit_in_any_case():
    assert chosen([labelled("p", pool="spot-*", zone="A")], run=SPOT) == "p"
    assert chosen([labelled("p", pool="spot-*", zone="b")], run=SPOT) is None
    assert chosen([labelled("p", pool="*", rack="*")], run=SPOT) is None
    assert chosen([labelled("p", pool="*")], run=replace(RUN, labels=())) is None


def test_each_label_is_a_match_of_its_own():
    entries = [entry("any"), labelled("one", pool="*"), labelled("plain", pool="spot-eu")]
    entries += [
        labelled("two", zone="*", pool="*"),
        labelled("three", "node-1", pool="*", zone="a"),
    ]
    for count, expected in enumerate(("any", "one", "plain", "two", "three"), 1):
        assert chosen(entries[:count], run=SPOT) == expected
        assert chosen(entries[:count][::-1], run=SPOT) == expected
    assert (
        chosen([labelled("pool", pool="spot-eu"), entry("host", host="node-1")], run=SPOT) is None
    )


def test_labels_in_another_order_or_case_are_the_same_matches():
    one = RunMatch(labels=(("pool", "spot"), ("zone", "a")))
    other = RunMatch(labels=(("zone", "A"), ("pool", "Spot")))
    with pytest.raises(ValueError, match="expected one price at a time for the same matches"):
        PriceBook([replace(entry("p"), matches=one), replace(entry("q"), matches=other)])


def test_while_labels_are_not_known_a_price_for_some_leaves_the_others_uncertain():
    entries = [entry("any"), labelled("spot", pool="spot*")]
    assert RUN.labels is None
    assert certain(entries, RUN) is None
    assert certain(entries[:1], RUN) == "any"
    assert certain(entries, SPOT) == "spot"
    assert certain(entries, replace(RUN, labels=())) == "any"
    assert PriceBook(entries[1:]).may_have_price(RUN, HOUR)
    assert not PriceBook(entries[1:]).may_have_price(replace(RUN, labels=()), HOUR)


def test_a_reason_tells_of_labels_and_shows_none():
    book = PriceBook([labelled("p", pool="big")])
    assert book.why_no_price(SPOT, HOUR) == (
        "no entry matches model 'Llama-8B', GPU 'NVIDIA H100 80GB HBM3', host 'node-1' and its"
        " labels"
    )


# ---- the most specific


def test_more_matches_win_and_of_as_many_more_plain_names():
    entries = [
        entry("any"),
        entry("glob", host="node-*"),
        entry("name", host="node-1"),
        entry("two globs", host="node-*", model="*"),
        entry("two", host="node-1", model="llama-8b"),
    ]
    for count, expected in enumerate(("any", "glob", "name", "two globs", "two"), 1):
        assert chosen(entries[:count]) == chosen(entries[:count][::-1]) == expected


def test_a_more_specific_entry_that_is_not_in_force_yet_hides_no_other():
    entries = [entry("any"), entry("host", host="node-1", since=HOUR + 3)]
    assert [chosen(entries, HOUR + n) for n in (2, 3)] == ["any", "host"]


def test_two_that_are_equally_specific_are_no_price_and_the_reason_names_both():
    entries = [entry("prices[1]", host="node-1"), entry("prices[0]", model="llama-8b")]
    book = PriceBook([*entries, entry("prices[2]"), entry("short", since=None)])
    assert book.price_at(RUN, HOUR) is None
    assert book.why_no_price(RUN, HOUR) == (
        "prices[0] and prices[1] are equally specific for model 'Llama-8B', GPU"
        " 'NVIDIA H100 80GB HBM3', host 'node-1': give one of them more matches"
    )
    both = entry("prices[3]", host="node-1", model="llama-8b")
    assert chosen([*entries, both]) == "prices[3]"


# ---- why there is none


def test_the_reason_says_what_is_missing():
    assert (
        NO_PRICES.why_no_price(RUN, HOUR) == "none is set by COST_METER_GPU_HOUR_USD or [[prices]]"
    )
    assert NO_PRICES.why_no_energy_price(RUN, HOUR) == "none is set by [[energy_prices]]"
    late = PriceBook([entry("p", since=HOUR + 1), entry("q", host="x")])
    assert late.why_no_price(RUN, HOUR).endswith("'node-1', is effective from 2027-01-15T09Z")
    other = PriceBook([entry("q", host="x")])
    assert other.why_no_price(RunFacts(model="m"), HOUR) == (
        "no entry matches model 'm', GPU 'unknown', host 'unknown'"
    )


# ---- energy


def test_energy_has_prices_of_its_own_by_host():
    book = PriceBook(
        energy_prices=[
            EnergyPrice("e0", Decimal("0.30"), "the bill", HOUR),
            EnergyPrice("e1", Decimal("0.25"), "the bill", HOUR + 2),
            EnergyPrice("e2", Decimal("0.10"), "the dam", HOUR, RunMatch(host="node-*")),
        ]
    )
    elsewhere = RunFacts(host="other")
    held = [book.energy_price_at(elsewhere, HOUR + n) for n in (-1, 0, 2)]
    assert [price and price.key for price in held] == [None, "e0", "e1"]
    assert book.energy_price_at(RUN, HOUR).usd_per_kwh == Decimal("0.10")
    assert book.energy_price_changes() == [HOUR, HOUR + 2]
    assert book.price_at(RUN, HOUR) is None


# ---- time at several prices


def test_time_is_added_up_at_each_price_and_rounded_once_for_each():
    # At 36 USD an hour a nanosecond costs 0.01 nano-USD.
    book = PriceBook([entry("a", "36"), entry("b", "72", since=HOUR + 2)])
    spent = [(HOUR + n, Quantities(30)) for n in range(3)]
    at = by_price(spent, lambda hour: book.price_at(RUN, hour))
    assert [(price.key, used.gpu_time_ns) for price, used in at.items()] == [("a", 60), ("b", 30)]
    assert total_nanousd(at) == 1 + 1  # 0.6 and 0.6
    before = (HOUR - 1, NO_QUANTITIES)
    assert by_price([*spent, before], lambda hour: book.price_at(RUN, hour)) is None


def test_blocks_cost_on_top_of_time_by_the_price_of_each_hour():
    # At 36 USD an hour a GPU-ns costs 0.01 nano-USD; at 0.36 a block-ms costs 100.
    priced = PriceEntry("a", Decimal(36), "s", HOUR, usd_per_kv_block_hour=Decimal("0.36"))
    book = PriceBook([priced, entry("b", "72", since=HOUR + 1)])
    spent = [(HOUR, Quantities(100, 3)), (HOUR + 1, Quantities(100, 3))]
    at = by_price(spent, lambda hour: book.price_at(RUN, hour))
    assert (time_nanousd(at), kv_nanousd(at), total_nanousd(at)) == (1 + 2, 300, 303)


def test_a_price_of_blocks_is_shown_beside_that_of_the_gpu_hour_and_is_null_without_one():
    with_blocks = PriceEntry("a", Decimal(36), "s", HOUR, usd_per_kv_block_hour=Decimal("1e-5"))
    shown = GpuHourPrice.of(with_blocks).as_dict()
    assert shown["usd_per_kv_block_hour"] == "0.00001"
    assert described(shown).startswith("36 USD per GPU-hour and 0.00001 USD per KV block-hour (")
    plain = GpuHourPrice.of(entry("a", "36")).as_dict()
    assert plain["usd_per_kv_block_hour"] is None
    assert described(plain).startswith("36 USD per GPU-hour (")
