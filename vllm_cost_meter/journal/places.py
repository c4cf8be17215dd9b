"""Where journals are, and which of them are alive: folders beside the ledger, each with a lock.

Every process that bills has a folder of its own in the ledger's folder of journals, named by a
random id. A process number would not do: in a container it is the same each time. A journal is
alive while its lock is held, and the kernel lets go of that with the process, however it dies. The
lock is `flock`, because POSIX record locks go when any descriptor of the file is closed. A child
that was forked closes the descriptor, or an engine that outlives its server would keep a dead
server's journal locked.

Invariant: a folder with a journal's name has its lock file, and is seen only once that is locked.
"""

import fcntl
import hashlib
import os
import secrets
import stat
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from vllm_cost_meter.errors import LedgerError

FOLDER_SUFFIX = ".journal"
LOCK_NAME = "lock"
# Held by whoever applies the journals of a ledger.
APPLIER_LOCK_NAME = "applier.lock"
# Links to folders with journals of the same ledger in other places.
SECOND_PREFIX = "second-"
_ID_BYTES = 16
_NEW_PREFIX = "new-"


class FileLock:
    """An exclusive `flock` on a file, held until `release` or the end of this process."""

    # Only this process's own: a forked child must not keep them.
    _held: "weakref.WeakSet[FileLock]" = weakref.WeakSet()

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        self._held.add(self)

    @classmethod
    def try_to_take(cls, path: Path, *, create: bool = True) -> Self | None:
        """Return the lock on a file, None while another holds it, or without a file to lock.

        Raises LedgerError for what is not a file, OSError where it cannot be opened.
        """
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(path, flags | (os.O_CREAT if create else 0), 0o600)
        except FileNotFoundError:
            if create:
                raise
            return None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise LedgerError(f"{path}: expected a file to lock, got a device")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def release(self) -> None:
        """Let go of the lock. Idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    @classmethod
    def _release_in_child(cls) -> None:
        # The parent's lock is on the same open file, and only goes once both have closed it.
        for lock in list(cls._held):
            lock.release()


os.register_at_fork(after_in_child=FileLock._release_in_child)


def folder_of_ledger(ledger: Path) -> Path:
    """Return the folder of journals beside a SQLite ledger."""
    real = ledger.resolve()
    return real.with_name(real.name + FOLDER_SUFFIX)


def second_folder(root: Path, shown_url: str) -> Path:
    """Return the folder for journals of a ledger below a second place, which ledgers may share."""
    digest = hashlib.sha256(shown_url.encode()).hexdigest()[:16]
    return root / f"ledger-{digest}{FOLDER_SUFFIX}"


def folder_of_database(shown_url: str, state_folder: Path) -> Path:
    """Return the folder of journals on this machine for a ledger that is no file."""
    digest = hashlib.sha256(shown_url.encode()).hexdigest()[:16]
    return state_folder / f"database-{digest}{FOLDER_SUFFIX}"


def link_second(first: Path, second: Path) -> None:
    """Have whoever reads the first folder of journals find the second one. Never raises."""
    digest = hashlib.sha256(os.fsencode(second)).hexdigest()[:16]
    link = first / f"{SECOND_PREFIX}{digest}"
    try:
        second.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(second)
    except OSError:
        pass  # It is linked when the first place can be written again.


def folders_of(first: Path, second: Path | None = None) -> list[Path]:
    """Return all folders that may have journals of a ledger, the first one first.

    These are the second place that is set now, and those that were. One that is linked and not
    there is among them: its disk is away.
    """
    links = sorted(first.glob(f"{SECOND_PREFIX}*")) if first.is_dir() else []
    found = [first, *(link.readlink() for link in links if link.is_symlink())]
    if second is not None and second not in found and second.is_dir():
        found.append(second)
    return found


def require_folders(first: Path, folders: Iterable[Path]) -> None:
    """Raise LedgerError where a folder that may have journals is away; the first may not be yet."""
    for folder in folders:
        if folder != first and not folder.is_dir():
            raise LedgerError(
                f"journals {folder}: not there, the second place of journals: is its disk away? If"
                f" it is gone for good, remove the link {first}/{SECOND_PREFIX}… to it"
            )


def make_journal(folder: Path) -> tuple[str, FileLock]:
    """Make a journal's folder, readable by this user only; return its id and its lock.

    Raises OSError.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    journal_id = secrets.token_hex(_ID_BYTES)
    new = folder / f"{_NEW_PREFIX}{journal_id}"
    new.mkdir(mode=0o700)
    lock = FileLock.try_to_take(new / LOCK_NAME)
    if lock is None:
        raise OSError(f"{new / LOCK_NAME}: another process holds the lock of a new journal")
    try:
        # Only now others see it: without its lock they would take it for a dead one.
        new.rename(folder / journal_id)
        sync_folder(folder)
    except BaseException:
        lock.release()
        raise
    return journal_id, lock


def journal_ids(folder: Path) -> list[str]:
    """Return the ids of all journals in a folder, in the same order each time."""
    if not folder.is_dir():
        return []
    return sorted(place.name for place in folder.iterdir() if is_journal_id(place.name))


def is_journal_id(name: str) -> bool:
    """Return whether a name is that of a journal."""
    return len(name) == 2 * _ID_BYTES and set(name) <= set("0123456789abcdef")


def take_over(folder: Path, journal_id: str) -> FileLock | None:
    """Return the lock of a journal whose process is dead; None while it lives or if it is gone."""
    return FileLock.try_to_take(folder / journal_id / LOCK_NAME, create=False)


def remove_journal(folder: Path, journal_id: str) -> None:
    """Remove a dead journal; the caller holds its lock. The lock's file goes last."""
    place = folder / journal_id
    for file in sorted(place.iterdir(), key=lambda file: file.name == LOCK_NAME):
        file.unlink(missing_ok=True)
    place.rmdir()


def sync_folder(folder: Path) -> None:
    """Have the disk know the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
