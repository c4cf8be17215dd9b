"""Drawn facts of a ledger: use and other time of a few runs, over hours that a test chooses."""

from fractions import Fraction

from hypothesis import strategies as st

from vllm_cost_meter.prices.cost import Rates
from vllm_cost_meter.records.snapshot import OTHER_ROWS
from vllm_cost_meter.reports.facts import COUNTS, Ended, Facts, Used

RUNS = ("run-1", "run-2")
TENANTS = ("alice", "bob", "carol")
MODELS = ("m", "n")
amounts = st.integers(0, 10**15)
blocks = st.just(0) | st.integers(0, 10**12)
prices = st.decimals(0, 1000, places=9).map(Fraction) | st.fractions(0, 10, max_denominator=7)
policies = st.one_of(
    st.sampled_from(["none", "proportional", "even", "owner:carol", "owner:dave"]),
    st.tuples(st.integers(0, 60), st.integers(0, 40)).map(
        lambda percent: f"reserved:alice={percent[0]},dave={percent[1]}"
    ),
)


@st.composite
def facts(draw, hours: st.SearchStrategy[int]) -> Facts:
    """Facts of books that balance, told apart by tenant and model."""
    run = st.sampled_from(RUNS)
    key = st.tuples(st.sampled_from(TENANTS), st.sampled_from(MODELS))
    used = draw(st.lists(st.builds(Used, run, hours, key, amounts, blocks), max_size=12))
    name = st.tuples(st.sampled_from(OTHER_ROWS))
    other_time = draw(st.lists(st.builds(Used, run, hours, name, amounts, st.just(0)), max_size=12))
    counts = st.tuples(*[st.integers(0, 9)] * len(COUNTS))
    ended = draw(st.lists(st.builds(Ended, hours, key, counts), max_size=6))
    wall = [one._replace(key=(), kv_block_ms=0) for one in (*used, *other_time)]
    return Facts(used, other_time, ended, wall, sum(one.gpu_time_ns for one in wall))


def priced(base: Fraction):
    """A price for each run and hour: none is the same as the next. Some hours price KV blocks."""

    def price_of(run_id: str, hour: int) -> Rates:
        usd = base * (1 + RUNS.index(run_id)) + Fraction(hour % 5, 3)
        return Rates(usd, Fraction(hour % 3, 7_000))

    return price_of
