"""What a statement says of how well the split is known, computed by hand."""

from dataclasses import replace

from tests.unit.reports.test_statement import (
    DAY,
    HOUR,
    RENT,
    SECOND,
    Page,
    about,
    facts,
    make,
    text,
)
from vllm_cost_meter.reports.charges import ChargesKnown
from vllm_cost_meter.reports.facts import Facts
from vllm_cost_meter.reports.statement_html import statement_html

# Alice's split is known but for one day's model, bob's is not; carol was always alone.
SPLITS = facts(
    used=[
        ("run", HOUR, ("alice", "m"), 60 * SECOND, 0, ChargesKnown(60 * SECOND, 3 * SECOND)),
        ("run", HOUR, ("alice", "n"), 20 * SECOND),
        ("run", DAY, ("alice", "n"), 20 * SECOND, 0, ChargesKnown(20 * SECOND, SECOND)),
        ("run", DAY, ("bob", "n"), 60 * SECOND),
        ("run", DAY, ("carol", "n"), 40 * SECOND, 0, ChargesKnown(40 * SECOND, 0)),
    ],
    other_time=[(HOUR, "idle", 40 * SECOND)],
)


def test_a_statement_says_how_well_each_tenants_split_is_known_and_that_of_all():
    # Alice: 3 + 1 of 60 + 20 s, of 100 s; all: 4 of 120 s, of 200 s.
    answer = make(SPLITS)
    assert {one["tenant"]: one["charge_error"] for one in answer["tenants"]} == {
        "alice": 0.05, "bob": None, "carol": 0.0,
    }  # fmt: skip
    total = answer["total"]
    assert (total["charge_known_ns"], total["charge_error_ns"]) == (120 * SECOND, 4 * SECOND)
    shown = text(answer).splitlines()
    at = shown.index("alice: split known to within 5.0% for 80.0% of the GPU time")
    assert shown[at + 1 : at + 4] == [
        "bob: not known how far the split may be off",
        "carol: split known to within 0.0%",
        "all tenants, on average: split known to within 3.4% for 60.0% of the GPU time",
    ]
    texts = Page(statement_html(about(answer))).texts
    assert {shown[at], *shown[at + 1 : at + 4]} <= set(texts)


def test_a_tenants_statement_says_it_in_one_line():
    assert (
        "split known to within 5.0% for 80.0% of the GPU time"
        in text(make(SPLITS, tenant="alice")).splitlines()
    )
    assert "not known how far the split may be off" in text(make(SPLITS, tenant="bob")).splitlines()


def test_lines_say_it_of_usage_and_no_other_line_says_anything():
    lines = make(SPLITS, overhead=[RENT])["lines"]
    names = ("charge_known_ns", "charge_error_ns", "charge_error")
    told = {
        (line["tenant"], line["day"], line["item"]): tuple(line[name] for name in names)
        for line in lines
        if line["kind"] == "usage"
    }
    assert told["alice", "2027-01-15", "m"] == (60 * SECOND, 3 * SECOND, 0.05)
    assert told["alice", "2027-01-15", "n"] == told["bob", "2027-01-16", "n"] == (0, 0, None)
    assert told["carol", "2027-01-16", "n"] == (40 * SECOND, 0, 0.0)
    others = [line for line in lines if line["kind"] != "usage"]
    assert others
    assert all(line[name] is None for line in others for name in names)


def test_no_amount_depends_on_how_well_a_split_is_known():
    def amounts(known: Facts) -> list[tuple]:
        lines = make(known, idle="proportional", overhead=[RENT])["lines"]
        return [(line["usage_cents"], line["amount_cents"], line["gpu_time_ns"]) for line in lines]

    unknown = replace(SPLITS, used=[one._replace(charges=ChargesKnown()) for one in SPLITS.used])
    assert amounts(SPLITS) == amounts(unknown)
