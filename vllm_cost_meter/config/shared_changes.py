"""Changes of the settings that a fleet shares: what they are, and whether they may be made.

A change gives a new whole, which is checked as a settings file is, before anything is written. The
entries are written in one form, so that the same values are the same entry, however they were
typed: a push that differs in nothing changes nothing.

What was billed by a price stays billed. So a change that would give hours that began another price
is refused, unless who makes it says that this is meant.

Invariant: a planned change that `check_money` lets pass leaves a valid whole.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from vllm_cost_meter.config.loading import checked_entry
from vllm_cost_meter.config.moved_money import MovedMoney, moved_money
from vllm_cost_meter.config.prices import price_book
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.config.types import Text
from vllm_cost_meter.errors import SettingError
from vllm_cost_meter.prices.book import PriceBook
from vllm_cost_meter.records.shared_settings import (
    SHARED_SECTIONS,
    SharedEntry,
    SharedSettings,
    canonical,
    in_order,
)

# Their entries have a name in any case; the others need an id.
_NAMED = ("tenants", "budgets")
ORDERED = "tenant_rules"
# Between the positions of two rules, so that others find room.
_STEP = 10
MEANT = "moves_money"


@dataclass(frozen=True, slots=True)
class EntryChange:
    """What becomes of one entry: `before` is None if it is created, `after` if it ends."""

    before: SharedEntry | None
    after: SharedEntry | None

    @property
    def kind(self) -> str:
        """`create`, `change` or `end`."""
        return "create" if self.before is None else "end" if self.after is None else "change"

    @property
    def entry(self) -> SharedEntry:
        """The entry as it becomes, or as it was if it ends."""
        found = self.after or self.before
        assert found is not None  # noqa: S101 - a change has one of both
        return found

    @property
    def keys(self) -> list[str]:
        """Which keys of the entry differ, its position among them."""
        was = {} if self.before is None else self.before.table
        becomes = {} if self.after is None else self.after.table
        keys = [key for key in {**was, **becomes} if was.get(key) != becomes.get(key)]
        if None not in (self.before, self.after) and not keys:
            return ["position"]
        return keys


@dataclass(frozen=True, slots=True)
class SharedPlan:
    """A change that is checked: the whole before and after, entry by entry, and what it moves."""

    before: SharedSettings
    after: SharedSettings
    changes: Sequence[EntryChange]
    moves: Sequence[MovedMoney]

    def check_money(self, *, is_meant: bool) -> None:
        """Raise SettingError if the change moves money that was reported, and nobody means that."""
        if not self.moves or is_meant:
            return
        more = f", and {len(self.moves) - 1} more" if len(self.moves) > 1 else ""
        raise SettingError(
            self.moves[0].section,
            f"a change that begins with a later hour, or {MEANT} to say that it is meant",
            Text(f"one that moves money of hours that began: {self.moves[0].text}{more}"),
            "the fleet's settings",
        )


# Checks a whole as a settings file, and returns what it declares.
Check = Callable[[SharedSettings], Settings]


def planned(
    before: SharedSettings, entries: Iterable[SharedEntry], check: Check, now_hour: int
) -> SharedPlan:
    """Return the change to these entries as a whole. Raises SettingError if it is not valid."""
    after = SharedSettings(before.version + 1, in_order(entries), before.restart_version)
    check(after)
    old = {(one.section, one.name): one for one in before.entries}
    named = {(one.section, one.name): one for one in after.entries}
    changes = [
        EntryChange(old.get(key), named.get(key))
        for key in {**named, **old}
        if old.get(key) != named.get(key)
    ]
    moves = moved_money(_book_of(before), _book_of(after), now_hour)
    return SharedPlan(before, after, changes, moves)


def _book_of(settings: SharedSettings) -> PriceBook:
    """Return the prices that are shared; those of single servers do not change with them."""
    found = {
        section: [_checked(settings, entry) for entry in settings.of(section)]
        for section in ("prices", "energy_prices", "overheads")
    }
    return price_book(None, **found)


def _checked(settings: SharedSettings, entry: SharedEntry) -> Any:
    return checked_entry(entry.section, entry.name, entry.table, settings.version)


def restarted(before: SharedSettings, after_version: int) -> SharedSettings:
    """Return the same entries under a number that is above all that servers have.

    Raises SettingError for a number below the latest version.
    """
    if after_version < before.version:
        expected = f"the highest version that a server has, {before.version} or more"
        raise SettingError("--after", expected, after_version, "command line")
    version = after_version + 1
    return SharedSettings(version, before.entries, version)


def pushed(before: SharedSettings, settings: Settings, where: str) -> list[SharedEntry]:
    """Return the entries that settings declare. Rules keep their positions if they can.

    Raises SettingError for an entry without a name, or two with the same.
    """
    entries: list[SharedEntry] = []
    for section in SHARED_SECTIONS:
        seen: set[str] = set()
        for place, declared in enumerate(getattr(settings, section)):
            name = _name_of(section, declared)
            if name is None or name in seen:
                key = f"{section}[{place}].{'name' if section in _NAMED else 'id'}"
                got = Text("nothing") if name is None else Text(f"{name!r} twice")
                raise SettingError(key, "a name of its own for each shared entry", got, where)
            seen.add(name)
            entries.append(SharedEntry(section, name, _json_of(declared)))
    return [*(one for one in entries if one.section != ORDERED), *_placed(before, entries)]


def _placed(before: SharedSettings, entries: Iterable[SharedEntry]) -> list[SharedEntry]:
    """Return the rules with positions: those that they had, where that is their order."""
    rules = [one for one in entries if one.section == ORDERED]
    had = {one.name: one.position for one in before.of(ORDERED)}
    positions = [had.get(rule.name) for rule in rules]
    known = [position for position in positions if position is not None]
    if len(known) < len(rules) or any(a >= b for a, b in zip(known, known[1:], strict=False)):
        positions = [_STEP * number for number in range(1, len(rules) + 1)]
    return [
        rule._replace(position=position) for rule, position in zip(rules, positions, strict=True)
    ]


def put(
    before: SharedSettings,
    section: str,
    name: str,
    table: Mapping[str, Any],
    position: int | None = None,
) -> list[SharedEntry]:
    """Return the entries with one more, or with another table for one that is there.

    A new rule without a position is the last. Raises SettingError for a table that is none.
    """
    _refuse_other_section(section)
    key = "name" if section in _NAMED else "id"
    if position is not None and section != ORDERED:
        raise SettingError("position", f"none in {section}, where order means nothing", position)
    if table.get(key, name) != name:
        raise SettingError(f"{section}.{key}", f"{name!r}, as the entry is named", table[key])
    declared = checked_entry(section, name, {**table, key: name}, before.version + 1)
    entry = SharedEntry(section, name, _json_of(declared))
    if section == ORDERED:
        rules = {one.name: one.position or 0 for one in before.of(ORDERED)}
        last = max(rules.values(), default=0) + _STEP
        entry = entry._replace(position=rules.get(name, last) if position is None else position)
    others = [one for one in before.entries if (one.section, one.name) != (section, name)]
    return [*others, entry]


def ended(before: SharedSettings, section: str, name: str) -> list[SharedEntry]:
    """Return the entries without one. Raises SettingError if it is not there."""
    _refuse_other_section(section)
    find(before, section, name)
    return [one for one in before.entries if (one.section, one.name) != (section, name)]


def find(settings: SharedSettings, section: str, name: str) -> SharedEntry:
    """Return an entry. Raises SettingError if it is not there."""
    for one in settings.of(section):
        if one.name == name:
            return one
    got = Text(f"no {name!r} at version {settings.version}")
    raise SettingError(section, "the name of an entry", got, "the fleet's settings")


def check_entries(settings: SharedSettings) -> None:
    """Raise SettingError for an entry that this version of the meter does not understand."""
    for one in settings.entries:
        _refuse_other_section(one.section)
        _checked(settings, one)


def _refuse_other_section(section: str) -> None:
    if section not in SHARED_SECTIONS:
        expected = f"one of {', '.join(SHARED_SECTIONS)}"
        raise SettingError("section", expected, section, "the fleet's settings")


def _name_of(section: str, declared: Any) -> str | None:
    name: str | None = declared.name if section in _NAMED else declared.id
    return name


def _json_of(declared: BaseModel) -> str:
    return canonical(declared.model_dump(mode="json", exclude_defaults=True))
