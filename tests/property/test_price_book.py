"""Any book, any run, any hours: the order of entries is nothing, and exact costs add up.

The judge of the choice states the rule again, plainly: all entries that fit and have begun, of each
set of matches the latest, of these the most specific, if it is one.
"""

import random
from decimal import Decimal
from fnmatch import fnmatchcase
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from vllm_cost_meter.prices.book import (
    PriceBook,
    PriceEntry,
    RunFacts,
    RunMatch,
    by_price,
    label_pairs,
)
from vllm_cost_meter.prices.cost import Quantities
from vllm_cost_meter.prices.overheads import Overhead, overhead_lines
from vllm_cost_meter.units.money import NANOUSD_PER_USD, decimal_text
from vllm_cost_meter.units.time import NS_PER_HOUR

HOUR = 500_000
names = st.sampled_from(["a", "B", "ab"])
patterns = st.none() | st.sampled_from(["a", "A*", "?", "*b", "[ab]", "*"])
labels = st.dictionaries(st.sampled_from(["pool", "zone"]), names).map(label_pairs)
wanted = st.dictionaries(
    st.sampled_from(["pool", "zone"]), st.sampled_from(["a", "A*", "*"]), max_size=2
).map(label_pairs)
runs = st.builds(RunFacts, st.just(1), names, names, st.none() | names, labels)
hours = st.integers(HOUR - 2, HOUR + 8)
amounts = st.decimals(0, 1000, places=4)


@st.composite
def entries_of_a_book(draw: st.DrawFn) -> list[PriceEntry]:
    drawn = draw(
        st.lists(
            st.tuples(
                st.none() | st.integers(HOUR, HOUR + 6),
                st.builds(RunMatch, patterns, patterns, patterns, wanted),
                amounts,
                st.integers(1, 9),
            ),
            max_size=12,
            unique_by=lambda entry: (entry[0], entry[1].folded()),
        )
    )
    return [
        PriceEntry(f"p{n}", amount, "s", since, "node", gpus, matches=matches)
        for n, (since, matches, amount, gpus) in enumerate(drawn)
    ]


def fits(pattern: str | None, name: str | None) -> bool:
    if pattern is None:
        return True
    return name is not None and fnmatchcase(name.lower(), pattern.lower())


def expected(entries: list[PriceEntry], run: RunFacts, hour: int) -> str | None:
    latest: dict[tuple, PriceEntry] = {}
    for entry in entries:
        since, m = entry.effective_from_hour, entry.matches
        begun = since is None or since <= hour
        if begun and all(
            fits(pattern, name)
            for pattern, name in (
                (m.model, run.model), (m.gpu_name, run.gpu_name), (m.host, run.host),
                *((pattern, dict(run.labels).get(name)) for name, pattern in m.labels),
            )
        ):  # fmt: skip
            line = (since is None, m.folded())
            known = latest.get(line)
            if known is None or (known.effective_from_hour or 0) < (since or 0):
                latest[line] = entry
    if not latest:
        return None
    rank = {}
    for entry in latest.values():
        m = entry.matches
        wanted_names = [p for p in (m.model, m.gpu_name, m.host) if p is not None]
        wanted_names += [pattern for _, pattern in m.labels]
        plain = sum(pattern.isalpha() for pattern in wanted_names)
        rank[entry.key] = entry.effective_from_hour is not None, len(wanted_names), plain
    best = [key for key, value in rank.items() if value == max(rank.values())]
    return best[0] if len(best) == 1 else None


@given(entries_of_a_book(), runs, hours, st.randoms())
def test_every_order_of_entries_gives_the_choice_that_the_rule_states(entries, run, hour, chance):
    shuffled = entries[:]
    chance.shuffle(shuffled)
    found = [PriceBook(order).price_at(run, hour) for order in (entries, shuffled)]
    assert {price and price.key for price in found} == {expected(entries, run, hour)}


@given(entries_of_a_book(), runs, hours)
def test_between_two_changes_of_a_book_no_price_changes(entries, run, hour):
    book = PriceBook(entries)
    changes = book.price_changes()
    if hour not in changes:
        assert book.price_at(run, hour) is book.price_at(run, hour - 1)


@given(entries_of_a_book(), runs, hours)
def test_where_there_is_no_price_there_is_a_reason(entries, run, hour):
    book = PriceBook(entries)
    if book.price_at(run, hour) is None:
        assert book.why_no_price(run, hour)


@given(
    entries_of_a_book().filter(bool),
    st.lists(st.tuples(hours, st.integers(0, 10**15)), max_size=20),
    st.integers(0, 2**32),
)
def test_costs_by_hour_add_up_exactly_however_the_hours_are_grouped(entries, spent, seed):
    run = RunFacts(1, "a", "a", "a")
    always = PriceEntry("always", Decimal("0.1"), "s", None)
    book = PriceBook([*(e for e in entries if e.effective_from_hour is not None), always])
    spent = [(hour, ns) for hour, ns in spent if book.price_at(run, hour) is not None]

    def exact(pieces: list[tuple[int, int]]) -> Fraction:
        used = [(hour, Quantities(ns)) for hour, ns in pieces]
        found = by_price(used, lambda hour: book.price_at(run, hour))
        costs = (each.gpu_time_ns * price.usd_per_gpu_hour for price, each in found.items())
        return sum(costs, Fraction(0))

    chance = random.Random(seed)
    shuffled = spent[:]
    chance.shuffle(shuffled)
    groups = []
    while shuffled:
        size = chance.randint(1, len(shuffled))
        groups.append(shuffled[:size])
        shuffled = shuffled[size:]
    one_by_one = sum(
        (ns * book.price_at(run, hour).usd_per_gpu_hour for hour, ns in spent), Fraction(0)
    )
    assert sum((exact(group) for group in groups), Fraction(0)) == exact(spent) == one_by_one


@given(
    st.lists(st.tuples(st.booleans(), amounts), max_size=4),
    st.lists(st.integers(HOUR, HOUR + 3_000), min_size=2, max_size=6, unique=True),
    st.integers(0, 10**12),
)
def test_overheads_of_the_parts_of_a_window_are_those_of_the_whole(drawn, cuts, per_hour):
    overheads = [
        Overhead(f"o{n}", f"{n}", "s", **{"percent" if share else "usd_per_month": amount})
        for n, (share, amount) in enumerate(drawn)
    ]
    cuts.sort()

    def total(begin: int, end: int) -> Fraction:
        lines = overhead_lines(overheads, begin, end, lambda low, high: (high - low) * per_hour)
        return sum((line.nanousd for line in lines), Fraction(0))

    parts = (total(begin, end) for begin, end in zip(cuts, cuts[1:], strict=False))
    assert sum(parts, Fraction(0)) == total(cuts[0], cuts[-1])


@given(st.integers(0, 10**18), st.fractions(0, 10**6, max_denominator=10**6))
def test_the_decimal_that_is_shown_gives_the_cost_within_one_nano(gpu_time_ns, usd):
    """What a reader recomputes by hand from the text, for up to thirty years of GPU time."""
    shown = Fraction(decimal_text(usd))
    off = abs(shown - usd) * gpu_time_ns * NANOUSD_PER_USD / NS_PER_HOUR
    assert off < 1
