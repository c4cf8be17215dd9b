"""Write batches of records to the ledger, each in one transaction, with how far journals came.

A database that fails (locked, full, gone) writes nothing, and the caller tries again. A record that
can never be written (`faults`) would hold up all others for ever: a batch with one is split until
the bad record is alone. That one is given up, and the others are written.

The file of a SQLite ledger is watched by its identity. Where it was deleted, renamed or replaced
while it was open, commits would go into a file that nobody finds again. So a connection to another
file than the one at the path is closed before and after each batch, and a ledger is made once: a
mark beside the journals says so to whoever comes later. One that went away is waited for, because a
new one would be lost with its records when the old one is moved back. One that was set aside for
damage is begun anew, and an empty ledger gets the names of those before it gets anything else.

Invariant: either all records of a batch but the bad ones are in the file at the ledger's path, with
the positions of its journals, or `write` raises and none of them is.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.engine import Connection

from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.journal import places
from vllm_cost_meter.journal.entries import Record
from vllm_cost_meter.journal.reader import Position
from vllm_cost_meter.ledger.damage.noticing import damage_in
from vllm_cost_meter.ledger.damage.setting_aside import name_set_aside
from vllm_cost_meter.ledger.database import open_database, parse_url, sqlite_path, writing
from vllm_cost_meter.ledger.faults import Fault, fault_of
from vllm_cost_meter.ledger.fleet.changes import changes_of
from vllm_cost_meter.ledger.fleet.outbox import begin, end, putting_in, read_sender
from vllm_cost_meter.ledger.inserts import write
from vllm_cost_meter.ledger.journal_place import journal_folder
from vllm_cost_meter.ledger.progress import JournalProgress, read_positions, write_progress
from vllm_cost_meter.logs import meter_logger

logger = meter_logger()

# One attempt waits so long for another process's transaction; then the caller tries again.
ATTEMPT_S = 1.0

FileIdentity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that no ledger can take, and why."""

    record: Record
    error: Exception


Beside = Callable[[Connection, Sequence[BadRecord]], None]


