"""The file beside the ledger that keeps what a fleet's senders have used, as last known.

A server that starts while the fleet's database is away goes on from it, and forgives nothing. So a
look is in the file before it counts. Of each sender it has what an owner used in each run and hour,
how many bills the sender has of each run, and what it told of what runs.

A file is of one fleet and has one form; another one is begun anew, and so is one that is damaged.
Nothing in it is known here only: the fleet's database has it all.

Invariant: a look is in the file as a whole, once, and only after the one before it.
"""

import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.fleet_use.reading import GroupUse, Known, Look, Mark
from vllm_cost_meter.ledger.fleet_use.running import OwnerTexts
from vllm_cost_meter.logs import meter_logger

logger = meter_logger()

_FORM = 1
# Hours that no budget needs any more are dropped once there are so many.
_HOURS_DROPPED_AT_ONCE = 24
_TABLES = """
CREATE TABLE about (
    form INTEGER NOT NULL, fleet TEXT NOT NULL, looks INTEGER NOT NULL,
    read_from_hour INTEGER NOT NULL, kept_from_hour INTEGER NOT NULL, read_at_ns INTEGER NOT NULL);
CREATE TABLE marks (
    sender_id TEXT PRIMARY KEY, first_number INTEGER, last_number INTEGER, hours_number INTEGER,
    gpu_time_ns INTEGER, bills_number INTEGER, bills INTEGER) WITHOUT ROWID;
CREATE TABLE sources (
    source INTEGER PRIMARY KEY, sender_id TEXT NOT NULL, run_id TEXT NOT NULL,
    bills INTEGER NOT NULL DEFAULT 0, UNIQUE (sender_id, run_id));
CREATE TABLE groups (group_id INTEGER PRIMARY KEY, run_id TEXT NOT NULL, owner INTEGER NOT NULL);
CREATE TABLE owners (
    owner INTEGER PRIMARY KEY, texts TEXT NOT NULL UNIQUE);
CREATE TABLE uses (
    source INTEGER, owner INTEGER, hour INTEGER, gpu_time_ns INTEGER NOT NULL,
    kv_block_ms INTEGER NOT NULL, PRIMARY KEY (source, owner, hour)) WITHOUT ROWID;
CREATE TABLE runs (run_id TEXT PRIMARY KEY, facts TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE running (sender_id TEXT PRIMARY KEY, content TEXT NOT NULL) WITHOUT ROWID;
"""


class Use(NamedTuple):
    """What an owner used in a UTC hour of one run, by one sender's word; both are by number."""

    source: int
    owner: int
    hour: int
    gpu_time_ns: int
    kv_block_ms: int


class Source(NamedTuple):
    """One sender's word of one run, and how many bills it has."""

    sender_id: str
    run_id: str
    bills: int


