"""Send a ledger's outbox to the fleet's database, in order, as long as there is something to send.

A step is one transaction of the fleet and then one of the ledger, which takes out what was sent. A
sender that dies in between sends again, and is told that the fleet has it. Where the fleet has
something else than this ledger sent, the ledger was restored, copied or merged: it then joins anew
under another name.

Blocks, in a process of its own: serving never waits for a network.

Invariant: a row leaves the outbox only after the fleet has committed it.
"""

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import ProgrammingError, SQLAlchemyError

from vllm_cost_meter.errors import LedgerError, in_one_line
from vllm_cost_meter.ledger.database import (
    cause_of,
    open_database,
    open_to_read,
    parse_url,
    writing,
)
from vllm_cost_meter.ledger.faults import Fault, fault_of
from vllm_cost_meter.ledger.fleet import outbox
from vllm_cost_meter.ledger.fleet.delivery import (
    Joining,
    Reached,
    Shipment,
    deliver,
    deliver_all,
    digest_of,
    for_postgresql,
    forget_older_states,
    insert_facts,
    note_end,
    reached,
    shipment_of,
)
from vllm_cost_meter.ledger.fleet.joining import all_else, large_facts
from vllm_cost_meter.ledger.fleet.outbox import Sender, Waiting
from vllm_cost_meter.ledger.fleet.schema import (
    FLEET_VERSION,
    create_fleet,
    fleet_version,
    has_fleet,
    upgrade_fleet,
)
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION, live_usage, schema_version, snapshots
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.version import __version__

logger = meter_logger()

# A shipment has at most so many packed bytes, and at least one row.
SHIPMENT_BYTES_MAX = 1 << 20
TIDY_EVERY_S = 60.0
INTERVAL_S = 2.0
_CONNECT_TIMEOUT_S = 10
# "fleet": a number of our own among PostgreSQL's locks.
_SCHEMA_LOCK = 0x666C656574


