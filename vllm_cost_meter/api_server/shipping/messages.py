"""What an API server and the process that sends its ledger to the fleet say to each other.

Invariant: what is sent changes nothing in what is sent to the fleet: the outbox alone says that.
"""

import msgspec

# The question, and the news of either end, by name. `RETRY` says that the fleet can be reached.
FLUSH, STATE, RETRY = "flush", "state", "retry"


class ShippingHello(msgspec.Struct, frozen=True, array_like=True):
    """What the process is told first: the ledger, the fleet, and how often to send.

    `rows` says where the rows of requests go, and `files` into which folder.
    `kept_path` is where the copy of the fleet's settings is; None where they are not used.
    """

    ledger_url: str
    fleet_url: str
    interval_s: float
    rows: str = "fleet"
    files: str | None = None
    outbox_bytes_max: int | None = None
    kept_path: str | None = None


class ShippingState(msgspec.Struct, frozen=True, array_like=True):
    """How sending does.

    `last_error` says why the fleet cannot be sent to: None while it can. `failures` counts failed
    steps. `waiting_rows` and `waiting_bytes` are what the outbox holds. `sent_at_ns` is when the
    fleet last had all of the ledger, by the wall clock; None before the first time.
    """

    last_error: str | None = None
    failures: int = 0
    waiting_rows: int = 0
    waiting_bytes: int = 0
    sent_at_ns: int | None = None
    settings_version: int | None = None
    settings_seen_at_ns: int | None = None
    settings_error: str | None = None
