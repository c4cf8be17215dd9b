"""Rates are over the time in which any engine ran, whatever engines and servers share a ledger.

The judge marks each second in which an engine lived, and counts the marks.
"""

import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.builders import make_snapshot
from tests.support.examples import examples
from tests.support.ledger_writer import LedgerWriter
from tests.support.upkeep import url_of
from vllm_cost_meter.economics import Declared
from vllm_cost_meter.ledger.economics.query import economics
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.records.snapshot import ClassTotals

S = 10**9
FIRST_HOUR = 500_016
FIRST_S = FIRST_HOUR * 3600
HOURS = 3
END_S = FIRST_S + HOURS * 3600
seconds = st.integers(FIRST_S, END_S)
lives = st.tuples(seconds, seconds).filter(lambda both: both[0] < both[1])
# When each engine lived, its GPUs, and its rank in its server.
engines = st.lists(st.tuples(lives, st.integers(1, 4), st.integers(0, 1)), max_size=4)


@settings(max_examples=examples(40))
@example([((FIRST_S, FIRST_S + 600), 1, 0)] * 2)
@given(engines)
def test_the_time_observed_is_the_time_in_which_any_engine_ran(drawn):
    ran: set[int] = set()
    with tempfile.TemporaryDirectory() as folder:
        url = url_of(Path(folder) / "ledger.db")
        writer = LedgerWriter(url)
        writer.start()
        for number, ((began, ended), gpus, rank) in enumerate(drawn):
            lived = range(began, ended)
            ran.update(lived)
            hours = {
                hour: ClassTotals(idle=gpus * S * len(inside))
                for hour in range(FIRST_HOUR, FIRST_HOUR + HOURS)
                if (inside := range(max(began, hour * 3600), min(ended, (hour + 1) * 3600)))
            }
            state = make_snapshot(
                run_id=f"run-{number}", gpus=gpus, engine_index=rank, hours=hours,
                totals=ClassTotals(idle=gpus * S * len(lived)),
                started_at_ns=began * S, taken_at_ns=ended * S,
            )  # fmt: skip
            writer.commit(state).result(20)
        writer.close()
        with LedgerReader(url) as reader:
            windows = [(None, None), *((FIRST_HOUR + n, FIRST_HOUR + n + 1) for n in range(HOURS))]
            for low, high in windows:
                at = AsOf(now_ns=(END_S + 999) * S, settle_s=0)
                found = economics(reader, Declared(), low, high, as_of=at)["figures"]
                inside = {s for s in ran if low is None or low <= s // 3600 < high}
                assert found["observed_seconds"] == (
                    pytest.approx(len(inside), abs=1e-6) if inside else None
                )
