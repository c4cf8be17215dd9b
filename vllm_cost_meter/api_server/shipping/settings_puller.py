"""Pull what the fleet shares of the settings into this server's copy: at the start, and ever after.

At the start the database is asked for some seconds. If it does not answer, the server starts with
its copy. While the server runs, the process that sends to the fleet looks for a new version with
each interval. What is new is checked entry by entry before it takes the copy's place; whether it is
right for this server as a whole the API servers see, which watch the copy.

A database that was restored to an older state would take away prices and tenants that are in force.
So a server takes over only what follows the version that it has, until an administrator begins anew
after it.

Invariant: the copy is only ever replaced by a state that follows it, and that this version of the
meter understands.
"""

import time
from pathlib import Path

from vllm_cost_meter.config.fleet import FleetPlace
from vllm_cost_meter.config.kept_copy import KEY, kept_path, read_kept, write_kept
from vllm_cost_meter.config.shared_changes import check_entries
from vllm_cost_meter.config.types import Text
from vllm_cost_meter.errors import CostMeterError, LedgerError, SettingError
from vllm_cost_meter.guard import in_daemon_thread
from vllm_cost_meter.ledger.fleet.opening import fleet_name, shared_store
from vllm_cost_meter.ledger.fleet.shared_settings import SharedHead, SharedStore
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.records.shared_settings import (
    NOTHING_SHARED,
    KeptSettings,
    SharedSettings,
    may_follow,
)
from vllm_cost_meter.units.time import rfc3339

logger = meter_logger()

# A start waits so long for the database, then takes the copy.
START_WITHIN_S = 5.0
PUSH_FIRST = "none yet: `vllm-cost-meter fleet settings push FILE` makes them"


class SettingsPuller:
    """Keeps the copy of one server up to date. Used by one thread."""

    def __init__(
        self,
        path: Path | None,
        fleet_url: str,
        *,
        keeps: bool = True,
        now: SharedSettings | None = None,
    ) -> None:
        """Nothing is read before the first look.

        Without `keeps` the copy is only read. Without a path there is none but `now`, in memory.
        """
        self._path = path
        self._fleet = fleet_name(fleet_url)
        self._keeps = keeps
        # What the database had when it was last taken over, or refused for good.
        self._settled: SharedHead | None = None
        # What this server is to use, once it is known.
        self.now = now
        # The latest version in the database, and when that was asked, by the wall clock.
        self.version: int | None = None
        self.seen_at_ns: int | None = None
        # Why it is not taken over; None if it is.
        self.error: str | None = None

    def look(self, store: SharedStore) -> None:
        """Take over what is new. Never raises; an error is logged once, and tried again."""
        before = self.error
        try:
            self.pull(store)
        except (CostMeterError, OSError, ValueError) as error:
            self.error = str(error)
        if self.error is not None and self.error != before:
            logger.warning("cost meter: the settings stay as they were: %s", self.error)
        elif self.error is None and before is not None:
            logger.info("cost meter: the fleet's settings are taken over again")

    def pull(self, store: SharedStore) -> None:
        """Take over what is new. Raises LedgerError, SettingError, OSError or ValueError."""
        head = store.head()
        self.version, self.seen_at_ns = head.version, time.time_ns()
        if head == self._settled:
            return
        found = store.read()
        check_entries(found)
        kept = self._kept()
        if kept is None and not found.version:
            raise LedgerError(f"fleet's settings: expected some in {self._fleet}, got {PUSH_FIRST}")
        if not may_follow(kept, found, store.digest_of(0 if kept is None else kept.version)):
            assert kept is not None  # noqa: S101 - anything follows nothing
            self.now, self.error = kept, restored_line(self._fleet, kept.version, found.version)
        else:
            if self._path is not None and self._keeps and found != kept:
                now = rfc3339(time.time_ns())
                write_kept(self._path, KeptSettings(self._fleet, now, found.digest(), found))
            self.now, self.error = found, None
        self._settled = head

    def _kept(self) -> SharedSettings | None:
        """Return what this server has of this fleet; None if nothing, or no whole copy."""
        if self._path is None:
            return self.now
        try:
            kept = read_kept(self._path)
        except SettingError as error:
            logger.warning("cost meter: %s: it is left aside", error)
            return None
        return None if kept is None or kept.fleet != self._fleet else kept.settings


