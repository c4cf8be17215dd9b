"""Open a ledger: its URL, its location, SQLite's WAL mode, and its schema.

SQLite runs in WAL mode with `synchronous=NORMAL`. A commit is written to the file (page cache)
before it returns, so it survives `kill -9` of every process. A crash of the machine may lose the
last commits, but never the file's consistency. WAL needs shared memory, so a network filesystem is
refused at the start. Transactions are explicit here: readers begin DEFERRED and see one state of
the file throughout; writers begin IMMEDIATE and never have to upgrade a lock.

Invariant: an engine that `open_database` returns has our complete schema, even if many processes
tried to create it at once.
"""

import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, insert, inspect, make_url, select, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.connections.postgresql import postgresql_engine
from vllm_cost_meter.ledger.file_modes import make_private, open_to_others
from vllm_cost_meter.ledger.fleet.schema import FLEET_VERSION, fleet_version, has_fleet
from vllm_cost_meter.ledger.migrations import (
    FIRST_WITH_BILL_SUMS,
    FIRST_WITH_ROLLUPS,
    FIRST_WITH_TODAYS_ROWS,
    migrate,
)
from vllm_cost_meter.ledger.rollups.bill_sums import rebuild_bill_sums
from vllm_cost_meter.ledger.rollups.rebuilding import rebuild
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION, metadata, schema_version
from vllm_cost_meter.ledger.tables.replies import create_views, drop_views
from vllm_cost_meter.ledger.untouched import connect_to_read
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.units.places import default_ledger

logger = meter_logger()

# SQLite's WAL mode loses data on these filesystems: its shared memory does not span machines.
NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "ncpfs", "afs", "coda", "9p", "ceph"}
    | {"lustre", "gpfs", "glusterfs", "beegfs", "orangefs", "pvfs2", "ocfs2", "gfs2", "davfs"}
    | {"virtiofs", "panfs"}
)
# FUSE names its driver after a dot; these drivers are for networks.
NETWORK_FUSE = frozenset(
    {"sshfs", "glusterfs", "ceph", "ceph-fuse", "s3fs", "gcsfuse", "rclone", "davfs", "davfs2"}
    | {"smbnetfs", "goofys", "juicefs", "blobfuse", "blobfuse2", "mount-s3", "hdfs", "seaweedfs"}
)
# What to do where the ledger cannot be: it ends the message.
SET_LEDGER = (
    "set COST_METER_LEDGER to a place that this user can write, such as"
    " sqlite:////var/lib/cost-meter/ledger.db, or to PostgreSQL"
)
BUSY_TIMEOUT_S = 5.0
SYNC_DRIVERS = {"sqlite": {"pysqlite"}, "postgresql": {"psycopg", "psycopg2", "pg8000"}}
# A ledger that is being made is looked for so often.
_LOOK_AGAIN_S = 0.02
# Marks a connection that will write; see `_begin`.
WRITE_OPTION = "cost_meter_write"
# The process that holds this PostgreSQL advisory lock may create the schema. The number is
# arbitrary.
_SCHEMA_LOCK = 7_366_101_477


def default_url() -> str:
    """Return the URL of this user's ledger: a SQLite file below the XDG state folder.

    Raises LedgerError where the user has no home folder.
    """
    try:
        return f"sqlite:///{default_ledger()}"
    except LookupError:
        raise LedgerError(
            "ledger: expected a home folder for its default place, got no HOME and no entry for"
            f" user id {os.getuid()} in the password file; {SET_LEDGER}"
        ) from None


def url_of(ledger: str | os.PathLike[str] | None) -> str:
    """Return the URL of a ledger that is named by its URL or its SQLite file; None is the default.

    The default is the ledger of this user, `default_url`.
    """
    if ledger is None:
        return default_url()
    name = os.fspath(ledger)
    return name if "://" in name else f"sqlite:///{Path(name).resolve()}"


def parse_url(url: str) -> URL:
    """Return a ledger's URL, parsed. Raises LedgerError for a database that the meter cannot use.

    A SQLite URL must name a file by a plain path.
    """
    hint = "sqlite:////path/ledger.db or postgresql+psycopg://user@host/database"
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, ValueError):
        came = url.rpartition("@")[2]  # The text before an @ may be a password.
        raise LedgerError(f"ledger: expected a URL such as {hint}, got {came!r}") from None
    shown = parsed.render_as_string(hide_password=True)
    try:
        driver = parsed.get_driver_name()
    except NoSuchModuleError:
        backend, driver = "", ""
    if backend not in SYNC_DRIVERS or driver not in SYNC_DRIVERS[backend]:
        raise LedgerError(f"ledger {shown}: expected {hint}, got an unsupported database or driver")
    if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise LedgerError(f"ledger {shown}: expected {hint}, got memory, where it would be lost")
    if backend == "sqlite" and str(parsed.database).startswith("file:"):
        raise LedgerError(f"ledger {shown}: expected a plain path, sqlite:////path/ledger.db")
    return parsed