class BatchWriter:
    """Writes batches to one ledger. Used by one thread."""

    def __init__(
        self,
        url: str,
        *,
        upgrade: bool = True,
        sends: bool | None = None,
        open_: Callable[..., Engine] = open_database,
    ) -> None:
        """The first time only, make a ledger that is not there, and with `upgrade` migrate it.

        `sends` says whether the ledger is to put what it gets into its outbox; None leaves that as
        the ledger has it.
        """
        self._sends = sends
        self.url = url
        self._create = True
        self._upgrade = upgrade
        self._open = open_
        self._path: Path | None = sqlite_path(parse_url(url))
        self._folder = journal_folder(url)
        self._engine: Engine | None = None
        self._identity: FileIdentity | None = None

    @property
    def is_open(self) -> bool:
        """Whether the ledger was opened, with the tables of this version, and was not closed."""
        return self._engine is not None

    def opened(self) -> Engine:
        """Return the ledger's database, opened if it is not. Raises LedgerError."""
        if self._engine is not None and self._identity != self._identity_now():
            self.drop()
        if self._engine is None:
            self._engine = self._opened_where_it_was()
            self._identity = self._identity_now()
            self._create = False
            self._name_set_aside(self._engine)
            self._begin_or_end_sending(self._engine)
            places.mark_ledger(self._folder)
        return self._engine

    def _opened_where_it_was(self) -> Engine:
        """Open the ledger; make it only if none was made for these journals."""
        mark = places.mark_of_ledger(self._folder)
        try:
            return self._open(
                self.url,
                create=self._create and mark is None,
                upgrade=self._create and self._upgrade,
                busy_timeout_s=ATTEMPT_S,
            )
        except LedgerError as error:
            if mark is None or not error.is_missing:
                raise
            raise LedgerError(
                f"{error}. There was one, so no other is begun: bills wait in the journals"
                f" {self._folder} until it is back, or a copy of it (`vllm-cost-meter ledger"
                f" restore`). If it is gone for good, remove {mark}, and a new one is begun"
            ) from None

    def positions(self) -> dict[str, Position]:
        """Return how far the ledger has each journal, by its id."""
        with self.opened().connect() as connection:
            return read_positions(connection)

    def apply(
        self,
        records: Sequence[Record],
        progress: Callable[[Sequence[BadRecord]], JournalProgress],
        *,
        to_disk: bool = False,
    ) -> list[BadRecord]:
        """Write records as `write` does, with the progress that goes with the bad ones."""

        def beside(connection: Connection, bad: Sequence[BadRecord]) -> None:
            write_progress(connection, progress(bad))

        return self.write(records, beside, to_disk=to_disk)

    def write(
        self,
        records: Sequence[Record],
        beside: Beside = lambda _connection, _bad: None,
        *,
        to_disk: bool = False,
    ) -> list[BadRecord]:
        """Write records in one transaction; return the bad records.

        In the same transaction `beside` gets the bad records and may write more. With `to_disk` the
        disk has all of it before this returns. Raises whatever the database raises.
        """
        engine = self.opened()
        try:
            bad = self._write(engine, records, beside, to_disk=to_disk)
        except Exception as error:
            # A damaged log would go into the file with the last connection that is closed by name.
            if damage_in(error) is None:
                self.drop()
            raise
        if self._identity != self._identity_now():
            self.drop()
            raise LedgerError(
                f"ledger {self._path}: its file was moved, replaced or deleted while it was open;"
                " bills wait until there is a ledger at this place again"
            )
        return bad

    def _write(
        self,
        engine: Engine,
        records: Sequence[Record],
        beside: Beside,
        *,
        to_disk: bool,
    ) -> list[BadRecord]:
        try:
            # The usual way has no savepoint.
            with writing(engine).connect() as connection:
                _set_sync(connection, to_disk=to_disk)
                with connection.begin(), putting_in(connection):
                    write(connection, records)
                    beside(connection, [])
        except Exception as error:
            if fault_of(error) is Fault.DATABASE:
                raise
        else:
            return []
        with writing(engine).connect() as connection:
            _set_sync(connection, to_disk=to_disk)
            with connection.begin(), putting_in(connection):
                bad = _write_what_can_be(connection, records)
                _refuse_to_give_up_all(records, bad)
                refused = [BadRecord(each, bad[id(each)]) for each in records if id(each) in bad]
                beside(connection, refused)
        return refused

    def _identity_now(self) -> FileIdentity | None:
        """Return which file is at the ledger's path; None where there is none, or no file."""
        if self._path is None:
            return None
        try:
            about = self._path.stat()
        except OSError:
            return None
        return about.st_dev, about.st_ino

    def begin_anew(self) -> None:
        """Close the connections; the next attempt makes a ledger: the one before was set aside."""
        self.drop()
        self._create = True

    def _name_set_aside(self, engine: Engine) -> None:
        if self._path is None:
            return
        try:
            with writing(engine).begin() as connection:
                name_set_aside(connection, self._path, time.time_ns())
        except BaseException:
            self.drop()
            raise

    def _begin_or_end_sending(self, engine: Engine) -> None:
        if self._sends is None:
            return
        try:
            with engine.connect() as connection:
                is_sending = read_sender(connection) is not None
            if is_sending != self._sends:
                with writing(engine).begin() as connection:
                    (begin if self._sends else end)(connection)
        except BaseException:
            self.drop()
            raise
        if is_sending and not self._sends:
            logger.warning(
                "cost meter: this ledger has sent to a fleet, and COST_METER_FLEET is not set any"
                " more: it sends nothing now. Should it join again, it sends all that it has"
            )

    def drop(self) -> None:
        """Close the connections; the next attempt opens new ones. Never raises."""
        engine, self._engine = self._engine, None
        if engine is not None:
            try:
                engine.dispose()
            except Exception:  # noqa: BLE001, S110 - the file may be gone, and nothing waits for it
                pass


def _set_sync(connection: Connection, *, to_disk: bool) -> None:
    """Have the next commit wait for the disk, or not."""
    if connection.dialect.name == "sqlite":
        # Without a transaction of SQLAlchemy's: SQLite takes this only outside of one.
        driver = connection.connection.driver_connection
        if driver is not None:
            driver.execute(f"PRAGMA synchronous={'FULL' if to_disk else 'NORMAL'}")


def _write_what_can_be(
    connection: Connection, records: Sequence[Record]
) -> Mapping[int, Exception]:
    """Write all records but the bad ones; return their errors by `id(record)`.

    A group that fails is split in halves until the bad record is alone, whatever the error is
    called. Raises only what is the database's fault.
    """
    changes = changes_of(connection)
    mark = 0 if changes is None else changes.mark()
    try:
        with connection.begin_nested():
            write(connection, records)
    except Exception as error:
        if changes is not None:
            changes.back_to(mark)
        if fault_of(error) is Fault.DATABASE:
            raise
        if len(records) == 1:
            return {id(records[0]): error}
        half = len(records) // 2
        return {
            **_write_what_can_be(connection, records[:half]),
            **_write_what_can_be(connection, records[half:]),
        }
    return {}


def _refuse_to_give_up_all(records: Sequence[Record], bad: Mapping[int, Exception]) -> None:
    """Raise if none of the records could be written, and no error says that they are at fault.

    Then the cause may be the database. A record that is bad is found once another one comes that
    can be written beside it.
    """
    if len(bad) < len(records):
        return
    for error in bad.values():
        if fault_of(error) is Fault.UNKNOWN:
            raise error
