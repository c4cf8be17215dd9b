"""The settings: where they come from, what they may be, and the one line that says what is wrong.

Every setting has a name in the environment (`COST_METER_PORT`) and a key in a TOML file (`port`)
that COST_METER_CONFIG names; the environment beats the file. A name or key that the meter does
not know is an error and never skipped: a mistyped tenant or price would quietly bill nobody.

Settings are read in every vLLM process. Nothing here touches the network or the ledger, and no
message shows a secret: tokens, ledger URLs and API keys that stand where a hash belongs.

Invariant: `load_settings` returns settings whose every value was checked, or raises SettingError.
"""

import difflib
import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Mapping
from datetime import date, time
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from vllm_cost_meter import setting_prices
from vllm_cost_meter import setting_types as t
from vllm_cost_meter.errors import SettingError
from vllm_cost_meter.price_book import PriceBook
from vllm_cost_meter.setting_prices import EnergyPriceSetting, OverheadSetting, PriceSetting
from vllm_cost_meter.setting_types import about as _about
from vllm_cost_meter.tenants import TenantRules
from vllm_cost_meter.toml_lines import line_of

PREFIX = "COST_METER_"
# Names that are no settings: they choose the build and the tests' set-up.
OTHER_NAMES = frozenset({"COST_METER_PURE_PYTHON", "COST_METER_SANITIZE", "COST_METER_CACHE"})

_SHOWN_CHARS_MAX = 60
_HASH_CHARS_SHOWN = 8

Method = Literal["shapley", "tokens", "equal"]
Reply = Literal["all", "headers", "none"]


