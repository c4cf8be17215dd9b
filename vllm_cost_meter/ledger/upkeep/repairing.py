"""Repair a damaged ledger: save every readable row into a new file, and name what is missing.

The damaged file is read as it is, page by page, its log included, and never by SQLite, which gives
up at the first page that is wrong. It is set aside under a name with the date. The new file is
migrated, gets its indexes, and is checked before it takes the place.

Bills are numbered in each run from 1 without a gap. So a lost bill is known by its number, as the
audit names it. Of other rows the number is known where an index is whole that lists them.

Invariant: the damaged file keeps every byte; without a new file that is sound, nothing changes.
"""

import re
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import delete, func, insert, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.auditing.audit import missing_bills
from vllm_cost_meter.ledger.database import open_database, refuse_newer, url_of, writing
from vllm_cost_meter.ledger.fleet.outbox import join_anew
from vllm_cost_meter.ledger.migrations import DROPPED_COLUMNS, MIGRATIONS
from vllm_cost_meter.ledger.migrations import Column as AddedColumn
from vllm_cost_meter.ledger.rollups.rebuilding import rebuild
from vllm_cost_meter.ledger.schema import (
    SCHEMA_VERSION,
    journals,
    metadata,
    requests,
    schema_version,
    snapshots,
)
from vllm_cost_meter.ledger.tables.replies import create_views
from vllm_cost_meter.ledger.tables.unpacked import PACKED_SINCE
from vllm_cost_meter.ledger.upkeep.alone import alone
from vllm_cost_meter.ledger.upkeep.btree import (
    DEFAULT_PAGE_SIZE,
    FILE_HEADER_BYTES,
    PageFile,
    Value,
    page_size_of,
)
from vllm_cost_meter.ledger.upkeep.copies import (
    faults,
    recorded_version,
    rows_by_table,
)
from vllm_cost_meter.ledger.upkeep.forms import TableForm, dropped_of, is_unpacked
from vllm_cost_meter.ledger.upkeep.kinds import RowKind, kind_of_rows
from vllm_cost_meter.ledger.upkeep.salvage import Salvage
from vllm_cost_meter.ledger.upkeep.sqlite_files import (
    FreeBytes,
    connect,
    existing,
    free_bytes,
    ledger_path,
    new_file,
    publish,
    require_space,
    set_aside,
    sqlite_errors,
    total_bytes,
)
from vllm_cost_meter.ledger.upkeep.statements import insert_text, sql_of
from vllm_cost_meter.ledger.upkeep.wal import read_wal
from vllm_cost_meter.units.time import NS_PER_US, rfc3339, unix_ns_of

# Rows are written in such groups.
_ROWS_AT_ONCE = 5_000


@dataclass(frozen=True, slots=True)
class SavedTable:
    """What a repair saved of a table. `missing` counts the rows that are lost; None if unknown."""

    name: str
    saved: int
    missing: int | None
    damaged_pages: int


@dataclass(frozen=True, slots=True)
class Repair:
    """What a repair did: the file that it set aside, the tables, and the bills that are missing.

    `missing_bills` has the numbers by run, consecutive ones as "5-9". `unclear_pages` counts pages
    whose rows might be of several tables, and `foreign_tables` are none of the meter's: both are in
    the file that was set aside only.
    """

    aside: Path
    tables: list[SavedTable]
    missing_bills: dict[str, list[str]]
    damaged_frames: int
    unclear_pages: int
    foreign_tables: list[str]


def repair(
    url: str, now_ns: int, *, force: bool = False, free: FreeBytes = free_bytes
) -> Repair | None:
    """Repair a ledger; None, and nothing changed, if it is not damaged and `force` is not set.

    Raises LedgerError while somebody uses the ledger.
    """
    path = existing(ledger_path(url, "repair"))
    if not force and not _is_damaged(path):
        return None
    with alone(path), new_file(path) as part:
        require_space(path.parent, 2 * total_bytes(path), "save the rows in a new file", free)
        found, damaged_frames = _save_rows(path, part)
        with sqlite_errors(part, "read"), closing(connect(part)) as connection:
            # A migration moves rows into others, which are not lost.
            saved = rows_by_table(connection)
        _finish(part)
        gaps = _gaps(part)
        aside = set_aside(path, "damaged", rfc3339(now_ns))
        publish(part, path)
    return Repair(
        aside,
        [
            _saved_table(name, saved, found)
            for name, table in metadata.tables.items()
            if kind_of_rows(table) is not RowKind.SUM
        ],
        gaps,
        damaged_frames,
        found.unclear_pages,
        found.foreign_tables,
    )


