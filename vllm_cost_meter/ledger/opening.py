"""Open a ledger from Python: `open_ledger`, where users of the package begin.

Invariant: a ledger opened here is read and never written.
"""

import os
from collections.abc import Callable

from vllm_cost_meter.ledger.database import url_of
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.prices.book import NO_PRICES, PriceBook


def open_ledger(
    url: str | os.PathLike[str] | None = None,
    *,
    book: PriceBook | Callable[[], PriceBook] = NO_PRICES,
) -> LedgerReader:
    """Open an existing ledger for reading. Use it in a `with` block, or close it.

    `url` is an SQLAlchemy URL (SQLite or PostgreSQL) or the path of an SQLite file; None is this
    user's default ledger. `book` prices what is read: a price book, or a function that returns the
    one to use now. Without a book, each run costs what the ledger recorded as its price.

    Raises LedgerError if there is no such ledger, or it cannot be opened, or another version of the
    cost meter wrote it.
    """
    return LedgerReader(url_of(url), book=book)
