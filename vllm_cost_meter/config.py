"""The settings: where they come from, what they may be, and the one line that says what is wrong.

Every setting has a name in the environment (`COST_METER_PORT`) and a key in a TOML file (`port`)
that COST_METER_CONFIG names; the environment beats the file. A name or key that the meter does
not know is an error and never skipped: a mistyped tenant or price would quietly bill nobody.

Settings are read in every vLLM process. Nothing here touches the network or the ledger, and no
message shows a secret: tokens, ledger URLs and API keys that stand where a hash belongs.

Invariant: `load_settings` returns settings whose every value was checked, or raises SettingError.
"""

import difflib
import hashlib
import ipaddress
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
from vllm_cost_meter.budgets import Budget
from vllm_cost_meter.errors import SettingError
from vllm_cost_meter.price_book import PriceBook
from vllm_cost_meter.setting_budgets import BudgetSetting, check_budgets
from vllm_cost_meter.setting_economics import EconomicsSettings
from vllm_cost_meter.setting_invoices import (
    InvoiceSetting,
    InvoiceSettings,
    RateSetting,
    ResourceSetting,
)
from vllm_cost_meter.setting_prices import EnergyPriceSetting, OverheadSetting, PriceSetting
from vllm_cost_meter.tenant_settings import (
    RuleSetting,
    TenantSetting,
    below,
    check_rules,
    check_tenants,
    failing_closed,
    keys_of,
    replies_of,
    resolver_of,
)
from vllm_cost_meter.tenants import SLASH, Resolver
from vllm_cost_meter.toml_lines import line_of

PREFIX = "COST_METER_"
# Names that are no settings: they choose the build and the tests' set-up.
OTHER_NAMES = frozenset({"COST_METER_PURE_PYTHON", "COST_METER_SANITIZE", "COST_METER_CACHE"})

Method = Literal["shapley", "tokens", "equal"]
_about = t.about


