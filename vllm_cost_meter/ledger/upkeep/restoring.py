"""Restore a ledger from a copy: check the copy, set the ledger aside, put the copy in its place.

A copy may be of an older schema, so this is also the way back after a migration.

Invariant: the replaced ledger stays beside the new one, whole, with its log.
"""

from dataclasses import dataclass
from pathlib import Path

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.file_modes import make_private
from vllm_cost_meter.ledger.upkeep.alone import alone
from vllm_cost_meter.ledger.upkeep.copies import copy_pages, count_rows, sound_version
from vllm_cost_meter.ledger.upkeep.sqlite_files import (
    FreeBytes,
    existing,
    free_bytes,
    ledger_path,
    new_file,
    publish,
    require_space,
    set_aside,
    source,
    total_bytes,
)
from vllm_cost_meter.units.time import rfc3339


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did: the file that it set aside (None if there was none), and the copy's."""

    aside: Path | None
    rows: int
    version: int


def restore(url: str, copy: Path, now_ns: int, *, free: FreeBytes = free_bytes) -> Restored:
    """Put a copy in the place of a ledger. Raises LedgerError while somebody uses the ledger."""
    named = ledger_path(url, "restore")
    path = existing(named) if named.exists() else named.resolve()
    copy = source(copy)
    if path.exists() and copy.samefile(path):
        raise LedgerError(f"{copy}: is the ledger itself; name a backup of it")
    if not path.parent.is_dir():
        raise LedgerError(f"ledger {path}: the folder {path.parent} does not exist; make it first")
    make_private(named)
    with alone(path):
        pass  # A server that runs is told of before anything is copied.
    require_space(path.parent, total_bytes(copy), "copy the backup", free)
    with new_file(path) as part:
        copy_pages(copy, part)
        version = sound_version(part, str(copy))
        rows = count_rows(part)
        with alone(path):
            aside = set_aside(path, "replaced", rfc3339(now_ns)) if path.exists() else None
            _refuse_leftovers(path)
            publish(part, path)
    sound_version(path, f"ledger {path}")
    if (there := count_rows(path)) < rows:  # A server may have begun, and written more.
        raise LedgerError(f"ledger {path}: expected {rows} rows after the restore, got {there}")
    return Restored(aside, rows, version)


def _refuse_leftovers(path: Path) -> None:
    """Refuse a log without its ledger: SQLite would apply it to the copy."""
    for suffix in ("-wal", "-journal"):
        leftover = path.with_name(path.name + suffix)
        if leftover.exists():
            raise LedgerError(
                f"{leftover}: is the log of a ledger that is not there any more; move it away"
            )
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
