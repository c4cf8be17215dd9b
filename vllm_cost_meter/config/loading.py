"""Load the settings from environment and TOML file, and say in one line what is wrong with them.

An error names the key, the place, what was expected and what came. For a key in a long list of
tables it names the file's line too, so that nobody has to count. `tomllib` gives no lines, so
`line_of` searches the text for the table's header and the key below it. It finds no line for a list
written inline or a key in quotes; then the message names only the key.

Invariant: an error never shows a secret value.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

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
from vllm_cost_meter.config.invoices import (
    InvoiceSetting,
    InvoiceSettings,
    RateSetting,
    ResourceSetting,
)
from vllm_cost_meter.config.prices import EnergyPriceSetting, OverheadSetting, PriceSetting
from vllm_cost_meter.config.reading import READ_WITHIN_S, read_text
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.config.tenants import (
    RuleSetting,
    TenantSetting,
)
from vllm_cost_meter.errors import SettingError, UnreadableError

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


def load_settings(
    environ: Mapping[str, str] = os.environ,
    config: str | Path | None = None,
    text: str | None = None,
    read_within_s: float = READ_WITHIN_S,
) -> Settings:
    """Return the settings from this environment and the file that it (or `config`) names.

    The environment overrides the file. `text`, if given, replaces the file's content. Raises
    SettingError with one line: the key, the place, what was expected and what came. A file that
    cannot be read within `read_within_s` is one of these errors.
    """
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
    try:
        settings = Settings(**{**from_file, **from_environment})
    except ValidationError as error:
        problems = error.errors(include_url=False)
    else:
        # Engines take these too, and a start must fail before they do.
        with_pod_labels(settings.labels, environ)
        return settings
    # The error is raised outside `except`, because the caught error holds secret values.
    # Unknown keys come first: a key is often missing because it was mistyped.
    problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    raise _setting_error(problem, from_environment, from_file, path, text)


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


def _setting_error(
    problem: Mapping[str, Any],
    from_environment: Mapping[str, Any],
    from_file: Mapping[str, Any],
    path: str | None,
    text: str,
) -> SettingError:
    wrong = problem.get("ctx", {}).get("error")
    field, *inner = problem["loc"]
    inner += wrong.within if isinstance(wrong, t.WrongError) else ()
    in_file = field in from_file and field not in from_environment
    key = str(field) if in_file else PREFIX + str(field).upper()
    key += "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in inner)
    model: type[BaseModel] = Settings
    names = [step for step in inner if isinstance(step, str)]
    where = _line(path) if in_file and path else "environment"
    if in_file and field in _WITH_LINES and (line := line_of(text, (field, *inner))):
        where += f":{line}"
    if field in SECTIONS and names:
        model, field = SECTIONS[field], names[0]
    wrong = problem.get("ctx", {}).get("error")
    got: object = _shown(problem["input"], secret=_is_secret(model, field))
    expected = _expected(model, field)
    if isinstance(wrong, t.WrongError):
        expected, got = wrong.expected or expected, got if wrong.got is None else wrong.got
    elif problem["type"] == "missing":
        got = t.Text("nothing")
    elif problem["type"] == "extra_forbidden":
        got = t.Text("an unknown key")
    return SettingError(_line(key), expected, got, where)


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
