"""Compact a ledger: write its file anew without the pages that are free, in the order of its keys.

Invariant: nothing changes unless this process is alone with the ledger and has the room to end.
"""

import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from vllm_cost_meter.ledger.upkeep.alone import alone
from vllm_cost_meter.ledger.upkeep.copies import version_of
from vllm_cost_meter.ledger.upkeep.sqlite_files import (
    FreeBytes,
    connect,
    existing,
    free_bytes,
    ledger_path,
    require_space,
    sqlite_errors,
    total_bytes,
)


@dataclass(frozen=True, slots=True)
class Compacted:
    """The size of a ledger before and after, its log included."""

    bytes_before: int
    bytes_after: int


def compact(url: str, *, free: FreeBytes = free_bytes) -> Compacted:
    """Write a ledger's file anew. Raises LedgerError while somebody uses the ledger."""
    path = existing(ledger_path(url, "compact"))
    with alone(path):
        pass  # Its message names who has the ledger open.
    before = total_bytes(path)
    _require_space(path, before, free)
    with sqlite_errors(path, "compacted"), closing(connect(path, writes=True)) as connection:
        # With this mode SQLite itself refuses all others from its first read on.
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("BEGIN IMMEDIATE")
        version_of(connection, f"ledger {path}")
        connection.execute("COMMIT")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return Compacted(before, total_bytes(path))


def _require_space(path: Path, size: int, free: FreeBytes) -> None:
    """Raise LedgerError without room for the new file, in SQLite's folder and in the log."""
    temporary = _temporary_folder()
    if temporary.stat().st_dev == path.parent.stat().st_dev:
        require_space(path.parent, 2 * size, "write the ledger anew", free)
    else:
        require_space(temporary, size, "write the ledger anew (SQLITE_TMPDIR names it)", free)
        require_space(path.parent, size, "write the ledger anew", free)


def _temporary_folder() -> Path:
    """Return the folder where SQLite makes temporary files (sqlite.org/tempfiles.html)."""
    named = (os.environ.get("SQLITE_TMPDIR"), os.environ.get("TMPDIR"))
    for name in (*named, "/var/tmp", "/usr/tmp", "/tmp"):  # noqa: S108 - as SQLite does
        if name and Path(name).is_dir() and os.access(name, os.W_OK | os.X_OK):
            return Path(name)
    return Path()
