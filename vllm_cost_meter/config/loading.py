"""Load the settings from environment and TOML file, and say in one line what is wrong with them.

An error names the key, the place, what was expected and what came. For a key in a long list of
tables it names the file's line too, so that nobody has to count. `tomllib` gives no lines, so
`line_of` searches the text for the table's header and the key below it. It finds no line for a list
written inline or a key in quotes; then the message names only the key.

Where a fleet shares settings, its sections come from there as a whole: by default from the copy
that this server keeps (`kept_copy.py`). Then no other place may have one of them.

Invariant: an error never shows a secret value.
"""

import difflib
import os
import re
import secrets
import tomllib
from collections.abc import Callable, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import (
    BaseModel,
    SecretStr,
    ValidationError,
)
from pydantic_settings import (
    EnvSettingsSource,
    SettingsError,
)

from vllm_cost_meter.config import types as t
from vllm_cost_meter.config.budgets import BudgetSetting
from vllm_cost_meter.config.engine import PREFIX, with_pod_labels
from vllm_cost_meter.config.fleet import FleetPlace
from vllm_cost_meter.config.invoices import (
    InvoiceSetting,
    InvoiceSettings,
    RateSetting,
    ResourceSetting,
)
from vllm_cost_meter.config.kept_copy import KEY as SHARED_KEY
from vllm_cost_meter.config.kept_copy import kept_settings
from vllm_cost_meter.config.prices import EnergyPriceSetting, OverheadSetting, PriceSetting
from vllm_cost_meter.config.reading import READ_WITHIN_S, read_text
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.config.tenants import (
    RuleSetting,
    TenantSetting,
)
from vllm_cost_meter.errors import SettingError, UnreadableError
from vllm_cost_meter.records.shared_settings import SHARED_SECTIONS, SharedEntry, SharedSettings

# These names are not settings: they choose the build and the tests' set-up.
OTHER_NAMES = frozenset({"COST_METER_PURE_PYTHON", "COST_METER_SANITIZE", "COST_METER_CACHE"})

# The settings that are lists of tables, each with the model for one table.
SECTIONS: Mapping[str, type[BaseModel]] = {
    "tenants": TenantSetting,
    "tenant_rules": RuleSetting,
    "prices": PriceSetting,
    "energy_prices": EnergyPriceSetting,
    "overheads": OverheadSetting,
    "budgets": BudgetSetting,
    "invoices": InvoiceSetting,
    "invoice_resources": ResourceSetting,
    "invoice_rates": RateSetting,
}

# A message about these long tables names the line too.
_WITH_LINES = ("prices", "energy_prices", "overheads", *InvoiceSettings.model_fields)


# From where the shared sections come, once it is known where the ledger and the fleet are.
SharedOf = Callable[[FleetPlace], SharedSettings]


class _Sources(NamedTuple):
    """All values as they were given, by place; those of the environment override the file."""

    environment: Mapping[str, Any]
    file: Mapping[str, Any]
    path: str | None
    text: str
    shared: SharedSettings | None = None

    def values(self) -> dict[str, Any]:
        shared = {} if self.shared is None else self.shared.tables()
        return {**self.file, **self.environment, **shared}

    def without(self, names: Sequence[str]) -> "_Sources":
        """Return the sources without these settings."""
        environment, file = (
            {name: value for name, value in given.items() if name not in names}
            for given in (self.environment, self.file)
        )
        return self._replace(environment=environment, file=file)

    def with_a_secret(self) -> "_Sources":
        """Return the sources with a gateway's secret that nobody knows, where none is given."""
        if "gateway_secret" in self.values():
            return self
        secret = secrets.token_hex(t.TOKEN_CHARS_MIN)
        return self._replace(environment={**self.environment, "gateway_secret": secret})


def load_settings(
    environ: Mapping[str, str] = os.environ,
    config: str | Path | None = None,
    text: str | None = None,
    read_within_s: float = READ_WITHIN_S,
    shared: SharedOf = kept_settings,
) -> Settings:
    """Return the settings from this environment and the file that it (or `config`) names.

    The environment overrides the file. `text`, if given, replaces the file's content. Where a fleet
    shares settings, `shared` gives them. Raises SettingError with one line: the key, the place,
    what was expected and what came. A file that cannot be read within `read_within_s` is one of
    these errors.
    """
    sources = _given(environ, config, text, read_within_s)
    if "fleet_settings" in sources.values():
        place = _place_of(sources)
        if place.fleet_settings:
            _refuse_two_places(sources)
            sources = sources._replace(shared=shared(place))
    settings = _checked(sources)
    # Engines take these too, and a start must fail before they do.
    with_pod_labels(settings.labels, environ)
    return settings


