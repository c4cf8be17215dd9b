"""Ledgers in every state that a command may find, and what a folder looks like to the byte."""

import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine

from vllm_cost_meter.ledger.migrations import migrate
from vllm_cost_meter.ledger.schema import metadata

OLDEST = Path(__file__).parents[1] / "component" / "ledger" / "ledger_v1.sql"


def state_of(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Return all that a folder holds: names, modes, times of the last change, contents.

    The folder's own time is left out: SQLite has a log beside a ledger while it is read. So are the
    contents of the log's index, which all that read at the time share.
    """
    found = {}
    for path in sorted((folder, *folder.rglob("*"))):
        about = path.stat()
        is_own = path.is_file() and not path.name.endswith("-shm")
        found[str(path.relative_to(folder))] = (
            stat.filemode(about.st_mode),
            about.st_uid,
            about.st_mtime_ns if is_own else None,
            path.read_bytes() if is_own else None,
        )
    return found


def old_ledger(path: Path, version: int) -> None:
    """Write a ledger with the schema of an earlier version."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(OLDEST.read_text())
    if version > 1:
        engine = create_engine(f"sqlite:///{path}")
        with engine.begin() as connection:
            metadata.create_all(connection)
            migrate(connection, 1, version)
        engine.dispose()
