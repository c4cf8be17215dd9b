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
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.engine import Connection
from sqlalchemy.exc import ProgrammingError, SQLAlchemyError

from vllm_cost_meter.errors import LedgerError, in_one_line
from vllm_cost_meter.ledger.catching_up import is_all_applied
from vllm_cost_meter.ledger.database import (
    cause_of,
    open_database,
    open_to_read,
    writing,
)
from vllm_cost_meter.ledger.faults import Fault, fault_of
from vllm_cost_meter.ledger.fleet import outbox
from vllm_cost_meter.ledger.fleet.changes import TableRows
from vllm_cost_meter.ledger.fleet.delivery import (
    Joining,
    Reached,
    deliver,
    deliver_all,
    for_postgresql,
    insert_facts,
    note_end,
    reached,
    rows_of,
)
from vllm_cost_meter.ledger.fleet.joining import all_else, large_facts, large_facts_since
from vllm_cost_meter.ledger.fleet.opening import failed, open_fleet, parse_fleet_url, store_in
from vllm_cost_meter.ledger.fleet.outbox import Sender, Waiting
from vllm_cost_meter.ledger.fleet.rows.dropping import without_dropped
from vllm_cost_meter.ledger.fleet.rows.files import RowFiles
from vllm_cost_meter.ledger.fleet.rows.rowless import LEFT_OUT, Rowless
from vllm_cost_meter.ledger.fleet.rows.unsent import note_unsent
from vllm_cost_meter.ledger.fleet.schema import WITH_ROWS
from vllm_cost_meter.ledger.fleet.shared_settings import SharedStore
from vllm_cost_meter.ledger.fleet.shipment import Shipment, digest_of, shipment_of
from vllm_cost_meter.ledger.fleet.tidying import SentSince
from vllm_cost_meter.ledger.fleet_use.running import NOTHING_RUNS, RunningHere
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.version import __version__

logger = meter_logger()

# A shipment has at most so many packed bytes, and at least one row.
SHIPMENT_BYTES_MAX = 1 << 20
TIDY_EVERY_S = 60.0
INTERVAL_S = 2.0


