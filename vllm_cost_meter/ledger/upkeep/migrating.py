"""Migrate a ledger to this version's schema, with a copy of what it was.

Invariant: there is a checked copy under a name with the old version before anything changes.
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from vllm_cost_meter.ledger.database import open_database, url_of
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION
from vllm_cost_meter.ledger.upkeep.alone import alone
from vllm_cost_meter.ledger.upkeep.copies import LedgerCopy, copy_to, sound_version, version_of
from vllm_cost_meter.ledger.upkeep.sqlite_files import (
    FreeBytes,
    connect,
    existing,
    free_bytes,
    free_name,
    ledger_path,
    require_space,
    sqlite_errors,
    total_bytes,
)
from vllm_cost_meter.units.time import rfc3339


@dataclass(frozen=True, slots=True)
class Migrated:
    """The versions before and after, and the copy of the ledger as it was, if there is one."""

    version_before: int
    version_after: int
    copy: LedgerCopy | None


def migrate_ledger(url: str, now_ns: int, *, free: FreeBytes = free_bytes) -> Migrated:
    """Bring a ledger up to date. Raises LedgerError for a newer one, and while somebody uses it."""
    path = existing(ledger_path(url, "migrate"))
    with sqlite_errors(path, "read"), closing(connect(path)) as connection:
        version = version_of(connection, f"ledger {path}")
    if version == SCHEMA_VERSION:
        return Migrated(version, version, None)
    with alone(path):
        pass  # A server of an older version would go on writing rows of the older kind.
    # The copy, and the log of a migration that changes every row.
    require_space(path.parent, 2 * total_bytes(path), "copy and migrate the ledger", free)
    copy = copy_to(path, _name(path, version, now_ns), free=free)
    open_database(url_of(path)).dispose()
    sound_version(path, f"ledger {path}")
    return Migrated(version, SCHEMA_VERSION, copy)


def _name(path: Path, version: int, now_ns: int) -> Path:
    return free_name(path, f"schema-{version}", rfc3339(now_ns))
