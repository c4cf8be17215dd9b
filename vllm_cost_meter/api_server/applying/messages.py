"""What an API server and the process that applies its journals say to each other.

Invariant: what is sent changes nothing in what is applied: the journals alone say that.
"""

import msgspec

# The question, and the news, by name.
CATCH_UP, STATE = "catch up", "state"


class ApplierHello(msgspec.Struct, frozen=True, array_like=True):
    """What the process is told first: where the ledger and its journals are."""

    url: str
    # The second folder of journals, None without.
    second: str | None = None
    # Rows of requests are kept for so many days before today; None for ever.
    keep_rows_days: int | None = None
    # So many bytes of the ledger's file may be used; None for any.
    keep_rows_bytes: int | None = None
    # The folder of Parquet files that gets rows before they are dropped, None without.
    archive: str | None = None
    # Whether what the ledger gets is put into its outbox, for a fleet.
    sends: bool = False


class ApplierState(msgspec.Struct, frozen=True, array_like=True):
    """How the ledger does.

    `is_ours` tells whether this process applies, `last_error` why it cannot: None while it can.
    `failures` counts failed passes. `journal_bytes` is what the segments of all journals take on
    the disk, `wal_bytes` SQLite's log, and `free_bytes` what is free there. `applied_at_ns` is the
    end of the latest pass that worked, by the wall clock; None before the first. `set_aside` counts
    the damaged files whose rows the ledger may lack; None if unknown.
    """

    is_ours: bool = False
    last_error: str | None = None
    failures: int = 0
    journal_bytes: int = 0
    wal_bytes: int = 0
    free_bytes: int | None = None
    applied_at_ns: int | None = None
    set_aside: int | None = None
