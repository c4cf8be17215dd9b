"""Connect to a SQLite ledger to read it, and leave its folder as it was.

In WAL mode each connection needs a log and the log's index beside the file, and what becomes of
them depends on how the file is opened. A connection that may write makes them if they are not
there, and the last one to close moves what the log has into the file and removes both. One that may
not write makes them too, and leaves them. So the log decides:

- It is there: a server is at work, or one died. We may not write, and take nothing out of the log.
- It is not there: all is in the file. We may write, though we do not, and clean up when we close.
- It is not there and cannot be made: the file is read as if it could not change. Such a connection
  must not live long.

Invariant: whoever reads makes, changes and removes no file, beyond the life of a connection. The
log's index, which has no contents of its own, is SQLite's.
"""

import os
import sqlite3
from pathlib import Path
from urllib.parse import quote


def connect_to_read(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    """Return a connection to an existing file that cannot change its contents.

    Close it soon. Its transactions are explicit, and any thread may use it.
    """
    real = path.resolve()
    connection = connect_by_uri(real, _mode(real), busy_timeout_s)
    connection.execute("PRAGMA query_only=ON")
    return connection


def connect_by_uri(path: Path, mode: str, busy_timeout_s: float) -> sqlite3.Connection:
    """Return a connection with one of the modes of SQLite's URIs: it never makes the file."""
    return sqlite3.connect(
        f"file:{quote(str(path))}?mode={mode}",
        uri=True,
        timeout=busy_timeout_s,
        isolation_level=None,
        check_same_thread=False,
    )


def has_log(path: Path) -> bool:
    """Return whether there is a write-ahead log beside a file."""
    return path.with_name(path.name + "-wal").exists()


def _mode(path: Path) -> str:
    if has_log(path):
        return "ro"
    is_ours = os.access(path.parent, os.W_OK | os.X_OK) and os.access(path, os.W_OK)
    return "rw" if is_ours else "ro&immutable=1"
