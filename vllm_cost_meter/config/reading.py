"""Read a settings file without waiting for it for ever.

A path may block whoever opens it: a FIFO until somebody writes into it, a file on a network mount
until its server answers. So only a regular file is read, it is opened without waiting, and all of
that is done by a thread that is given up after `READ_WITHIN_S`. Engines read their settings so too.

Invariant: nobody waits longer than that bound. While a reading that was given up hangs, the next
one of that path fails at once and starts no thread.
"""

import os
import stat
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from vllm_cost_meter.guard import in_daemon_thread

R = TypeVar("R")

READ_WITHIN_S = 10.0

# Modification time, size and inode: a file replaced within the clock's resolution differs too.
Stamp = tuple[int, int, int]

_KINDS = {
    stat.S_IFIFO: "a FIFO or pipe",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# The reading that was given up last, by path.
_given_up: dict[Path, Future[Any]] = {}


def read_text(path: str | Path, within_s: float = READ_WITHIN_S) -> str:
    """Return the text of a regular file, which is UTF-8.

    Raises TimeoutError if it cannot be read in time, another OSError if it cannot be read at all,
    ValueError for other bytes, and RuntimeError for a home folder that nobody knows.
    """
    return _in_time(path, _read, within_s).decode()


def stamp_of(path: str | Path, within_s: float = READ_WITHIN_S) -> Stamp | None:
    """Return a stamp that differs between two states of a file; None without a file.

    Raises TimeoutError if the file cannot be looked at in time.
    """
    return _in_time(path, _stamp, within_s)


def _read(path: Path) -> bytes:
    # Opening a device may do something to it, so it is looked at first.
    _check_is_regular(path.stat())
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        _check_is_regular(os.fstat(descriptor))
        return file.read()


def _check_is_regular(found: os.stat_result) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise OSError(0, f"it is {_KINDS.get(kind, 'something else')}")


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _in_time(path: str | Path, look: Callable[[Path], R], within_s: float) -> R:
    """Return `look(path)`, from a thread of its own. Raises TimeoutError if that takes too long."""
    found = Path(path).expanduser()
    hanging = _given_up.get(found)
    why = TimeoutError(
        0, f"it could not be read within {within_s:g} s; is it on a mount that is away?"
    )
    if hanging is not None and not hanging.done():
        raise why
    looking = in_daemon_thread(look, found)
    try:
        return looking.result(within_s)
    except TimeoutError:  # of ours, or of a mount that gave up
        _given_up[found] = looking
        raise why from None
