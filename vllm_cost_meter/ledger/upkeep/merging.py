"""Merge other ledgers into this one by key, so that the sums of all are there once.

Each other ledger is copied first, as it is at one instant, checked, and migrated in the copy. Then
one transaction adds their rows: facts that are not there yet, totals with a higher snapshot number,
open requests without a bill. What people declared or imported must be the same where the key is the
same. Otherwise nothing is written, because one of the two is wrong and no rule could say which. A
row that one of them has dropped does not come back (`retention/merging.py`).

Invariant: merging a ledger twice, or in another order, leaves the same rows.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import (
    MetaData,
    Select,
    Table,
    and_,
    delete,
    func,
    insert,
    or_,
    select,
    true,
)
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.invoices.files import InvoiceFile
from vllm_cost_meter.ledger.billing.facts import hour_row, lines_in, readings_in
from vllm_cost_meter.ledger.billing.hours import Change, ImportLimits, change_of
from vllm_cost_meter.ledger.damage.setting_aside import forget_set_aside, is_aside_of
from vllm_cost_meter.ledger.database import cause_of, open_database, url_of, writing
from vllm_cost_meter.ledger.fleet.outbox import join_anew
from vllm_cost_meter.ledger.queries.open_requests import is_billed
from vllm_cost_meter.ledger.retention.merging import fit_together, refuse_bills_beyond
from vllm_cost_meter.ledger.rollups.rebuilding import rebuild
from vllm_cost_meter.ledger.schema import (
    billed_hours,
    billing_snapshots,
    http_requests,
    invoice_lines,
    metadata,
    open_requests,
    requests,
)
from vllm_cost_meter.ledger.tables.replies import REPLY_COLUMNS, put_beside_bills, replies
from vllm_cost_meter.ledger.upkeep.copies import column_names, copy_pages, sound_version
from vllm_cost_meter.ledger.upkeep.kinds import ORIGIN, RowKind, kind_of_rows
from vllm_cost_meter.ledger.upkeep.sqlite_files import (
    FreeBytes,
    connect,
    existing,
    free_bytes,
    ledger_path,
    new_file,
    require_space,
    source,
    total_bytes,
)
from vllm_cost_meter.ledger.upkeep.statements import insert_into
from vllm_cost_meter.units.time import NS_PER_SECOND

# SQLite attaches so many files to one connection (SQLITE_MAX_ATTACHED).
OTHERS_MAX = 10
# So many rows that contradict each other are named.
NAMED_MAX = 5
# A merge is asked for by a person who knows the sizes: unlike an import it is not to be done in
# parts.
_NO_LIMITS = ImportLimits(hours=1 << 62, rows=1 << 62)
# All of time that RFC 3339 can write.
_ALWAYS = (0, 253_402_300_799 * NS_PER_SECOND)


@dataclass(frozen=True, slots=True)
class MergedTable:
    """A table after a merge: rows that came, totals that were raised, rows that were there before.

    `differing` counts those whose other columns differ; they stay as this ledger had them.
    """

    name: str
    new: int = 0
    raised: int = 0
    known: int = 0
    differing: int = 0


@dataclass(frozen=True, slots=True)
class _Other:
    """Another ledger: its file, its copy of today's schema, and the columns that the file has."""

    file: Path
    copy: Path
    columns: Mapping[str, frozenset[str]]


def merge(
    url: str,
    files: Sequence[Path],
    gap_ns: int,
    *,
    dry_run: bool = False,
    free: FreeBytes = free_bytes,
) -> list[MergedTable]:
    """Merge ledgers into one, in one transaction. Raises LedgerError, with nothing written.

    `gap_ns` is the longest time between two readings of a provider's counter without a gap.
    """
    path = existing(ledger_path(url, "merge"))
    sources = _distinct(path, files)
    # Copies of all of them, and at most as much again in the ledger and its log.
    needed = 3 * sum(total_bytes(file) for file in sources)
    require_space(path.parent, needed, "copy and merge the ledgers", free)
    with ExitStack() as stack:
        others = [stack.enter_context(_copied(path, file)) for file in sources]
        engine = open_database(url_of(path), create=False)
        stack.callback(engine.dispose)
        try:
            with writing(engine).connect() as connection:
                return _merge(connection, path, others, gap_ns, dry_run=dry_run)
        except SQLAlchemyError as error:
            raise LedgerError(f"ledger {path}: cannot be merged: {cause_of(error)}") from error