def shown_url(url: str) -> str:
    """Return a ledger's URL as people may see it: without its password, and its path absolute."""
    parsed = parse_url(url)
    if (path := sqlite_path(parsed)) is not None:
        parsed = parsed.set(database=str(path))
    return parsed.render_as_string(hide_password=True)


def sqlite_path(url: URL) -> Path | None:
    """Return a SQLite ledger's absolute path; None for another database."""
    if url.get_backend_name() != "sqlite":
        return None
    return Path(str(url.database)).absolute()


def check_location(url: str, *, mounts: str | None = None) -> None:
    """Raise LedgerError with one line unless a ledger may live at this URL and can be written.

    This creates a SQLite ledger's folder, and closes its files to other users. `mounts` is the text
    of /proc/mounts, read from there by default.
    """
    check_place(url, mounts=mounts)
    if (path := sqlite_path(parse_url(url))) is not None:
        _make_folder(path)
        make_private(path)


def check_place(url: str, *, mounts: str | None = None) -> None:
    """Raise LedgerError as `check_location` does, and change nothing."""
    path = sqlite_path(parse_url(url))
    if path is None:
        return
    kind = filesystem_of(path, _read_mounts() if mounts is None else mounts)
    if kind in NETWORK_FILESYSTEMS or kind.removeprefix("fuse.") in NETWORK_FUSE:
        raise LedgerError(
            f"ledger {path}: is on a network filesystem ({kind}), where SQLite's WAL mode is"
            " unsafe; set COST_METER_LEDGER to a local path or to PostgreSQL"
        )
    folder = nearest_folder(path)
    if not folder.is_dir():
        raise LedgerError(
            f"ledger {path}: the folder {path.parent} cannot be created: {folder} is a file;"
            f" {SET_LEDGER}"
        )
    # First of all: nothing can be known of what is in a folder that this user may not enter.
    if not os.access(folder, os.W_OK | os.X_OK):
        raise LedgerError(f"ledger {path}: cannot write in the folder {folder}; {SET_LEDGER}")
    if path.is_dir():
        raise LedgerError(f"ledger {path}: expected a file, got a folder; {SET_LEDGER}")
    if path.exists() and not path.is_file():
        raise LedgerError(f"ledger {path}: expected a file, got a FIFO or a device; {SET_LEDGER}")
    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        raise LedgerError(
            f"ledger {path}: the file cannot be read and written by this user; {SET_LEDGER}"
        )
    open_to_others(path)  # It refuses what is not ours.


def nearest_folder(path: Path) -> Path:
    """Return the folder that a file is in or would be made in: the nearest one that is there."""
    return next(parent for parent in path.parents if os.path.lexists(parent))


def filesystem_of(path: Path, mounts: str) -> str:
    """Return the filesystem type under a path: the type at the longest mount point above it.

    `mounts` is the text of /proc/mounts. Returns "" if no mount point is above the path.
    """
    real = path.resolve()
    best, kind = -1, ""
    for line in mounts.splitlines():
        words = line.split()
        if len(words) < 3:
            continue
        # /proc/mounts writes blanks in octal.
        point = words[1].encode().decode("unicode_escape")
        # A later mount on the same point covers the earlier one.
        if real.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), words[2]
    return kind


def open_database(
    url: str,
    *,
    create: bool = True,
    upgrade: bool | None = None,
    busy_timeout_s: float = BUSY_TIMEOUT_S,
) -> Engine:
    """Open a ledger's database; create folder, file and schema if absent and `create` is set.

    With `upgrade`, by default where `create` is set, an older ledger gets this version's schema.
    Raises LedgerError when it cannot be opened, or was written by another version.
    """
    parsed = parse_url(url)
    path = sqlite_path(parsed)
    if path is not None and create:
        _make_folder(path)
        make_private(path)
        # A symlink may name a file that is not there yet.
        _make_file(path.resolve())
    elif path is not None:
        _require_file(path, parsed)
    upgrade = create if upgrade is None else upgrade
    return _opened(parsed, lambda: _engine(parsed, busy_timeout_s), create=create, upgrade=upgrade)


