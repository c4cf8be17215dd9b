"""The real ledger in a real SQLite on the simulated disk, for the applier and for the model.

The applier writes through `BatchWriter`, its SQL and SQLAlchemy. In the end the files are put into
a real folder, where Python's sqlite3 checks them and the product's audit reads them.

Invariant: `look` reads what a command would read after the last crash.
"""

import sqlite3
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.pool import StaticPool

from tests.simulation.disk import Call, Disk, File
from tests.simulation.ledgers import Key, key_of
from tests.simulation.sqlite_disk import NAME, VFS, Driver
from tests.support.raw_rows import texts
from tests.support.upkeep import differences_of_audits
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.journal.entries import Record
from vllm_cost_meter.journal.reader import Position
from vllm_cost_meter.ledger import database
from vllm_cost_meter.ledger.batches import BadRecord, BatchWriter
from vllm_cost_meter.ledger.progress import JournalProgress
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.rollups.rebuilding import differences
from vllm_cost_meter.records.requests import EngineRequest, HttpRequest, OpenRequest
from vllm_cost_meter.records.snapshot import Snapshot
from vllm_cost_meter.units.time import NS_PER_US

URL = f"sqlite:////simulated/{NAME}"
# Each process makes an engine, and the statements are the same.
_COMPILED: dict[Any, Any] = {}
TABLES = {
    "bill": "SELECT run_id, seq, request_id, gpu_time_ns, cost_nanousd, route FROM requests",
    "http": "SELECT http_request_id, gpu_time_ns, cost_nanousd FROM replies",
    "open": "SELECT request_id, started_at FROM open_requests",
    "snapshot": "SELECT run_id, number, last_seq, billed_ns, idle_ns FROM snapshots",
}


def row_of(record: Record) -> tuple[Any, ...]:
    """Return what `TABLES` has for a record."""
    match record:
        case EngineRequest():
            bill = record.bill
            return (
                *(bill.run_id, bill.seq, bill.request_id, bill.gpu_time_ns, record.cost_nanousd),
                record.route,
            )
        case HttpRequest():
            return record.http_request_id, record.gpu_time_ns, record.cost_nanousd
        case OpenRequest():
            return record.request_id, record.started_at_ns // NS_PER_US
        case Snapshot():
            totals = record.totals
            return record.run_id, record.number, record.last_seq, record.billed_ns, totals.idle