def _is_damaged(path: Path) -> bool:
    """Return whether SQLite finds a fault in a file, or its log has a frame that is wrong.

    Raises LedgerError for a newer ledger.
    """
    try:
        with closing(connect(path)) as connection:
            version = recorded_version(connection)
            page_size = int(connection.execute("PRAGMA page_size").fetchone()[0])
            wrong = version is None or bool(faults(connection, full=True))
    except sqlite3.OperationalError as error:
        raise LedgerError(f"ledger {path}: cannot be read: {error}") from error
    except (sqlite3.DatabaseError, UnicodeDecodeError):
        return True
    refuse_newer(version or 0, f"ledger {path}")
    wal = read_wal(path.with_name(path.name + "-wal"), page_size)
    return wrong or bool(wal.ignored)


def _save_rows(path: Path, part: Path) -> tuple[Salvage, int]:
    """Write all rows that can be read in a damaged file into a new one, of the same version.

    No process has the file open by SQLite, so opening it here drops nobody's locks.
    """
    wal_path = path.with_name(path.name + "-wal")
    with path.open("rb") as db, (wal_path if wal_path.exists() else path).open("rb") as wal:
        head = db.read(FILE_HEADER_BYTES)
        frames = read_wal(wal_path, page_size_of(head) or DEFAULT_PAGE_SIZE)
        page_size = page_size_of(head) or frames.page_size or DEFAULT_PAGE_SIZE
        pages = PageFile(db, path.stat().st_size, page_size)
        if wal_path.exists():
            pages.overlay(wal, frames)
        found = Salvage(pages, _free_list(pages))
        if not found.tables_found:
            raise LedgerError(
                f"ledger {path}: no definition of a table of a ledger can be read in it: is it a"
                " ledger? Restore a backup if it was one; nothing was changed"
            )
        _refuse_newer(path, found)
        with closing(connect(part, writes=True)) as connection:
            connection.execute("PRAGMA synchronous=OFF")
            connection.execute("BEGIN")
            for form in found.forms.values():
                connection.execute(form.sql)
            for form, rows in _grouped(found.rows()):
                _insert(connection, found, form, rows)
            _ensure_version(connection, found)
            connection.execute("COMMIT")
    return found, frames.damaged


def _free_list(pages: PageFile) -> tuple[int, int] | None:
    """Return the first page and the length of the list of free pages; None if it is damaged."""
    try:
        head = pages.read(1)
    except ValueError:
        return None
    if page_size_of(head) is None:
        return None
    first, count = struct.unpack(">2I", head[32:40])
    return (first, count) if first <= pages.count and count <= pages.count else None


def _grouped(
    rows: Iterator[tuple[TableForm, tuple[Value, ...]]],
) -> Iterator[tuple[TableForm, list[tuple[Value, ...]]]]:
    group: list[tuple[Value, ...]] = []
    current: TableForm | None = None
    for form, values in rows:
        if current is not None and (form is not current or len(group) >= _ROWS_AT_ONCE):
            yield current, group
            group = []
        current = form
        group.append(values)
    if current is not None and group:
        yield current, group


def _insert(
    connection: sqlite3.Connection,
    found: Salvage,
    form: TableForm,
    rows: list[tuple[Value, ...]],
) -> None:
    """Insert rows. One that the table does not take, or without its instant, is damaged."""
    table = metadata.tables[form.name]
    place = {column.name: at for at, column in enumerate(form.stored)}
    # The order of the schema is that of the statement, whatever order the file has.
    kept = [place[column.name] for column in table.c if column.name in place]
    text = insert_text(table, [form.stored[at].name for at in kept])
    for name, name_in_file in form.names_in_file.items():
        text = re.sub(rf"\b{name}\b", name_in_file, text)
    instants = [at for at in kept if form.stored[at].name.endswith("_at")]
    for row in rows:
        try:
            for at in instants:
                _require_instant(row[at])
            connection.execute(text, [row[at] for at in kept])
        except (sqlite3.Error, ValueError, OverflowError, UnicodeError, OSError):
            found.losses[form.name].damaged_rows += 1


