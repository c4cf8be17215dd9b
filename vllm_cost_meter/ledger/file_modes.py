"""Keep a SQLite ledger private: its file, its write-ahead log, and the meter's own folder.

A ledger holds who asked what at which cost. Its files get mode 0600, and a folder that is named as
the meter's own gets 0700; looser modes are tightened. Other folders stay as their owner made them.
A file of another owner is refused, because that owner could read and change it, and so is a symlink
into a folder where everybody may write.

Files are only looked at by name, never opened: closing a descriptor would drop SQLite's locks.

Invariant: after `make_private` only this user can read the ledger's files.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.units.places import OWN_FOLDER

# SQLite writes these beside the file.
_SUFFIXES = ("", "-wal", "-shm")
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def make_private(path: Path) -> None:
    """Tighten the modes of a ledger's files and folder. Raises LedgerError for what is not ours."""
    for file, mode in _files_of(path):
        _tighten(file, mode)


def open_to_others(path: Path) -> list[Path]:
    """Return what `make_private` would tighten. Raises LedgerError for what is not ours."""
    return [file for file, _ in _files_of(path) if _is_open(file)]


def _files_of(path: Path) -> Iterator[tuple[Path, int]]:
    """Yield a ledger's own folder and files with the modes that they are to have."""
    real = path.resolve()
    if real != path.absolute() and is_open_folder(real.parent):
        raise LedgerError(
            f"ledger {path}: expected a place that only this user can change, got a symlink into"
            f" {real.parent}, where everybody may write; set COST_METER_LEDGER to another place"
        )
    if real.parent.name == OWN_FOLDER:
        yield real.parent, stat.S_IRWXU
    for suffix in _SUFFIXES:
        file = real.with_name(real.name + suffix)
        try:
            about = file.lstat()
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(about.st_mode):
            continue  # SQLite says that it cannot open it.
        if not stat.S_ISREG(about.st_mode):
            raise LedgerError(f"ledger {file}: expected a file, got a symlink or a device")
        if about.st_uid != os.geteuid():
            raise LedgerError(
                f"ledger {file}: expected a file of this user (id {os.geteuid()}), got one of user"
                f" id {about.st_uid}, who could change it; give it to this user or set"
                " COST_METER_LEDGER to another place"
            )
        yield file, stat.S_IRUSR | stat.S_IWUSR


def is_open_folder(folder: Path) -> bool:
    """Return whether everybody may write in a folder."""
    try:
        return bool(folder.stat().st_mode & stat.S_IWOTH)
    except OSError:
        return False


def _is_open(path: Path) -> bool:
    try:
        about = path.stat()
    except FileNotFoundError:  # Another process closed the ledger, and its log is gone.
        return False
    return bool(about.st_mode & _OTHERS) and about.st_uid == os.geteuid()


def _tighten(path: Path, mode: int) -> None:
    try:
        if _is_open(path):
            path.chmod(mode)
    except FileNotFoundError:
        return
    except OSError as error:
        raise LedgerError(
            f"ledger {path}: is open to other users and cannot be closed to them: {error.strerror}"
        ) from error
