"""A real SQLite over the simulated disk: a VFS of apsw's, and a driver for SQLAlchemy around it.

Python's own sqlite3 has no way to put a file system below it. A process can be killed, the machine
crash and the disk fail at each write and sync that SQLite makes. One process at a time has the file
open, as the applier's lock sees to it, so SQLite keeps the log's index in its own memory.

Invariant: what a dead process still does changes nothing.
"""

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import apsw

from tests.simulation.disk import Call, Disk, File, Killed

NAME = "ledger.db"


class Machine:
    """Where the VFS finds the disk of the schedule that runs, and what each call meets."""

    disk: Disk
    before: Callable[[Call], None]
    # Whether the process that runs is dead.
    is_dead: Callable[[], bool]


class _Opened:
    """A file that SQLite has open."""

    def __init__(self, machine: Machine, file: File, is_log: bool) -> None:
        self._machine = machine
        self._file = file
        self._is_dead = machine.is_dead
        self._folder = machine.disk.root if is_log else None

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        # SQLite pads what is short by itself.
        return bytes(self._file.data[offset : offset + amount])

    def _meets(self, name: str) -> bool:
        """Return whether the process lives; raise what this call meets."""
        if self._is_dead():
            return False
        try:
            self._machine.before(Call(name))
        except OSError as error:
            raise apsw.IOError(str(error)) from None
        return True

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        if self._meets("SQLite writes"):
            self._file.write(offset, bytes(data))

    def xTruncate(self, size: int) -> None:  # noqa: N802
        if self._meets("SQLite truncates"):
            self._file.truncate(size)

    def xSync(self, flags: int) -> None:  # noqa: N802
        try:
            if not self._meets("SQLite syncs"):
                return
        except apsw.IOError:
            self._file.fail_to_sync()
            raise
        self._file.sync()
        if self._folder is not None:  # As SQLite's own VFS does after it made a file.
            self._folder.sync()
            self._folder = None

    def xFileSize(self) -> int:  # noqa: N802
        return len(self._file.data)

    def xLock(self, level: int) -> None:  # noqa: N802
        pass

    def xUnlock(self, level: int) -> None:  # noqa: N802
        pass

    def xCheckReservedLock(self) -> bool:  # noqa: N802
        return False

    def xFileControl(self, operation: int, pointer: int) -> bool:  # noqa: N802
        return False

    def xSectorSize(self) -> int:  # noqa: N802
        return 4096

    def xDeviceCharacteristics(self) -> int:  # noqa: N802
        return apsw.SQLITE_IOCAP_POWERSAFE_OVERWRITE

    def xClose(self) -> None:  # noqa: N802
        pass


class _Vfs(apsw.VFS):
    def __init__(self) -> None:
        super().__init__("simulated", "")
        self.machine = Machine()

    def xOpen(self, name: Any, flags: Sequence[int]) -> Any:  # noqa: N802
        folder = self.machine.disk.root
        path = name if isinstance(name, str) else name.filename() if name is not None else "/temp"
        short = Path(path).name
        if short not in folder.names:
            if self.machine.is_dead():
                raise apsw.CantOpenError("dead")
            folder.change(**{short: File()})
        flags[1] = flags[0]  # type: ignore[index]
        file = folder.names[short]
        assert isinstance(file, File)
        return _Opened(self.machine, file, bool(flags[0] & apsw.SQLITE_OPEN_WAL))

    def xDelete(self, name: str, is_synced: bool) -> None:  # noqa: N802
        if not self.machine.is_dead():
            self.machine.disk.root.change(**{Path(name).name: None})
            if is_synced:
                self.machine.disk.root.sync()

    def xAccess(self, name: str, flags: int) -> bool:  # noqa: N802
        return Path(name).name in self.machine.disk.root.names

    def xFullPathname(self, name: str) -> str:  # noqa: N802
        return name

    def xRandomness(self, size: int) -> bytes:  # noqa: N802
        return bytes(size)


VFS = _Vfs()


class Driver:
    """What SQLAlchemy and the meter use of `sqlite3.Connection`."""

    def __init__(self, process: Any) -> None:
        self._connection = apsw.Connection(f"/{NAME}", vfs="simulated")
        self._is_dead = lambda: bool(process.is_dead)
        self.isolation_level: str | None = None
        # Without shared memory between processes SQLite needs this for its log.
        self.execute("PRAGMA locking_mode=EXCLUSIVE")

    def cursor(self) -> "Cursor":
        return Cursor(self._connection, self._is_dead)

    def execute(self, text: str, values: Iterable[Any] = ()) -> "Cursor":
        return self.cursor().execute(text, values)

    def create_function(self, *_arguments: Any, **_words: Any) -> None:
        pass

    def commit(self) -> None:
        if self._connection.in_transaction:
            self.execute("COMMIT")

    def rollback(self) -> None:
        if not self._is_dead() and self._connection.in_transaction:
            self.execute("ROLLBACK")

    def close(self) -> None:
        if not self._is_dead():
            self._connection.close()


class Cursor:
    """What they use of `sqlite3.Cursor`."""

    arraysize = 1
    lastrowid: int | None = None

    def __init__(self, connection: apsw.Connection, is_dead: Callable[[], bool]) -> None:
        self._connection = connection
        self._is_dead = is_dead
        self._rows: list[tuple[Any, ...]] = []
        self.description: list[tuple[Any, ...]] | None = None
        self.rowcount = -1

    def execute(self, text: str, values: Iterable[Any] = ()) -> "Cursor":
        if self._is_dead():
            raise Killed
        cursor = self._connection.cursor()
        cursor.exec_trace = self._describe
        try:
            self._rows = list(cursor.execute(text, tuple(values)))
        except apsw.Error as error:
            raise _as_sqlite3(error) from error
        self.rowcount = self._connection.changes()
        return self

    def _describe(self, cursor: apsw.Cursor, _text: str, _values: Any) -> bool:
        self.description = [(name, *[None] * 6) for name, *_ in cursor.get_description()] or None
        return True

    def executemany(self, text: str, many: Iterable[Iterable[Any]]) -> "Cursor":
        for values in many:
            self.execute(text, values)
        return self

    def fetchone(self) -> tuple[Any, ...] | None:
        return self._rows.pop(0) if self._rows else None

    def fetchall(self) -> list[tuple[Any, ...]]:
        rows, self._rows = self._rows, []
        return rows

    def fetchmany(self, size: int = 1) -> list[tuple[Any, ...]]:
        rows, self._rows = self._rows[:size], self._rows[size:]
        return rows

    def close(self) -> None:
        self._rows = []


def _as_sqlite3(error: apsw.Error) -> sqlite3.Error:
    kinds = {apsw.ConstraintError: sqlite3.IntegrityError, apsw.TooBigError: sqlite3.DataError}
    found = kinds.get(type(error), sqlite3.OperationalError)(str(error))
    found.sqlite_errorcode = getattr(error, "extendedresult", apsw.SQLITE_ERROR)
    return found
