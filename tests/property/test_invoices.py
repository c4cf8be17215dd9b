"""Whatever was read and charged: windows add up, counters make no debt, order means nothing.

In a real ledger too, whatever file a fact comes in and however often.
"""

import contextlib
import sqlite3
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.bills import spend
from tests.support.examples import examples
from vllm_cost_meter.invoices.files import InvoiceFile
from vllm_cost_meter.invoices.timeline import (
    CHARGE_CLASSES,
    InvoiceLine,
    Reading,
    billed_hours,
    stretches,
)
from vllm_cost_meter.ledger.billing.importing import import_invoice
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.units.time import NS_PER_HOUR

SPAN_NS = 60 * NS_PER_HOUR
instants = st.one_of(
    st.integers(0, SPAN_NS), st.integers(0, 60).map(lambda hour: hour * NS_PER_HOUR)
)
amounts = st.integers(0, 10**15)
gaps = st.integers(1, SPAN_NS)


@st.composite
def snapshots(draw):
    """Readings of one meter, mostly a counter."""
    at = draw(st.lists(instants, unique=True, max_size=6))
    is_rate = draw(st.lists(st.sampled_from([False, False, True]), min_size=6, max_size=6))
    found = []
    for each, rated in zip(at, is_rate, strict=False):
        usd = draw(amounts)
        found.append(Reading("r", "gpu", each, *((None, usd) if rated else (usd, None))))
    return found


@st.composite
def lines(draw):
    found = []
    for number in range(draw(st.integers(0, 4))):
        low, high = sorted(draw(st.tuples(instants, instants).filter(lambda two: two[0] != two[1])))
        charge_class = draw(st.sampled_from(["", "", *CHARGE_CLASSES]))
        usd = draw(amounts) * (-1 if charge_class and draw(st.booleans()) else 1)
        found.append(InvoiceLine("r", "gpu", low, high, usd, "", str(number), charge_class))
    return found


@given(snapshots(), lines(), gaps, st.lists(instants, max_size=4))
def test_the_parts_of_a_window_add_up_to_it_exactly(read, charged, gap_ns, cuts):
    found = stretches(read, charged, gap_ns)
    bounds = [0, *sorted(cuts), SPAN_NS]
    parts = [spend(found, low, high) for low, high in zip(bounds, bounds[1:], strict=False)]
    assert sum(parts, Fraction(0)) == spend(found, 0, SPAN_NS)


@given(snapshots(), gaps, instants, instants)
def test_no_counter_makes_a_spend_negative(read, gap_ns, low, high):
    found = stretches(read, [], gap_ns)
    assert spend(found, min(low, high), max(low, high)) >= 0
    assert all(hour.nanousd >= 0 for hour in billed_hours(found))


@given(snapshots(), lines(), gaps)
def test_the_hours_add_up_to_the_whole(read, charged, gap_ns):
    found = stretches(read, charged, gap_ns)
    hours = billed_hours(found)
    assert sum(hour.nanousd for hour in hours) == sum(
        round(one.nanousd) for one in found if one.nanousd is not None
    )
    for hour in hours:
        begin_ns = hour.hour * NS_PER_HOUR
        exact = spend(found, begin_ns, begin_ns + NS_PER_HOUR)
        assert abs(hour.nanousd - exact) <= len(found)
        assert 0 <= hour.covered_ns <= NS_PER_HOUR
        assert 0 <= hour.unobserved_ns <= NS_PER_HOUR


@given(lines(), gaps)
def test_all_that_was_charged_is_in_the_hours(charged, gap_ns):
    hours = billed_hours(stretches([], charged, gap_ns))
    assert sum(hour.nanousd for hour in hours) == sum(line.nanousd for line in charged)


@given(snapshots(), lines(), gaps, st.randoms())
def test_the_order_of_facts_is_irrelevant(read, charged, gap_ns, random):
    whole = billed_hours(stretches(read, charged, gap_ns))
    random.shuffle(read)
    random.shuffle(charged)
    assert billed_hours(stretches(read, charged, gap_ns)) == whole


