"""The settings that the servers of a fleet share, as they travel from its database to each server.

An entry is one table of a section, as canonical JSON: a price, a tenant, a rule. All entries
together have one version. A server keeps a copy in a file, for when the database is away. The copy
carries the digest of what it holds, so that a torn or edited one is known.

Invariant: two states with the same entries have the same digest, and no others.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

# The sections of a settings file that a fleet can share, in the order of the file.
SHARED_SECTIONS = (*("tenants", "tenant_rules", "prices", "energy_prices", "overheads", "budgets"),)
# The form of entries and copies. A server leaves alone what has a later one.
SHARED_FORMAT = 1


class SharedEntry(NamedTuple):
    """One entry: its section, its name there, its table as JSON, its place where order counts."""

    section: str
    name: str
    table_json: str
    position: int | None = None

    @property
    def table(self) -> dict[str, Any]:
        """The entry as a settings file has it."""
        table: dict[str, Any] = json.loads(self.table_json)
        return table


class SharedSettings(msgspec.Struct, frozen=True):
    """All entries at one version, in order. Version 0 is that nobody ever set any.

    `restart_version` is the last version with which an administrator began anew after the database
    had been restored: a server of an earlier version takes it over whatever it has. 0 if none.
    """

    version: int
    entries: tuple[SharedEntry, ...] = ()
    restart_version: int = 0

    def of(self, section: str) -> list[SharedEntry]:
        """Return the entries of a section, in order."""
        return [entry for entry in self.entries if entry.section == section]

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Return each section as a settings file has it; a section without an entry is empty."""
        return {name: [entry.table for entry in self.of(name)] for name in SHARED_SECTIONS}

    def digest(self) -> str:
        """Return a digest of the entries."""
        content = json.dumps([list(entry) for entry in self.entries]).encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest()


NOTHING_SHARED = SharedSettings(0)


def canonical(table: Any) -> str:
    """Return a table as JSON that is the same for the same values."""
    return json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def in_order(entries: Iterable[SharedEntry]) -> tuple[SharedEntry, ...]:
    """Return entries by section, then position, then name."""
    return tuple(
        sorted(
            entries,
            key=lambda one: (SHARED_SECTIONS.index(one.section), one.position or 0, one.name),
        )
    )


class KeptSettings(msgspec.Struct, frozen=True):
    """A server's copy of the fleet's settings: where they are from, and when they were read."""

    fleet: str
    pulled_at: str
    digest: str
    settings: SharedSettings
    format: int = SHARED_FORMAT


class _Format(msgspec.Struct):
    format: int


def encoded(kept: KeptSettings) -> bytes:
    """Return a copy as its file has it."""
    return msgspec.json.format(msgspec.json.encode(kept), indent=1)


def decoded_copy(content: bytes) -> KeptSettings:
    """Return the copy that a file holds. Raises ValueError for what is none, torn or too new."""
    try:
        found = msgspec.json.decode(content, type=_Format).format
        if found != SHARED_FORMAT:
            raise ValueError(f"format {found}, which another version of the meter has written")
        kept = msgspec.json.decode(content, type=KeptSettings)
    except msgspec.MsgspecError as error:
        raise ValueError(f"no whole copy: {error}") from None
    if kept.settings.digest() != kept.digest:
        raise ValueError("a copy that was changed: its digest differs from its entries'")
    return kept


def may_follow(kept: SharedSettings | None, found: SharedSettings, digest: str | None) -> bool:
    """Return whether a server that has `kept` may take over what it finds in the database.

    `digest` is what the database has for the version of `kept`; None if it lacks that version. A
    database that was restored to an older state lacks it, or has another one by that number.
    """
    if kept is None or found.restart_version > kept.version:
        return True
    return found.version >= kept.version and digest == kept.digest()