class FleetSender:
    """Sends one ledger's outbox to one fleet. Used by one thread."""

    def __init__(
        self,
        ledger_url: str,
        fleet_url: str,
        interval_s: float = INTERVAL_S,
        shipment_bytes_max: int = SHIPMENT_BYTES_MAX,
        rows: str = WITH_ROWS,
        files: Path | None = None,
        outbox_bytes_max: int | None = None,
    ) -> None:
        """Nothing is opened before the first step, which comes at least each `interval_s`.

        While the fleet is away the outbox may hold `outbox_bytes_max`; None for any number.
        `rows` says where the rows of requests go (see `senders.rows`), and `files` into which
        folder, if that is where. Raises LedgerError if that folder cannot be written.
        """
        self._interval_s = interval_s
        self._ledger_url = ledger_url
        self._fleet_url = parse_fleet_url(fleet_url)
        self._bytes_max = shipment_bytes_max
        self._ledger: Engine | None = None
        self._fleet: Engine | None = None
        self._rows = rows
        self._files = None if files is None else RowFiles(files)
        self._outbox_bytes_max = outbox_bytes_max
        # What is sent in place of rows, once that is known of the present sender.
        self._rowless: Rowless | None = None
        # The sender of which the fleet is known to say where its rows go.
        self._known_id: str | None = None
        self._here = RunningHere()
        # What the fleet was told last of what runs here.
        self._running: str | None = None
        self._sent = SentSince()
        self._tidy_at_s = 0.0
        self._may_tidy = True
        # Whether the fleet had all of the ledger at the last step; not where there is none yet.
        self.is_all_sent = False
        # What a process left in its journals is in no outbox yet.
        self._has_caught_up = False

    def step(self) -> bool:
        """Send what waits, up to one shipment; return whether more may wait.

        Raises LedgerError if either database fails; the next step tries again.
        """
        self.is_all_sent = False
        try:
            more = self._step()
        except BaseException as error:
            self.close()
            if isinstance(error, LedgerError) and error.is_missing:
                return False  # A server that starts makes it.
            raise
        self.is_all_sent = not more
        return more

    def end(self) -> None:
        """Say that the fleet has all of the ledger, and that its server stops.

        Says nothing if more waits, in the outbox or in a journal. Raises LedgerError if either
        database fails.
        """
        ledger, fleet = self._ledger, self._fleet
        if ledger is None or fleet is None or not is_all_applied(self._ledger_url):
            return
        with self._ledger_errors(), ledger.connect() as connection:
            sender = outbox.read_sender(connection)
        if sender is not None and sender.joined_at and sender.sent_number == sender.last_number:
            if self._files is not None:
                self._file(ledger, sender, self._files)
            with self._fleet_errors(), fleet.begin() as connection:
                note_end(connection, sender.sender_id, sender.last_number)
            self._running = NOTHING_RUNS

    def waiting(self) -> Waiting:
        """Return what is still to be sent. Raises LedgerError."""
        with self._ledger_errors(), self._opened().connect() as connection:
            return outbox.waiting(connection)

    def shed(self) -> bool:
        """Empty an outbox that is too large: the ledger then joins anew; return whether it was.

        Nothing is lost by that, as the ledger holds all of it. Raises LedgerError.
        """
        if self._outbox_bytes_max is None:
            return False
        with self._ledger_errors():
            ledger = self._opened()
            with writing(ledger).begin() as connection:
                is_too_large = outbox.held_bytes(connection) > self._outbox_bytes_max
                if is_too_large:
                    outbox.join_anew(connection)
        if is_too_large:
            logger.warning(
                "cost meter: fleet: more than %d bytes wait for it (fleet_outbox_bytes). They are"
                " freed, and when the database is back it gets all that the ledger holds",
                self._outbox_bytes_max,
            )
        return is_too_large

    def shared(self) -> SharedStore:
        """Return the fleet's shared settings, by the sender's own connection.

        Raises LedgerError if the fleet cannot be opened.
        """
        if self._fleet is None:
            self._fleet = open_fleet(self._fleet_url)
        return store_in(self._fleet_url, self._fleet)

    def close(self) -> None:
        """Close the connections; the next step opens new ones."""
        for engine in (self._ledger, self._fleet):
            if engine is not None:
                engine.dispose()
        self._ledger = self._fleet = self._rowless = self._known_id = None

    def _step(self) -> bool:
        read_at_ns = self._look_at_journals()
        ledger, sender, rows, running = self._looked()
        if self._fleet is None:
            self._fleet = open_fleet(self._fleet_url)
        fleet = self._fleet
        if sender.joined_at is None:
            self._join(ledger, fleet, sender)
            return True
        if self._known_id != sender.sender_id:
            with self._fleet_errors(), fleet.connect() as connection:
                is_same = rows_of(connection, sender.sender_id) in (None, self._rows)
            if not is_same:
                logger.info("cost meter: fleet: rows of requests go elsewhere from now on")
                self._begin_anew(ledger, sender)
                return True
            self._known_id, self._rowless = sender.sender_id, None
        if not _is_gapless(rows, sender):
            self._begin_again(ledger, sender, "rows of its outbox are gone")
            return True
        if not rows:
            if self._files is not None and self._files.is_due():
                self._file(ledger, sender, self._files)
            return False
        is_all = self._has_caught_up and rows[-1][0] == sender.last_number
        until_ns = read_at_ns if is_all else None
        shipment = shipment_of(sender.sender_id, rows, self._interval_s, until_ns)
        shipment = shipment._replace(
            tables=self._to_send(ledger, fleet, sender, shipment),
            running=None if running == self._running else running,
        )
        have = self._delivered(fleet, shipment)
        if have is None:
            self._running = self._running if running is None else running
            self._note_sent(ledger, shipment.last_number)
            self._tidy(fleet, shipment)
        else:
            self._rowless = None
            self._go_on_from(ledger, sender, have)
        return True

    def _looked(self) -> tuple[Engine, Sender, list[tuple[int, bytes]], str | None]:
        """Return the ledger, who sends from it, what is to be sent next, and what runs then."""
        with self._ledger_errors():
            ledger = self._opened()
            with ledger.begin() as connection:
                if (sender := outbox.read_sender(connection)) is not None:
                    rows = outbox.next_rows(connection, sender.sent_number, self._bytes_max)
                    # Together with all that the ledger has now, or a bill could count twice.
                    is_all = rows != [] and rows[-1][0] == sender.last_number
                    running = self._here.told(connection) if is_all else None
                    return ledger, sender, rows, running
            with writing(ledger).begin() as connection:
                return ledger, outbox.begin(connection), [], None

    def _look_at_journals(self) -> int:
        """Learn whether the ledger has what journals held when this process began; return when."""
        self._has_caught_up = self._has_caught_up or is_all_applied(self._ledger_url)
        return time.time_ns()

    def _opened(self) -> Engine:
        if self._ledger is None:
            self._ledger = open_database(self._ledger_url, create=False)
        return self._ledger

    def _to_send(
        self, ledger: Engine, fleet: Engine, sender: Sender, shipment: Shipment
    ) -> Sequence[TableRows]:
        """Return the rows that are sent of a shipment."""
        if self._rows == WITH_ROWS:
            return shipment.tables
        if self._rowless is None:
            with (
                self._ledger_errors(),
                ledger.begin() as own,
                self._fleet_errors(),
                fleet.begin() as connection,
            ):
                self._rowless = Rowless.recovered(connection, own, sender)
        return self._rowless.sent(shipment.tables)

    def _file(self, ledger: Engine, sender: Sender, files: RowFiles) -> None:
        """Put what was sent into files, and then take it out of the outbox."""
        with self._ledger_errors():
            for _ in files.write(ledger, sender):
                with writing(ledger).begin() as connection:
                    outbox.forget_up_to(connection, files.filed_number(sender))

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
        """Now and then tidy what this sender has sent, if that is allowed.

        A sender without the right to update and delete leaves it to others.
        """
        if not self._may_tidy:
            return
        self._sent.note(shipment.sender_id, shipment.tables)
        if time.monotonic() < self._tidy_at_s:
            return
        self._tidy_at_s = time.monotonic() + TIDY_EVERY_S
        try:
            with self._fleet_errors(), fleet.begin() as connection:
                self._sent.tidy(connection)
        except LedgerError as error:
            if not isinstance(error.__cause__, ProgrammingError):
                raise
            self._may_tidy = False
        self._sent = SentSince()

    def _join(self, ledger: Engine, fleet: Engine, sender: Sender) -> None:
        """Send all that the ledger holds."""
        with self._fleet_errors(), fleet.connect() as connection:
            have = reached(connection, sender.sender_id)
        if have is None:
            logger.info("cost meter: fleet: this ledger joins; all that it holds is sent")
            if self._files is not None:
                self._files.write_all(sender, large_facts(ledger))
            for some in large_facts(ledger) if self._rows == WITH_ROWS else ():
                with self._fleet_errors(), fleet.begin() as connection:
                    kept = without_dropped(connection, for_postgresql([some]))
                    insert_facts(connection, kept)
            have = self._send_sums(ledger, fleet, sender)
        with self._ledger_errors(), writing(ledger).begin() as connection:
            outbox.note_joined(connection, have.last_number, self._kept_after(sender))
        logger.info("cost meter: fleet: joined")

    def _send_sums(self, ledger: Engine, fleet: Engine, sender: Sender) -> Reached:
        joining = Joining(platform.node(), __version__, self._rows, sender.retired)
        read_at_ns = self._look_at_journals()
        # One state of the ledger: its sums, and the outbox up to which they have everything.
        with self._ledger_errors(), ledger.begin() as reading:
            now = outbox.read_sender(reading)
            if now is None or now.sender_id != sender.sender_id:
                raise LedgerError("fleet: the ledger began to send under another name meanwhile")
            last = outbox.next_rows(reading, now.last_number - 1, 1)
            digest = digest_of(last[0][1]) if last else ""
            until_ns = read_at_ns if self._has_caught_up else None
            self._running = self._here.told(reading)
            shipment = Shipment(
                *(sender.sender_id, 0, now.last_number, digest, self._interval_s, until_ns, ()),
                running=self._running,
            )
            with self._fleet_errors(), fleet.begin() as connection:
                is_first = not any(reached(connection, name) for name in sender.retired)
                all_rows = self._all_rows(reading, is_first=is_first)
                clean = (each for some in all_rows for each in for_postgresql([some]))
                kept = without_dropped(connection, clean)
                have = deliver_all(connection, shipment, joining, kept)
                if have is None and not is_first and self._rows == WITH_ROWS:
                    self._note_unsent(connection, reading)
        return have or Reached(shipment.last_number, digest)

    def _note_unsent(self, fleet: Connection, ledger: Connection) -> None:
        if bills := note_unsent(fleet, ledger, platform.node()):
            logger.warning(
                "cost meter: fleet: the rows of %d bills were dropped here before the fleet could"
                " get them. It has what they add up to, and its audit names them",
                bills,
            )

    def _all_rows(self, reading: Connection, *, is_first: bool) -> Iterator[TableRows]:
        if self._rows == WITH_ROWS:
            yield from large_facts_since(reading)
            yield from all_else(reading, is_first=is_first)
            return
        yield from all_else(reading, is_first=is_first, left_out=LEFT_OUT)
        yield from Rowless.of_ledger(reading).states()

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
                outbox.note_sent(connection, have.last_number, self._kept_after(sender))
                return
        self._begin_again(ledger, sender, "it was restored or copied")

    def _begin_anew(self, ledger: Engine, sender: Sender) -> None:
        with self._ledger_errors(), writing(ledger).begin() as connection:
            now = outbox.read_sender(connection)
            if now is not None and now.sender_id == sender.sender_id:
                outbox.begin_again(connection)

    def _begin_again(self, ledger: Engine, sender: Sender, why: str) -> None:
        self._begin_anew(ledger, sender)
        logger.warning(
            "cost meter: fleet: it has something else of this ledger than this ledger has sent: %s."
            " The ledger joins anew under another name; nothing counts twice",
            why,
        )

    def _note_sent(self, ledger: Engine, number: int) -> None:
        with self._ledger_errors(), writing(ledger).begin() as connection:
            sender = outbox.read_sender(connection)
            kept_after = None if sender is None else self._kept_after(sender)
            outbox.note_sent(connection, number, kept_after)

    def _kept_after(self, sender: Sender) -> int | None:
        """Return up to which row the outbox is not needed for files; None without files."""
        return None if self._files is None else self._files.filed_number(sender)

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