class KeptUse:
    """The kept figures of one fleet. Used by one thread at a time."""

    def __init__(self, path: Path | None, fleet: str) -> None:
        """Open the file of a fleet, which `fleet` names; without a path keep them in memory.

        Raises LedgerError if the file cannot be made or read.
        """
        self._path, self._fleet = path, fleet
        # How many looks are in it; 0 before the first.
        self.looks = 0
        # From which hour on it was read, and has all. The latter is later once hours were dropped.
        self._read_from_hour = self.kept_from_hour = 0
        # The wall clock at the last look.
        self.read_at_ns = 0
        self.marks: dict[str, Mark] = {}
        self.sources: dict[int, Source] = {}
        self.owners: dict[int, OwnerTexts] = {}
        self.runs: dict[str, Mapping[str, Any]] = {}
        self.running: dict[str, str] = {}
        self._groups: dict[int, tuple[str, int]] = {}
        with self._errors():
            self._connection = self._open()

    def refresh(self) -> bool:
        """Take what another process has written meanwhile; return whether any has."""
        with self._errors():
            (looks,) = self._connection.execute("SELECT looks FROM about").fetchone()
            if looks == self.looks:
                return False
            self._load()
            return True

    def known(self, first_hour: int) -> Known:
        """Return what a reader has that needs figures from an hour on."""
        if self.looks == 0 or first_hour < self.kept_from_hour:
            return Known(first_hour, {}, self._groups, self.runs)
        return Known(self._read_from_hour, self.marks, self._groups, self.runs)

    def has(self, first_hour: int) -> bool:
        """Return whether it has figures from an hour on."""
        return self.looks > 0 and first_hour >= self.kept_from_hour

    def uses(self, first_hour: int) -> Iterator[Use]:
        """Yield all that was used from an hour on. Raises LedgerError."""
        with self._errors():
            asked = "SELECT * FROM uses WHERE hour >= ?"
            yield from map(Use._make, self._connection.execute(asked, [first_hour]))

    def take(self, look: Look, first_hour: int) -> list[Use] | None:
        """Keep a look; return what it added, or None where it replaced what was there.

        Drops now and then what is before `first_hour`. Raises LedgerError: nothing is kept then.
        """
        try:
            with self._errors(), self._writing():
                (looks,) = self._connection.execute("SELECT looks FROM about").fetchone()
                if looks != self.looks:
                    raise LedgerError(
                        f"kept figures {self._path}: expected those of {self.looks} looks, got"
                        f" {looks}: another process writes them; the next look goes on from there"
                    )
                added = self._write(look)
                self._drop_before(first_hour)
        finally:
            with self._errors():
                self._load()
        return None if look.anew else added

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    # -- writing --------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._connection.in_transaction:  # A full disk has ended it.
                self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def _write(self, look: Look) -> list[Use]:
        run = self._connection.execute
        if look.first_hour != self._read_from_hour or self.looks == 0:
            run("DELETE FROM uses")
            run("DELETE FROM sources")
            run("DELETE FROM marks")
            hours = [look.first_hour, look.first_hour]
            run("UPDATE about SET read_from_hour = ?, kept_from_hour = ?", hours)
        for sender_id in look.anew:
            run(
                "DELETE FROM uses WHERE source IN (SELECT source FROM sources WHERE sender_id = ?)",
                [sender_id],
            )
            run("UPDATE sources SET bills = 0 WHERE sender_id = ?", [sender_id])
        self._write_facts(look)
        run_many = self._connection.executemany
        run_many(
            "INSERT INTO sources (sender_id, run_id, bills) VALUES (?, ?, ?)"
            " ON CONFLICT (sender_id, run_id) DO UPDATE SET bills = bills + excluded.bills",
            look.bills,
        )
        added = list(self._added(look.uses))
        run_many(
            "INSERT INTO uses VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (source, owner, hour) DO UPDATE SET"
            " gpu_time_ns = gpu_time_ns + excluded.gpu_time_ns,"
            " kv_block_ms = kv_block_ms + excluded.kv_block_ms",
            added,
        )
        run_many("INSERT OR REPLACE INTO marks VALUES (?, ?, ?, ?, ?, ?, ?)", look.marks)
        run_many("INSERT OR REPLACE INTO running VALUES (?, ?)", look.running.items())
        run("UPDATE about SET looks = looks + 1, read_at_ns = ?", [time.time_ns()])
        return added

    def _write_facts(self, look: Look) -> None:
        """Write runs, owners and groups that are new."""
        run_many = self._connection.executemany
        facts = ((row["run_id"], orjson.dumps(dict(row)).decode()) for row in look.runs)
        run_many("INSERT OR REPLACE INTO runs VALUES (?, ?)", facts)
        texts = [orjson.dumps([g.tenant, g.above, g.tags]).decode() for g in look.groups]
        run_many("INSERT OR IGNORE INTO owners (texts) VALUES (?)", ([each] for each in texts))
        run_many(
            "INSERT OR REPLACE INTO groups SELECT ?, ?, owner FROM owners WHERE texts = ?",
            ((g.group_id, g.run_id, text) for g, text in zip(look.groups, texts, strict=True)),
        )
        if look.groups:
            self._load_groups()

    def _added(self, uses: Sequence[GroupUse]) -> Iterator[Use]:
        """Yield uses with their sources, which are made where they are new."""
        sources = {(sender_id, run_id): number for number, sender_id, run_id in self._sources()}
        for use in uses:
            if not (use.gpu_time_ns or use.kv_block_ms):
                continue
            if use.group_id not in self._groups:
                raise LedgerError(
                    f"kept figures {self._path}: expected the group {use.group_id} of what"
                    f" {use.sender_id} has used, got none"
                )
            run_id, owner = self._groups[use.group_id]
            key = use.sender_id, run_id
            if key not in sources:
                made = self._connection.execute(
                    "INSERT INTO sources (sender_id, run_id) VALUES (?, ?) RETURNING source", key
                )
                (sources[key],) = made.fetchone()
            yield Use(sources[key], owner, use.hour, use.gpu_time_ns, use.kv_block_ms)

    def _drop_before(self, hour: int) -> None:
        run = self._connection.execute
        (kept_from,) = run("SELECT kept_from_hour FROM about").fetchone()
        if hour >= kept_from + _HOURS_DROPPED_AT_ONCE:
            run("DELETE FROM uses WHERE hour < ?", [hour])
            run("UPDATE about SET kept_from_hour = ?", [hour])

    # -- reading --------------------------------------------------------------------------------

    def _load(self) -> None:
        run = self._connection.execute
        self.looks, self._read_from_hour, self.kept_from_hour, self.read_at_ns = run(
            "SELECT looks, read_from_hour, kept_from_hour, read_at_ns FROM about"
        ).fetchone()
        self.marks = {row[0]: Mark(*row) for row in run("SELECT * FROM marks")}
        self.sources = {n: Source(*row) for n, *row in run("SELECT * FROM sources")}
        self.running = dict(run("SELECT * FROM running"))
        known = run("SELECT (SELECT count(*) FROM runs), (SELECT count(*) FROM groups)").fetchone()
        if known != (len(self.runs), len(self._groups)):
            self.runs = {id: orjson.loads(facts) for id, facts in run("SELECT * FROM runs")}
            self._load_groups()

    def _load_groups(self) -> None:
        run = self._connection.execute
        owners = ((n, orjson.loads(texts)) for n, texts in run("SELECT * FROM owners"))
        self.owners = {n: OwnerTexts(*texts) for n, texts in owners}
        self._groups = {id: (run_id, owner) for id, run_id, owner in run("SELECT * FROM groups")}

    def _sources(self) -> list[tuple[int, str, str]]:
        found = self._connection.execute("SELECT source, sender_id, run_id FROM sources")
        return found.fetchall()

    # -- the file -------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        if self._path is None:
            return self._opened(":memory:")
        try:
            _make_private_file(self._path)
            return self._opened(str(self._path))
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            logger.warning(
                "cost meter: kept figures %s: expected a database, got a damaged one: %s; it is"
                " made anew from the fleet's",
                *(self._path, error),
            )
        remove_kept(self._path)
        _make_private_file(self._path)
        return self._opened(str(self._path))

    def _opened(self, name: str) -> sqlite3.Connection:
        # The threads that use it take turns.
        connection = sqlite3.connect(name, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            self._connection = connection
            with self._writing():
                self._begin()
            self._load()
        except BaseException:
            connection.close()
            raise
        return connection

    def _begin(self) -> None:
        """Have the tables of this form and this fleet."""
        run = self._connection.execute
        tables = [name for (name,) in run("SELECT name FROM sqlite_master WHERE type = 'table'")]
        ours = (_FORM, self._fleet)
        if "about" in tables and run("SELECT form, fleet FROM about").fetchone() == ours:
            return
        for name in tables:
            run(f'DROP TABLE "{name}"')
        for statement in _TABLES.split(";"):
            run(statement)
        run("INSERT INTO about VALUES (?, ?, 0, 0, 0, 0)", [_FORM, self._fleet])

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(f"kept figures {self._path}: {error}") from error


def figures_path(ledger: Path, place: int) -> Path:
    """Return where the API server with this index keeps its fleet's figures, beside its ledger."""
    real = ledger.resolve()
    return real.with_name(f"{real.name}.fleet-{place}")


def last_read_ns(path: Path) -> int | None:
    """Return when kept figures were read last, by the wall clock; None without a first time.

    Changes nothing. Raises LedgerError if they cannot be read.
    """
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            looks, read_at_ns = connection.execute("SELECT looks, read_at_ns FROM about").fetchone()
    except sqlite3.Error as error:
        raise LedgerError(f"kept figures {path}: {error}") from error
    return read_at_ns if looks else None


def remove_kept(path: Path) -> None:
    """Remove kept figures."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _make_private_file(path: Path) -> None:
    """Make the file, or see that it is this user's alone; SQLite's others get the same mode."""
    flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
            raise LedgerError(
                f"kept figures {path}: expected a file of this user, got one of user id"
                f" {about.st_uid} or what is no file; remove it"
            )
        os.fchmod(descriptor, 0o600)
    finally:
        # Nobody has it open in this process yet, whose locks would go.
        os.close(descriptor)