@given(snapshots(), lines(), gaps)
def test_twice_the_amounts_are_twice_the_money_and_no_other_time(read, charged, gap_ns):
    def twice(usd: int | None) -> int | None:
        return None if usd is None else 2 * usd

    once = stretches(read, charged, gap_ns)
    doubled = stretches(
        [
            replace(
                one,
                cumulative_nanousd=twice(one.cumulative_nanousd),
                nanousd_per_hour=twice(one.nanousd_per_hour),
            )
            for one in read
        ],
        [replace(one, nanousd=2 * one.nanousd) for one in charged],
        gap_ns,
    )
    assert [replace(one, nanousd=None) for one in doubled] == [
        replace(one, nanousd=None) for one in once
    ]
    assert [one.nanousd for one in doubled] == [
        None if one.nanousd is None else 2 * one.nanousd for one in once
    ]


@st.composite
def facts_in_files(draw):
    """Facts of two resources, lines of two kinds, over files in any order; some come twice."""
    facts = [
        replace(fact, resource=resource)
        for resource in ("r", "s")
        for fact in draw(st.tuples(snapshots(), lines()).map(lambda both: [*both[0], *both[1]]))
    ]
    facts = [
        replace(fact, kind=draw(st.sampled_from(["gpu", "gpu", "disk"])))
        if isinstance(fact, InvoiceLine)
        else fact
        for fact in map(of_whole_microseconds, facts)
    ]
    facts = list({one.key: one for one in facts if is_possible(one)}.values())
    files = [[] for _ in range(draw(st.integers(1, 6)))]
    for fact in draw(st.permutations(facts)):
        for place in draw(st.sets(st.integers(0, len(files) - 1), min_size=1, max_size=2)):
            files[place].append(fact)
    return files


def of_whole_microseconds(fact):
    """As a ledger has instants."""
    names = ("from_ns", "to_ns") if isinstance(fact, InvoiceLine) else ("at_ns",)
    return replace(fact, **{name: getattr(fact, name) // 1000 * 1000 for name in names})


def is_possible(fact):
    return isinstance(fact, Reading) or fact.from_ns < fact.to_ns


def recomputed(files, gap_ns):
    """The rows of all hours, computed at once from all facts, by the functions alone."""
    facts = {fact for file in files for fact in file}
    return sorted(
        (*meter, *hour)
        for meter in {(fact.resource, fact.kind) for fact in facts}
        for hour in billed_hours(stretches(
            [one for one in facts if isinstance(one, Reading)
             and (one.resource, one.kind) == meter],
            [one for one in facts if isinstance(one, InvoiceLine)
             and (one.resource, one.kind) == meter],
            gap_ns,
        ))
    )  # fmt: skip


TABLES = ("billing_snapshots", "invoice_lines", "billed_hours")


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """Import files into a ledger that is empty, and return its rows by table, and what was told."""
    path = tmp_path_factory.mktemp("invoices") / "ledger.db"
    url = f"sqlite:///{path}"
    open_database(url).dispose()

    def imported(files, gap_ns):
        with contextlib.closing(sqlite3.connect(path)) as connection:
            with connection:
                for table in TABLES:
                    connection.execute(f"DELETE FROM {table}")
            for facts in files:
                read = {one: "f:1" for one in facts if isinstance(one, Reading)}
                charged = {one: "f:1" for one in facts if isinstance(one, InvoiceLine)}
                file = InvoiceFile("f", read, charged, 0)
                told = import_invoice(url, file, gap_ns, 0)["resources"]
            found = [
                connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2, 3, 4, 5, 6").fetchall()
                for table in TABLES
            ]
        return found, told

    return imported


@given(facts_in_files(), gaps)
def test_hours_are_those_of_all_facts_whatever_file_each_came_in_and_in_which_order(
    ledger, files, gap_ns
):
    (_, _, hours), _ = ledger(files, gap_ns)
    assert hours == recomputed(files, gap_ns)


@settings(max_examples=examples(30))
@given(facts_in_files(), gaps)
def test_a_ledger_holds_and_tells_the_same_however_facts_are_split_into_files(
    ledger, files, gap_ns
):
    whole = [list({fact: None for file in files for fact in file})]
    once = ledger(whole, gap_ns)
    assert ledger([*files, *whole], gap_ns) == once
    assert ledger([*whole, *reversed(files)], gap_ns)[0] == once[0]