def open_to_read(
    url: str, *, busy_timeout_s: float = BUSY_TIMEOUT_S, wait_s: float = 0.0
) -> Engine:
    """Open an existing ledger's database, and change nothing in it nor in its folder.

    Every transaction sees one state of the ledger. A SQLite file is opened anew for each, by its
    path: where another file comes to that place, the next transaction reads that one. A ledger that
    is not there yet is waited for, for so long: a server that starts makes it. Raises LedgerError
    when it cannot be opened, or was written by another version of the cost meter.
    """
    until = time.monotonic() + wait_s
    while True:
        try:
            return _open_to_read(url, busy_timeout_s)
        except LedgerError:
            if time.monotonic() >= until:
                raise
        time.sleep(_LOOK_AGAIN_S)


def _open_to_read(url: str, busy_timeout_s: float) -> Engine:
    parsed = parse_url(url)
    path = sqlite_path(parsed)
    if path is None:
        return in_one_state(_opened(parsed, lambda: _engine(parsed, busy_timeout_s)))
    _require_file(path, parsed)
    return _opened(parsed, lambda: _reading_engine(parsed, path, busy_timeout_s))


def _require_file(path: Path, parsed: URL) -> None:
    if not path.exists():
        raise LedgerError(
            f"ledger {parsed.render_as_string(hide_password=True)}: no such file; start a server"
            " with the meter, or name the right ledger in COST_METER_LEDGER",
            is_missing=True,
        )


def _opened(
    parsed: URL, make: Callable[[], Engine], *, create: bool = False, upgrade: bool = False
) -> Engine:
    """Return the engine that `make` makes, if it has our schema. Raises LedgerError."""
    shown = parsed.render_as_string(hide_password=True)
    engine: Engine | None = None
    try:
        engine = make()
        _ensure_schema(engine, shown, create=create, upgrade=upgrade)
    except ImportError as error:
        raise LedgerError(
            f"ledger {shown}: its driver is not installed ({error}); install it into this"
            " environment"
        ) from error
    except SQLAlchemyError as error:
        _dispose(engine)
        raise LedgerError(f"ledger {shown}: cannot be opened: {cause_of(error)}") from error
    except BaseException:
        _dispose(engine)
        raise
    return engine


def cause_of(error: SQLAlchemyError) -> str:
    """Return a database error's own message, its first line only."""
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]


def _dispose(engine: Engine | None) -> None:
    if engine is not None:
        engine.dispose()


def _read_mounts() -> str:
    try:
        return Path("/proc/mounts").read_text(errors="replace")
    except OSError:  # Outside Linux no mount is known, so none is refused.
        return ""


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise LedgerError(
            f"ledger {path}: the folder {path.parent} cannot be created: {error.strerror};"
            f" {SET_LEDGER}"
        ) from error


def _make_file(path: Path) -> None:
    """Create the file readable by its owner only; SQLite gives -wal and -shm the same mode.

    An existing ledger is never opened here: closing any descriptor of a file drops all POSIX locks
    of the process on it, SQLite's among them. A command beside the server would then believe itself
    alone, and remove the write-ahead log that the server goes on writing to.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return
    except OSError as error:
        raise LedgerError(f"ledger {path}: cannot be written: {error.strerror}") from error


def _engine(url: URL, busy_timeout_s: float) -> Engine:
    if url.get_backend_name() != "sqlite":
        return postgresql_engine(url, pool_pre_ping=True)
    engine = create_engine(url, connect_args={"timeout": busy_timeout_s})

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # `_begin` executes BEGIN itself.
        _set_wal(connection, busy_timeout_s)
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA cache_size=-16384")

    event.listen(engine, "begin", _begin)
    return engine


def _reading_engine(url: URL, path: Path, busy_timeout_s: float) -> Engine:
    """Return an engine whose connections live no longer than a transaction."""

    def connect() -> sqlite3.Connection:
        connection = connect_to_read(path, busy_timeout_s)
        connection.execute("PRAGMA cache_size=-16384")
        return connection

    engine = create_engine(url, creator=connect, poolclass=NullPool)
    event.listen(engine, "begin", _begin)
    return engine


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get(WRITE_OPTION)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _set_wal(connection: Any, timeout_s: float) -> None:
    """Switch the file to WAL, and retry while others open it: SQLite itself does not wait here."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
        except connection.OperationalError:
            if time.monotonic() > deadline:
                raise
        else:
            if mode == "wal":
                return
            if time.monotonic() > deadline:
                raise connection.OperationalError(f"expected journal mode WAL, got {mode}")
        time.sleep(0.005)