class FleetSender:
    """Sends one ledger's outbox to one fleet. Used by one thread."""

    def __init__(
        self,
        ledger_url: str,
        fleet_url: str,
        interval_s: float = INTERVAL_S,
        shipment_bytes_max: int = SHIPMENT_BYTES_MAX,
    ) -> None:
        """Nothing is opened before the first step, which comes at least each `interval_s`."""
        self._interval_s = interval_s
        self._ledger_url = ledger_url
        self._fleet_url = parse_fleet_url(fleet_url)
        self._bytes_max = shipment_bytes_max
        self._ledger: Engine | None = None
        self._fleet: Engine | None = None
        # The runs that were told of since the last tidying.
        self._told: set[str] = set()
        self._tidy_at_s = 0.0
        self._may_delete = True

    def step(self) -> bool:
        """Send what waits, up to one shipment; return whether more may wait.

        Raises LedgerError if either database fails; the next step tries again.
        """
        try:
            return self._step()
        except BaseException as error:
            self.close()
            if isinstance(error, LedgerError) and error.is_missing:
                return False  # A server that starts makes it.
            raise

    def end(self) -> None:
        """Say that the fleet has all of the ledger, and that its server stops.

        Raises LedgerError if either database fails.
        """
        ledger, fleet = self._ledger, self._fleet
        if ledger is None or fleet is None:
            return
        with self._ledger_errors(), ledger.connect() as connection:
            sender = outbox.read_sender(connection)
        if sender is not None and sender.joined_at and sender.sent_number == sender.last_number:
            with self._fleet_errors(), fleet.begin() as connection:
                note_end(connection, sender.sender_id, sender.last_number)

    def waiting(self) -> Waiting:
        """Return what is still to be sent. Raises LedgerError."""
        if self._ledger is None:
            return Waiting(0, 0)
        with self._ledger_errors(), self._ledger.connect() as connection:
            return outbox.waiting(connection)

    def close(self) -> None:
        """Close the connections; the next step opens new ones."""
        for engine in (self._ledger, self._fleet):
            if engine is not None:
                engine.dispose()
        self._ledger = self._fleet = None

    def _step(self) -> bool:
        with self._ledger_errors():
            if self._ledger is None:
                self._ledger = open_database(self._ledger_url, create=False)
            ledger = self._ledger
            with ledger.connect() as connection:
                sender = outbox.read_sender(connection)
            if sender is None:
                with writing(ledger).begin() as connection:
                    sender = outbox.begin(connection)
        if self._fleet is None:
            self._fleet = open_fleet(self._fleet_url)
        if sender.joined_at is None:
            self._join(ledger, self._fleet, sender)
            return True
        with self._ledger_errors(), ledger.begin() as connection:
            now = outbox.read_sender(connection)
            rows = outbox.next_rows(connection, sender.sent_number, self._bytes_max)
        if now is None or now.sender_id != sender.sender_id:
            return True
        if not _is_gapless(rows, now):
            self._begin_again(ledger, sender, "rows of its outbox are gone")
            return True
        if not rows:
            return False
        shipment = shipment_of(sender.sender_id, rows, self._interval_s)
        have = self._delivered(self._fleet, shipment)
        if have is None:
            self._note_sent(ledger, shipment.last_number)
            self._tidy(self._fleet, shipment)
        else:
            self._go_on_from(ledger, sender, have)
        return True

    def _delivered(self, fleet: Engine, shipment: Shipment) -> Reached | None:
        try:
            with fleet.begin() as connection:
                return deliver(connection, shipment)
        except Exception as error:
            if fault_of(error) is not Fault.RECORD:
                if isinstance(error, SQLAlchemyError):
                    raise failed(self._fleet_url, error) from error
                raise
            logger.warning(
                "cost meter: fleet: it cannot take a text of this ledger, and gets it in another"
                " form: %s",
                in_one_line(error),
            )
        with self._fleet_errors(), fleet.begin() as connection:
            clean = for_postgresql(shipment.tables)
            return deliver(connection, shipment._replace(tables=clean))

    def _tidy(self, fleet: Engine, shipment: Shipment) -> None:
        """Now and then delete what was told before of these runs, if that is allowed.

        A sender without the right to delete leaves it to others.
        """
        states = {snapshots.name, live_usage.name}
        for name, columns, rows in shipment.tables:
            if name in states:
                self._told.update(row[columns.index("run_id")] for row in rows)
        if not self._told or not self._may_delete or time.monotonic() < self._tidy_at_s:
            return
        self._tidy_at_s = time.monotonic() + TIDY_EVERY_S
        try:
            with self._fleet_errors(), fleet.begin() as connection:
                forget_older_states(connection, self._told)
        except LedgerError as error:
            if not isinstance(error.__cause__, ProgrammingError):
                raise
            self._may_delete = False
        self._told.clear()

    def _join(self, ledger: Engine, fleet: Engine, sender: Sender) -> None:
        """Send all that the ledger holds."""
        with self._fleet_errors(), fleet.connect() as connection:
            have = reached(connection, sender.sender_id)
        if have is None:
            logger.info("cost meter: fleet: this ledger joins; all that it holds is sent")
            for some in large_facts(ledger):
                with self._fleet_errors(), fleet.begin() as connection:
                    insert_facts(connection, for_postgresql([some]))
            have = self._send_sums(ledger, fleet, sender)
        with self._ledger_errors(), writing(ledger).begin() as connection:
            outbox.note_joined(connection, have.last_number)
        logger.info("cost meter: fleet: joined")

    def _send_sums(self, ledger: Engine, fleet: Engine, sender: Sender) -> Reached:
        joining = Joining(platform.node(), __version__, sender.retired)
        # One state of the ledger: its sums, and the outbox up to which they have everything.
        with self._ledger_errors(), ledger.begin() as reading:
            now = outbox.read_sender(reading)
            if now is None or now.sender_id != sender.sender_id:
                raise LedgerError("fleet: the ledger began to send under another name meanwhile")
            last = outbox.next_rows(reading, now.last_number - 1, 1)
            digest = digest_of(last[0][1]) if last else ""
            shipment = Shipment(sender.sender_id, 0, now.last_number, digest, self._interval_s, ())
            with self._fleet_errors(), fleet.begin() as connection:
                is_first = not any(reached(connection, name) for name in sender.retired)
                all_rows = all_else(reading, is_first=is_first)
                clean = (each for some in all_rows for each in for_postgresql([some]))
                have = deliver_all(connection, shipment, joining, clean)
        return have or Reached(shipment.last_number, digest)

    def _go_on_from(self, ledger: Engine, sender: Sender, have: Reached) -> None:
        """Go on where the fleet is, if what it has is what this ledger sent."""
        with self._ledger_errors(), writing(ledger).begin() as connection:
            now = outbox.read_sender(connection)
            if now is None or now.sender_id != sender.sender_id:
                return
            if have.last_number == now.sent_number > sender.sent_number:
                return  # Another process has sent and noted it meanwhile.
            rows = outbox.next_rows(connection, have.last_number - 1, 1)
            own = dict(rows).get(have.last_number)
            if own is not None and digest_of(own) == have.last_digest:
                outbox.note_sent(connection, have.last_number)
                return
        self._begin_again(ledger, sender, "it was restored or copied")

    def _begin_again(self, ledger: Engine, sender: Sender, why: str) -> None:
        with self._ledger_errors(), writing(ledger).begin() as connection:
            now = outbox.read_sender(connection)
            if now is not None and now.sender_id == sender.sender_id:
                outbox.begin_again(connection)
        logger.warning(
            "cost meter: fleet: it has something else of this ledger than this ledger has sent: %s."
            " The ledger joins anew under another name; nothing counts twice",
            why,
        )

    def _note_sent(self, ledger: Engine, number: int) -> None:
        with self._ledger_errors(), writing(ledger).begin() as connection:
            outbox.note_sent(connection, number)

    @contextmanager
    def _ledger_errors(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise LedgerError(f"ledger: its outbox cannot be read: {cause_of(error)}") from error

    @contextmanager
    def _fleet_errors(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise failed(self._fleet_url, error) from error


def _is_gapless(rows: Sequence[tuple[int, bytes]], sender: Sender) -> bool:
    """Return whether rows follow one another, and the last one that was sent."""
    first = sender.sent_number + 1
    if not rows:
        return sender.last_number < first
    return [number for number, _ in rows] == list(range(first, first + len(rows)))


def parse_fleet_url(url: str) -> URL:
    """Return a fleet's URL. Raises LedgerError unless it is one of PostgreSQL."""
    parsed = parse_url(url)
    if parsed.get_backend_name() != "postgresql":
        shown = parsed.render_as_string(hide_password=True)
        raise LedgerError(
            f"fleet {shown}: expected a PostgreSQL database, such as"
            " postgresql+psycopg://user@host/name"
        )
    return parsed


def failed(url: URL, error: SQLAlchemyError) -> LedgerError:
    """Return the error of a fleet's database, without its password."""
    shown = url.render_as_string(hide_password=True)
    return LedgerError(f"fleet {shown}: {cause_of(error)}")


def sending_state(ledger_url: str) -> tuple[Sender | None, Waiting]:
    """Return who sends from a ledger, None if nobody does, and what waits. Raises LedgerError."""
    engine = open_to_read(ledger_url)
    try:
        with engine.connect() as connection:
            return outbox.read_sender(connection), outbox.waiting(connection)
    except SQLAlchemyError as error:
        raise LedgerError(f"ledger: its outbox cannot be read: {cause_of(error)}") from error
    finally:
        engine.dispose()


def fleet_there(url: str) -> bool:
    """Return whether a fleet's database has its tables; False if it is empty. Changes nothing.

    Raises LedgerError if it cannot be opened, is a ledger, or is of another version.
    """
    parsed = parse_fleet_url(url)
    shown = parsed.render_as_string(hide_password=True)
    engine = _engine(parsed)
    try:
        with engine.connect() as connection:
            is_there = has_fleet(connection)
            if is_there:
                _check_version(connection, shown)
            else:
                _refuse_ledger(connection, shown)
    except SQLAlchemyError as error:
        raise failed(parsed, error) from error
    finally:
        engine.dispose()
    return is_there


def _engine(url: URL) -> Engine:
    # A pooler in transaction mode gives each transaction another session, and with it none of the
    # statements that were prepared.
    options = {"prepare_threshold": None, "connect_timeout": _CONNECT_TIMEOUT_S}
    return create_engine(url, pool_size=1, max_overflow=0, pool_pre_ping=True, connect_args=options)


def open_fleet(url: URL) -> Engine:
    """Open a fleet's database with one connection; an empty database gets its tables.

    Raises LedgerError if it cannot be opened, is a ledger, or is of another version.
    """
    engine = _engine(url)
    try:
        with engine.begin() as connection:
            _ensure_fleet(connection, url.render_as_string(hide_password=True))
    except SQLAlchemyError as error:
        engine.dispose()
        raise failed(url, error) from error
    except BaseException:
        engine.dispose()
        raise
    return engine


def _ensure_fleet(connection: Connection, shown: str) -> None:
    if not has_fleet(connection):
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SCHEMA_LOCK})
    if not has_fleet(connection):
        _refuse_ledger(connection, shown)
        create_fleet(connection)
    _upgrade(connection)
    _check_version(connection, shown)


def _upgrade(connection: Connection) -> None:
    """Bring a fleet of an earlier version to this one. Servers of that version then wait."""
    if _rows_version(connection) < SCHEMA_VERSION:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SCHEMA_LOCK})
        if (found := _rows_version(connection)) < SCHEMA_VERSION:
            upgrade_fleet(connection, found)


def _rows_version(connection: Connection) -> int:
    return int(connection.execute(schema_version.select()).scalar_one())


def _refuse_ledger(connection: Connection, shown: str) -> None:
    if connection.dialect.has_table(connection, schema_version.name):
        raise LedgerError(
            f"fleet {shown}: expected an empty database or a fleet's, got one with a ledger;"
            " name another database"
        )


def _check_version(connection: Connection, shown: str) -> None:
    found = connection.execute(fleet_version.select()).scalar_one()
    rows = _rows_version(connection)
    if (found, rows) != (FLEET_VERSION, SCHEMA_VERSION):
        raise LedgerError(
            f"fleet {shown}: expected version {FLEET_VERSION} with rows of version"
            f" {SCHEMA_VERSION}, got {found} with {rows}; run the same version of"
            " vllm-cost-meter at all servers"
        )
