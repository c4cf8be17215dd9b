"""Rows may be dropped at any midnight, in any slices: every figure stays as it was.

The judge is a second ledger that got the same records, and of which nothing is ever dropped.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from tests.support.examples import examples
from tests.support.old_worlds import DAYS, FIRST, figures, old_worlds, standings
from tests.support.upkeep import rows_of, url_of, wrong_sums
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.journal.entries import Record
from vllm_cost_meter.ledger.database import open_database, writing
from vllm_cost_meter.ledger.inserts import write
from vllm_cost_meter.ledger.queries.spending import Spending
from vllm_cost_meter.ledger.retention.dropping import Dropper
from vllm_cost_meter.ledger.retention.ranges import DroppedNumbers, joined, ranges_of, without
from vllm_cost_meter.ledger.rollups.rebuilding import rebuild, wrong_histograms
from vllm_cost_meter.ledger.upkeep.merging import merge

numbers = st.frozensets(st.integers(1, 20))
slow = settings(max_examples=examples(5))


@given(numbers, numbers)
def test_ranges_are_the_sets_of_numbers_that_they_stand_for(one, other):
    def members(ranges: Any) -> set[int]:
        return {n for first, last in ranges for n in range(first, last + 1)}

    assert members(ranges_of(one)) == one
    assert ranges_of(one) == joined(ranges_of(one))
    assert members(without(ranges_of(one), ranges_of(other))) == one - other
    dropped = DroppedNumbers().and_also(one).and_also(other)
    assert {n for n in range(0, 25) if dropped.has(n)} == one | other
    assert members(dropped.ranges()) == one | other
    assert DroppedNumbers.stored(dropped.last_seq, dropped.rest_text()) == dropped


class Twins:
    """Two ledgers with the same records; of one of them rows are dropped."""

    def __init__(self, folder: str) -> None:
        self.paths = [Path(folder) / name for name in ("whole.db", "dropped.db")]
        self.engines = [open_database(url_of(path)) for path in self.paths]
        # One that looks all the time.
        self.follower = Spending(url_of(self.paths[1]))

    @property
    def dropped(self) -> Engine:
        return self.engines[1]

    def write(self, records: list[Record]) -> None:
        for engine in self.engines:
            with writing(engine).begin() as connection:
                write(connection, records)

    def check(self) -> None:
        whole, dropped = (dict(figures(url_of(path))) for path in self.paths)
        for name, figure in whole.items():
            assert dropped[name] == figure, differing(name, figure, dropped[name])
        assert standings(self.follower) == whole["budgets"]
        assert wrong_sums(self.paths[1]) == []
        with self.dropped.connect() as connection:
            assert wrong_histograms(connection) == []

    def close(self) -> None:
        self.follower.close()
        for engine in self.engines:
            engine.dispose()


def differing(name: str, one: Any, other: Any) -> str:
    """Return the first place where two answers differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one:
            if one[key] != other.get(key):
                return differing(f"{name}.{key}", one[key], other.get(key))
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for at, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            if mine != theirs:
                return differing(f"{name}[{at}]", mine, theirs)
    return f"{name}: expected {one}, got {other}"


def some_steps(dropper: Dropper, most: int) -> Iterator[None]:
    """Take at most so many steps, as a process does that is killed between two."""
    for _ in range(most):
        if dropper.is_done:
            return
        dropper.step()
        yield


@slow
@given(old_worlds(), st.randoms(use_true_random=False), st.data())
def test_all_figures_stay_whatever_is_dropped_when(world, chance, data):
    late = data.draw(st.frozensets(st.sampled_from(sorted(world.exchanges) or ["none"])))
    early = [r for id, some in world.exchanges.items() if id not in late for r in some]
    with tempfile.TemporaryDirectory() as folder:
        twins = Twins(folder)
        twins.write([*world.states, *early])
        standings(twins.follower)
        written = [*world.states, *early]
        for day in sorted(data.draw(st.lists(st.integers(0, DAYS), min_size=1, max_size=3))):
            dropper = Dropper(twins.dropped, FIRST + 24 * day, data.draw(st.integers(1, 5)))
            for _ in some_steps(dropper, data.draw(st.integers(1, 12))):
                if written and chance.random() < 0.5:
                    # An old journal is applied again.
                    twins.write(chance.sample(written, min(3, len(written))))
        twins.check()
        for id in late & world.exchanges.keys():
            twins.write(world.exchanges[id])
        twins.check()
        while not dropper.is_done:
            dropper.step()
        with writing(twins.dropped).begin() as connection:
            rebuild(connection)
        twins.write(chance.sample(world.records(), len(world.records())))
        twins.check()
        twins.close()


@slow
@given(old_worlds(), st.data())
def test_ledgers_with_dropped_rows_merge_into_what_they_are_without(world, data):
    """Of some exchanges only one of the two has the records; of the others both."""
    ids = st.frozensets(st.sampled_from(sorted(world.exchanges) or ["none"]))
    left_out = data.draw(ids), data.draw(ids)
    with tempfile.TemporaryDirectory() as folder:
        twins = [Twins(f"{folder}/{n}") for n in (0, 1)]
        for twin, out in zip(twins, left_out, strict=True):
            twin.write([r for id, some in world.exchanges.items() if id not in out for r in some])
            twin.write(world.states)
            dropper = Dropper(twin.dropped, FIRST + 24 * data.draw(st.integers(0, DAYS)), 3)
            for _ in some_steps(dropper, data.draw(st.sampled_from([0, 0, 2, 50]))):
                pass
        one, other = twins
        merge(url_of(one.paths[0]), [other.paths[0]], 1)
        before = rows_of(one.paths[1])
        refused = None
        try:
            merge(url_of(one.paths[1]), [other.paths[1]], 1)
        except LedgerError as error:
            refused = str(error)
        event("merged" if refused is None else "refused")
        if refused is not None:
            assert "only there and" in refused
            assert rows_of(one.paths[1]) == before
        else:
            one.check()
            after = rows_of(one.paths[1])
            merge(url_of(one.paths[1]), [other.paths[1]], 1)
            assert rows_of(one.paths[1]) == after
        for twin in twins:
            twin.close()
