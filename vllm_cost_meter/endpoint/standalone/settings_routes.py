"""Routes by which an operator reads and changes the settings that a fleet shares.

They are there where the endpoint answers from a fleet's database. They need the admin token, and
one that is set: on loopback without a token anybody may read, but nobody may change a price. The
role of this process in the database must be allowed to insert them, or a change is refused there.

Invariant: a change is made on the version that its maker has seen, or not at all.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from vllm_cost_meter.config.shared_changes import Check, SharedPlan, ended, planned, put
from vllm_cost_meter.endpoint.access import Access
from vllm_cost_meter.endpoint.dependencies import FOR_ADMINS
from vllm_cost_meter.errors import ConflictError, SettingError
from vllm_cost_meter.ledger.fleet.opening import shared_store
from vllm_cost_meter.ledger.fleet.settings_answers import SharedVersionRow, version_row
from vllm_cost_meter.records.shared_settings import SharedEntry, SharedSettings
from vllm_cost_meter.units.time import instant_of

PATH = "/cost/fleet/settings"
VERSIONS_MAX = 1_000
BY_CHARS_MAX = 100


class SharedAnswer(TypedDict):
    """The settings that a fleet shares, as they are with a version."""

    version: int
    """Its number; 0 if nobody ever made one."""
    settings: dict[str, list[dict[str, Any]]]
    """Each section of a settings file, with its entries in their order."""


class SharedHistory(TypedDict):
    """The versions of the fleet's settings."""

    versions: list[SharedVersionRow]
    """The newest first."""


class PlannedChange(TypedDict):
    """What becomes of one entry."""

    kind: str
    """`create`, `change` or `end`."""
    section: str
    """The section of the settings file."""
    name: str
    """The entry's name there, or its id."""
    keys: list[str]
    """The keys that differ."""


class MovedHours(TypedDict):
    """Hours that began already, whose price the change changes."""

    section: str
    """`prices`, `energy_prices` or `overheads`."""
    line: str
    """For which runs, or the name of the overhead."""
    begins: str | None
    """RFC 3339: the first such hour; null if there was no price before."""
    ends: str
    """RFC 3339: the end of the last one."""
    before: str | None
    """The price that held; null if none did."""
    after: str | None
    """The price that holds instead; null if none does."""


class SharedChanged(TypedDict):
    """What a change of the fleet's settings did."""

    version: int
    """The latest version after it."""
    is_written: bool
    """Whether it was made; a dry run, or a change of nothing, was not."""
    changes: list[PlannedChange]
    """Entry by entry."""
    moves: list[MovedHours]
    """What it changes in costs that were reported already."""


class SharedEnd(BaseModel):
    """Which entry to end."""

    model_config = ConfigDict(extra="forbid")

    section: str = Field(description="The section of the settings file.")
    name: str = Field(description="The entry's name there, or its id.")
    expected_version: int = Field(description="The latest version, as its maker has seen it.")
    moves_money: bool = Field(
        False, description="Whether it may change what reports say of hours that began already."
    )
    dry_run: bool = Field(False, description="Whether only to say what would change.")
    changed_by: str | None = Field(
        None,
        min_length=1,
        max_length=BY_CHARS_MAX,
        description="Who makes the change, for the history; beside the address that it came from.",
    )


class SharedPut(SharedEnd):
    """An entry to create, or to put in the place of one that is there."""

    entry: dict[str, Any] = Field(description="The whole entry, as a settings file has it.")
    position: int | None = Field(
        None, description="Where a rule stands among the others; a new one is the last without it."
    )


def add_settings_routes(app: FastAPI, url: str, access: Access, check: Check) -> None:
    """Add the routes for the fleet at a URL; `check` checks a whole beside the other settings."""

    @app.get(PATH, dependencies=FOR_ADMINS)
    def shared_settings(
        version: Annotated[
            int | None, Query(ge=0, description="An earlier version; the latest by default.")
        ] = None,
    ) -> SharedAnswer:
        """Return the settings that the fleet shares."""
        with shared_store(url) as store:
            found = store.read(version)
        return {"version": found.version, "settings": found.tables()}

    @app.get(f"{PATH}/history", dependencies=FOR_ADMINS)
    def shared_history(
        limit: Annotated[int, Query(ge=1, le=VERSIONS_MAX, description="Versions at most.")] = 50,
        before: Annotated[
            int | None, Query(ge=1, description="Only versions before this one.")
        ] = None,
    ) -> SharedHistory:
        """Return who changed what and when."""
        with shared_store(url) as store:
            return {"versions": [version_row(each) for each in store.history(limit, before)]}

    change = functools.partial(_change, url, access, check)

    @app.put(f"{PATH}/entry", dependencies=FOR_ADMINS)
    def put_entry(given: SharedPut, request: Request) -> SharedChanged:
        """Create or replace one entry of the settings that the fleet shares."""
        return change(
            given,
            request,
            lambda now: put(now, given.section, given.name, given.entry, given.position),
        )

    @app.post(f"{PATH}/end", dependencies=FOR_ADMINS)
    def end_entry(given: SharedEnd, request: Request) -> SharedChanged:
        """End one entry of the settings that the fleet shares; history keeps it."""
        return change(given, request, lambda now: ended(now, given.section, given.name))


def _change(
    url: str,
    access: Access,
    check: Check,
    given: SharedEnd,
    request: Request,
    entries: Callable[[SharedSettings], Sequence[SharedEntry]],
) -> SharedChanged:
    """Make a change, or only say what it does. Raises HTTPException, LedgerError."""
    if access.admin_sha256 is None:
        raise HTTPException(
            403, "expected an admin token to be set (COST_METER_ADMIN_TOKEN), as this changes money"
        )
    try:
        with shared_store(url) as store:
            before = store.read()
            if before.version != given.expected_version:
                said = f"expected_version: expected {before.version}, the latest version, got"
                raise ConflictError(f"{said} {given.expected_version}", before.version)
            plan = planned(before, entries(before), check, store.now_hour())
            plan.check_money(is_meant=given.moves_money or given.dry_run)
            is_written = bool(plan.changes) and not given.dry_run
            if is_written:
                store.change(before, plan.after, _changer(given.changed_by, request))
    except SettingError as error:
        raise HTTPException(422, str(error)) from None
    except ConflictError as error:
        raise HTTPException(409, str(error)) from None
    return _answer(plan, is_written=is_written)


def _changer(said: str | None, request: Request) -> str:
    host = "an unknown address" if request.client is None else request.client.host
    return f"{said or 'an operator'}, by HTTP from {host}"


def _answer(plan: SharedPlan, *, is_written: bool) -> SharedChanged:
    return {
        "version": plan.after.version if is_written else plan.before.version,
        "is_written": is_written,
        "changes": [
            {
                "kind": change.kind,
                "section": change.entry.section,
                "name": change.entry.name,
                "keys": change.keys,
            }
            for change in plan.changes
        ],
        "moves": [
            {
                "section": moved.section,
                "line": moved.line,
                "begins": instant_of(moved.from_hour),
                "ends": instant_of(moved.until_hour) or "",
                "before": moved.before,
                "after": moved.after,
            }
            for moved in plan.moves
        ],
    }
