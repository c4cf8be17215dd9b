"""Name, make and publish the files of SQLite ledgers, and check the room that they need.

A new file gets its content under a temporary name of its own, in the folder where it will be, with
mode 600. It gets its real name when it is complete and on the disk. A file that must not be
overwritten is published by a hard link, which fails if the name is taken.

SQLite believes in whatever log lies beside a file. So a name with a left-over `-wal` or `-journal`
is never given to another file: the log would be applied to it.

Invariant: whenever the process dies, a name shows the whole old file, the whole new one, or none,
and then the old one is whole under the name that it was set aside with.
"""

import os
import secrets
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.database import parse_url, sqlite_path
from vllm_cost_meter.ledger.file_modes import is_open_folder, make_private
from vllm_cost_meter.ledger.untouched import connect_by_uri, connect_to_read

# SQLite keeps these beside a file: two for the write-ahead log, one for the older kind of journal.
COMPANIONS = ("-wal", "-shm", "-journal")
BUSY_TIMEOUT_S = 5.0
# What a command needs more than it will write: pages that SQLite rounds up to, and the like.
SPARE_BYTES = 1 << 20

FreeBytes = Callable[[Path], int]

# What does in PostgreSQL what a command here does for SQLite.
_IN_POSTGRESQL = {
    "check": "pg_amcheck, and `vllm-cost-meter audit` for the books",
    "backup": "pg_dump",
    "restore": "pg_restore",
    "merge": "pg_dump --inserts --on-conflict-do-nothing from the one and psql into the other",
    "compact": "vacuumdb --full",
    "repair": "pg_restore of the last good pg_dump",
    "migrate": "pg_dump, and then the start of a metered server, which migrates it",
}


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user can still write in a folder."""
    return shutil.disk_usage(folder).free


def ledger_path(url: str, command: str) -> Path:
    """Return the file of a SQLite ledger. Raises LedgerError for one in PostgreSQL.

    A symlink is followed: what happens to a ledger happens to the file, not to the link.
    """
    parsed = parse_url(url)
    path = sqlite_path(parsed)
    if path is None:
        shown = parsed.render_as_string(hide_password=True)
        raise LedgerError(
            f"ledger {shown}: `ledger {command}` is for SQLite; in PostgreSQL the tool is"
            f" {_IN_POSTGRESQL[command]}"
        )
    return path


def existing(path: Path, *, is_read: bool = False) -> Path:
    """Return the real file of a ledger that is there. Raises LedgerError for what is not ours.

    Its modes are tightened, as a server does. What `is_read` only stays as it is, and may be of
    another user, if it can be read.
    """
    if not path.exists():
        raise LedgerError(
            f"ledger {path}: no such file; name the right ledger with --ledger or in"
            " COST_METER_LEDGER"
        )
    if not path.is_file():
        raise LedgerError(f"ledger {path}: expected a file, got a folder or a device")
    if not is_read:
        make_private(path)
    return path.resolve()


def source(path: Path) -> Path:
    """Return the real file of a copy or another ledger that is only read. Raises LedgerError."""
    if not path.is_file():
        raise LedgerError(f"{path}: expected a ledger's file, got none; check the name")
    return path.resolve()


def companions(path: Path) -> list[Path]:
    """Return the names that SQLite uses beside a file, whether they are there or not."""
    return [path.with_name(path.name + suffix) for suffix in COMPANIONS]


def total_bytes(path: Path) -> int:
    """Return the size of a ledger: the file and its log."""
    files = [path, path.with_name(path.name + "-wal")]
    return sum(file.stat().st_size for file in files if file.exists())


def connect(path: Path, *, writes: bool = False) -> sqlite3.Connection:
    """Open an existing file by SQLite; without `writes` nothing in it or beside it changes."""
    if writes:
        return connect_by_uri(path, "rw", BUSY_TIMEOUT_S)
    return connect_to_read(path, BUSY_TIMEOUT_S)


@contextmanager
def sqlite_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an error of SQLite or of the system into one LedgerError that says what was done."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        hint = ""
        if isinstance(error, sqlite3.DatabaseError) and is_damage(error):
            hint = "; run `vllm-cost-meter ledger repair`"
        raise LedgerError(f"ledger {path}: cannot be {doing}: {cause}{hint}") from error


def is_damage(error: sqlite3.DatabaseError) -> bool:
    """Return whether SQLite says that a file is damaged, or is none of its own."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@contextmanager
