"""Any bills and any book: every hour costs what the book says of it, whenever the price came.

The judge is plain Python over the drawn values: it asks the book for each run and hour and adds up
fractions. The whole is rounded once; a row is that sum rounded down or up.
"""

import math
import sqlite3
import tempfile
from contextlib import closing
from fractions import Fraction
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.property.test_ledger_books import NOW, parts_of, runs, slow, snapshot_of, store
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.queries.cut import AsOf
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import NO_PRICES, PriceBook, PriceEntry, RunFacts, RunMatch

HOUR = 500_000
HOURS = range(HOUR, HOUR + 4)
entries = st.lists(
    st.tuples(
        st.none() | st.integers(HOUR - 1, HOUR + 4),
        st.sampled_from([None, "m", "x"]),
        st.decimals(0, 1_000, places=3),
        st.integers(1, 7),
    ),
    max_size=5,
    unique_by=lambda entry: entry[:2],
)


def book_of(drawn: list) -> PriceBook:
    return PriceBook(
        PriceEntry(f"p{n}", amount, "s", since, "node", gpus, matches=RunMatch(model=model))
        for n, (since, model, amount, gpus) in enumerate(drawn)
    )


def cost(book: PriceBook, spent: list[tuple[str, int, int]]) -> Fraction | None:
    """What (run, hour, ns) cost; None if any that is not 0 has no price."""
    total = Fraction(0)
    for _, hour, ns in spent:
        if ns:
            price = book.price_at(RunFacts(1, "m", "a GPU", "node-1"), hour)
            if price is None:
                return None
            total += Fraction(ns, 3600) * price.usd_per_gpu_hour
    return total


@slow
@given(runs.filter(bool), entries, entries, st.integers(0, 2**32))
def test_reports_price_each_hour_by_the_book_at_hand_and_change_no_record(
    drawn, first, later, seed
):
    parts = [parts_of(n, bills) for n, (bills, _, _) in enumerate(drawn)]
    snapshots = [
        snapshot_of(n, bills, other_time, gpus)
        for n, (bills, (_, other_time, gpus)) in enumerate(zip(parts, drawn, strict=True))
    ]
    bills = [part for run in parts for part in run]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        engine = open_database(f"sqlite:///{path}")
        store(engine, [*bills, *snapshots], seed)
        engine.dispose()
        before = dump(path)
        for book in (NO_PRICES, book_of(first), book_of(later)):
            reader = LedgerReader(f"sqlite:///{path}", book=book)
            whole = reader.tenants(as_of=AsOf(NOW, 0))
            hours = [reader.tenants(h, h + 1, as_of=AsOf(NOW, 0)) for h in HOURS]
            reader.close()
            check(book, bills, snapshots, whole, hours)
        assert dump(path) == before


def check(book: PriceBook, bills: list, snapshots: list, whole: dict, hours: list[dict]) -> None:
    rows = {row["tenant"]: row for row in whole["tenants"]}
    every = [
        (snapshot.run_id, hour, totals.total())
        for snapshot in snapshots
        for hour, totals in snapshot.hours.items()
    ]
    assert priced(whole) == rounded(judged(book, every, every))
    for tenant in {part.owner.tenant for part in bills}:
        spent = [
            (part.bill.run_id, piece.hour, piece.gpu_time_ns)
            for part in bills
            for piece in part.bill.pieces
            if part.owner.tenant == tenant
        ]
        if tenant in rows:
            assert_near(priced(rows[tenant]), judged(book, spent, every))
    for name in ("idle", "host", "lost"):
        spent = [
            (snapshot.run_id, hour, getattr(totals, name))
            for snapshot in snapshots
            for hour, totals in snapshot.hours.items()
        ]
        assert_near(priced(rows[f"__{name}__"]), judged(book, spent, every))
    for hour, window in zip(HOURS, hours, strict=True):
        inside = [each for each in every if each[1] == hour]
        assert priced(window) == rounded(judged(book, inside, inside))


def rounded(exact: Fraction | None) -> int | None:
    return None if exact is None else round(exact)


def assert_near(nanousd: int | None, exact: Fraction | None) -> None:
    assert (nanousd is None) == (exact is None)
    assert exact is None or nanousd in (math.floor(exact), math.ceil(exact))


def judged(book: PriceBook, spent: list, every: list) -> Fraction | None:
    """As `cost`; but nothing costs nothing only where some of all time has a price."""
    if not any(ns for _, _, ns in spent):
        some = (cost(book, [each]) is not None for each in every if each[2])
        return Fraction(0) if any(some) else None
    return cost(book, spent)


def priced(row: dict) -> int | None:
    assert (row["cost_nanousd"] is None) == (row["cost_reason"] is not None)
    return row["cost_nanousd"]


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())
