"""Check a ledger's file, and that what belongs together in it is there, without changing anything.

A quick check opens the file, looks for its tables and columns, reads every page but those of
indexes, and looks for damaged frames in the log, which SQLite passes over without a word. A full
check reads the indexes too, and adds up what must add up. Whether engines' time is billed whole is
another question, which `audit` answers.

Invariant: the ledger is only read, and a check that finds nothing wrong has looked everywhere.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Select, Table, and_, func, or_, select
from sqlalchemy.dialects import sqlite

from vllm_cost_meter.ledger.queries.open_requests import is_billed
from vllm_cost_meter.ledger.rollups.rebuilding import wrong_days, wrong_hours
from vllm_cost_meter.ledger.schema import (
    SCHEMA_VERSION,
    cost_models,
    energy_hours,
    engine_hours,
    live_usage,
    metadata,
    open_requests,
    requests,
    runs,
    snapshots,
    usage_pieces,
)
from vllm_cost_meter.ledger.tables.packed import InstantColumn, PackedId
from vllm_cost_meter.ledger.tables.pieces import BILL_AMOUNTS, IS_UNEVEN, with_pieces
from vllm_cost_meter.ledger.tables.replies import replies
from vllm_cost_meter.ledger.upkeep.copies import column_names, faults, version_of
from vllm_cost_meter.ledger.upkeep.sqlite_files import (
    connect,
    existing,
    ledger_path,
    sqlite_errors,
)
from vllm_cost_meter.ledger.upkeep.statements import sql_of
from vllm_cost_meter.ledger.upkeep.wal import lasting_damage

# So many rows that are wrong are named.
NAMED_MAX = 5

# One transaction writes a row of the first table with that of the second. A bill without a run is
# none of these: programs that serve no requests write bills without snapshots.
_TOGETHER: tuple[tuple[Table, Table], ...] = (
    (usage_pieces, requests),
    (engine_hours, snapshots),
    (energy_hours, snapshots),
    (live_usage, snapshots),
    (snapshots, runs),
    (cost_models, runs),
)
# The hours of a run add up to its snapshot, in every column that both have.
_HOURS = (engine_hours, energy_hours)


@dataclass(frozen=True, slots=True)
class LedgerCheck:
    """What one check of a ledger found."""

    name: str
    ok: bool
    detail: str


def check_ledger(url: str, *, full: bool = False) -> list[LedgerCheck]:
    """Check a ledger. Raises LedgerError if there is none, or a newer one."""
    path = existing(ledger_path(url, "check"), is_read=True)
    with sqlite_errors(path, "checked"), closing(connect(path)) as connection:
        try:
            connection.execute("BEGIN")
            version = version_of(connection, f"ledger {path}")
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            return [LedgerCheck("file", False, f"{error}; run `vllm-cost-meter ledger repair`")]
        found = [_version_check(version), _wal_check(connection, path), _pages(connection, full)]
        if version == SCHEMA_VERSION and found[-1].ok:
            found.append(_tables(connection))
            if full and found[-1].ok:
                found += _identities(connection)
    return found


def _version_check(version: int) -> LedgerCheck:
    if version == SCHEMA_VERSION:
        return LedgerCheck("schema", True, f"version {version}")
    detail = f"version {version}, this cost meter needs {SCHEMA_VERSION}: only the pages were read"
    return LedgerCheck("schema", False, f"{detail}; run `vllm-cost-meter ledger migrate`")


def _wal_check(connection: sqlite3.Connection, path: Path) -> LedgerCheck:
    """Look for damaged frames in the log that commits came after."""
    page_size = int(connection.execute("PRAGMA page_size").fetchone()[0])
    wal = path.with_name(path.name + "-wal")
    frames = lasting_damage(wal, page_size)
    if frames.ignored:
        detail = (
            f"{frames.damaged} damaged frames; SQLite leaves out {frames.ignored} committed ones:"
            " stop the servers and run `vllm-cost-meter ledger repair`"
        )
        return LedgerCheck("log", False, detail)
    return LedgerCheck("log", True, f"{len(frames.pages)} pages wait in it")


def _pages(connection: sqlite3.Connection, full: bool) -> LedgerCheck:
    wrong = faults(connection, full=full)
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        detail = f"{wrong[0]}{more}; run `vllm-cost-meter ledger repair`"
        return LedgerCheck("pages", False, detail)
    read = "every page was read" if full else "every page but those of indexes was read"
    return LedgerCheck("pages", True, read)


def _tables(connection: sqlite3.Connection) -> LedgerCheck:
    """Look for the tables, columns and indexes of the schema, and for its view."""
    lacking = [] if column_names(connection, replies.name) else [replies.name]
    for table in metadata.sorted_tables:
        columns = column_names(connection, table.name)
        lacking += [f"{table.name}.{c.name}" for c in table.c if c.name not in columns]
        indexes = {
            name
            for (name,) in connection.execute(
                "SELECT name FROM pragma_index_list(?)", (table.name,)
            )
        }
        lacking += [str(index.name) for index in table.indexes if index.name not in indexes]
    if lacking:
        return LedgerCheck("tables", False, f"missing: {', '.join(lacking)}")
    return LedgerCheck("tables", True, f"{len(metadata.tables)} tables with all their columns")


def _identities(connection: sqlite3.Connection) -> Iterator[LedgerCheck]:
    """Yield whether rows that are written together are there together, and add up."""
    for table, with_table in _TOGETHER:
        name = f"{table.name} have their {with_table.name}"
        yield _no_rows(connection, name, _without(table, with_table))
    yield _no_rows(connection, "bills are the sum of their pieces", _uneven_bills())
    yield _no_rows(connection, "rollup_hours are the sums of the bills", wrong_hours())
    yield _no_rows(connection, "rollup_days are the sums of their hours", wrong_days())
    for table in _HOURS:
        name = f"{table.name} add up to their snapshots"
        yield _no_rows(connection, name, _uneven_hours(table))
    both = select(open_requests.c.request_id, open_requests.c.started_at).where(is_billed())
    yield _no_rows(connection, "no request is open and billed", both)


def _no_rows(connection: sqlite3.Connection, name: str, query: Select[Any]) -> LedgerCheck:
    wrong = select(func.count()).select_from(query.subquery())
    (count,) = connection.execute(sql_of(wrong)).fetchone()
    if not count:
        return LedgerCheck(name, True, "all")
    first = connection.execute(sql_of(query.limit(NAMED_MAX))).fetchall()
    columns = list(query.selected_columns)
    keys = "; ".join(" ".join(map(_shown, columns, row)) for row in first)
    more = f"; and {count - len(first)} more" if count > len(first) else ""
    return LedgerCheck(name, False, f"not {count}: {keys}{more}")


def _shown(column: ColumnElement[Any], stored: Any) -> str:
    """Return what a stored value stands for: an instant or an id is not stored as its text."""
    kind: Any = column.type
    is_packed = isinstance(kind, InstantColumn | PackedId)
    return str(kind.process_result_value(stored, sqlite.dialect()) if is_packed else stored)


def _without(table: Table, with_table: Table) -> Select[Any]:
    """Select the keys in a table that the other table lacks."""
    key = [column.name for column in with_table.primary_key]
    same = and_(*(table.c[name] == with_table.c[name] for name in key))
    lacking = with_table.c[key[0]].is_(None)
    return select(*table.primary_key).join(with_table, same, isouter=True).where(lacking)


def _uneven_bills() -> Select[Any]:
    """Select the bills that are not the sum of their pieces, amount by amount."""
    return (
        select(*requests.primary_key)
        .select_from(with_pieces())
        .group_by(*requests.primary_key, *BILL_AMOUNTS)
        .having(IS_UNEVEN)
    )


def _uneven_hours(table: Table) -> Select[Any]:
    """Select the runs whose hours are not the snapshot, amount by amount."""
    names = [c.name for c in table.c if c.name in snapshots.c and c.name.endswith(("_ns", "_mj"))]
    differ: Sequence[ColumnElement[bool]] = [
        # An amount that was never known has no hours.
        func.coalesce(snapshots.c[name], 0) != func.coalesce(func.sum(table.c[name]), 0)
        for name in names
    ]
    return (
        select(snapshots.c.run_id)
        .join(table, table.c.run_id == snapshots.c.run_id, isouter=True)
        .group_by(snapshots.c.run_id, *(snapshots.c[name] for name in names))
        .having(or_(*differ))
    )