def _require_instant(value: Value) -> None:
    """Raise ValueError or OverflowError for what is no instant: a text, or microseconds."""
    if isinstance(value, int):
        rfc3339(value * NS_PER_US)
    elif value is not None:
        unix_ns_of(str(value))


def _refuse_newer(path: Path, found: Salvage) -> None:
    """Raise LedgerError for a ledger that is newer, by its version or, without one, its columns."""
    refuse_newer(found.version or 0, f"ledger {path}")
    for form in found.forms.values():
        known = {*metadata.tables[form.name].c.keys(), *dropped_of(form.name)}
        unknown = [column.name for column in form.columns if column.name not in known]
        if unknown:
            raise LedgerError(
                f"ledger {path}: table {form.name} has the column {unknown[0]}, which this cost"
                " meter does not know; upgrade vllm-cost-meter and repair with that"
            )


def _ensure_version(connection: sqlite3.Connection, found: Salvage) -> None:
    """Record the version of the schema where its row is lost: the tables' columns show it."""
    version = connection.execute(sql_of(select(func.max(schema_version.c.version)))).fetchone()[0]
    if version is None:
        connection.execute(sql_of(insert(schema_version).values(version=_version_of(found))))


def _version_of(found: Salvage) -> int:
    names = {name: {column.name for column in form.columns} for name, form in found.forms.items()}
    for version, steps in sorted(MIGRATIONS.items()):
        added = [step for step in steps if isinstance(step, AddedColumn)]
        if any(step.table in names and step.name not in names[step.table] for step in added):
            return version
    if any(is_unpacked(form) for form in found.forms.values()):
        return PACKED_SINCE - 1
    dropped = (
        version
        for version, columns in sorted(DROPPED_COLUMNS.items())
        if any(name in names.get(table, ()) for table, name in columns)
    )
    return next(dropped, SCHEMA_VERSION)


def _finish(part: Path) -> None:
    """Migrate a new file, give it its indexes and check it. Raises LedgerError."""
    engine = open_database(url_of(part))
    try:
        with writing(engine).begin() as connection:
            # What of the journals is still there is applied again: rows may be lost that were.
            connection.execute(delete(journals))
            rebuild(connection)
            join_anew(connection)
            for table in metadata.tables.values():
                for index in table.indexes:
                    index.create(connection, checkfirst=True)
            create_views(connection)
    finally:
        engine.dispose()
    with sqlite_errors(part, "checked"), closing(connect(part)) as plain:
        wrong = faults(plain, full=True)
    if wrong:
        raise LedgerError(f"the repaired copy is not sound ({wrong[0]}); nothing was changed")


def _gaps(part: Path) -> dict[str, list[str]]:
    """Return by run the numbers of the bills that are missing up to the last one known."""
    engine = open_database(url_of(part), create=False)
    try:
        with engine.begin() as connection:
            return {
                run_id: gaps
                for run_id, last_seq in _last_bills(connection).items()
                if (gaps := missing_bills(connection, run_id, last_seq))
            }
    finally:
        engine.dispose()


def _last_bills(connection: Connection) -> dict[str, int]:
    """Return the number of each run's last bill, by its snapshot or by its bills."""
    last: dict[str, int] = {}
    for query in (
        select(snapshots.c.run_id, snapshots.c.last_seq),
        select(requests.c.run_id, func.max(requests.c.seq)).group_by(requests.c.run_id),
    ):
        for run_id, seq in connection.execute(query):
            last[run_id] = max(last.get(run_id, 0), int(seq))
    return last


def _saved_table(name: str, saved: dict[str, int], found: Salvage) -> SavedTable:
    loss, rows = found.losses[name], saved[name]
    missing = None if loss.rows_known is None else max(loss.rows_known - rows, 0)
    return SavedTable(name, rows, missing, loss.damaged_pages)
