"""A percentile of the histograms is within 1 % of the exact one, whatever the times are."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from tests.component.ledger.test_reader import NOW, Ledger, part
from tests.support.examples import examples
from tests.support.upkeep import url_of
from vllm_cost_meter.economics import Declared
from vllm_cost_meter.ledger.economics.figures import exact_percentile, near_percentile
from vllm_cost_meter.ledger.economics.query import economics, with_tables
from vllm_cost_meter.ledger.queries.cut import AsOf, Window
from vllm_cost_meter.ledger.rollups.histograms import RELATIVE_ERROR, about
from vllm_cost_meter.records.requests import Latencies

# From a microsecond to a day.
# The ledger keeps whole microseconds.
times_ms = st.integers(1, 86_400_000_000).map(lambda us: us / 1000)


@given(st.integers(0, 10**12))
def test_a_time_is_within_one_percent_or_a_microsecond_of_what_stands_for_it(us):
    assert abs(about(us) - us) <= us * RELATIVE_ERROR * 1.000001 + 1


@given(st.lists(st.integers(0, 10**12), min_size=2, max_size=2))
def test_of_two_times_the_longer_one_never_stands_lower(times):
    low, high = sorted(times)
    assert about(low) <= about(high)


@settings(max_examples=examples(30))
@given(st.lists(times_ms, min_size=1, max_size=120))
def test_percentiles_by_both_ways_and_by_hand(times):
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(url_of(Path(folder) / "ledger.db"))
        bills = [part(seq, f"h{seq}") for seq in range(1, len(times) + 1)]
        ledger.write(
            *(
                replace(bill, latencies=Latencies(1.0, 2.0, 3.0, ms))
                for bill, ms in zip(bills, times, strict=True)
            )
        )
        for percent in (50, 99):
            by_hand = sorted(times)[math.ceil(percent * len(times) / 100) - 1]
            with ledger.reader.at_cut(Window(), AsOf(now_ns=NOW)) as (connection, cut):
                found = [
                    connection.execute(text(with_tables(f"SELECT ({way('e2e', percent)})", cut)))
                    for way in (exact_percentile, near_percentile)
                ]
                exact, near = (one.scalar_one() for one in found)
            assert exact == by_hand
            assert near == pytest.approx(by_hand, rel=RELATIVE_ERROR * 1.001, abs=0.0015)
        shown = economics(ledger.reader, Declared(), as_of=AsOf(now_ns=NOW))["figures"]
        assert shown["e2e_p99_ms"] == by_hand
        assert shown["mean_e2e_seconds"] == pytest.approx(sum(times) / len(times) / 1e3, abs=1e-6)
        ledger.close()
