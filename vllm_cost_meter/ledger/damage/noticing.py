"""Notice that a SQLite ledger is damaged: by an error of SQLite, by its log, by reading its pages.

SQLite says so only when it meets a damaged page, and of a damaged log never. So the log is read
before the file is opened, and pages in the background, a table at a time. A table's check is one
transaction, which keeps SQLite from emptying its log meanwhile, so it is ended after a while.

Invariant: an error that is not damage (a lock, a full disk, a missing file) is never taken for it.
"""

import functools
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from vllm_cost_meter.ledger.untouched import connect_to_read
from vllm_cost_meter.ledger.upkeep.btree import DEFAULT_PAGE_SIZE
from vllm_cost_meter.ledger.upkeep.sqlite_files import (
    BUSY_TIMEOUT_S,
    interrupted_after,
    is_damage,
)
from vllm_cost_meter.ledger.upkeep.wal import lasting_damage
from vllm_cost_meter.logs import meter_logger

logger = meter_logger()

# A table that takes longer is left to `ledger check`.
TABLE_S_MAX = 60.0
# Checksums of a longer log would take seconds; it is read once SQLite has emptied it.
LOG_BYTES_MAX = 64 << 20
# Lines of a check that speak of pages. Others speak of values, and no server's work depends on it.
_OF_PAGES = ("*** in database", "Tree ", "Page ", "Freelist")
# The table of tables, under a name that every version of SQLite knows.
_SCHEMA = "sqlite_master"


def damage_in(error: BaseException | None) -> str | None:
    """Return what SQLite says of a damaged file, if that is behind an error; else None."""
    while error is not None:
        for cause in (error, getattr(error, "orig", None)):
            if isinstance(cause, sqlite3.DatabaseError) and is_damage(cause):
                return str(cause)
        error = error.__cause__
    return None


def damage_of_log(path: Path) -> str | None:
    """Return what is wrong with the log beside a ledger: commits that SQLite would leave out.

    The log is opened and not the ledger: SQLite's locks are on the latter.
    """
    wal = path.with_name(path.name + "-wal")
    try:
        if wal.stat().st_size > LOG_BYTES_MAX:
            return None
        found = lasting_damage(wal, DEFAULT_PAGE_SIZE)
    except OSError:
        return None
    if not found.ignored:
        return None
    return f"{found.damaged} damaged frames in its log, {found.ignored} committed ones are left out"


class PageWatch:
    """Reads a ledger's pages, and its log, a part at each look. Used by one thread."""

    def __init__(self, path: Path, table_s_max: float = TABLE_S_MAX) -> None:
        self.path = path.resolve()
        self._table_s_max = table_s_max
        self._left: list[Callable[[], str | None]] = []
        self._too_long: set[str] = set()

    @property
    def is_at_end(self) -> bool:
        """Whether all parts were read, and the next look begins with the first one again."""
        return not self._left

    def look(self) -> str | None:
        """Read the next part; return what is damaged there, None if nothing is."""
        if not self._left:
            self._left = list(self._parts())
        part = self._left.pop(0)
        # What is damaged stays so. A reading that went wrong once does not.
        return part() and part()

    def _parts(self) -> Iterator[Callable[[], str | None]]:
        yield functools.partial(damage_of_log, self.path)
        yield functools.partial(self._damage_of_table, _SCHEMA)
        try:
            with closing(connect_to_read(self.path, BUSY_TIMEOUT_S)) as connection:
                named = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
                names = [name for (name,) in connection.execute(named)]
        except sqlite3.Error:  # The part before says so, if it is damage.
            return
        for name in names:
            yield functools.partial(self._damage_of_table, name)

    def _damage_of_table(self, name: str) -> str | None:
        """Read a table's pages and those of its indexes."""
        quoted = name.replace("'", "''")
        lines: list[str] = []
        cut_short = threading.Event()
        try:
            with (
                closing(connect_to_read(self.path, BUSY_TIMEOUT_S)) as connection,
                interrupted_after(connection, self._table_s_max) as cut_short,
            ):
                rows = connection.execute(f"PRAGMA quick_check('{quoted}')")
                lines = [str(line) for (line,) in rows]
        except sqlite3.DatabaseError as error:
            if not cut_short.is_set():
                return damage_in(error)
        if cut_short.is_set():
            self._say_too_long(name)
            return None
        found = [line for line in lines if line.startswith(_OF_PAGES)]
        return f"{name}: {found[0].splitlines()[-1]}" if found else None

    def _say_too_long(self, name: str) -> None:
        if name not in self._too_long:
            self._too_long.add(name)
            logger.warning(
                "cost meter: the table %s of the ledger %s is not read to its end for damage: that"
                " takes more than %g s. `vllm-cost-meter ledger check` reads all of it.",
                *(name, self.path, self._table_s_max),
            )
