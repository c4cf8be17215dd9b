"""What all tables of the ledger share: their list, and the type of keys.

Invariant: every table of the ledger is in `metadata`.
"""

from sqlalchemy import MetaData, Text

metadata = MetaData()

# Keys and instants compare byte by byte, whatever locale a PostgreSQL database has.
KeyText = Text().with_variant(Text(collation="C"), "postgresql")
