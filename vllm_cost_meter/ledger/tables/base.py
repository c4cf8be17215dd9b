"""What all tables of the ledger share: their list, the type of keys, and columns of amounts.

Invariant: every table of the ledger is in `metadata`.
"""

from sqlalchemy import BigInteger, Column, MetaData, Text

metadata = MetaData()

# Keys and instants compare byte by byte, whatever locale a PostgreSQL database has.
KeyText = Text().with_variant(Text(collation="C"), "postgresql")


def amount_columns(*names: str) -> list[Column[int]]:
    """Return a column for each amount that is always known."""
    return [Column(name, BigInteger, nullable=False) for name in names]
