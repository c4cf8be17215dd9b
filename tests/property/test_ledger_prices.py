"""Any bills and any book: every hour costs what the book says of it, whenever the price came.

The judge is plain Python over the drawn values: it asks the book for each run and hour, adds up
nanoseconds by run and price, and rounds each sum once.
"""

import sqlite3
import tempfile
from contextlib import closing
from decimal import Decimal
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.property.test_ledger_books import NOW, parts_of, runs, slow, snapshot_of, store
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import NO_PRICES, Matches, PriceBook, PriceEntry, RunFacts
from vllm_cost_meter.prices.cost import cost_nanousd

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
        PriceEntry(f"p{n}", amount, "s", since, "node", gpus, matches=Matches(model=model))
        for n, (since, model, amount, gpus) in enumerate(drawn)
    )


def cost(book: PriceBook, spent: list[tuple[str, int, int]]) -> int | None:
    """What (run, hour, ns) cost; None if any that is not 0 has no price."""
    sums: dict[tuple[str, str], tuple[int, Decimal]] = {}
    for run, hour, ns in spent:
        if ns:
            price = book.price_at(RunFacts(1, "m", "a GPU", "node-1"), hour)
            if price is None:
                return None
            known = sums.get((run, price.key), (0, None))[0]
            sums[run, price.key] = (known + ns, price.usd_per_gpu_hour)
    return sum(cost_nanousd(ns, usd) for ns, usd in sums.values()) if sums else 0


@slow
@given(runs.filter(bool), entries, entries, st.integers(0, 2**32))
def test_reports_price_each_hour_by_the_book_at_hand_and_change_no_record(
    drawn, first, later, seed
):
    parts = [parts_of(n, bills) for n, (bills, _, _) in enumerate(drawn)]
    snapshots = [
        snapshot_of(n, bills, overhead, gpus)
        for n, (bills, (_, overhead, gpus)) in enumerate(zip(parts, drawn, strict=True))
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
            whole = reader.tenants(now_ns=NOW, settle_s=0)
            hours = [reader.tenants(h, h + 1, now_ns=NOW, settle_s=0) for h in HOURS]
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
    assert priced(whole) == judged(book, every, every)
    for tenant in {part.owner.tenant for part in bills}:
        spent = [
            (part.bill.run_id, piece.hour, piece.gpu_time_ns)
            for part in bills
            for piece in part.bill.pieces
            if part.owner.tenant == tenant
        ]
        if tenant in rows:
            assert priced(rows[tenant]) == judged(book, spent, every)
    for name in ("idle", "host", "lost"):
        spent = [
            (snapshot.run_id, hour, getattr(totals, name))
            for snapshot in snapshots
            for hour, totals in snapshot.hours.items()
        ]
        assert priced(rows[f"__{name}__"]) == judged(book, spent, every)
    for hour, window in zip(HOURS, hours, strict=True):
        inside = [each for each in every if each[1] == hour]
        assert priced(window) == judged(book, inside, inside)


def judged(book: PriceBook, spent: list, every: list) -> int | None:
    """As `cost`; but nothing costs nothing only where some of all time has a price."""
    if not any(ns for _, _, ns in spent):
        some = (cost(book, [each]) is not None for each in every if each[2])
        return 0 if any(some) else None
    return cost(book, spent)


def priced(row: dict) -> int | None:
    assert (row["cost_nanousd"] is None) == (row["cost_reason"] is not None)
    return row["cost_nanousd"]


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())
