"""Where journals are, and which of them are alive: folders beside the ledger, each with a lock.

Every process that bills has a folder of its own in the ledger's folder of journals, named by a
random id. A process number would not do: in a container it is the same each time. A journal is
alive while its lock is held, and the kernel lets go of that with the process, however it dies. The
lock is `flock`, because POSIX record locks go when any descriptor of the file is closed. A child
that was forked closes the descriptor, or an engine that outlives its server would keep a dead
server's journal locked.

Invariant: a folder with a journal's name has its lock file, and is seen only once that is locked.
"""

import hashlib
import os
import secrets
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Self

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.journal import files
from vllm_cost_meter.journal.segments import segment_indexes, segment_name

FOLDER_SUFFIX = ".journal"
LOCK_NAME = "lock"
# Held by whoever applies the journals of a ledger.
APPLIER_LOCK_NAME = "applier.lock"
# Says that a ledger was made beside the journals: without it, that one is away.
LEDGER_MARK_NAME = "ledger-is-made"
# Links to folders with journals of the same ledger in other places.
SECOND_PREFIX = "second-"
_ID_BYTES = 16
_NEW_PREFIX = "new-"
_GONE_PREFIX = "gone-"


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
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = files.open_file(path, flags | (os.O_CREAT if create else 0))
        except FileNotFoundError:
            if create:
                raise
            return None
        is_ours = False
        try:
            if not files.is_file(descriptor):
                raise LedgerError(f"{path}: expected a file to lock, got a device")
            is_ours = files.try_to_lock(descriptor)
        finally:
            if not is_ours:
                files.close(descriptor)
        return cls(descriptor) if is_ours else None

    def release(self) -> None:
        """Let go of the lock. Idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            files.close(descriptor)

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


def mark_ledger(folder: Path) -> None:
    """Remember that a ledger was made beside these journals. Never raises."""
    try:
        files.close(files.open_file(folder / LEDGER_MARK_NAME, os.O_CREAT | os.O_WRONLY))
    except OSError:
        pass  # Nothing is journaled here yet, or the next one to open the ledger marks it.


def unmark_ledger(folder: Path) -> None:
    """Have another ledger be made beside these journals. Raises OSError."""
    files.remove_file(folder / LEDGER_MARK_NAME)


def mark_of_ledger(folder: Path) -> Path | None:
    """Return the mark of the ledger that was made beside these journals; None without."""
    mark = folder / LEDGER_MARK_NAME
    return mark if files.exists(mark) else None


def link_second(first: Path, second: Path) -> None:
    """Have whoever reads the first folder of journals find the second one. Never raises."""
    digest = hashlib.sha256(str(second).encode(errors="surrogateescape")).hexdigest()[:16]
    link = first / f"{SECOND_PREFIX}{digest}"
    try:
        make_folder_of_journals(second)
        if files.linked(link) is None:
            files.link(link, second)
    except OSError:
        pass  # It is linked when the first place can be written again.


def folders_of(first: Path, second: Path | None = None) -> list[Path]:
    """Return all folders that may have journals of a ledger, the first one first.

    These are the second place that is set now, and those that were. One that is linked and not
    there is among them: its disk is away.
    """
    names = sorted(files.names(first)) if files.is_folder(first) else []
    links = (files.linked(first / name) for name in names if name.startswith(SECOND_PREFIX))
    found = [first, *(to for to in links if to is not None)]
    if second is not None and second not in found and files.is_folder(second):
        found.append(second)
    return found


def require_folders(first: Path, folders: Iterable[Path]) -> None:
    """Raise LedgerError where a folder that may have journals is away; the first may not be yet."""
    for folder in folders:
        if folder != first and not files.is_folder(folder):
            raise LedgerError(
                f"journals {folder}: not there, the second place of journals: is its disk away? If"
                f" it is gone for good, remove the link {first}/{SECOND_PREFIX}… to it"
            )


def make_folder_of_journals(folder: Path) -> None:
    """Make the folder of a ledger's journals, if it is not there. Raises OSError."""
    if not files.exists(folder.parent):
        make_folder_of_journals(folder.parent)
    files.make_folder(folder)


def make_journal(folder: Path) -> tuple[str, FileLock]:
    """Make a journal's folder, readable by this user only; return its id and its lock.

    Raises OSError.
    """
    make_folder_of_journals(folder)
    journal_id = secrets.token_hex(_ID_BYTES)
    new = folder / f"{_NEW_PREFIX}{journal_id}"
    files.make_folder(new)
    lock = FileLock.try_to_take(new / LOCK_NAME)
    if lock is None:
        raise OSError(f"{new / LOCK_NAME}: another process holds the lock of a new journal")
    try:
        # Only now others see it: without its lock they would take it for a dead one.
        files.rename(new, folder / journal_id)
        files.sync_folder(folder)
        # Whoever made the folder may not have come so far.
        files.sync_folder(folder.parent)
    except BaseException:
        lock.release()
        raise
    return journal_id, lock


def journal_ids(folder: Path) -> list[str]:
    """Return the ids of all journals in a folder, in the same order each time."""
    return [name for name in names_in(folder) if is_journal_id(name)]


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, in the same order each time; none where there is no folder."""
    try:
        return sorted(files.names(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_journal_id(name: str) -> bool:
    """Return whether a name is that of a journal."""
    return len(name) == 2 * _ID_BYTES and set(name) <= set("0123456789abcdef")


def take_over(folder: Path, journal_id: str) -> FileLock | None:
    """Return the lock of a journal whose process is dead; None while it lives or if it is gone.

    A journal without the lock's file is dead: a crash of the machine took the file.
    """
    try:
        return FileLock.try_to_take(folder / journal_id / LOCK_NAME)
    except FileNotFoundError:
        return None


def remove_remains(folder: Path) -> None:
    """Remove what processes left behind that died while they made or removed a journal.

    What cannot be removed stays: nothing waits for it.
    """
    for name in names_in(folder):
        with suppress(OSError):
            if name.startswith(_GONE_PREFIX):
                _remove_contents(folder / name)
            elif name.startswith(_NEW_PREFIX):
                _remove_new(folder, name)


def _remove_new(folder: Path, name: str) -> None:
    # One that is being made has no lock for a moment: then its process makes another one.
    lock = FileLock.try_to_take(folder / name / LOCK_NAME)
    if lock is not None:
        try:
            remove_journal(folder, name)
        finally:
            lock.release()


def remove_segments(folder: Path, journal_id: str, before: int) -> None:
    """Remove the segments of a journal that come before the one with this index."""
    place = folder / journal_id
    for index in segment_indexes(place):
        if index < before:
            files.remove_file(place / segment_name(index))


def remove_journal(folder: Path, journal_id: str) -> None:
    """Remove a dead journal; the caller holds its lock.

    It loses its name first: what is half removed is no journal, and nobody takes it for one that is
    being made.
    """
    gone = folder / f"{_GONE_PREFIX}{journal_id}"
    files.rename(folder / journal_id, gone)
    _remove_contents(gone)


def _remove_contents(gone: Path) -> None:
    for name in names_in(gone):
        files.remove_file(gone / name)
    files.remove_folder(gone)
