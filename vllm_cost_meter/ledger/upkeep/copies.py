"""Copy a ledger as it is at one instant, while others write to it.

SQLite's backup starts again whenever another connection commits between two of its steps, and under
load it never ends. So all pages are copied in one step, within one read transaction: commits that
come meanwhile go into the log behind it and do not count. The log grows until the copy is done.

A copy is a whole file by itself, without a log beside it. It is checked before it gets its name.

Invariant: a published copy has every row that was committed when the copy began, and no other.
"""

import os
import sqlite3
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import MetaData, func, select

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.database import refuse_newer
from vllm_cost_meter.ledger.schema import metadata, schema_version
from vllm_cost_meter.ledger.upkeep.alone import alone
from vllm_cost_meter.ledger.upkeep.btree import DEFAULT_PAGE_SIZE
from vllm_cost_meter.ledger.upkeep.sqlite_files import (
    FreeBytes,
    connect,
    existing,
    free_bytes,
    is_damage,
    ledger_path,
    new_file,
    publish,
    refuse_target,
    require_space,
    sqlite_errors,
    total_bytes,
)
from vllm_cost_meter.ledger.upkeep.statements import sql_of
from vllm_cost_meter.ledger.upkeep.wal import lasting_damage

# So many lines of SQLite about what is wrong with a file are shown.
FAULTS_MAX = 20


@dataclass(frozen=True, slots=True)
class LedgerCopy:
    """A copy that was published: its file, its rows, its size and the version of its schema."""

    file: Path
    rows: int
    bytes: int
    version: int


def back_up(
    url: str, target: Path, *, force: bool = False, free: FreeBytes = free_bytes
) -> LedgerCopy:
    """Copy a ledger in use to a new file. Raises LedgerError, and then leaves no new file."""
    path = existing(ledger_path(url, "backup"), is_read=True)
    target = target.absolute()
    refuse_target(target, force=force, ledger=path)
    return copy_to(path, target, replace=force, free=free)


def copy_to(
    path: Path, target: Path, *, replace: bool = False, free: FreeBytes = free_bytes
) -> LedgerCopy:
    """Copy a ledger's file, check the copy and give it its name."""
    require_space(target.parent, total_bytes(path), "copy the ledger", free)
    with new_file(target) as part:
        copy_pages(path, part)
        version = sound_version(part, f"the copy of {path}")
        rows = count_rows(part)
        size = part.stat().st_size
        # What is replaced may be a ledger too, and its log goes with it.
        with alone(target) if replace else nullcontext():
            publish(part, target, replace=replace)
    return LedgerCopy(target, rows, size, version)


def copy_pages(path: Path, part: Path) -> None:
    """Copy all pages of a file as they are at one instant into an empty file.

    Raises LedgerError where its log is damaged: SQLite would leave out commits without a word.
    """
    with sqlite_errors(path, "copied"):
        log = lasting_damage(path.with_name(path.name + "-wal"), DEFAULT_PAGE_SIZE)
    if log.ignored:
        raise LedgerError(
            f"{path}: its log has {log.damaged} damaged frames; run `vllm-cost-meter ledger repair"
            f" --ledger {path}` first, nothing was changed"
        )
    with (
        sqlite_errors(path, "copied"),
        closing(connect(path)) as origin,
        closing(connect(part, writes=True)) as copy,
    ):
        # Nothing needs to be undone in a file that is dropped after any error.
        copy.execute("PRAGMA journal_mode=OFF")
        copy.execute("PRAGMA synchronous=OFF")
        origin.execute("BEGIN")
        origin.execute("SELECT count(*) FROM sqlite_master").fetchone()
        origin.backup(copy, pages=-1)
        # The copy says of itself that it has a log, as its origin has: it has none.
        copy.execute("PRAGMA journal_mode=DELETE")
    os.chmod(part, 0o600)  # noqa: PTH101 - the mode that it was made with


def sound_version(path: Path, name: str) -> int:
    """Return the version of a file's schema. Raises LedgerError for a damaged or newer file."""
    with sqlite_errors(path, "read"), closing(connect(path)) as connection:
        version = version_of(connection, name)
        found = faults(connection, full=True)
    if found:
        raise LedgerError(
            f"{name}: is damaged ({found[0]}); run `vllm-cost-meter ledger repair`, or take"
            " another copy; nothing was changed"
        )
    return version


def version_of(connection: sqlite3.Connection, name: str) -> int:
    """Return the version of a ledger's schema. Raises LedgerError for none, and for a newer one."""
    version = recorded_version(connection)
    if version is None:
        raise LedgerError(f"{name}: holds no ledger (no row in the table {schema_version.name})")
    refuse_newer(version, name)
    return version


def recorded_version(connection: sqlite3.Connection) -> int | None:
    """Return the version that a file says its schema has; None if it says none."""
    named = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    if connection.execute(named, (schema_version.name,)).fetchone() is None:
        return None
    (version,) = connection.execute(sql_of(select(func.max(schema_version.c.version)))).fetchone()
    return None if version is None else int(version)


def faults(connection: sqlite3.Connection, *, full: bool) -> list[str]:
    """Return what SQLite finds wrong with a file; `full` holds the indexes against the tables too.

    Raises sqlite3.DatabaseError for what is no damage, such as a lock.
    """
    pragma = "integrity_check" if full else "quick_check"
    try:
        lines = [str(line) for (line,) in connection.execute(f"PRAGMA {pragma}({FAULTS_MAX})")]
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        return [str(error)]
    return [] if lines == ["ok"] else [line.replace("\n", "; ") for line in lines]


def count_rows(path: Path) -> int:
    """Return the number of all rows of a ledger, whatever the version of its schema."""
    with sqlite_errors(path, "read"), closing(connect(path)) as connection:
        return sum(rows_by_table(connection).values())


def column_names(connection: sqlite3.Connection, table: str) -> frozenset[str]:
    """Return the names of the columns that a table has in this file; none without the table."""
    named = "SELECT name FROM pragma_table_info(?)"
    return frozenset(name for (name,) in connection.execute(named, (table,)))


def rows_by_table(connection: sqlite3.Connection, among: MetaData = metadata) -> dict[str, int]:
    """Return the number of rows of each table of a ledger that this file has."""
    there = {
        name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
    }
    return {
        table.name: connection.execute(sql_of(select(func.count()).select_from(table))).fetchone()[
            0
        ]
        for table in among.sorted_tables
        if table.name in there
    }
