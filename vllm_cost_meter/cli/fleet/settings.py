"""The commands `fleet settings ...`: push, show, history, set, end and restart what a fleet shares.

A change is checked as a settings file is, as a whole, before it is written as the next version. It
is refused if another change came first, or if it would move money that was reported already and
nobody said that this is meant.

Invariant: nothing is ever deleted, and no API key is printed or written, only its SHA-256.
"""

import getpass
import json
import os
import platform
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vllm_cost_meter.cli.fleet.database import FleetOption, fleet_url
from vllm_cost_meter.cli.options import (
    Config,
    Csv,
    Json,
    Output,
    Wide,
    new_group,
    one_line_errors,
    print_answer,
)
from vllm_cost_meter.cli.tenants import hashes_of
from vllm_cost_meter.config.loading import file_settings, settings_with
from vllm_cost_meter.config.shared_changes import (
    SharedPlan,
    ended,
    planned,
    pushed,
    put,
    restarted,
)
from vllm_cost_meter.config.shared_text import plan_lines, toml_text
from vllm_cost_meter.console import print_lines, print_table
from vllm_cost_meter.errors import ConflictError, SettingError
from vllm_cost_meter.ledger.fleet.opening import shared_store
from vllm_cost_meter.ledger.fleet.settings_answers import SharedVersionRow, version_row
from vllm_cost_meter.ledger.fleet.shared_settings import SharedStore
from vllm_cost_meter.records.shared_settings import SharedSettings
from vllm_cost_meter.units.text import plain

app = new_group("settings")

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")]
MovesMoney = Annotated[
    bool,
    typer.Option(
        "--moves-money", help="Let it change what reports say of hours that began already."
    ),
]
Expect = Annotated[
    int | None,
    typer.Option(metavar="VERSION", help="Refuse it unless this is the latest version."),
]
Section = Annotated[
    str,
    typer.Argument(
        help="tenants, tenant_rules, prices, energy_prices, overheads or budgets.",
        metavar="SECTION",
    ),
]
EntryName = Annotated[str, typer.Argument(help="The entry's name, or its id.", metavar="NAME")]


@app.command()
def push(
    file: Annotated[Path, typer.Argument(help="A settings file, of which the sections count.")],
    dry_run: DryRun = False,
    moves_money: MovesMoney = False,
    fleet: FleetOption = None,
    config: Config = None,
) -> None:
    """Make the fleet's settings equal to those of a file.

    Entries are created, changed and ended, and each is printed. An entry of prices, energy_prices,
    overheads and tenant_rules needs an id. An empty database gets a fleet's tables.

    Example: vllm-cost-meter fleet settings push meter.toml --dry-run
    """
    with one_line_errors(), _store(fleet, config, creates=not dry_run) as store:
        before = store.read()
        declared = file_settings(file)
        entries = pushed(before, declared, str(file))
        plan = planned(before, entries, _check(file), store.now_hour())
        _carry_out(store, plan, dry_run=dry_run, moves_money=moves_money)


