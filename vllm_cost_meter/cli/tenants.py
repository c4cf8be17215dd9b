"""The commands `tenants ...`: list, add, change and remove the tenants in the settings file.

The edited text is checked as at a server's start before it replaces the file, so a wrong edit
changes nothing. A server that runs with the file reloads it within seconds (`config.reload`).

Invariant: no API key is printed or written, only its SHA-256.
"""

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vllm_cost_meter.cli.options import (
    Config,
    Csv,
    Json,
    Output,
    Wide,
    new_group,
    one_line_errors,
    print_answer,
    settings_of,
)
from vllm_cost_meter.config import tenant_file
from vllm_cost_meter.config.engine import PREFIX
from vllm_cost_meter.config.loading import fleet_place, load_settings
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.config.tenant_file import Entry
from vllm_cost_meter.config.tenants import HASH_CHARS_SHOWN, TenantSetting
from vllm_cost_meter.config.types import TOKEN_CHARS_MIN, Text
from vllm_cost_meter.console import print_table
from vllm_cost_meter.errors import SettingError
from vllm_cost_meter.tenants.rules import sha256_of
from vllm_cost_meter.units.text import plain

app = new_group("tenants")

Name = Annotated[str, typer.Argument(help="The tenant's name.")]
KeySha256 = Annotated[
    list[str] | None, typer.Option(help="SHA-256 of an API key; repeat it for several.")
]
KeyFromEnv = Annotated[
    list[str] | None,
    typer.Option(metavar="VAR", help="An environment variable that holds an API key."),
]
TagsOption = Annotated[
    list[str] | None, typer.Option("--tag", metavar="KEY=VALUE", help="Repeat it for several.")
]
Parent = Annotated[str | None, typer.Option(help="The tenant that this one belongs to.")]
ReplyOption = Annotated[
    str | None, typer.Option(help="What its clients are told: all, headers or none.")
]
FailClosed = Annotated[
    bool | None,
    typer.Option(
        "--fail-closed/--no-fail-closed",
        help="Refuse its requests while nothing can be measured.",
        show_default=False,
    ),
]


@app.command("list")
def list_(
    config: Config = None,
    wide: Wide = False,
    as_json: Json = False,
    as_csv: Csv = False,
    output: Output = None,
) -> None:
    """List the tenants, their parents, tags and number of keys.

    Example: vllm-cost-meter tenants list --config meter.toml
    """
    with one_line_errors():
        tenants = settings_of(None, config).tenants
    rows = [_shown(tenant) for tenant in tenants]
    print_answer(
        {"tenants": rows},
        [{**row, **_joined(tenant)} for row, tenant in zip(rows, tenants, strict=True)],
        lambda: _show(tenants, wide=wide),
        as_json=as_json,
        as_csv=as_csv,
        output=output,
    )


def _joined(tenant: TenantSetting) -> dict[str, str]:
    """Return what has several values as one text, for a cell."""
    tags = ", ".join(f"{key}={value}" for key, value in sorted(tenant.tags.items()))
    return {"tags": tags, "api_key_sha256": ", ".join(_shown(tenant)["api_key_sha256"])}


def _show(tenants: Iterable[TenantSetting], *, wide: bool) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("tenant", "parent", "tags", "reply", "fail closed", "keys"):
        table.add_column(column, no_wrap=True, justify="right" if column == "keys" else "left")
    for tenant in tenants:
        tags = _joined(tenant)["tags"]
        cells = (tenant.name, tenant.owner or "-", tags or "-", tenant.reply or "-")
        closed = "yes" if tenant.fail_closed else "-"
        table.add_row(*map(plain, cells), closed, str(len(tenant.api_key_sha256)))
    print_table(table, important=(0, 5, 1, 2, 3, 4), wide=wide)


@app.command()
def add(
    name: Name,
    key_sha256: KeySha256 = None,
    key_from_env: KeyFromEnv = None,
    tag: TagsOption = None,
    parent: Parent = None,
    reply: ReplyOption = None,
    fail_closed: FailClosed = None,
    config: Config = None,
) -> None:
    """Add a tenant.

    A running server takes it over within seconds.

    Example: vllm-cost-meter tenants add search --key-from-env SEARCH_KEY --config meter.toml
    """
    with one_line_errors():
        keys = [*(key_sha256 or ()), *hashes_of(key_from_env)]
        tags = tenant_file.inline_table(_pairs(tag))
        given = {
            "api_key_sha256": keys,
            "parent": parent,
            "tags": tags,
            "reply": reply,
            "fail_closed": fail_closed,
        }
        entry = {"name": name, **{key: value for key, value in given.items() if value}}

        def edit(text: str, settings: Settings) -> str:
            if name in _names(settings):
                got = Text(f"{name!r}, which is there already: `tenants set` changes it")
                raise SettingError("NAME", "a new tenant", got, "command line")
            return tenant_file.added(text, entry)

        _edit(config, edit, f"added {name!r}")


