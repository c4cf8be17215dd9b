"""One question has one answer, and its rows add up to the nano-USD, whoever asks and however.

The judge adds up drawn nanoseconds x prices by hand, as fractions, and rounds the whole once. It
knows of no rows but those of tenants and classes, and of no code of the ledger.
"""

import math
import tempfile
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.property.test_ledger_books import NOW, parts_of, runs, slow, snapshot_of, store
from tests.property.test_ledger_prices import HOUR, HOURS, book_of, entries
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import PriceBook, RunFacts
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.owner import OWN
from vllm_cost_meter.records.requests import EngineRequest
from vllm_cost_meter.records.snapshot import OTHER_ROWS
from vllm_cost_meter.reports.grammar import Question, question

AT = {"as_of": AsOf(NOW, 0)}
policies = st.sampled_from(["none", "even", "proportional", "owner:z", "reserved:a=30,z=12.5"])
Spent = dict[str, list[tuple[int, int]]]


def world(drawn: list) -> tuple[list, list]:
    parts = [
        [with_a_piece(part) for part in parts_of(n, bills)] for n, (bills, _, _) in enumerate(drawn)
    ]
    snapshots = [
        snapshot_of(n, bills, other_time, gpus)
        for n, (bills, (_, other_time, gpus)) in enumerate(zip(parts, drawn, strict=True))
    ]
    return [part for run in parts for part in run], snapshots


def with_a_piece(part: EngineRequest) -> EngineRequest:
    """The bill of an engine has one, however little it used."""
    pieces = part.bill.pieces or (UsagePiece(HOUR, 0, 0, 0, 0),)
    return replace(part, bill=part.bill._replace(pieces=pieces))


def spent_by_row(bills: list, snapshots: list, hours: set[int]) -> Spent:
    """(hour, ns) of each tenant and each class."""
    spent: Spent = defaultdict(list)
    for part in bills:
        for piece in part.bill.pieces:
            if piece.hour in hours:
                spent[part.owner.tenant].append((piece.hour, piece.gpu_time_ns))
    for snapshot in snapshots:
        for hour, totals in snapshot.hours.items():
            for name in OTHER_ROWS:
                if hour in hours:
                    spent[f"__{name}__"].append((hour, getattr(totals, name)))
    return spent


def exact(book: PriceBook, spent: list[tuple[int, int]]) -> Fraction | None:
    """What (hour, ns) cost in nano-USD by the book; None where it has no price."""
    total = Fraction(0)
    for hour, ns in spent:
        if ns:
            price = book.price_at(RunFacts(1, "m", "a GPU", "node-1"), hour)
            if price is None:
                return None
            total += Fraction(ns, 3600) * price.usd_per_gpu_hour
    return total


def rows_of(answer: dict) -> dict[str, dict]:
    (series,) = answer["series"]
    return {row["tenant"]: row for row in series["rows"]}


def asked(drawn: list, book: PriceBook, questions: list[Question], windows: list) -> tuple:
    bills, snapshots = world(drawn)
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'ledger.db'}"
        engine = open_database(url)
        store(engine, [*bills, *snapshots], seed=0)
        engine.dispose()
        reader = LedgerReader(url, book=book)
        reports = [reader.report(one, **AT) for one in questions]
        tenants = [reader.tenants(*window, **AT) for window in windows]
        summaries = [reader.summary(*window, **AT) for window in windows]
        singles = [
            {name: reader.tenant(name, *window, covers=OWN, **AT) for name in "abc"}
            for window in windows
        ]
        reader.close()
    return reports, tenants, summaries, singles


WINDOWS = [(), (HOUR, HOUR + 1), (HOUR + 1, None)]


@slow
@given(runs.filter(bool), entries)
def test_every_way_to_ask_for_tenants_gives_the_same_rows(drawn, priced):
    asks = [Question(*window) for window in WINDOWS]
    reports, tenants, summaries, singles = asked(drawn, book_of(priced), asks, WINDOWS)
    for report, answer, summary, single in zip(reports, tenants, summaries, singles, strict=True):
        (series,) = report["series"]
        assert answer["series"] == report["series"]
        assert answer["tenants"] == series["rows"]
        assert {name: answer[name] for name in report} == report
        assert answer["cost_nanousd"] == report["wall_cost_nanousd"] == series["cost_nanousd"]
        assert summary["cost_nanousd"] == series["cost_nanousd"]
        for name, row in rows_of(report).items():
            if name in single:
                assert_same_but_for_rounding(single[name], row)


def assert_same_but_for_rounding(single: dict, row: dict) -> None:
    """A tenant's row by itself is rounded by itself: each has its amount rounded up or down."""
    money = [key for key in row if "cost" in key and "reason" not in key]
    for key in money:
        if key.endswith("_nanousd"):
            assert (single[key] is None) == (row[key] is None)
            assert abs((single[key] or 0) - (row[key] or 0)) <= 1
    others = row.keys() - money
    assert {key: single[key] for key in others} == {key: row[key] for key in others}


@slow
@given(runs.filter(bool), entries)
def test_rows_are_the_drawn_time_at_its_prices_and_add_up_to_the_whole(drawn, priced):
    book = book_of(priced)
    bills, snapshots = world(drawn)
    asks = [Question(*window) for window in WINDOWS]
    reports, *_ = asked(drawn, book, asks, [])
    for (low, high), report in zip([(None, None), *WINDOWS[1:]], reports, strict=True):
        inside = {
            hour for hour in HOURS if (low is None or hour >= low) and (high is None or hour < high)
        }
        spent = spent_by_row(bills, snapshots, inside)
        rows = rows_of(report)
        for name, row in rows.items():
            due = exact(book, spent.get(name, []))
            if any(ns for _, ns in spent.get(name, [])):
                assert (row["cost_nanousd"] is None) == (due is None)
            if due is not None and row["cost_nanousd"] is not None:
                assert row["cost_nanousd"] in (math.floor(due), math.ceil(due))
        whole = exact(book, [each for of in spent.values() for each in of])
        (series,) = report["series"]
        if whole is not None and any(ns for of in spent.values() for _, ns in of):
            assert sum(row["cost_nanousd"] for row in rows.values()) == round(whole)
            assert series["cost_nanousd"] == report["wall_cost_nanousd"] == round(whole)
        else:
            assert series["cost_nanousd"] is report["wall_cost_nanousd"] is None


@slow
@given(runs.filter(bool), st.integers(1, 7), policies)
def test_whatever_the_columns_the_steps_and_the_policy_all_rows_are_the_whole(drawn, gpus, idle):
    book = book_of([(None, None, 1, gpus)])
    bills, snapshots = world(drawn)
    spent = spent_by_row(bills, snapshots, set(HOURS))
    due = round(exact(book, [each for of in spent.values() for each in of]) or 0)
    words = [
        {"aggregate": aggregate, "step": step, "accumulate": accumulate, "idle": idle}
        for aggregate in ("tenant", "model", "tenant,hour", "day,status")
        for step, accumulate in ((None, False), ("1h", False), ("1h", True))
    ]
    reports, *_ = asked(drawn, book, [question(**each) for each in words], [])
    for report in reports:
        for name in ("cost_nanousd", "usage_cost_nanousd"):
            costs = [row[name] for one in report["series"] for row in one["rows"]]
            assert sum(cost or 0 for cost in costs) == due
        assert sum(one["cost_nanousd"] or 0 for one in report["series"]) == due
        assert (report["wall_cost_nanousd"] or 0) == due