def restored_line(fleet: str, kept_version: int, found_version: int) -> str:
    """Return what is said of a database that does not go on from what a server has."""
    return (
        f"fleet's settings: expected {fleet} to go on from version {kept_version}, which is in use"
        f" here, got version {found_version} of another past: was the database restored? Look at"
        " it, set what it lacks, then: vllm-cost-meter fleet settings restart --after"
        f" {kept_version}"
    )


def settings_at_start(
    place: FleetPlace, within_s: float = START_WITHIN_S, *, keeps: bool = True
) -> SharedSettings:
    """Return what this server is to use of the fleet's settings, and keep a copy of it.

    Raises SettingError if there is neither a database that answers in time nor a copy.
    """
    if place.fleet is None:
        raise SettingError(KEY, "COST_METER_FLEET beside it", Text("none"))
    path, url = kept_path(place.ledger), place.fleet
    puller = SettingsPuller(path, url, keeps=keeps)

    def pull() -> None:
        with shared_store(url) as store:
            puller.pull(store)

    why: str | None = None
    try:
        in_daemon_thread(pull).result(within_s)
    except TimeoutError:
        why = f"fleet {fleet_name(url)}: no answer within {within_s:g} s"
    except (CostMeterError, OSError, ValueError) as error:
        why = str(error)
    if why is None and puller.error is None and puller.now is not None:
        return puller.now
    kept = read_kept(path)
    if kept is None or kept.fleet != fleet_name(url):
        expected = "the fleet's settings in its database, or a copy of them"
        raise SettingError(KEY, expected, Text(f"neither: {why}"), str(path))
    logger.warning(
        "cost meter: %s; the settings are those of version %d, which came at %s",
        *(why or puller.error, kept.settings.version, kept.pulled_at),
    )
    return kept.settings


def settings_for_reading(place: FleetPlace, ledger: str | None) -> SharedSettings:
    """Return what a command is to use that reads a ledger; it keeps no copy.

    A fleet's database has its own settings. For the ledger of a server they are what that server
    would start with. Raises SettingError, or LedgerError if the database cannot be read.
    """
    for url in (ledger, place.ledger):
        if url is not None and url.startswith("postgresql"):
            with shared_store(url) as store:
                found = store.read()
            if not found.version:
                raise LedgerError(
                    f"fleet's settings: expected some in {fleet_name(url)}, got {PUSH_FIRST}"
                )
            return found
    return settings_at_start(place, keeps=False)


class SharedFollower:
    """Follows the settings of a fleet in memory, for a process that keeps no copy."""

    def __init__(self, ledger: str | None) -> None:
        """`ledger` is the one that is read; the fleet is that of the first settings."""
        self._ledger = ledger
        self._url = ""
        self._puller: SettingsPuller | None = None
        self.now = NOTHING_SHARED

    def first(self, place: FleetPlace) -> SharedSettings:
        """Return what to begin with. Raises as `settings_for_reading`."""
        self.now = settings_for_reading(place, self._ledger)
        urls = (self._ledger, place.ledger, place.fleet)
        self._url = next(url for url in urls if (url or "").startswith("postgresql")) or ""
        self._puller = SettingsPuller(None, self._url, now=self.now)
        return self.now

    def look(self) -> None:
        """Take over what is newer in the database. Never raises; an error is logged once."""
        if (puller := self._puller) is not None:
            with shared_store(self._url) as store:
                puller.look(store)
            self.now = puller.now or self.now