@app.command("set")
def set_(
    name: Name,
    key_sha256: KeySha256 = None,
    key_from_env: KeyFromEnv = None,
    remove_key: Annotated[
        list[str] | None,
        typer.Option(metavar="SHA256", help="Take a key away; its first 8 digits will do."),
    ] = None,
    tag: TagsOption = None,
    parent: Parent = None,
    reply: ReplyOption = None,
    fail_closed: FailClosed = None,
    config: Config = None,
) -> None:
    """Change a tenant.

    Keys are added; anything else is replaced. An empty value removes it.

    Example: vllm-cost-meter tenants set search --tag team=web --config meter.toml
    """
    with one_line_errors():
        keys = [*(key_sha256 or ()), *hashes_of(key_from_env)]
        tags = _pairs(tag)
        simple = {"parent": parent, "reply": reply, "fail_closed": fail_closed}
        set_to = {key: value for key, value in simple.items() if value is not None}
        if not (keys or remove_key or tags or set_to):
            raise ValueError("tenants set: expected an option that changes something, got none")

        def change(entry: Entry) -> None:
            if keys or remove_key:
                _change_keys(entry, keys, remove_key or ())
            if tags:
                _put(entry.setdefault("tags", tenant_file.inline_table({})), tags)
                if not entry["tags"]:
                    del entry["tags"]
            _put(entry, set_to)

        def edit(text: str, settings: Settings) -> str:
            _check_known(name, settings)
            return tenant_file.changed(text, name, change)

        _edit(config, edit, f"changed {name!r}")


@app.command()
def remove(name: Name, config: Config = None) -> None:
    """Remove a tenant; its keys name nobody from then on.

    What it used stays in the ledger.

    Example: vllm-cost-meter tenants remove search --config meter.toml
    """

    def edit(text: str, settings: Settings) -> str:
        _check_known(name, settings)
        return tenant_file.removed(text, name)

    with one_line_errors():
        _edit(config, edit, f"removed {name!r}")


# -- helpers ------------------------------------------------------------------------------------


def _edit(config: Path | None, edit: Callable[[str, Settings], str], done: str) -> None:
    """Replace the settings file by its edited text if that is valid, and print what was done."""
    path = config or os.environ.get(f"{PREFIX}CONFIG")
    if path is None:
        raise SettingError("--config", "a settings file, or COST_METER_CONFIG", Text("neither"))
    if f"{PREFIX}TENANTS" in os.environ:
        got = Text("it, which goes before the file")
        raise SettingError(f"{PREFIX}TENANTS", "no tenants in the environment", got)
    if fleet_place(config=config).fleet_settings:
        got = Text(
            "COST_METER_FLEET_SETTINGS: `vllm-cost-meter fleet settings set tenants` does it"
        )
        raise SettingError("tenants", "them in the settings file", got, str(path))
    file = Path(path).expanduser()
    try:
        with tenant_file.alone(file):
            settings = load_settings(config=path)
            text = edit(file.read_bytes().decode(), settings)
            load_settings(config=path, text=text)
            tenant_file.replace_text(file, text)
    except OSError as error:
        got = Text(f"{str(path)!r}: {error.strerror}")
        raise SettingError("--config", "a file that can be replaced", got) from None
    print(plain(f"{path}: {done}"))


def _names(settings: Settings) -> list[str]:
    return [tenant.name for tenant in settings.tenants]


def _check_known(name: str, settings: Settings) -> None:
    if name not in _names(settings):
        like = difflib.get_close_matches(name, _names(settings), n=1)
        hint = f", perhaps {like[0]!r}" if like else ""
        raise SettingError("NAME", f"a declared tenant{hint}", name, "command line")


def hashes_of(variables: Iterable[str] | None) -> list[str]:
    """Return the SHA-256 of the API keys in these environment variables. Raises SettingError."""
    hashes = []
    for variable in variables or ():
        key = os.environ.get(variable, "").strip().encode()
        if (digest := sha256_of(key)) is None:
            got = Text(f"one of {len(key)} bytes" if key else "none")
            raise SettingError(variable, "an API key", got)
        if len(key) < TOKEN_CHARS_MIN:
            print(
                f"warning: {plain(variable)}: the API key has fewer than {TOKEN_CHARS_MIN}"
                " characters, so it could be guessed: give out a longer one",
                file=sys.stderr,
            )
        hashes.append(digest)
    return hashes


def _pairs(tags: Iterable[str] | None) -> dict[str, str]:
    pairs = {}
    for tag in tags or ():
        key, equals, value = tag.partition("=")
        if not equals:
            raise SettingError("--tag", "KEY=VALUE", tag, "command line")
        pairs[key] = value
    return pairs


def _put(entry: Entry, values: dict[str, Any]) -> None:
    """Set the keys that have a value, and delete those without one."""
    for key, value in values.items():
        if value:
            entry[key] = value
        elif key in entry:
            del entry[key]


def _change_keys(entry: Entry, more: Sequence[str], fewer: Sequence[str]) -> None:
    keys = entry.setdefault("api_key_sha256", [])
    for start in fewer:
        found = [key for key in keys if key.lower().startswith(start.lower())]
        if len(start) < HASH_CHARS_SHOWN or len(found) != 1:
            got = Text(f"{len(found)} that begin so" if found else "none that begins so")
            expected = f"at least {HASH_CHARS_SHOWN} digits of one of its keys' SHA-256"
            raise SettingError("--remove-key", expected, got, "command line")
        keys.remove(found[0])
    keys.extend(key for key in more if key.lower() not in {known.lower() for known in keys})


def _shown(tenant: TenantSetting) -> dict[str, Any]:
    return {
        "name": tenant.name,
        "parent": tenant.owner,
        "tags": tenant.tags,
        "reply": tenant.reply,
        "fail_closed": tenant.fail_closed,
        "api_key_sha256": [f"{digest[:HASH_CHARS_SHOWN]}..." for digest in tenant.api_key_sha256],
    }
