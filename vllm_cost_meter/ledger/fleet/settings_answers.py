"""Answers about the settings that a fleet shares: each JSON field and its meaning.

A docstring below a field is its description.

Invariant: an answer has these fields and no other.
"""

from typing import Any

from typing_extensions import TypedDict

from vllm_cost_meter.ledger.fleet.shared_settings import SettingsVersion


class SharedChangeRow(TypedDict):
    """What a version did to one entry."""

    section: str
    """The section of the settings file."""
    name: str
    """The entry's name there, or its id."""
    entry: dict[str, Any] | None
    """The entry from then on, as a settings file has it; null if it ended."""
    position: int | None
    """Where a rule stands among the others; null in other sections."""


class SharedVersionRow(TypedDict):
    """One version of the fleet's settings."""

    version: int
    """Its number."""
    changed_at: str
    """RFC 3339: when it was made, by the clock of the database."""
    changed_by: str
    """Who made it, as the changer said."""
    changed_as: str
    """The role of the database that made it."""
    is_restart: bool
    """Whether it let servers take over a database that had been restored."""
    changes: list[SharedChangeRow]
    """The entries that it created, changed or ended."""


def version_row(found: SettingsVersion) -> SharedVersionRow:
    """Return a version as answers list it."""
    return {
        "version": found.version,
        "changed_at": found.changed_at,
        "changed_by": found.changed_by,
        "changed_as": found.changed_as,
        "is_restart": found.is_restart,
        "changes": [
            {
                "section": entry.section,
                "name": entry.name,
                "entry": entry.table if is_there else None,
                "position": entry.position,
            }
            for entry, is_there in found.changes
        ],
    }