def interrupted_after(connection: sqlite3.Connection, limit_s: float) -> Iterator[threading.Event]:
    """End what a connection does within the block after a time; the event says whether it was."""
    cut_short = threading.Event()

    def end() -> None:
        cut_short.set()
        connection.interrupt()

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield cut_short
    finally:
        timer.cancel()
        timer.join()  # It must not meet a connection that is closed.


def require_space(folder: Path, needed: int, doing: str, free: FreeBytes = free_bytes) -> None:
    """Raise LedgerError unless a folder has room for so many bytes."""
    there = free(folder)
    if there < needed + SPARE_BYTES:
        raise LedgerError(
            f"{folder}: expected {needed + SPARE_BYTES:,} free bytes to {doing}, got {there:,};"
            " free some, nothing was changed"
        )


def refuse_target(target: Path, *, force: bool, ledger: Path) -> None:
    """Raise LedgerError unless a new file may get this name.

    With `force` it may replace a file of this user, with what SQLite left beside that.
    """
    folder = target.parent
    if not folder.is_dir():
        raise LedgerError(f"{target}: the folder {folder} does not exist; make it first")
    if is_open_folder(folder) and not folder.stat().st_mode & stat.S_ISVTX:
        raise LedgerError(f"{target}: everybody may replace files in {folder}; choose another")
    for file in (target, *companions(target)):
        if not os.path.lexists(file):
            continue
        about = file.lstat()
        if not stat.S_ISREG(about.st_mode):
            raise LedgerError(f"{file}: expected no symlink, folder or device; choose another name")
        if not force:
            raise LedgerError(f"{file}: is there already; choose another name, or give --force")
        if about.st_uid != os.geteuid():
            raise LedgerError(f"{file}: is of user id {about.st_uid}; choose another name")
    if ledger.exists() and target.exists() and target.samefile(ledger):
        raise LedgerError(f"{target}: is the ledger itself; choose another name")


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Make an empty file with mode 600 beside `target`, and remove it unless it was published."""
    path = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        os.close(os.open(path, flags, 0o600))
    except OSError as error:
        raise LedgerError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        yield path
    finally:
        for file in (path, *companions(path)):
            file.unlink(missing_ok=True)


def publish(path: Path, target: Path, *, replace: bool = False) -> None:
    """Give a complete file, which nobody has open, its name; it is on the disk before that."""
    _sync(path)
    try:
        if replace:
            for file in companions(target):
                file.unlink(missing_ok=True)
            path.replace(target)
        else:
            _link(path, target)
    except FileExistsError:
        raise LedgerError(f"{target}: came meanwhile, and was left as it is; try again") from None
    except OSError as error:
        raise LedgerError(f"{target}: cannot be written: {error.strerror}") from error
    _sync(target.parent)


def _link(path: Path, target: Path) -> None:
    try:
        target.hardlink_to(path)
    except FileExistsError:
        raise
    except OSError:  # Some filesystems have no hard links.
        if os.path.lexists(target):
            raise FileExistsError from None
        path.replace(target)
    path.unlink(missing_ok=True)


def set_aside(path: Path, kind: str, now: str) -> Path:
    """Give a ledger a name with its date, and its log with it; nobody makes a new one meanwhile.

    The ledger's name goes first: a log without its ledger is applied to nothing, and a ledger
    without its log would be read as an older one.
    """
    aside = free_name(path, kind, now)
    _link(path, aside)
    path.unlink(missing_ok=True)
    for file in companions(path):
        if file.exists():
            file.rename(file.with_name(aside.name + file.name.removeprefix(path.name)))
    _sync(path.parent)
    return aside


def free_name(path: Path, kind: str, now: str) -> Path:
    """Return a name beside a ledger that says what the file is and from when, and is not taken.

    `now` is an instant as RFC 3339 text.
    """
    stamp = "".join(c for c in now[:19] if c.isalnum())
    name = f"{path.name}.{kind}-{stamp}Z"
    found, count = path.with_name(name), 1
    while any(os.path.lexists(file) for file in (found, *companions(found))):
        count += 1
        found = path.with_name(f"{name}-{count}")
    return found


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        with suppress(OSError):
            os.close(descriptor)
