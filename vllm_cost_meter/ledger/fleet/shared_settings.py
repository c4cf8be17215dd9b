"""The settings that the servers of a fleet share, in its database: versions, and their changes.

A version is a row, and so is each entry that it changes: created, changed, or ended by an entry
without a table. Nothing is updated or deleted, so every past version can be read again. Who makes a
version inserts the next number, which is unique: of two who do so at once one is refused.

The database itself says when a version was made, and by which of its roles. A version has the
digest of all entries as they are with it. So rows that were inserted later into an earlier version
are found, and so is a database that was restored to an older state and went on from there.

Invariant: what is read has the digest that its version says.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Engine,
    Integer,
    Table,
    Text,
    func,
    inspect,
    select,
    text,
)
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from vllm_cost_meter.errors import ConflictError, LedgerError
from vllm_cost_meter.ledger.fleet.schema import fleet_metadata, now_text
from vllm_cost_meter.ledger.tables.base import KeyText
from vllm_cost_meter.records.shared_settings import (
    NOTHING_SHARED,
    SHARED_FORMAT,
    SharedEntry,
    SharedSettings,
    in_order,
)

T = TypeVar("T")

settings_versions = Table(
    "settings_versions",
    fleet_metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("format", Integer, nullable=False),
    # Of all entries as they are with this version.
    Column("digest", Text, nullable=False),
    # Whether an administrator began anew with it, after the database had been restored.
    Column("is_restart", Boolean, nullable=False),
    # As the changer says it.
    Column("changed_by", Text, nullable=False),
    # As the database knows it.
    Column("changed_at", KeyText, server_default=now_text(), nullable=False),
    Column("changed_as", Text, server_default=text("session_user"), nullable=False),
)

settings_changes = Table(
    "settings_changes",
    fleet_metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("section", KeyText, primary_key=True),
    Column("name", KeyText, primary_key=True),
    # Where order counts, as in rules.
    Column("position", BigInteger),
    # The entry's table as JSON; NULL ends the entry.
    Column("entry", Text),
)

NO_TABLES = (
    "expected a fleet with shared settings, got one without their tables: an administrator runs"
    " `vllm-cost-meter fleet migrate`"
)


class SharedHead(NamedTuple):
    """The latest version, and the digest of its entries."""

    version: int
    digest: str


class SettingsVersion(NamedTuple):
    """One version: who made it when, and the entries that it changed; one without JSON is ended.

    `changed_at` is by the clock of the database, `changed_as` its role, and `changed_by` is what
    the changer said.
    """

    version: int
    changed_at: str
    changed_by: str
    changed_as: str
    is_restart: bool
    changes: Sequence[tuple[SharedEntry, bool]]
    """Each entry, and whether it is there from then on."""


def _has_tables(connection: Connection) -> bool:
    return inspect(connection).has_table(settings_versions.name)


def read_head(connection: Connection) -> SharedHead:
    """Return the latest version, 0 if nobody ever made one. Raises LedgerError without tables."""
    c = settings_versions.c
    asked = select(c.version, c.digest).order_by(c.version.desc()).limit(1)
    row = connection.execute(asked).first()
    return SharedHead(0, NOTHING_SHARED.digest()) if row is None else SharedHead._make(row)


def digest_of_version(connection: Connection, version: int) -> str | None:
    """Return the digest of a version; None if the database does not have it."""
    if not version:
        return NOTHING_SHARED.digest()
    c = settings_versions.c
    return connection.execute(select(c.digest).where(c.version == version)).scalar_one_or_none()


def database_hour(connection: Connection) -> int:
    """Return the present hour since the epoch, by the clock of the database."""
    seconds = select(func.extract("epoch", func.clock_timestamp()))
    return int(connection.execute(seconds).scalar_one()) // 3_600


def read_shared(connection: Connection, version: int | None = None) -> SharedSettings:
    """Return all entries as they are with a version, by default the latest.

    Raises LedgerError for a version that is not there, in a form of a later meter, or other than
    it was when it was made.
    """
    c = settings_versions.c
    asked = select(c.version, c.format, c.digest)
    if version is not None:
        asked = asked.where(c.version == version)
    row = connection.execute(asked.order_by(c.version.desc()).limit(1)).first()
    if row is None:
        if version in (None, 0):
            return NOTHING_SHARED
        latest = read_head(connection).version
        raise LedgerError(f"fleet's settings: expected a version up to {latest}, got {version}")
    found, format_, digest = row
    if format_ != SHARED_FORMAT:
        raise LedgerError(
            f"fleet's settings: expected format {SHARED_FORMAT}, got version {found} in format"
            f" {format_}, of another version of the meter"
        )
    restarts = select(func.max(c.version)).where(c.is_restart, c.version <= found)
    settings = SharedSettings(
        found, _entries(connection, found), connection.execute(restarts).scalar_one() or 0
    )
    if settings.digest() != digest:
        raise LedgerError(
            f"fleet's settings: expected version {found} as it was made, got rows that were changed"
            " since, past the meter"
        )
    return settings


def _entries(connection: Connection, version: int) -> tuple[SharedEntry, ...]:
    c = settings_changes.c
    latest = (
        select(c.section, c.name, c.entry, c.position)
        .where(c.version <= version)
        .distinct(c.section, c.name)
        .order_by(c.section, c.name, c.version.desc())
    )
    rows = connection.execute(latest)
    return in_order(SharedEntry(*row) for row in rows if row.entry is not None)


def read_history(
    connection: Connection, limit: int, before: int | None = None
) -> list[SettingsVersion]:
    """Return the latest versions, the newest first; only those before a version if one is given."""
    v, c = settings_versions.c, settings_changes.c
    asked = select(v.version, v.changed_at, v.changed_by, v.changed_as, v.is_restart)
    if before is not None:
        asked = asked.where(v.version < before)
    heads = connection.execute(asked.order_by(v.version.desc()).limit(limit)).all()
    if not heads:
        return []
    of_versions = (
        select(c.version, c.section, c.name, c.entry, c.position)
        .where(c.version.between(heads[-1].version, heads[0].version))
        .order_by(c.section, c.name)
    )
    changes: dict[int, list[tuple[SharedEntry, bool]]] = {}
    for version, section, name, entry, position in connection.execute(of_versions):
        changed = SharedEntry(section, name, entry or "{}", position), entry is not None
        changes.setdefault(version, []).append(changed)
    return [SettingsVersion(*row, changes.get(row.version, [])) for row in heads]


def insert_version(
    connection: Connection, before: SharedSettings, after: SharedSettings, changed_by: str
) -> None:
    """Insert a version with what it changes, within the connection's transaction.

    `after` says its number. Raises ConflictError if the latest version is not `before`.
    """
    latest = read_head(connection).version
    if latest != before.version:
        raise _conflict(before.version, latest)
    version = {
        "version": after.version,
        "format": SHARED_FORMAT,
        "digest": after.digest(),
        "is_restart": after.restart_version == after.version,
        "changed_by": changed_by,
    }
    # It waits for whoever inserts the same number, and fails if that is committed.
    connection.execute(settings_versions.insert().values(version))
    old = {(one.section, one.name): one for one in before.entries}
    new = {(one.section, one.name): one for one in after.entries}
    rows = [
        {
            "version": after.version,
            "section": key[0],
            "name": key[1],
            "position": None if one is None else one.position,
            "entry": None if one is None else one.table_json,
        }
        for key in sorted(old.keys() | new.keys())
        if (one := new.get(key)) != old.get(key)
    ]
    if rows:
        connection.execute(settings_changes.insert(), rows)


def _conflict(expected: int, latest: int) -> ConflictError:
    return ConflictError(
        f"fleet's settings: expected version {expected}, got version {latest}, which another change"
        " has made: look at it, and try again",
        latest,
    )


class SharedStore:
    """The shared settings of one fleet. Used by one thread; opens a connection for each call."""

    def __init__(self, engine: Engine, failed: Callable[[SQLAlchemyError], LedgerError]) -> None:
        self._engine = engine
        self._failed = failed

    def head(self) -> SharedHead:
        """Return the latest version. Raises LedgerError."""
        return self._asked(read_head)

    def read(self, version: int | None = None) -> SharedSettings:
        """Return all entries as they are with a version. Raises LedgerError."""
        return self._asked(lambda connection: read_shared(connection, version))

    def digest_of(self, version: int) -> str | None:
        """Return the digest of a version; None if it is not there. Raises LedgerError."""
        return self._asked(lambda connection: digest_of_version(connection, version))

    def history(self, limit: int, before: int | None = None) -> list[SettingsVersion]:
        """Return the latest versions, the newest first. Raises LedgerError."""
        return self._asked(lambda connection: read_history(connection, limit, before))

    def now_hour(self) -> int:
        """Return the present hour since the epoch, by the database's clock. Raises LedgerError."""
        return self._asked(database_hour)

    def change(self, before: SharedSettings, after: SharedSettings, changed_by: str) -> None:
        """Make a version. Raises ConflictError if another was faster, LedgerError if it fails."""
        try:
            with self._errors(), self._engine.begin() as connection:
                self._require_tables(connection)
                insert_version(connection, before, after, changed_by)
        except LedgerError as error:
            if isinstance(error.__cause__, IntegrityError):
                raise _conflict(before.version, self.head().version) from error
            raise

    def _asked(self, question: Callable[[Connection], T]) -> T:
        with self._errors(), self._engine.connect() as connection:
            self._require_tables(connection)
            return question(connection)

    def _require_tables(self, connection: Connection) -> None:
        if not _has_tables(connection):
            raise LedgerError(NO_TABLES)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise self._failed(error) from error
