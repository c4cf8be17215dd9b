"""Open a ledger from Python: `open_ledger`, where users of the package begin.

What journals hold is brought into the ledger first, where no server does it: whoever asks sees each
cost that a client was told.

Invariant: a ledger opened here is read; nothing but its journals changes it.
"""

import os
from collections.abc import Callable

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.catching_up import catch_up
from vllm_cost_meter.ledger.database import url_of
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.prices.book import NO_PRICES, PriceBook

logger = meter_logger()


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
    cost meter wrote it. If journals cannot be applied, a warning in the log says how much is not
    there yet.
    """
    given = url_of(url)
    left: int | None = None
    try:
        left = catch_up(given)
    except LedgerError as error:
        logger.warning("cost meter: what journals hold is not in the ledger yet: %s", error)
    else:
        if left:
            logger.warning(
                "cost meter: %d records in journals are not in the ledger yet: the server that"
                " applies them is behind; ask again, or see its log",
                left,
            )
    return LedgerReader(given, book=book, not_applied=left)