@cache
def _empty_ledger() -> bytes:
    """Return the file of a ledger without rows."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/{NAME}"
        database.open_database(url).dispose()
        return (Path(folder) / NAME).read_bytes()


class SqliteLedger:
    """The ledger's file on a simulated disk, as the world and the model need it."""

    def __init__(
        self, disk: Disk, before: Callable[[Call], None], current: Callable[[], Any]
    ) -> None:
        self.is_out = False
        self.rows: dict[Key, Record] = {}
        self.losses: dict[tuple[str, int], int] = {}
        self.complaints: list[str] = []
        self._disk = disk
        content = _empty_ledger()
        disk.root.change(**{NAME: File(bytearray(content), bytearray(content))})
        disk.root.sync()
        VFS.machine.disk, VFS.machine.before = disk, before
        self._current = current
        # A dead process does not close what it had open, whenever Python would.
        self._drivers: list[Driver] = []

    def batches(self, before: Callable[[Call], None]) -> "SqliteBatches":
        """Return what the applier of the process that runs now writes to."""
        return SqliteBatches(self, before)

    def connect(self) -> Driver:
        """Open the file for the process that runs now."""
        process = self._current()
        VFS.machine.is_dead = lambda: process.is_dead
        self._drivers.append(Driver(process))
        return self._drivers[-1]

    def crash(self) -> None:
        """The disk has crashed already."""

    def checkpoint(self) -> None:
        """SQLite makes its own."""

    def look(self, made: dict[Key, list[Record]], *, is_end: bool = False) -> None:
        """Read the file as a command would, and check it; at the end with the product's audit."""
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            for suffix in ("", "-wal"):
                file = self._disk.root.names.get(NAME + suffix)
                if isinstance(file, File):
                    Path(folder, NAME + suffix).write_bytes(file.data)
            with closing(sqlite3.connect(Path(folder, NAME))) as connection:
                checked = connection.execute("PRAGMA integrity_check").fetchall()
                if checked != [("ok",)]:
                    self.complaints.append(f"the file is damaged: {checked[:3]}")
                self._read(connection, made)
            if is_end:
                self._audit(folder)

    def _read(self, connection: sqlite3.Connection, made: dict[Key, list[Record]]) -> None:
        of_row: dict[tuple[Any, ...], Record] = {}
        for records in made.values():
            of_row.update({(key_of(record)[0], *row_of(record)): record for record in records})
        self.rows = {}
        for kind, query in TABLES.items():
            for row in texts(connection.execute(query)):
                record = of_row.get((kind, *row))
                if record is None:
                    self.complaints.append(f"nobody made this {kind}: {row}")
                elif key_of(record) in self.rows:
                    self.complaints.append(f"there twice: {kind} {row}")
                else:
                    self.rows[key_of(record)] = record
        self.losses = {
            (journal_id, after): records
            for journal_id, after, records in connection.execute(
                "SELECT journal_id, after_number, records FROM journal_losses"
            )
        }

    def _audit(self, folder: str) -> None:
        url = f"sqlite:///{folder}/{NAME}"
        with LedgerReader(url) as reader:
            audit, by_sums = reader.audit(full=True), reader.audit()
        self.complaints += differences_of_audits(audit, by_sums)
        engine = database.open_to_read(url)
        with engine.connect() as connection:
            self.complaints += [f"a sum is not as its rows: {s}" for s in differences(connection)]
        engine.dispose()
        for run in (*audit["runs"], *audit["without_totals"]):
            there = {key[2] for key in self.rows if key[:2] == ("bill", run["run_id"])}
            missing = set(range(1, run["last_seq"] + 1)) - there
            named = {
                seq
                for first, last in map(_range_of, run["missing_bills"])
                for seq in range(first, last + 1)
            }
            if named != missing:
                self.complaints.append(f"the audit names {named}, missing are {missing}")
            if not missing and run.get("balanced") is False:
                self.complaints.append(f"all bills are there, and not balanced: {run}")
        if bool(audit["journal_losses"]) != bool(self.losses):
            self.complaints.append("the audit does not name the losses")
        if audit["balanced"] and self.losses:
            self.complaints.append("balanced, with losses")


def _range_of(text: str) -> tuple[int, int]:
    first, _, last = str(text).partition("-")
    return int(first), int(last or first)


class SqliteBatches(BatchWriter):
    """The real writer of batches, with SQLite on the simulated disk."""

    def __init__(self, ledger: SqliteLedger, before: Callable[[Call], None]) -> None:
        super().__init__(URL, open_=self._open_simulated)
        self._ledger = ledger
        self._before = before

    def _open_simulated(self, _url: str, **_words: Any) -> Engine:
        engine = create_engine(
            "sqlite://",
            creator=self._ledger.connect,
            poolclass=StaticPool,
            execution_options={"compiled_cache": _COMPILED},
        )

        @event.listens_for(engine, "connect")
        def _connect(connection: Any, _record: Any) -> None:
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL"):
                connection.execute(f"PRAGMA {pragma}")

        event.listen(engine, "begin", database._begin)
        return engine

    def _name_set_aside(self, _engine: Engine) -> None:
        """No file is set aside here: the simulated disk has no folder of such files."""

    def opened(self) -> Engine:
        self._look("open ledger")
        return super().opened()

    def positions(self) -> dict[str, Position]:
        self._look("read ledger")
        return super().positions()

    def apply(
        self,
        records: Sequence[Record],
        progress: Callable[[Sequence[BadRecord]], JournalProgress],
        *,
        to_disk: bool = False,
    ) -> list[BadRecord]:
        self._look("begin")
        bad = super().apply(records, progress, to_disk=to_disk)
        self._look("committed")
        return bad

    def _look(self, name: str) -> None:
        self._before(Call(name))
        if self._ledger.is_out:
            raise LedgerError("the ledger is locked")