def _distinct(path: Path, files: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for file in map(source, files):
        if file.samefile(path):
            raise LedgerError(f"{file}: is the ledger itself; name the other ledgers")
        if not any(file.samefile(known) for known in found):
            found.append(file)
    if len(found) > OTHERS_MAX:
        raise LedgerError(f"expected at most {OTHERS_MAX} other ledgers at once, got {len(found)}")
    return found


@contextmanager
def _copied(path: Path, file: Path) -> Iterator[_Other]:
    """Give a copy of another ledger, checked and migrated."""
    with new_file(path) as part:
        copy_pages(file, part)
        sound_version(part, str(file))
        with closing(connect(part)) as plain:
            columns = {name: column_names(plain, name) for name in metadata.tables}
        open_database(url_of(part)).dispose()
        yield _Other(file, part, columns)


def _merge(
    connection: Connection,
    path: Path,
    others: Sequence[_Other],
    gap_ns: int,
    *,
    dry_run: bool,
) -> list[MergedTable]:
    driver: Any = connection.connection.driver_connection
    for number, other in enumerate(others):
        driver.execute(f"ATTACH ? AS other{number}", (str(other.copy),))
    merged = {table.name: MergedTable(table.name) for table in metadata.sorted_tables}
    with connection.begin() as transaction:
        for number, other in enumerate(others):
            if is_aside_of(path, other.file):
                # The ledger knows what was set aside before it, and what of that is merged already.
                forget_set_aside(connection, f"other{number}")
            fit_together(connection, f"other{number}", str(other.file))
            _add_billed_hours(connection, other, gap_ns, merged)
            for table in metadata.sorted_tables:
                merged[table.name] = _add(
                    connection, table, f"other{number}", other, merged[table.name]
                )
            put_beside_bills(connection)
        connection.execute(delete(open_requests).where(is_billed()))
        forget_set_aside(connection, files={other.file.name for other in others})
        refuse_bills_beyond(connection)
        rebuild(connection)
        join_anew(connection)
        if dry_run:
            transaction.rollback()
    return [
        merged[table.name]
        for table in metadata.sorted_tables
        if kind_of_rows(table) not in (RowKind.VERSION, RowKind.SUM)
    ]


def _add(
    connection: Connection, table: Table, schema: str, other: _Other, so_far: MergedTable
) -> MergedTable:
    """Add the rows of a table of another ledger. Raises LedgerError for a contradiction."""
    kind = kind_of_rows(table)
    if kind in (RowKind.VERSION, RowKind.OWN, RowKind.BILLED_HOURS, RowKind.SUM):
        return so_far
    ours = _seen(table)
    attached = ours.to_metadata(MetaData(), schema=schema)
    differing = 0
    if kind in (RowKind.FACT, RowKind.DECLARED):
        different = _different(table, attached, other)
        differing = _count(connection, different) if different is not None else 0
        if differing and different is not None and kind is RowKind.DECLARED:
            raise _contradiction(connection, table, different, differing, other)
    before = _count(connection, select(ours))
    rows = _rows_of(table, attached)
    names = rows.selected_columns.keys()
    written = connection.execute(insert_into(table, names).from_select(names, rows)).rowcount
    new = _count(connection, select(ours)) - before
    raised = max(written - new, 0)
    return replace(
        so_far,
        new=so_far.new + new,
        raised=so_far.raised + raised,
        known=so_far.known + _count(connection, select(attached)) - new - raised,
        differing=so_far.differing + differing,
    )


def _seen(table: Table) -> Table:
    """Return where the rows of a table are read: replies stand beside bills too."""
    return replies if table is http_requests else table


def _rows_of(table: Table, attached: Table) -> Select[Any]:
    """Select what another ledger has for a table; a bill comes without the reply beside it.

    The reply comes with those that have a row of their own, and moves beside the bill afterwards.
    """
    # Without a condition SQLite would take ON CONFLICT for a part of a join.
    theirs = attached.c
    if table is http_requests:
        is_new = theirs.http_request_id.not_in(select(replies.c.http_request_id))
        return select(attached).where(is_new)
    if table is requests:
        bill = (column for column in theirs if column.name not in REPLY_COLUMNS)
        return select(*bill, theirs.finished_at.label("ended_at")).where(true())
    return select(attached).where(true())


def _may_differ(table: Table) -> Collection[str]:
    """Return the columns in which two rows with one key may differ and say the same."""
    if table is requests:
        return REPLY_COLUMNS
    return ORIGIN if kind_of_rows(table) is RowKind.DECLARED else ()


def _different(table: Table, attached: Table, other: _Other) -> Select[Any] | None:
    """Select the keys of rows that both have with other values; None for a table of keys only.

    Columns that the other ledger's version lacked are left out: the migration has filled them.
    """
    keys = [column.name for column in table.primary_key]
    compared = [
        name
        for name in (column.name for column in table.c)
        if name not in keys and name not in _may_differ(table) and name in other.columns[table.name]
    ]
    if not compared:
        return None
    # Both have one name, which SQLite would take for the same table.
    ours, theirs = _seen(table).alias("ours"), attached.alias("theirs")
    same_key = and_(*(ours.c[name] == theirs.c[name] for name in keys))
    differ = or_(*(ours.c[name].is_distinct_from(theirs.c[name]) for name in compared))
    return select(*(ours.c[name] for name in keys)).join_from(ours, theirs, same_key).where(differ)


def _contradiction(
    connection: Connection, table: Table, different: Select[Any], count: int, other: _Other
) -> LedgerError:
    rows = connection.execute(different.limit(NAMED_MAX)).all()
    named = "; ".join(" ".join(map(str, row)) for row in rows)
    more = f"; and {count - len(rows)} more" if count > len(rows) else ""
    return LedgerError(
        f"{other.file}: {table.name}: expected the same as in this ledger, got another amount:"
        f" {named}{more}; one of the two is wrong, nothing was written"
    )


def _add_billed_hours(
    connection: Connection, other: _Other, gap_ns: int, merged: dict[str, MergedTable]
) -> None:
    """Write the billed hours that follow from the bills of both ledgers."""
    file = _bills_of(other)
    if not file.readings and not file.lines:
        return
    try:
        change: Change = change_of(connection, file, gap_ns, _NO_LIMITS)
    except ValueError as error:
        raise LedgerError(f"{error}; one of the two is wrong, nothing was written") from None
    for meter, hour in change.gone:
        row = hour_row(meter, hour)
        key = [column == row[column.name] for column in billed_hours.primary_key]
        connection.execute(delete(billed_hours).where(*key))
    if change.come:
        connection.execute(insert(billed_hours), [hour_row(*come) for come in change.come])
    so_far = merged[billed_hours.name]
    merged[billed_hours.name] = replace(
        so_far,
        new=so_far.new + max(len(change.come) - len(change.gone), 0),
        raised=so_far.raised + min(len(change.come), len(change.gone)),
    )


def _bills_of(other: _Other) -> InvoiceFile:
    """Return all facts of a provider's bills in another ledger, as a file would give them."""
    engine = open_database(url_of(other.copy), create=False)
    try:
        with engine.begin() as connection:
            spans = {
                resource: _ALWAYS
                for table in (billing_snapshots, invoice_lines)
                for (resource,) in connection.execute(select(table.c.resource).distinct())
            }
            name = str(other.file)
            readings = dict.fromkeys(readings_in(connection, spans), name)
            lines = dict.fromkeys(lines_in(connection, spans), name)
    finally:
        engine.dispose()
    return InvoiceFile(name, readings, lines, 0)


def _count(connection: Connection, query: Select[Any]) -> int:
    return int(connection.execute(select(func.count()).select_from(query.subquery())).scalar_one())
