"""Engines with any labels: answers about some of them are their own, and add up to that about all.

The judge adds up the drawn bills and totals of each run in Python. It knows of no filter but a list
of runs.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.property.test_ledger_books import (
    HOUR,
    NOW,
    http_of,
    parts_of,
    runs,
    slow,
    snapshot_of,
    store,
)
from tests.property.test_one_allocation import policies, with_a_piece
from vllm_cost_meter.economics import Declared
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.economics.query import economics
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import PriceBook, PriceEntry, RunMatch
from vllm_cost_meter.records.requests import EngineRequest
from vllm_cost_meter.records.snapshot import OTHER_ROWS, Snapshot
from vllm_cost_meter.reports.facts import COUNTS, UNALLOCATED
from vllm_cost_meter.reports.grammar import engines_named, question

AT = AsOf(NOW, 0)
POOLS = ("big", "spot", UNALLOCATED)
labels = st.sampled_from(
    [{}, {"pool": "spot"}, {"pool": "spot", "zone": "a"}, {"zone": "a", "pool": "big"}]
)
worlds = st.lists(st.tuples(labels, runs.filter(bool).map(lambda drawn: drawn[0])), max_size=4)
windows = st.sampled_from([(None, None), (HOUR, HOUR + 2), (HOUR + 1, None)])
# USD per GPU-hour by pool; engines without one have that of everybody.
USD = {"spot": 3, "big": 7, UNALLOCATED: 2}
BOOK = PriceBook(
    PriceEntry(
        f"of {pool}", usd, "s", None,
        matches=RunMatch(labels=() if pool == UNALLOCATED else (("pool", pool),)),
    )
    for pool, usd in USD.items()
)  # fmt: skip
AMOUNTS = (
    *("cost_usd", "wall_gpu_seconds", "cold_starts", "requests", "arrivals", "prompt_tokens"),
    *("output_tokens", "charged_usd", "cold_start_gpu_seconds"),
)


class World:
    """Drawn engines in a ledger, and what the judge knows of them."""

    def __init__(self, drawn: list) -> None:
        self.pool_of: dict[str, str] = {}
        self.bills: list[EngineRequest] = []
        self.snapshots: list[Snapshot] = []
        for n, (of_run, (bills, other_time, gpus)) in enumerate(drawn):
            parts = [with_a_piece(part) for part in parts_of(n, bills)]
            said = snapshot_of(n, parts, other_time, gpus)
            self.snapshots.append(replace(said, engine=replace(said.engine, labels=of_run)))
            self.bills += parts
            self.pool_of[said.run_id] = of_run.get("pool", UNALLOCATED)

    @contextmanager
    def reader(self) -> Iterator[LedgerReader]:
        replies = {part.http_request_id: http_of(part) for part in self.bills}
        with tempfile.TemporaryDirectory() as folder:
            url = f"sqlite:///{Path(folder) / 'ledger.db'}"
            engine = open_database(url)
            store(engine, [*self.bills, *self.snapshots, *replies.values()], seed=0)
            engine.dispose()
            with LedgerReader(url, book=BOOK) as reader:
                yield reader

    def spent(self, pool: str, window: tuple[int | None, int | None]) -> Counter[str]:
        """GPU-ns of each tenant and class on engines of a pool."""
        low, high = window
        found: Counter[str] = Counter()

        def count(name: str, run_id: str, hour: int, ns: int) -> None:
            is_inside = (low is None or hour >= low) and (high is None or hour < high)
            if is_inside and self.pool_of[run_id] == pool:
                found[name] += ns

        for part in self.bills:
            for piece in part.bill.pieces:
                count(part.owner.tenant, part.bill.run_id, piece.hour, piece.gpu_time_ns)
        for said in self.snapshots:
            for hour, totals in said.hours.items():
                for name in OTHER_ROWS:
                    count(f"__{name}__", said.run_id, hour, getattr(totals, name))
        return +found


def times_of(rows: list[dict]) -> Counter[str]:
    return +Counter({row["tenant"]: row["gpu_time_ns"] for row in rows})


@slow
@given(worlds, windows)
def test_a_report_of_a_pool_is_its_engines_time_and_cost_and_the_pools_are_the_whole(drawn, window):
    world = World(drawn)
    with world.reader() as reader:
        asked = replace(question(aggregate="tenant"), from_hour=window[0], to_hour=window[1])
        whole = reader.report(asked, AT)
        pools = {
            pool: reader.report(replace(asked, conditions={"label:pool": frozenset([pool])}), AT)
            for pool in POOLS
        }
        both = replace(asked, aggregate=("tenant", "label:pool"))
        (grouped,) = reader.report(both, AT)["series"]
    found: Counter[str] = Counter()
    for pool, report in pools.items():
        (piece,) = report["series"]
        spent = world.spent(pool, window)
        assert times_of(piece["rows"]) == spent
        assert report["wall_gpu_ns"] == piece["gpu_time_ns"] == sum(spent.values())
        assert report["adds_up"] is True
        due = round(Fraction(sum(spent.values()), 3600) * USD[pool])
        assert (report["wall_cost_nanousd"] or 0) == due
        assert sum(row["cost_nanousd"] or 0 for row in piece["rows"]) == due
        apart = [row for row in grouped["rows"] if row["label:pool"] == pool]
        assert times_of(apart) == spent
        for row in piece["rows"]:
            found.update({name: row[name] or 0 for name in COUNTS})
    (all_of_it,) = whole["series"]
    rows = all_of_it["rows"]
    assert +found == +Counter({n: sum(row[n] or 0 for row in rows) for n in COUNTS})
    assert sum(report["wall_gpu_ns"] for report in pools.values()) == whole["wall_gpu_ns"]
    assert grouped["cost_nanousd"] == all_of_it["cost_nanousd"]
    assert sum(row["cost_nanousd"] or 0 for row in grouped["rows"]) == (
        whole["wall_cost_nanousd"] or 0
    )


@slow
@given(worlds, policies)
def test_whoever_carries_idle_time_rows_by_pool_add_up_to_those_by_tenant(drawn, idle):
    world = World(drawn)
    with world.reader() as reader:
        (by_tenant,) = reader.report(question(idle=idle), AT)["series"]
        by_pool = reader.report(question(aggregate="tenant,label:pool", idle=idle), AT)
        (grouped,) = by_pool["series"]
        pools = [
            reader.report(question(idle=idle, filter=f"label:pool={pool}"), AT) for pool in POOLS
        ]
    assert by_pool["adds_up"] is True
    assert grouped["cost_nanousd"] == by_tenant["cost_nanousd"]
    assert sum(row["idle_share_ns"] for row in grouped["rows"]) == 0
    shares: Counter[str] = Counter()
    for row in grouped["rows"]:
        shares[row["tenant"]] += row["idle_share_ns"]
    for row in by_tenant["rows"]:
        # Each row is rounded to the nanosecond by itself.
        assert abs(shares[row["tenant"]] - row["idle_share_ns"]) <= len(POOLS)
    for report in pools:
        (piece,) = report["series"]
        assert sum(row["idle_share_ns"] for row in piece["rows"]) == 0
        costs = sum(row["cost_nanousd"] or 0 for row in piece["rows"])
        assert costs == (report["wall_cost_nanousd"] or 0)


@slow
@given(worlds, windows)
def test_economic_amounts_of_the_pools_add_up_to_those_of_all_engines(drawn, window):
    world = World(drawn)
    with world.reader() as reader:
        whole = economics(reader, Declared(), *window, as_of=AT)["figures"]
        pools = [
            economics(
                reader, Declared(), *window, as_of=AT,
                engines=engines_named(f"label:pool={pool}"),
            )["figures"]
            for pool in POOLS
        ]  # fmt: skip
    for name in AMOUNTS:
        amounts = [figures[name] or 0 for figures in pools]
        assert sum(amounts) == pytest.approx(whole[name] or 0), name
    observed = [figures["observed_seconds"] or 0 for figures in pools]
    all_of_it = whole["observed_seconds"] or 0
    assert all_of_it <= sum(observed) * (1 + 1e-9)
    assert max(observed) <= all_of_it * (1 + 1e-9)