@app.command()
def show(
    version: Annotated[
        int | None, typer.Option(min=0, help="An earlier version; otherwise the latest.")
    ] = None,
    fleet: FleetOption = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Show the settings that a fleet shares, as a settings file.

    Example: vllm-cost-meter fleet settings show --version 3
    """
    with one_line_errors(), _store(fleet, config) as store:
        found = store.read(version)
    if as_json:
        print(json.dumps({"version": found.version, "settings": found.tables()}, indent=2))
    else:
        print_lines(toml_text(found).splitlines())


@app.command()
def history(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Versions at most.")] = 50,
    fleet: FleetOption = None,
    config: Config = None,
    wide: Wide = False,
    as_json: Json = False,
    as_csv: Csv = False,
    output: Output = None,
) -> None:
    """Show who changed what and when, the newest version first.

    Example: vllm-cost-meter fleet settings history --limit 10
    """
    with one_line_errors(), _store(fleet, config) as store:
        versions = [version_row(each) for each in store.history(limit)]
    rows = [{**each, "changes": _changes_text(each)} for each in versions]

    def table() -> None:
        shown = Table(box=None, pad_edge=False)
        for column in ("version", "changed at", "changed by", "role", "changes"):
            shown.add_column(column, no_wrap=True)
        for row in rows:
            names = ("version", "changed_at", "changed_by", "changed_as", "changes")
            shown.add_row(*(plain(str(row[name])) for name in names))
        print_table(shown, important=(0, 1, 4, 2, 3), wide=wide)

    print_answer({"versions": versions}, rows, table, as_json=as_json, as_csv=as_csv, output=output)


@app.command("set")
def set_(
    section: Section,
    name: EntryName,
    values: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Keys of the entry, their values as in TOML or as plain text; none removes a key.",
        ),
    ] = None,
    key_from_env: Annotated[
        list[str] | None,
        typer.Option(metavar="VAR", help="An environment variable with an API key of a tenant."),
    ] = None,
    position: Annotated[
        int | None, typer.Option(help="Where a rule stands among the others.")
    ] = None,
    expect: Expect = None,
    dry_run: DryRun = False,
    moves_money: MovesMoney = False,
    fleet: FleetOption = None,
    config: Config = None,
) -> None:
    """Create or change one entry.

    Keys that are not named stay as they are. API keys are added, by their SHA-256.

    Example: vllm-cost-meter fleet settings set prices h100 amount=2.49 scope=gpu kind=reserved
    """
    with one_line_errors(), _store(fleet, config) as store:
        before = _expected(store, expect)
        found = [one.table for one in before.of(section) if one.name == name]
        table = _changed(found[0] if found else {}, values or ())
        if hashes := hashes_of(key_from_env):
            known = table.get("api_key_sha256", [])
            table["api_key_sha256"] = [*known, *(one for one in hashes if one not in known)]
        entries = put(before, section, name, table, position)
        plan = planned(before, entries, _check(config), store.now_hour())
        _carry_out(store, plan, dry_run=dry_run, moves_money=moves_money)


@app.command()
def end(
    section: Section,
    name: EntryName,
    expect: Expect = None,
    dry_run: DryRun = False,
    moves_money: MovesMoney = False,
    fleet: FleetOption = None,
    config: Config = None,
) -> None:
    """End one entry; history keeps it.

    Example: vllm-cost-meter fleet settings end budgets trial
    """
    with one_line_errors(), _store(fleet, config) as store:
        before = _expected(store, expect)
        entries = ended(before, section, name)
        plan = planned(before, entries, _check(config), store.now_hour())
        _carry_out(store, plan, dry_run=dry_run, moves_money=moves_money)


@app.command()
def restart(
    after: Annotated[
        int, typer.Option(min=0, help="The highest version that a server has, as its log says.")
    ],
    fleet: FleetOption = None,
    config: Config = None,
) -> None:
    """Let servers take over a database that was restored.

    A server leaves alone what does not go on from the version that it has. This gives what the
    database has now a version above all of them, which each server takes over.

    Example: vllm-cost-meter fleet settings restart --after 17
    """
    with one_line_errors(), _store(fleet, config) as store:
        before = store.read()
        new = restarted(before, after)
        store.change(before, new, changer())
    print(f"version {before.version} is now version {new.version}, for every server")


def _changes_text(row: SharedVersionRow) -> str:
    """Return what a version changed, for a cell."""
    ended_ = (" (ended)" if one["entry"] is None else "" for one in row["changes"])
    named = (f"{one['section']} {one['name']}" for one in row["changes"])
    texts = [f"{name}{end}" for name, end in zip(named, ended_, strict=True)]
    return ", ".join(["restart", *texts] if row["is_restart"] else texts)


# -- helpers ------------------------------------------------------------------------------------


def changer() -> str:
    """Return who runs this command: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # In a container a user may have no name.
        user = str(os.getuid())
    return f"{user}@{platform.node()}"


@contextmanager
def _store(
    fleet: str | None, config: Path | None, *, creates: bool = False
) -> Iterator[SharedStore]:
    with shared_store(fleet_url(fleet, config), creates=creates) as store:
        yield store


def _check(config: Path | None) -> Any:
    return lambda shared: settings_with(shared, config=config)


def _expected(store: SharedStore, version: int | None) -> SharedSettings:
    before = store.read()
    if version is not None and version != before.version:
        raise ConflictError(
            f"--expect: expected version {before.version}, the latest, got {version}",
            before.version,
        )
    return before


def _carry_out(store: SharedStore, plan: SharedPlan, *, dry_run: bool, moves_money: bool) -> None:
    """Print a change, and make it unless it is only tried."""
    if not plan.changes:
        print(f"nothing changes: version {plan.before.version}")
        return
    print_lines(plan_lines(plan))
    plan.check_money(is_meant=moves_money or dry_run)
    if dry_run:
        print("nothing was written: --dry-run")
        return
    store.change(plan.before, plan.after, changer())
    print(f"version {plan.after.version}")


def _changed(table: dict[str, Any], values: Iterable[str]) -> dict[str, Any]:
    """Return an entry's table with other values; a key without a value is removed."""
    changed = dict(table)
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise SettingError("KEY=VALUE", "a key, `=` and a value", value, "command line")
        if text:
            changed[key] = _toml_value(text)
        else:
            changed.pop(key, None)
    return changed


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}", parse_float=Decimal)["value"]
    except tomllib.TOMLDecodeError:
        return text