class Settings(EconomicsSettings, InvoiceSettings, BaseSettings):
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
    admin_token_sha256: t.Digest | None = Field(
        default=None,
        repr=False,
        description="The SHA-256 of the admin token, in place of `admin_token`.",
        json_schema_extra=_about(t.SHA256, secret=True),
    )
    admin_token: t.Token | None = Field(
        default=None,
        description="Bearer token that the side endpoint demands; tenants show their API keys.",
        json_schema_extra=_about(t.TOKEN, secret=True),
    )
    method: Method = Field(
        default="shapley",
        description="How a step's GPU time is split: by the Shapley values of the fitted cost "
        "model, by scheduled tokens, or equally.",
        json_schema_extra=_about("shapley, tokens or equal"),
    )
    reply: t.Reply = Field(
        default="all",
        description="What clients are told: cost in headers and streams, headers only, nothing.",
        json_schema_extra=_about(t.REPLY, live=True),
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
    gateway_secret: t.Token | None = Field(
        default=None,
        description="The secret that the gateway sends to be believed, for `header` rules without "
        "`proof_sha256`. It belongs in the environment.",
        json_schema_extra=_about(t.TOKEN, secret=True, live=True),
    )
    tenants: tuple[TenantSetting, ...] = Field(
        default=(),
        description="The tenants, see below.",
        json_schema_extra=_about(
            "a list of tenants (in the environment: as JSON)", secret=True, live=True
        ),
    )
    tenant_rules: tuple[RuleSetting, ...] = Field(
        default=(),
        description="How a request finds its tenant, in this order, see below; without it by "
        "`api_key` only.",
        json_schema_extra=_about(
            "a list of rules (in the environment: as JSON)", secret=True, live=True
        ),
    )
    prices: tuple[PriceSetting, ...] = Field(
        default=(),
        description="What GPUs cost, and from when: [set prices](../howto/set-prices.md).",
        json_schema_extra=_about("a list of prices (in the environment: as JSON)", live=True),
    )
    energy_prices: tuple[EnergyPriceSetting, ...] = Field(
        default=(),
        description="What a kilowatt-hour costs, and from when: "
        "[set prices](../howto/set-prices.md).",
        json_schema_extra=_about(
            "a list of energy prices (in the environment: as JSON)", live=True
        ),
    )
    overheads: tuple[OverheadSetting, ...] = Field(
        default=(),
        description="What is paid besides the GPUs: [set prices](../howto/set-prices.md).",
        json_schema_extra=_about("a list of overheads (in the environment: as JSON)", live=True),
    )
    budgets: tuple[BudgetSetting, ...] = Field(
        default=(),
        description="What tenants may use in a period, see below.",
        json_schema_extra=_about("a list of budgets (in the environment: as JSON)", live=True),
    )
    budget_throttle_s: t.Number = Field(
        default=5.0,
        ge=0.1,
        le=600,
        allow_inf_nan=False,
        description="How long a new request waits whose budget is used up and throttles.",
        json_schema_extra=_about("a number from 0.1 to 600", "s", live=True),
    )

    @field_validator("admin_token")
    @classmethod
    def _guarded_off_loopback(cls, token: SecretStr | None, info: ValidationInfo) -> object:
        host = info.data.get("host", "localhost")
        digest = info.data.get("admin_token_sha256")
        if token is not None and digest is not None:
            raise t.WrongError("either admin_token or admin_token_sha256", "both")
        is_open = token is None and digest is None
        if is_open and info.data.get("port") is not None and not _is_loopback(host):
            raise t.WrongError(
                f"a token, as the side endpoint listens on {host}, off loopback", "nothing"
            )
        return token

    @field_validator("budgets")
    @classmethod
    def _countable(
        cls, budgets: tuple[BudgetSetting, ...], info: ValidationInfo
    ) -> tuple[BudgetSetting, ...]:
        of_all = info.data.get("gpu_hour_usd") is not None
        check_budgets(budgets, has_price=of_all or bool(info.data.get("prices")))
        return budgets

    @field_validator("tenants")
    @classmethod
    def _each_once(cls, tenants: tuple[TenantSetting, ...]) -> tuple[TenantSetting, ...]:
        check_tenants(tenants)
        return tenants

    @field_validator("tenant_rules")
    @classmethod
    def _askable(cls, rules: tuple[RuleSetting, ...], info: ValidationInfo) -> object:
        check_rules(rules, info.data.get("tenants", ()), info.data.get("gateway_secret"))
        return rules

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

    def derive(self) -> None:
        """Derive now what the first request would otherwise wait for."""
        _ = self.resolver, self._replies, self.declared_budgets, self.failing_closed
        _ = self.price_book

    @cached_property
    def price_book(self) -> PriceBook:
        """The declared prices and overheads."""
        return setting_prices.price_book(
            self.gpu_hour_usd, self.prices, self.energy_prices, self.overheads
        )

    @cached_property
    def resolver(self) -> Resolver:
        """What tells whose a request is."""
        return resolver_of(self.tenant_rules, self.tenants, self.gateway_secret)

    @cached_property
    def declared_budgets(self) -> tuple[Budget, ...]:
        """The budgets, with the tenants below theirs."""
        return tuple(each.budget(below(self.tenants, each.tenant or "")) for each in self.budgets)

    @cached_property
    def failing_closed(self) -> frozenset[str]:
        """The declared tenants that are refused while nothing can be measured."""
        return failing_closed(self.tenants)

    @cached_property
    def tenant_keys(self) -> dict[str, str]:
        """The tenants by the SHA-256 of their API keys."""
        return keys_of(self.tenants)

    def admin_sha256(self) -> str | None:
        """Return the SHA-256 of the admin token; None without one."""
        if self.admin_token is None:
            return self.admin_token_sha256
        return hashlib.sha256(self.admin_token.get_secret_value().encode()).hexdigest()

    def reply_for(self, tenant: str) -> t.Reply:
        """Return what the clients of this tenant, or of this child of a tenant, are told."""
        said = self._replies.get(tenant) or self._replies.get(tenant.rpartition(SLASH)[0])
        return said or self.reply

    @cached_property
    def _replies(self) -> dict[str, t.Reply]:
        return replies_of(self.tenants, self.reply)


# Settings that are lists of tables, and what stands in one.
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


# Of long tables a message says the line too.
_WITH_LINES = ("prices", "energy_prices", "overheads", *InvoiceSettings.model_fields)


def load_settings(
    environ: Mapping[str, str] = os.environ,
    config: str | Path | None = None,
    text: str | None = None,
) -> Settings:
    """Return the settings of this environment and of the file it (or `config`) names.

    `text`, if given, is taken for what that file says. Raises SettingError: one line with the key,
    what was expected and what came.
    """
    given = {name: value for name, value in environ.items() if name.upper().startswith(PREFIX)}
    _refuse_unknown_names(given)
    if config is not None:
        given["COST_METER_CONFIG"] = str(config)
    path = given.get("COST_METER_CONFIG")
    from_file, text = ({}, "") if path is None else _read_file(path, text)
    source = EnvSettingsSource(Settings)
    source.env_vars = {name.lower(): value for name, value in given.items()}
    try:
        from_environment = source()
    except SettingsError as error:  # only of sections, which are not plain text
        section = next(name for name in SECTIONS if f'"{name}"' in str(error))
        key = f"{PREFIX}{section.upper()}"
        got = t.Text("text that is not JSON")
        raise SettingError(key, _expected(Settings, section), got) from None
    try:
        return Settings(**{**from_file, **from_environment})
    except ValidationError as error:
        problems = error.errors(include_url=False)
    # Raised out here, as the caught error holds the values, secrets among them.
    # First the unknown keys: what is missing is missing because its key was mistyped.
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


def _read_file(path: str, text: str | None) -> tuple[dict[str, Any], str]:
    """Return the values of a TOML file, decimals as they are written, and its text."""
    key, expected = f"{PREFIX}CONFIG", _expected(Settings, "config")
    try:
        if text is None:
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
    """Return what a message may show of a value: never a secret, never much."""
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


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