class TenantSetting(BaseModel):
    """One `[[tenants]]` entry: who is billed for which API keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: t.TenantName = Field(
        description="Name of the tenant in bills and reports; unique.",
        json_schema_extra=_about(
            "1 to 128 printable characters, not `unknown`, not starting with `__`"
        ),
    )
    api_key_sha256: tuple[t.Digest, ...] = Field(
        default=(),
        repr=False,
        description="SHA-256 of each of the tenant's API keys; a key belongs to one tenant.",
        json_schema_extra=_about(f"a list, each {t.SHA256}", secret=True),
    )
    reply: Reply | None = Field(
        default=None,
        description="What this tenant's clients are told; overrides `reply`.",
        json_schema_extra=_about("all, headers or none"),
    )


class Settings(BaseSettings):
    """All settings, checked. Built by `load_settings`; never changed afterwards."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=PREFIX, validate_default=True
    )

    config: str | None = Field(
        default=None,
        description="The TOML file with the settings of this page; cannot be set in the file.",
        json_schema_extra=_about("the path of a readable TOML file"),
    )
    gpu_hour_usd: t.Price | None = Field(
        default=None,
        description="Price of one GPU for one hour, at any time for which `prices` have none. "
        "Without any price GPU time is reported and cost is null.",
        json_schema_extra=_about(t.PRICE, "USD per GPU-hour"),
    )
    ledger: t.Url | None = Field(
        default=None,
        repr=False,
        description="Where the ledger is. Without it, "
        "`$XDG_STATE_HOME/vllm-cost-meter/ledger.db` (SQLite).",
        json_schema_extra=_about(t.LEDGER, secret=True),
    )
    host: t.Host = Field(
        default="127.0.0.1",
        description="Address the side endpoint listens on. Off loopback `admin_token` is needed.",
        json_schema_extra=_about(t.HOST),
    )
    port: t.Port = Field(
        default=9477,
        description="Port of the side endpoint; 0 takes any free one, `off` runs none.",
        json_schema_extra=_about(t.PORT),
    )
    admin_token: t.Token | None = Field(
        default=None,
        description="Bearer token that the side endpoint demands.",
        json_schema_extra=_about(t.TOKEN, secret=True),
    )
    method: Method = Field(
        default="shapley",
        description="How a step's GPU time is split: by the Shapley values of the fitted cost "
        "model, by scheduled tokens, or equally.",
        json_schema_extra=_about("shapley, tokens or equal"),
    )
    reply: Reply = Field(
        default="all",
        description="What clients are told: cost in headers and streams, headers only, nothing.",
        json_schema_extra=_about("all, headers or none"),
    )
    bill_timeout_ms: t.WholeNumber = Field(
        default=250,
        ge=1,
        le=10_000,
        description="How long a reply waits for its cost before it goes out without.",
        json_schema_extra=_about("a whole number from 1 to 10000", "ms"),
    )
    snapshot_interval_s: t.Number = Field(
        default=1.0,
        ge=0.05,
        le=3_600,
        allow_inf_nan=False,
        description="How often the engines' totals are fetched.",
        json_schema_extra=_about("a number from 0.05 to 3600", "s"),
    )
    step_log: str | None = Field(
        default=None,
        min_length=1,
        description="A file into which each engine step's requests, tokens and time are written, "
        "for `vllm-cost-meter validate --step-log`. Ids only, no prompt; at most 256 MiB with the "
        "older half in FILE.1. Further data-parallel engines add their index to the name.",
        json_schema_extra=_about("the path of a file"),
    )
    tenant_header: t.HeaderName | None = Field(
        default=None,
        description="Request header trusted to carry the tenant. Set it only behind a gateway "
        "that strips the header from what clients send; without it none is trusted.",
        json_schema_extra=_about(t.TENANT_HEADER),
    )
    tenants: tuple[TenantSetting, ...] = Field(
        default=(),
        description="The tenants and their API keys, see below.",
        json_schema_extra=_about("a list of tenants (in the environment: as JSON)", secret=True),
    )
    prices: tuple[PriceSetting, ...] = Field(
        default=(),
        description="What GPUs cost, and from when: [prices.md](prices.md).",
        json_schema_extra=_about("a list of prices (in the environment: as JSON)"),
    )
    energy_prices: tuple[EnergyPriceSetting, ...] = Field(
        default=(),
        description="What a kilowatt-hour costs, and from when: [prices.md](prices.md).",
        json_schema_extra=_about("a list of energy prices (in the environment: as JSON)"),
    )
    overheads: tuple[OverheadSetting, ...] = Field(
        default=(),
        description="What is paid besides the GPUs: [prices.md](prices.md).",
        json_schema_extra=_about("a list of overheads (in the environment: as JSON)"),
    )

    @field_validator("admin_token")
    @classmethod
    def _guarded_off_loopback(cls, token: SecretStr | None, info: ValidationInfo) -> object:
        host = info.data.get("host", "localhost")
        if token is None and info.data.get("port") is not None and not _is_loopback(host):
            raise t.WrongError(
                f"a token, as the side endpoint listens on {host}, off loopback", "nothing"
            )
        return token

    @field_validator("tenants")
    @classmethod
    def _each_once(cls, tenants: tuple[TenantSetting, ...]) -> tuple[TenantSetting, ...]:
        names: set[str] = set()
        owners: dict[str, str] = {}
        for tenant in tenants:
            if tenant.name in names:
                raise t.WrongError("each tenant's name once", f"{tenant.name!r} twice")
            names.add(tenant.name)
            for digest in tenant.api_key_sha256:
                if (owner := owners.setdefault(digest, tenant.name)) != tenant.name:
                    short = f"{digest[:_HASH_CHARS_SHOWN]}..."
                    got = f"{short} at {owner!r} and {tenant.name!r}"
                    raise t.WrongError("each api_key_sha256 at one tenant", got)
        return tenants

    @field_validator("prices", "energy_prices")
    @classmethod
    def _one_at_a_time(cls, prices: Any, info: ValidationInfo) -> Any:
        setting_prices.refuse_two_at_once(str(info.field_name), prices)
        return prices

    @field_validator("overheads")
    @classmethod
    def _one_of_a_name(cls, overheads: tuple[OverheadSetting, ...]) -> tuple[OverheadSetting, ...]:
        setting_prices.refuse_overlaps(overheads)
        return overheads

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values from the caller only: `load_settings` says which source it uses."""
        return (init_settings,)

    def tenant_rules(self) -> TenantRules:
        """Return what `tenants.resolve` needs to know."""
        owners = {h: tenant.name for tenant in self.tenants for h in tenant.api_key_sha256}
        return TenantRules(owners, self.tenant_header)

    def price_book(self) -> PriceBook:
        """Return the declared prices and overheads."""
        return setting_prices.price_book(
            self.gpu_hour_usd, self.prices, self.energy_prices, self.overheads
        )

    def reply_for(self, tenant: str) -> Reply:
        """Return what the clients of this tenant are told."""
        return self._replies.get(tenant, self.reply)

    @cached_property
    def _replies(self) -> dict[str, Reply]:
        return {tenant.name: tenant.reply for tenant in self.tenants if tenant.reply}


# The settings that are lists of tables.
_TABLES: Mapping[str, type[BaseModel]] = {
    "tenants": TenantSetting,
    "prices": PriceSetting,
    "energy_prices": EnergyPriceSetting,
    "overheads": OverheadSetting,
}
# Of long tables a message says the line too.
_WITH_LINES = ("prices", "energy_prices", "overheads")


def load_settings(
    environ: Mapping[str, str] = os.environ, config: str | Path | None = None
) -> Settings:
    """Return the settings of this environment and of the file it (or `config`) names.

    Raises SettingError: one line with the key, what was expected and what came.
    """
    given = {name: value for name, value in environ.items() if name.upper().startswith(PREFIX)}
    _refuse_unknown_names(given)
    if config is not None:
        given["COST_METER_CONFIG"] = str(config)
    path = given.get("COST_METER_CONFIG")
    from_file, text = ({}, "") if path is None else _read_file(path)
    source = EnvSettingsSource(Settings)
    source.env_vars = {name.lower(): value for name, value in given.items()}
    try:
        from_environment = source()
    except SettingsError:  # only of lists of tables, the settings that are not plain text
        name = next(name for name in _TABLES if not _is_json(source.env_vars, name))
        expected = _expected(Settings, name)
        key = f"{PREFIX}{name.upper()}"
        raise SettingError(key, expected, t.Text("text that is not JSON")) from None
    try:
        return Settings(**{**from_file, **from_environment})
    except ValidationError as error:
        problems = error.errors(include_url=False)
    # Raised out here, as the caught error holds the values, secrets among them.
    # First the unknown keys: what is missing is missing because its key was mistyped.
    problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    raise _setting_error(problem, from_environment, from_file, path, text)


def _is_json(env_vars: Mapping[str, str | None], name: str) -> bool:
    try:
        json.loads(env_vars.get(f"{PREFIX}{name}".lower()) or "null")
    except ValueError:
        return False
    return True


def _refuse_unknown_names(given: Mapping[str, str]) -> None:
    known = OTHER_NAMES | {PREFIX + field.upper() for field in Settings.model_fields}
    for name in sorted(given.keys() - known):
        like = difflib.get_close_matches(name.upper(), known, n=1)
        hint = f", perhaps {like[0]}" if like else ""
        if re.search(r"_SERVICE_(HOST|PORT)|_TCP|_UDP", name):
            hint = f" ({t.KUBERNETES})"
        raise SettingError(_line(name), f"a known setting{hint}", t.Text("an unknown name"))


def _read_file(path: str) -> tuple[dict[str, Any], str]:
    """Return the values of a TOML file, decimals as they are written, and its text."""
    key, expected = f"{PREFIX}CONFIG", _expected(Settings, "config")
    try:
        text = Path(path).expanduser().read_bytes().decode()
        values = tomllib.loads(text, parse_float=Decimal)
    except (OSError, ValueError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise SettingError(key, expected, t.Text(f"{_line(path)!r}: {_line(str(why))}")) from None
    where = _line(path)
    for name in values:
        if name == "config":
            got = t.Text("it in the file itself")
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
    if field in _TABLES and names:
        model, field = _TABLES[field], names[0]
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
    """Return what a message may show of a value: never a secret, never much."""
    if isinstance(value, str | SecretStr) and secret:
        return t.Text(f"a text of {len(value)} characters")
    if isinstance(value, Decimal | date | time) and not secret:
        return t.Text(value if isinstance(value, Decimal) else value.isoformat())
    if secret or not isinstance(value, str | int | float | None):
        return t.Text(f"a value of type {type(value).__name__}")
    if isinstance(value, str) and len(value) > _SHOWN_CHARS_MAX:
        return value[:_SHOWN_CHARS_MAX] + "..."
    return value


def _line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
