"""Set a damaged ledger aside while servers run, and remember that until it is merged back.

The file, its log and the log's index get a name with the date, and the applier goes on in a new
file. It may do so though other processes have the old file open, for these reasons:

- Only the applier makes a ledger, and only while it holds the lock of the journals' folder. So
  between the names no new file appears that SQLite would apply the old log to. Commands that
  replace the file hold the same lock.
- A process that has the old file open keeps it, its log and their index, whatever their names are.
  What it commits is in the file that was set aside, where `ledger repair` finds it.
- A connection that closes looks whether its file still has the name that it was opened by. Only if
  so does SQLite move the log into the file and remove it (`databaseIsUnmoved` in pager.c). So the
  last one to close the old file leaves the new file's log alone. This is also why the applier's own
  connections are closed after the names are changed: a damaged log must not go into the file.
- Our processes that read connect anew for each transaction, by the path: they come to the new file.

In the new file a row names each file that was set aside. It travels with the ledger into backups
and other ledgers, and a merge of the repaired file removes it.

Invariant: a ledger that was begun beside a damaged file has that file's row from before its first
record on, until the damaged file is merged into it.
"""

import re
from collections.abc import Collection
from pathlib import Path

from sqlalchemy import ColumnElement, MetaData, Table, delete, insert, select
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.journal.places import folder_of_ledger, unmark_ledger
from vllm_cost_meter.ledger.database import cause_of, open_to_read
from vllm_cost_meter.ledger.queries.answers import SetAsideFile
from vllm_cost_meter.ledger.schema import (
    http_requests,
    journal_losses,
    requests,
    runs,
    schema_version,
)
from vllm_cost_meter.ledger.upkeep.sqlite_files import companions, set_aside
from vllm_cost_meter.units.time import rfc3339

KIND = "damaged"
# The definitions of the tables are on the first pages.
_BEGINNING_BYTES = 1 << 18
_STAMP = re.compile(r"[0-9T]+Z(-\d+)?")


def set_damaged_aside(path: Path, now_ns: int) -> Path:
    """Give a damaged ledger another name, with its log; return it. Raises OSError.

    The caller holds the lock of the applier and makes the new file.
    """
    unmark_ledger(folder_of_ledger(path))
    return set_aside(path.resolve(), KIND, rfc3339(now_ns))


def finish_setting_aside(path: Path) -> None:
    """Give a log its ledger's name again, where the process died between the two. Raises OSError.

    A new ledger would have SQLite remove it.
    """
    real = path.resolve()
    logs = [file for file in companions(real) if file.exists()]
    if real.exists() or not logs:
        return
    asides = sorted(file for file in real.parent.iterdir() if is_aside_of(real, file))
    if asides and not any(file.exists() for file in companions(asides[-1])):
        for file in logs:
            file.rename(real.with_name(asides[-1].name + file.name.removeprefix(real.name)))


def was_a_ledger(path: Path) -> bool:
    """Return whether a damaged file has traces of a ledger's tables at its beginning.

    This process must have no connection to it: the file is opened here, which drops SQLite's locks.
    """
    try:
        with path.open("rb") as file:
            return schema_version.name.encode() in file.read(_BEGINNING_BYTES)
    except OSError:
        return False


def is_aside_of(path: Path, file: Path) -> bool:
    """Return whether a file's name is that of a ledger that was set aside for damage."""
    begin = f"{path.resolve().name}.{KIND}-"
    return file.name.startswith(begin) and bool(_STAMP.fullmatch(file.name.removeprefix(begin)))


def what_to_do(path: Path, aside: Path) -> str:
    """Return the commands that bring the rows of a file that was set aside into the ledger."""
    return (
        f"`vllm-cost-meter ledger repair --ledger {aside}`, then `vllm-cost-meter ledger merge"
        f" --ledger {path} {aside}`"
    )


def name_set_aside(connection: Connection, path: Path, now_ns: int) -> None:
    """Write into an empty ledger which damaged files lie beside it. Others are left as they are.

    An empty one was made in the place of the newest of them, whichever process died in between.
    """
    for table in (runs, requests, http_requests, journal_losses):
        if connection.execute(select(table).limit(1)).first() is not None:
            return
    real = path.resolve()
    rows = [
        {
            "journal_id": aside.name,
            "after_number": 0,
            "records": 0,
            "reason": f"damaged: run {what_to_do(real, aside)}",
            "noticed_at": rfc3339(now_ns),
        }
        for aside in sorted(real.parent.iterdir())
        if is_aside_of(real, aside)
    ]
    if rows:
        connection.execute(insert(journal_losses), rows)


def is_set_aside(table: Table = journal_losses) -> ColumnElement[bool]:
    """Tell the rows of files that were set aside from losses of journals, whose names are hex."""
    return table.c.journal_id.contains(f".{KIND}-")


def set_aside_files(connection: Connection) -> list[SetAsideFile]:
    """Return the damaged files whose rows a ledger may lack, the latest first."""
    c = journal_losses.c
    found = connection.execute(
        select(c.journal_id, c.reason, c.noticed_at)
        .where(is_set_aside())
        .order_by(c.journal_id.desc())
    )
    return [
        {"file": file, "reason": reason, "noticed_at": noticed_at}
        for file, reason, noticed_at in found
    ]


def set_aside_beside(url: str) -> list[SetAsideFile]:
    """Return the damaged files whose rows an existing ledger may lack. Raises LedgerError."""
    engine = open_to_read(url)
    try:
        with engine.connect() as connection:
            return set_aside_files(connection)
    except SQLAlchemyError as error:
        raise LedgerError(f"ledger: cannot be read: {cause_of(error)}") from error
    finally:
        engine.dispose()


def forget_set_aside(
    connection: Connection, schema: str | None = None, files: Collection[str] | None = None
) -> None:
    """Remove the rows of files that were merged, by their names; without names of all files.

    `schema` is an attached ledger; without it the connection's own is meant.
    """
    table = journal_losses
    if schema is not None:
        table = journal_losses.to_metadata(MetaData(), schema=schema)
    gone = delete(table).where(is_set_aside(table))
    connection.execute(gone if files is None else gone.where(table.c.journal_id.in_(files)))
