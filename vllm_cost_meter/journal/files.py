"""The files of journals: the journal touches the disk through these functions, and nothing else.

So one place says what a journal asks of a file system, and a test can put a disk of its own there
that fails, fills, and crashes at any of these calls.

Invariant: each function is one call of the system, or fails as one would.
"""

import fcntl
import os
import stat
from pathlib import Path

# Nothing is added to a write's way: it is the system's call.
close = os.close
pread = os.pread
pwrite = os.pwrite
allocate = os.posix_fallocate
sync_data = os.fdatasync


def open_file(path: Path, flags: int) -> int:
    """Return a descriptor that no child of this process gets; a new file is this user's only."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def size_bytes(descriptor: int) -> int:
    """Return the size of an open file."""
    return os.fstat(descriptor).st_size


def is_file(descriptor: int) -> bool:
    """Return whether what is open is a file, not a device or a pipe."""
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


def try_to_lock(descriptor: int) -> bool:
    """Take the `flock` of an open file; return False while another holds it. Raises OSError."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def exists(path: Path) -> bool:
    """Return whether there is a file or a folder at a path."""
    return path.exists()


def names(folder: Path) -> list[str]:
    """Return the names in a folder, in any order. Raises FileNotFoundError without one."""
    return [path.name for path in folder.iterdir()]


def make_folder(folder: Path) -> bool:
    """Make a folder for this user only; return False if it is there. Its parent must be."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if not folder.is_dir():
            raise
        return False
    return True


def is_folder(path: Path) -> bool:
    """Return whether there is a folder at a path, itself or by a link."""
    return path.is_dir()


def link(path: Path, to: Path) -> None:
    """Make a symbolic link. Raises FileExistsError where there is something already."""
    path.symlink_to(to)


def linked(path: Path) -> Path | None:
    """Return where a symbolic link leads; None for anything else."""
    return path.readlink() if path.is_symlink() else None


def rename(path: Path, to: Path) -> None:
    """Give a file or folder another name, in one step."""
    path.rename(to)


def remove_file(path: Path) -> None:
    """Remove a file if it is there."""
    path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove an empty folder."""
    folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Have the disk know the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