def fleet_place(
    environ: Mapping[str, str] = os.environ, config: str | Path | None = None
) -> FleetPlace:
    """Return where the ledger and the fleet are, by this environment and file.

    Nothing else is checked. Raises SettingError.
    """
    return _place_of(_given(environ, config, None, READ_WITHIN_S))


def file_settings(path: str | Path) -> Settings:
    """Return the settings of a file alone, whose shared sections are meant for a fleet.

    What the environment says of other settings goes before the file. Each server has its own
    gateway secret, so one is taken to be there. Raises SettingError.
    """
    sources = _given(os.environ, path, None, READ_WITHIN_S)
    environment = {
        name: value
        for name, value in sources.environment.items()
        if name not in (*SHARED_SECTIONS, "fleet_settings")
    }
    return _checked(sources._replace(environment=environment).with_a_secret())


def settings_with(
    shared: SharedSettings,
    environ: Mapping[str, str] = os.environ,
    config: str | Path | None = None,
) -> Settings:
    """Return the settings with these shared sections in place of those given: for a check of them.

    As in `file_settings` there is a gateway's secret. What becomes of requests that no rule names
    each server says itself. Raises SettingError.
    """
    sources = _given(environ, config, None, READ_WITHIN_S)
    sources = sources.without((*SHARED_SECTIONS, "fleet_settings", "unnamed_requests"))
    return _checked(sources.with_a_secret()._replace(shared=shared))


def _given(
    environ: Mapping[str, str], config: str | Path | None, text: str | None, read_within_s: float
) -> _Sources:
    given = {name: value for name, value in environ.items() if name.upper().startswith(PREFIX)}
    _refuse_unknown_names(given)
    if config is not None:
        given["COST_METER_CONFIG"] = str(config)
    path = given.get("COST_METER_CONFIG")
    from_file, text = ({}, "") if path is None else _read_file(path, text, read_within_s)
    source = EnvSettingsSource(Settings)
    source.env_vars = {name.lower(): value for name, value in given.items()}
    try:
        from_environment = source()
    except SettingsError as error:  # Only the sections raise it: they are JSON.
        section = next(name for name in SECTIONS if f'"{name}"' in str(error))
        key = f"{PREFIX}{section.upper()}"
        got = t.Text("text that is not JSON")
        raise SettingError(key, _expected(Settings, section), got) from None
    return _Sources(from_environment, from_file, path, text)


def _checked(sources: _Sources) -> Settings:
    try:
        settings = Settings(**sources.values())
    except ValidationError as error:
        problems = error.errors(include_url=False)
    else:
        settings.note_shared(None if sources.shared is None else sources.shared.version)
        return settings
    # The error is raised outside `except`, because the caught error holds secret values.
    # Unknown keys come first: a key is often missing because it was mistyped.
    problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    raise _setting_error(problem, sources)


def checked_entry(section: str, name: str, table: Mapping[str, Any], version: int) -> BaseModel:
    """Return one entry of the shared settings, checked by itself. Raises SettingError."""
    try:
        return SECTIONS[section].model_validate(table)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    named = SharedSettings(version, (SharedEntry(section, name, "{}"),))
    within = {**problem, "loc": (section, 0, *problem["loc"])}
    raise _setting_error(within, _Sources({}, {}, None, "", named))


def _place_of(sources: _Sources) -> FleetPlace:
    try:
        return FleetPlace.of(sources.values())
    except ValidationError as error:
        problems = error.errors(include_url=False)
    raise _setting_error(problems[0], sources)


def _refuse_two_places(sources: _Sources) -> None:
    """Raise SettingError if a section that the fleet shares is given here as well."""
    for name in SHARED_SECTIONS:
        for values, key, where in (
            (sources.environment, PREFIX + name.upper(), "environment"),
            (sources.file, name, _line(sources.path or "")),
        ):
            if name in values:
                expected = f"it in the fleet's settings alone ({SHARED_KEY})"
                raise SettingError(key, expected, t.Text("it here as well"), where)


def _refuse_unknown_names(given: Mapping[str, str]) -> None:
    known = OTHER_NAMES | {PREFIX + field.upper() for field in Settings.model_fields}
    for name in sorted(given.keys() - known):
        like = difflib.get_close_matches(name.upper(), known, n=1)
        hint = f", perhaps {like[0]}" if like else ""
        if re.search(r"_SERVICE_(HOST|PORT)|_TCP|_UDP", name):
            hint = f" ({t.KUBERNETES})"
        raise SettingError(_line(name), f"a known setting{hint}", t.Text("an unknown name"))


