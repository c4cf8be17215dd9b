"""Keep every other process off a ledger while its file is replaced, and refuse if one has it open.

A connection in WAL mode holds SQLite's shared lock on the file for as long as it is open, between
its transactions too. So whoever gets that lock exclusively is alone, and stays alone while it holds
it: others wait, or are told that the database is locked. This works without reading the file, so
also where it is damaged.

Closing a descriptor drops all POSIX locks of its process on the file. So the lock is taken by a
child process, which has nothing to do with SQLite. That also proves that this process itself has no
connection to the file. The child ends with the block, or with this process.

A server may have no connection at a moment. So the lock of whoever applies its journals counts too:
a server has that all the time.

Invariant: within `alone`, no process has the ledger open by SQLite.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.journal.places import APPLIER_LOCK_NAME, FileLock, folder_of_ledger

# A command that reads the ledger may be just at its end.
WAIT_S = 1.0
# 512 bytes from the pending byte on: the locks that every user of a SQLite file must get.
_CHILD = """
import errno, fcntl, os, sys, time
until = time.monotonic() + float(sys.argv[2])
try:
    file = os.open(sys.argv[1], os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 512, 0x40000000)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN) or time.monotonic() > until:
                raise
            time.sleep(0.02)
    said = "alone"
except OSError as error:
    said = "used" if error.errno in (errno.EACCES, errno.EAGAIN) else error.strerror
try:
    os.write(1, (said + chr(10)).encode())
    while said == "alone" and os.read(0, 1):
        pass
except OSError:
    pass  # Whoever asked was killed.
"""


@contextmanager
def alone(path: Path, *, wait_s: float = WAIT_S) -> Iterator[None]:
    """Hold off all others from a ledger's real file. Raises LedgerError if somebody uses it."""
    with _applier_kept_off(path):
        if not path.exists():
            yield
            return
        # `access` first: the child could not tell a lock from a file that it may not open.
        if not os.access(path, os.R_OK | os.W_OK):
            raise LedgerError(f"ledger {path}: the file cannot be read and written by this user")
        command = [sys.executable, "-I", "-S", "-c", _CHILD, str(path), str(wait_s)]
        with subprocess.Popen(  # noqa: S603 - our own program
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdin is not None and child.stdout is not None  # noqa: S101, PT018
            try:
                said = child.stdout.readline().strip()
                if said == "used":
                    child.wait()  # It must not be named among the users.
                    raise LedgerError(
                        f"ledger {path}: is in use{_users(path)}; stop its servers and commands"
                        " first, nothing was changed"
                    )
                if said != "alone":
                    raise LedgerError(f"ledger {path}: cannot be locked: {said or 'no answer'}")
                yield
            finally:
                child.stdin.close()


@contextmanager
def _applier_kept_off(path: Path) -> Iterator[None]:
    """Hold the lock of whoever applies the journals, if there are any. Raises LedgerError."""
    file = folder_of_ledger(path) / APPLIER_LOCK_NAME
    if not file.exists() and not file.is_symlink():
        yield
        return
    try:
        lock = FileLock.try_to_take(file, create=False)
    except OSError as error:
        raise LedgerError(f"{file}: cannot be opened: {error.strerror}") from error
    if lock is None:
        raise LedgerError(
            f"ledger {path}: a server uses it, which holds {file}; stop it first, nothing was"
            " changed"
        )
    try:
        yield
    finally:
        lock.release()


def _users(path: Path) -> str:
    """Return the processes that have a file open, for people; empty where none can be seen.

    The entries of /proc are looked at and never opened.
    """
    found = []
    wanted = path.stat()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(_is_same(entry, wanted) for entry in (folder / "fd").iterdir()):
                name = (folder / "comm").read_text(errors="replace").strip()
                found.append(f"{folder.name} ({name})")
        except OSError:  # It ended, or belongs to another user.
            continue
    return f" by process {', '.join(sorted(found))}" if found else ""


def _is_same(entry: Path, wanted: os.stat_result) -> bool:
    try:
        about = entry.stat()
    except OSError:
        return False
    return (about.st_dev, about.st_ino) == (wanted.st_dev, wanted.st_ino)
