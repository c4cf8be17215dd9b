"""Economics of any window are the sums of its hours, each at its own price.

They are read from sums by day where that is the same. The judge adds up the drawn bills in Python.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.component.ledger.test_reader import http, part
from tests.support.builders import make_snapshot, reply_of
from tests.support.examples import examples
from tests.support.ledger_writer import LedgerWriter
from tests.support.upkeep import url_of
from vllm_cost_meter.economics import Declared
from vllm_cost_meter.ledger.economics.query import economics
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import PriceBook, PriceEntry
from vllm_cost_meter.records.bill import UsagePiece
from vllm_cost_meter.records.requests import EngineRequest
from vllm_cost_meter.records.snapshot import ClassTotals

NS = 3_600 * 10**9
# A midnight, UTC, and the hours of four days after it.
FIRST = 500_016
HOURS = range(FIRST, FIRST + 96)
AT = AsOf(now_ns=(FIRST + 200) * NS, settle_s=0)
some_hour = st.sampled_from(HOURS)
windows = st.tuples(st.none() | some_hour, st.none() | some_hour).filter(
    lambda both: None in both or both[0] < both[1]
)


@st.composite
def runs(draw: st.DrawFn) -> dict[str, tuple[range, list[EngineRequest]]]:
    """Each run's hours, and its bills within them."""
    found = {}
    for run in "ab":
        first = draw(some_hour)
        lived = range(first, draw(st.integers(first + 1, HOURS[-1] + 1)))
        bills = []
        for seq, hour in enumerate(draw(st.lists(st.sampled_from(lived), max_size=6)), 1):
            piece = UsagePiece(hour, *(draw(st.integers(0, 10**6)) for _ in range(4)))
            bill = part(seq, f"{run}{seq}", run_id=run, pieces=(piece,))
            bills.append(replace(bill, finished_at_ns=hour * NS + seq))
        found[run] = lived, bills
    return found


def entries(changes: Mapping[int, int]) -> list[PriceEntry]:
    later = [
        PriceEntry(f"prices[{number}]", Decimal(usd), "list", hour)
        for number, (hour, usd) in enumerate(sorted(changes.items()), 1)
    ]
    return [PriceEntry("prices[0]", Decimal(3), "list", None), *later]


@settings(max_examples=examples(40))
@given(runs(), st.dictionaries(some_hour, st.integers(1, 9), max_size=3), st.lists(windows))
def test_a_windows_figures_are_those_of_its_hours(drawn, changes, asked):
    def usd_at(hour: int) -> int:
        return changes[max(since)] if (since := [h for h in changes if h <= hour]) else 3

    with tempfile.TemporaryDirectory() as folder:
        url = url_of(Path(folder) / "ledger.db")
        writer = LedgerWriter(url)
        writer.start()
        for run, (lived, bills) in drawn.items():
            hours = {hour: ClassTotals(idle=NS) for hour in lived}
            for bill in bills:
                hours[bill.bill.pieces[0].hour].requests += bill.bill.gpu_time_ns
            total = ClassTotals(
                idle=NS * len(lived), requests=sum(one.requests for one in hours.values())
            )
            state = make_snapshot(
                run_id=run, totals=total, hours=hours, last_seq=len(bills),
                billed_ns=total.requests, taken_at_ns=lived[-1] * NS + 1,
                started_at_ns=lived[0] * NS,
            )  # fmt: skip
            told = [
                replace(reply_of(one, http(one.http_request_id)), finished_at_ns=one.finished_at_ns)
                for one in bills
            ]
            writer.commit(*bills, *told, state).result(20)
        writer.close()
        bills = [bill for _, some in drawn.values() for bill in some]
        with LedgerReader(url, book=PriceBook(entries(changes))) as reader:
            for low, high in [(None, None), *asked]:
                of_window = [
                    (bill, piece)
                    for bill in bills
                    for piece in bill.bill.pieces
                    if (low is None or piece.hour >= low) and (high is None or piece.hour < high)
                ]
                found = economics(reader, Declared(), low, high, as_of=AT)["figures"]
                assert found["requests"] == len(of_window)
                assert found["output_tokens"] == 5 * len(of_window)
                paid = sum(p.gpu_time_ns * usd_at(p.hour) for _, p in of_window) / 3.6e12
                assert (found["charged_usd"] or 0) == pytest.approx(paid, rel=1e-9, abs=1e-18)
                tokens = sum(piece.prefill_tokens for _, piece in of_window)
                if tokens:
                    prefill = sum(p.prefill_ns * usd_at(p.hour) for _, p in of_window)
                    by_hand = 1e6 * prefill / 3.6e12 / tokens
                    price = found["usd_per_m_computed_prompt_tokens"]
                    assert price == pytest.approx(by_hand, rel=1e-9, abs=1e-18)