def writing(engine: Engine) -> Engine:
    """Return the same engine with transactions that begin as a writer's (BEGIN IMMEDIATE)."""
    return engine.execution_options(**{WRITE_OPTION: True})


def in_one_state(engine: Engine) -> Engine:
    """Return the same engine with transactions that see one state of the ledger throughout."""
    if engine.dialect.name == "postgresql":
        return engine.execution_options(isolation_level="REPEATABLE READ")
    return engine


def refuse_newer(version: int, name: str) -> None:
    """Raise LedgerError for a schema's version that this cost meter does not know."""
    if version > SCHEMA_VERSION:
        raise LedgerError(
            f"{name}: has schema version {version}, this cost meter knows {SCHEMA_VERSION};"
            " upgrade vllm-cost-meter or use another ledger"
        )


def _ensure_schema(engine: Engine, shown: str, *, create: bool, upgrade: bool) -> None:
    found = recorded_version(engine)
    if found is not None and (of_fleet := _fleet_version(engine)) is not None:
        if create or upgrade:
            raise LedgerError(
                f"ledger {shown}: expected a ledger, got the database of a fleet; name it in"
                " COST_METER_FLEET, and a file of the server's own in COST_METER_LEDGER"
            )
        if of_fleet < FLEET_VERSION:
            raise LedgerError(
                f"fleet {shown}: expected tables of version {FLEET_VERSION}, got version"
                f" {of_fleet}; an administrator runs `vllm-cost-meter fleet migrate`"
            )
    if found is None and create:
        _create_schema(engine)
        found = recorded_version(engine)
    elif found is not None and upgrade and found < SCHEMA_VERSION:
        _upgrade(engine, shown, found)
        found = recorded_version(engine)
    if found is None:
        raise LedgerError(
            f"ledger {shown}: holds no ledger (no table schema_version)", is_missing=True
        )
    refuse_newer(found, f"ledger {shown}")
    if found < SCHEMA_VERSION:
        raise LedgerError(
            f"ledger {shown}: has schema version {found}, this cost meter needs {SCHEMA_VERSION};"
            " run `vllm-cost-meter ledger migrate`, or start a metered server with this ledger and"
            " wait until it has changed the rows"
        )


def _upgrade(engine: Engine, shown: str, found: int) -> None:
    """Bring an older ledger to this version's schema, and say so: it may take minutes.

    Raises LedgerError, with nothing changed, if the disk has no room for that.
    """
    doing = f"ledger {shown}: from schema version {found} to {SCHEMA_VERSION}"
    path = sqlite_path(engine.url)
    if path is not None and found < FIRST_WITH_TODAYS_ROWS:
        size, free = path.stat().st_size, shutil.disk_usage(path.parent).free
        # The rows that change are in the log first, then in the file beside the old ones.
        if free < 2 * size:
            raise LedgerError(
                f"{doing}: expected {2 * size:,} free bytes in {path.parent} to change its rows,"
                f" got {free:,}; free some, nothing was changed"
            )
    began_s = time.monotonic()
    logger.info("cost meter: %s: begins; what is told meanwhile waits in the journal", doing)
    _create_schema(engine)
    logger.info("cost meter: %s: done in %.1f s", doing, time.monotonic() - began_s)


def recorded_version(engine: Engine) -> int | None:
    """Return the version that a database says its ledger's schema has; None without a ledger."""
    with engine.connect() as connection:
        if not inspect(connection).has_table(schema_version.name):
            return None
        rows = connection.execute(select(schema_version.c.version)).scalars().all()
        return max(rows, default=None)


def _fleet_version(engine: Engine) -> int | None:
    """Return the version of a fleet's tables; None for a ledger. Only PostgreSQL has fleets."""
    if engine.dialect.name != "postgresql":
        return None
    with engine.connect() as connection:
        if not has_fleet(connection):
            return None
        return connection.execute(select(fleet_version.c.version)).scalar()


def _create_schema(engine: Engine) -> None:
    with writing(engine).begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SCHEMA_LOCK})
        # A second process finds everything once the first has committed.
        drop_views(connection)
        metadata.create_all(connection)
        found = connection.execute(select(schema_version.c.version)).scalar()
        if found is None:
            connection.execute(insert(schema_version).values(version=SCHEMA_VERSION))
        elif found < SCHEMA_VERSION:
            migrate(connection, found, SCHEMA_VERSION)
            if found < FIRST_WITH_ROLLUPS:
                rebuild(connection)
            elif found < FIRST_WITH_BILL_SUMS:
                rebuild_bill_sums(connection)
        create_views(connection)
