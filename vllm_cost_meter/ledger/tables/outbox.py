"""The outbox of a ledger: what the fleet's database is still to be sent, and who sends it.

A row of `outbox` has what one transaction wrote, and is written by that same transaction. It goes
once the fleet has it. Rows are numbered without a gap, and a number is never used again.

Invariant: without a name in `fleet_sender` nothing is put into the outbox.
"""

from sqlalchemy import BigInteger, Column, LargeBinary, Table, Text

from vllm_cost_meter.ledger.tables.base import KeyText, metadata

# At most one row: the name under which this ledger's sums count in the fleet. It is empty for a
# ledger that does not send any more.
fleet_sender = Table(
    "fleet_sender",
    metadata,
    Column("sender_id", KeyText, primary_key=True),
    # This JSON has the names that it had before: their sums must not count beside its own.
    Column("retired", Text, nullable=False),
    Column("began_at", KeyText, nullable=False),
    # The number of the last row that was put in, and of the last one that the fleet has.
    Column("last_number", BigInteger, nullable=False),
    Column("sent_number", BigInteger, nullable=False),
    # When the fleet got all that the ledger held; NULL until then.
    Column("joined_at", KeyText),
)

outbox = Table(
    "outbox",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    # `ledger/fleet/changes.py` packs it.
    Column("content", LargeBinary, nullable=False),
)
