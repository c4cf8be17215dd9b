"""Checks of the ledger's place, its schema and its pages. They leave it as it was.

Invariant: what a server's start would do to the ledger is said, never done.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from vllm_cost_meter.cli.doctor.findings import Finding, Outcome, failed, fine
from vllm_cost_meter.cli.doctor.server import RunningServer
from vllm_cost_meter.errors import LedgerError, ServerError
from vllm_cost_meter.journal.places import folders_of, require_folders
from vllm_cost_meter.ledger.damage.setting_aside import set_aside_beside
from vllm_cost_meter.ledger.database import (
    check_place,
    nearest_folder,
    parse_url,
    refuse_newer,
    shown_url,
    sqlite_path,
)
from vllm_cost_meter.ledger.economics.saturation import knows_runs
from vllm_cost_meter.ledger.file_modes import open_to_others
from vllm_cost_meter.ledger.journal_place import journal_folder, second_journal_folder
from vllm_cost_meter.ledger.queries.answers import SetAsideFile
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION
from vllm_cost_meter.ledger.upkeep.examining import damage_of, try_writing, version_in
from vllm_cost_meter.ledger.upkeep.sqlite_files import free_bytes
from vllm_cost_meter.reports.answers import Summary

# With less a ledger is full in hours rather than days.
FREE_BYTES_MIN = 256 << 20
NOT_YET = "there is no ledger yet"


@dataclass(frozen=True, slots=True)
class Place:
    """A ledger's place: its URL, its file if it has one, and the version of the schema there.

    `version` is None where there is no ledger yet.
    """

    url: str
    path: Path | None
    version: int | None

    @property
    def unread(self) -> str | None:
        """Why nothing is read there; None if it can be."""
        if self.version is None:
            return NOT_YET
        if self.version != SCHEMA_VERSION:
            return f"not looked at: the ledger has schema version {self.version}"
        return None


def place_of(url: str) -> Place:
    """Look at a ledger's place. Raises LedgerError for what cannot be read."""
    path = sqlite_path(parse_url(url))
    if path is not None and not path.exists():
        return Place(url, path, None)
    return Place(url, path, version_in(url))


def ledger_writable(url: str, server: RunningServer | None, busy_timeout_s: float) -> Finding:
    """Check the place, and whether a row of each table can be written there."""
    check_place(url)
    place = place_of(url)
    found = _written(place, server, busy_timeout_s)
    if place.path is not None:
        for loose in open_to_others(place.path):
            detail = f"{loose.name} is open to other users: a metered server's start closes it"
            found = found.and_also(Outcome.WARN, detail)
        free = free_bytes(nearest_folder(place.path))
        if free < FREE_BYTES_MIN:
            found = found.and_also(Outcome.WARN, f"only {free:,} bytes are free there")
        for aside in _set_aside(place):
            detail = f"{aside['file']} was set aside: {aside['reason']}"
            found = found.and_also(Outcome.WARN, detail)
    if server is not None and not _is_the_servers(url, server):
        found = found.and_also(Outcome.WARN, f"{server.url} writes to {server.health['ledger']}")
    return found


def journals_writable(url: str, second_root: str | None) -> Finding:
    """Check that the places of the journal can be written, and that they are on two disks."""
    first = journal_folder(url)
    require_folders(first, folders_of(first))
    found = _folder("journal", first)
    second = second_journal_folder(url, second_root)
    if second is None:
        return found.and_also(Outcome.OK, "no second place is set")
    other = _folder("journal", second)
    found = found.and_also(other.outcome, other.detail)
    if other.ok and nearest_folder(first).stat().st_dev == nearest_folder(second).stat().st_dev:
        detail = f"{second_root} is on the same disk: where that fails, both do"
        found = found.and_also(Outcome.WARN, detail)
    return found


def archive_writable(folder: str | None) -> Finding:
    """Check that dropped rows can be kept in Parquet files, if they are to be."""
    if folder is None:
        return fine("archive", "none is set: rows of old requests are dropped for good")
    return _folder("archive", Path(folder))


def _folder(name: str, folder: Path) -> Finding:
    there = folder if os.path.lexists(folder) else nearest_folder(folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        detail = f"{folder}: {there} is no folder that this user can write"
        return failed(name, detail)
    free = free_bytes(there)
    how = "can be written" if folder.is_dir() else "not there yet, and can be made"
    found = fine(name, f"{folder}: {how}")
    if free < FREE_BYTES_MIN:
        return found.and_also(Outcome.WARN, f"only {free:,} bytes are free there")
    return found


def _written(place: Place, server: RunningServer | None, busy_timeout_s: float) -> Finding:
    shown = shown_url(place.url)
    if place.version is None:
        made = "the file" if place.path is not None and not place.path.exists() else "its tables"
        detail = f"{shown}: not there yet: the server makes {made} at its start"
        return fine("ledger", detail)
    if place.version != SCHEMA_VERSION:
        return fine("ledger", f"{shown} is there; with its schema nothing was written")
    trial = try_writing(place.url, busy_timeout_s)
    if trial.refused is None:
        return fine("ledger", f"{shown} can be written: a row of each table, and taken back")
    detail = f"{shown} cannot be written: {trial.refused}"
    if trial.is_busy and server is not None:
        return Finding("ledger", Outcome.WARN, f"{detail} now: {server.url} may be at work on it")
    return failed("ledger", detail)


def _set_aside(place: Place) -> list[SetAsideFile]:
    """Return the damaged files whose rows a ledger may lack."""
    if place.version != SCHEMA_VERSION:
        return []
    try:
        return set_aside_beside(place.url)
    except LedgerError:  # Other checks say what is wrong.
        return []


def _is_the_servers(url: str, server: RunningServer) -> bool:
    """Return whether a server writes to this ledger, maybe by another name of its file."""
    if shown_url(url) == server.health["ledger"]:
        return True
    try:
        runs = server.ask("/cost/summary?window=1h", Summary)["runs"]
    except ServerError:
        return False
    alive = [run["run_id"] for run in runs if run["alive"]]
    return bool(alive) and knows_runs(url, alive)


def schema_known(url: str, server: RunningServer | None) -> Finding:
    """Say which version the schema has, and what the next start of a server does to it."""
    place = place_of(url)
    if place.version is None:
        return fine("schema", NOT_YET)
    refuse_newer(place.version, f"ledger {shown_url(url)}")
    if place.version == SCHEMA_VERSION:
        found = fine("schema", f"version {place.version}")
    else:
        found = Finding(
            "schema",
            Outcome.WARN,
            f"version {place.version}, this cost meter has {SCHEMA_VERSION}: the next start of a"
            " metered server migrates it without a copy, and no older version can use it then;"
            " `vllm-cost-meter ledger migrate` keeps a copy",
        )
    theirs = SCHEMA_VERSION if server is None else server.health["schema_version"]
    if theirs == SCHEMA_VERSION or server is None:
        return found
    return found.and_also(Outcome.WARN, f"{server.url} writes version {theirs}")


def pages_sound(url: str, limit_s: float) -> Finding:
    """Read the pages of a ledger's file, for a while."""
    place = place_of(url)
    if place.version is None:
        return fine("pages", NOT_YET)
    if place.path is None:
        return fine("pages", "not read: PostgreSQL's own tool is pg_amcheck")
    damage = damage_of(place.path, limit_s)
    if damage is None:
        detail = f"cut short after {limit_s:g} s: `vllm-cost-meter ledger check` reads all of them"
        return fine("pages", detail)
    if damage:
        return failed("pages", f"{damage[0]}; run `vllm-cost-meter ledger check`")
    return fine("pages", "every page but those of indexes was read")