def _read_file(path: str, text: str | None, read_within_s: float) -> tuple[dict[str, Any], str]:
    """Return a TOML file's values, with decimals exactly as written, and its text."""
    key, expected = f"{PREFIX}CONFIG", _expected(Settings, "config")
    try:
        if text is None:
            text = read_text(path, read_within_s)
        values = tomllib.loads(text, parse_float=Decimal)
    except OSError as error:
        got = t.Text(f"{_line(path)!r}: {_line(str(error.strerror or error))}")
        raise UnreadableError(key, expected, got) from None
    except (ValueError, RuntimeError) as error:
        raise SettingError(key, expected, t.Text(f"{_line(path)!r}: {_line(str(error))}")) from None
    where = _line(path)
    for name in values:
        if name == "config":
            got = t.Text("the key in the file itself")
            raise SettingError(name, "COST_METER_CONFIG in the environment", got, where)
        if name not in Settings.model_fields:
            like = difflib.get_close_matches(name, Settings.model_fields, n=1)
            hint = f", perhaps {like[0]}" if like else ""
            raise SettingError(_line(name), f"a known key{hint}", t.Text("an unknown one"), where)
    return values, text


def _setting_error(problem: Mapping[str, Any], sources: _Sources) -> SettingError:
    wrong = problem.get("ctx", {}).get("error")
    field, *inner = problem["loc"]
    inner += wrong.within if isinstance(wrong, t.WrongError) else ()
    key, where = _place_of_error(str(field), inner, sources)
    model: type[BaseModel] = Settings
    names = [step for step in inner if isinstance(step, str)]
    if field in SECTIONS and names:
        model, field = SECTIONS[field], names[0]
    got: object = _shown(problem["input"], secret=_is_secret(model, field))
    expected = _expected(model, field)
    if isinstance(wrong, t.WrongError):
        expected, got = wrong.expected or expected, got if wrong.got is None else wrong.got
    elif problem["type"] == "missing":
        got = t.Text("nothing")
    elif problem["type"] == "extra_forbidden":
        got = t.Text("an unknown key")
    return SettingError(_line(key), expected, got, where)


def _place_of_error(field: str, inner: Sequence[int | str], sources: _Sources) -> tuple[str, str]:
    """Return the key of a wrong value as its place has it, and that place."""
    steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in inner)
    if sources.shared is not None and field in SHARED_SECTIONS:
        if inner and isinstance(inner[0], int):
            named = sources.shared.of(field)[inner[0]].name
            steps = f" {named!r}" + steps.removeprefix(f"[{inner[0]}]")
        return f"{field}{steps}", f"the fleet's settings, version {sources.shared.version}"
    if field not in sources.file or field in sources.environment or not sources.path:
        return f"{PREFIX}{field.upper()}{steps}", "environment"
    where = _line(sources.path)
    if field in _WITH_LINES and (line := line_of(sources.text, (field, *inner))):
        where += f":{line}"
    return f"{field}{steps}", where


def _expected(model: type[BaseModel], field: str) -> str:
    if field not in model.model_fields:
        return f"one of {', '.join(model.model_fields)}"
    return str(_extra(model, field)["expected"])


def _is_secret(model: type[BaseModel], field: str) -> bool:
    return field not in model.model_fields or bool(_extra(model, field)["secret"])


def _extra(model: type[BaseModel], field: str) -> Mapping[str, Any]:
    extra = model.model_fields[field].json_schema_extra
    return extra if isinstance(extra, Mapping) else {}


def _shown(value: object, *, secret: bool) -> object:
    """Return the part of a value that a message may show: never a secret, never a long text."""
    if isinstance(value, str | SecretStr) and secret:
        return t.Text(f"a text of {len(value)} characters")
    if isinstance(value, Decimal | date | time) and not secret:
        return t.Text(value if isinstance(value, Decimal) else value.isoformat())
    if secret or not isinstance(value, str | int | float | None):
        return t.Text(f"a value of type {type(value).__name__}")
    if isinstance(value, str) and len(value) > t.SHOWN_CHARS_MAX:
        return value[: t.SHOWN_CHARS_MAX] + "..."
    return value


def _line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def line_of(text: str, path: Sequence[int | str]) -> int | None:
    """Return the line, from 1, of a key such as ("prices", 1, "amount"); None if not found.

    For a missing key it is the line on which its table begins.
    """
    if len(path) < 2 or not isinstance(path[1], int):
        return None
    lines = text.splitlines()
    header = re.compile(rf"\s*\[\[\s*{re.escape(str(path[0]))}\s*\]\]")
    headers = [number for number, line in enumerate(lines) if header.match(line)]
    if path[1] >= len(headers):
        return None
    first = headers[path[1]]
    key = re.compile(rf"\s*{re.escape(str(path[2]))}\s*=") if len(path) > 2 else None
    for number, line in enumerate(lines[first + 1 :], first + 1):
        if key is not None and key.match(line):
            return number + 1
        if re.match(r"\s*\[", line):
            break
    return first + 1
