"""All settings: each field with its type, range and description, and values derived from them.

`loading.py` reads them and writes the error messages. Every vLLM process on the API side uses them;
an engine reads its three settings with `engine.py`.

Invariant: every field says what it expects, and a `Settings` holds only checked values.
"""

import ipaddress
from functools import cached_property
from typing import Annotated, Any

from pydantic import (
    Field,
    PrivateAttr,
    SecretStr,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from vllm_cost_meter.config import prices as setting_prices
from vllm_cost_meter.config import types as t
from vllm_cost_meter.config.budgets import (
    BudgetSetting,
    check_budgets,
    check_tenants_of_budgets,
)
from vllm_cost_meter.config.economics import EconomicsSettings
from vllm_cost_meter.config.engine import (
    LABELS_EXPECTED,
    METHOD_EXPECTED,
    PAYER_EXPECTED,
    PREFIX,
    EngineSettings,
    Method,
    Payer,
)
from vllm_cost_meter.config.fleet import FleetSettings
from vllm_cost_meter.config.invoices import (
    InvoiceSettings,
)
from vllm_cost_meter.config.prices import EnergyPriceSetting, OverheadSetting, PriceSetting
from vllm_cost_meter.config.tenants import (
    RuleSetting,
    TenantSetting,
    above,
    check_rules,
    check_secrets,
    check_tenants,
    declared_of,
    digest_of,
    failing_closed,
    keys_of,
    replies_of,
    resolver_of,
)
from vllm_cost_meter.prices.book import PriceBook
from vllm_cost_meter.records.owner import SLASH
from vllm_cost_meter.tenants.budgets import Budget
from vllm_cost_meter.tenants.rules import Resolver

_about = t.about


class Settings(FleetSettings, EconomicsSettings, InvoiceSettings, BaseSettings):
    """All settings, checked. `load_settings` builds them, and they never change afterwards."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=PREFIX, validate_default=True
    )

    config: str | None = Field(
        default=None,
        description="The TOML file with the settings of this page; cannot be set in the file.",
        json_schema_extra=_about("the path of a readable TOML file"),
    )
    gpu_hour_usd: t.UsdPrice | None = Field(
        default=None,
        description="Price of one GPU for one hour, wherever `prices` have none. Without any "
        "price the meter reports GPU time, and cost is null.",
        json_schema_extra=_about(t.PRICE, "USD per GPU-hour"),
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
        description="Bearer token that the side endpoint demands; tenants show their API keys. No "
        "API key and no gateway's secret may be the same.",
        json_schema_extra=_about(t.TOKEN, secret=True),
    )
    questions_at_once: t.WholeNumber = Field(
        default=2,
        ge=1,
        le=64,
        description="How many questions the side endpoint answers at the same time; others wait.",
        json_schema_extra=_about("a whole number from 1 to 64"),
    )
    question_timeout_s: t.Number = Field(
        default=30.0,
        ge=0.1,
        le=3_600,
        allow_inf_nan=False,
        description="How long a question to the side endpoint may take, its wait included; then it "
        "is ended, and the asker may try again.",
        json_schema_extra=_about("a number from 0.1 to 3600", "s"),
    )
    method: Method = Field(
        default=EngineSettings().method,
        description="How a step's GPU time is split: by the Shapley values of the fitted cost "
        "model, by scheduled tokens, or equally.",
        json_schema_extra=_about(METHOD_EXPECTED),
    )
    preemption_paid_by: Payer = Field(
        default=EngineSettings().preemption_paid_by,
        description="Who pays the time to compute again what a preemption threw away: the request "
        "that was preempted, or the operator, in the class `recomputed`. It holds for engines that "
        "start with it.",
        json_schema_extra=_about(PAYER_EXPECTED),
    )
    reply: t.ReplyDetail = Field(
        default="all",
        description="What clients are told: cost in headers and streams, headers only, nothing.",
        json_schema_extra=_about(t.REPLY, live=True),
    )
    stream_comment: t.StreamComment = Field(
        default="asked",
        description="Which streams have a comment line with their cost before their end: those "
        "whose request asks for it by the header `x-cost-meter-comment: true`, or all others too. "
        "Some clients take such a line for data.",
        json_schema_extra=_about(t.COMMENT, live=True),
    )
    bill_timeout_ms: t.WholeNumber = Field(
        default=250,
        ge=1,
        le=10_000,
        description="How long a reply waits for its cost before it goes out without.",
        json_schema_extra=_about("a whole number from 1 to 10000", "ms"),
    )
    durability: t.Durability = Field(
        default="process",
        description="What a cost that was told survives: the death of every process, or with `disk`"
        " that of the machine too; then each reply waits for the disk.",
        json_schema_extra=_about(t.DURABILITY),
    )
    second_journal: t.Folder | None = Field(
        default=None,
        description="A folder on another disk that takes the journal while the place beside the "
        "ledger refuses it: [a second place](../howto/operations.md#a-second-place-for-the-"
        "journal).",
        json_schema_extra=_about(t.FOLDER),
    )
    keep_rows_days: t.Days = Field(
        default=90,
        description="How many days before today the ledger keeps the rows of requests for. Sums, "
        "which reports and statements read, are [kept for ever]"
        "(../explanation/ledger.md#old-rows-are-dropped-their-sums-stay).",
        json_schema_extra=_about(t.DAYS, "days"),
    )
    keep_rows_bytes: t.Bytes | None = Field(
        default=None,
        description="How large the ledger's file may get: rows of the oldest days are dropped until"
        " what is used of it is less, but never those of today and of the day before. For SQLite.",
        json_schema_extra=_about(t.BYTES),
    )
    archive: t.ArchiveFolder | None = Field(
        default=None,
        description="A folder that gets the rows of requests as [Parquet files]"
        "(../howto/look-after-the-ledger.md#keep-dropped-rows-in-parquet-files) before they are "
        "dropped. Needs DuckDB.",
        json_schema_extra=_about(t.FOLDER),
    )
    snapshot_interval_s: t.Number = Field(
        default=1.0,
        ge=0.05,
        le=3_600,
        allow_inf_nan=False,
        description="How often the engines' totals are fetched.",
        json_schema_extra=_about("a number from 0.05 to 3600", "s"),
    )
    labels: Annotated[t.Labels, NoDecode] = Field(
        default={},
        description="What the engines of this server are labelled with, such as their pool or zone:"
        " every run keeps them, so that reports can tell runs apart. `POD_NAME`, `POD_NAMESPACE`"
        " and `NODE_NAME` in an engine's environment become its labels `pod`, `namespace` and"
        " `node`: [labels](../howto/fleet.md#which-pod-which-pool).",
        json_schema_extra=_about(LABELS_EXPECTED),
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
    unnamed_requests: t.UnnamedRequests = Field(
        default="serve",
        description="What becomes of requests that no rule names: served as `unknown`, or refused "
        "(401). `refuse` also closes vLLM's open routes to whoever has none of its API keys: "
        "[open routes](../howto/tenants-from-keys.md#requests-that-no-rule-names).",
        json_schema_extra=_about(t.UNNAMED, live=True),
    )
    tenant_metrics: t.TenantMetrics = Field(
        default="everywhere",
        description="Where metrics with names of tenants and budgets, or money, are shown: on "
        "vLLM's own `/metrics` too, or on the side endpoint's only.",
        json_schema_extra=_about(t.TENANT_METRICS, live=True),
    )
    tenant_detail: t.TenantDetail = Field(
        default="exact",
        description="How exact the figures are that tenants see: `coarse` rounds GPU time to 1 ms "
        "and leaves out what tells of other requests: "
        "[coarse figures](../howto/tenants-from-keys.md#what-figures-tell-of-other-tenants).",
        json_schema_extra=_about(t.TENANT_DETAIL, live=True),
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
        description="How long a throttling budget delays each new request once it is used up.",
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
                f"a token, because the side endpoint listens on {host}, off loopback", "nothing"
            )
        return token

    @field_validator("budgets")
    @classmethod
    def _countable(
        cls, budgets: tuple[BudgetSetting, ...], info: ValidationInfo
    ) -> tuple[BudgetSetting, ...]:
        of_all = info.data.get("gpu_hour_usd") is not None
        check_budgets(budgets, has_price=of_all or bool(info.data.get("prices")))
        if "tenants" in info.data and "tenant_rules" in info.data:
            check_tenants_of_budgets(budgets, info.data["tenants"], info.data["tenant_rules"])
        return budgets

    @field_validator("tenants")
    @classmethod
    def _each_once(cls, tenants: tuple[TenantSetting, ...]) -> tuple[TenantSetting, ...]:
        check_tenants(tenants)
        return tenants

    @field_validator("tenant_rules")
    @classmethod
    def _askable(cls, rules: tuple[RuleSetting, ...], info: ValidationInfo) -> object:
        tenants, secret = info.data.get("tenants", ()), info.data.get("gateway_secret")
        check_rules(rules, tenants, secret)
        admin = _admin_sha256(info.data.get("admin_token"), info.data.get("admin_token_sha256"))
        check_secrets(admin, rules, tenants, secret)
        return rules

    @field_validator("unnamed_requests")
    @classmethod
    def _somebody_is_named(cls, said: t.UnnamedRequests, info: ValidationInfo) -> object:
        is_wrong_already = not {"tenants", "tenant_rules"} <= info.data.keys()
        can_name = info.data.get("tenants") or info.data.get("tenant_rules")
        if said == "refuse" and not can_name and not is_wrong_already:
            raise t.WrongError(
                "serve, or tenants or tenant_rules that name somebody, because otherwise every "
                "request would be refused"
            )
        return said

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
        """Take values only from the caller: `load_settings` chooses the sources."""
        return (init_settings,)

    # Which version of the fleet's settings the shared sections are.
    _shared_version: int | None = PrivateAttr(default=None)

    @property
    def shared_version(self) -> int | None:
        """The version of the fleet's settings that these have; None where they are not shared."""
        return self._shared_version

    def note_shared(self, version: int | None) -> None:
        """Note which version of the fleet's settings the shared sections are."""
        self._shared_version = version

    def derive(self) -> None:
        """Compute the derived values now, so that the first request does not wait for them."""
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
        """The resolver that finds a request's tenant."""
        return resolver_of(self.tenant_rules, self.tenants, self.gateway_secret)

    @cached_property
    def declared_budgets(self) -> tuple[Budget, ...]:
        """The declared budgets, each with the tenants above its tenant."""
        declared = declared_of(self.tenants)
        return tuple(each.budget(above(declared, each.tenant or "")) for each in self.budgets)

    @cached_property
    def failing_closed(self) -> frozenset[str]:
        """The declared tenants whose requests are refused while nothing can be measured."""
        return failing_closed(self.tenants)

    @cached_property
    def tenant_keys(self) -> dict[str, str]:
        """Tenant names by the SHA-256 of their API keys."""
        return keys_of(self.tenants)

    def admin_sha256(self) -> str | None:
        """Return the admin token's SHA-256; None without a token."""
        return _admin_sha256(self.admin_token, self.admin_token_sha256)

    @property
    def refuses_unmetered(self) -> bool:
        """Whether some requests are refused even while nothing can be measured."""
        return bool(self.failing_closed) or self.unnamed_requests == "refuse"

    @property
    def is_coarse(self) -> bool:
        """Whether tenants see coarse figures only."""
        return self.tenant_detail == "coarse"

    @property
    def clients_name_tenants(self) -> bool:
        """Whether a client may name its tenant in the body of its request."""
        return any(rule.trust_clients for rule in self.tenant_rules)

    @property
    def leaves_some_unnamed(self) -> bool:
        """Whether tenants or rules are declared, and yet some requests have no tenant by them."""
        names_all = any(rule.rule == "constant" for rule in self.tenant_rules)
        return bool(self.tenants or self.tenant_rules) and not names_all

    def reply_for(self, tenant: str) -> t.ReplyDetail:
        """Return what clients of this tenant (or child of a tenant) are told."""
        said = self._replies.get(tenant) or self._replies.get(tenant.rpartition(SLASH)[0])
        return said or self.reply

    @cached_property
    def _replies(self) -> dict[str, t.ReplyDetail]:
        return replies_of(self.tenants, self.reply)


def _admin_sha256(token: SecretStr | None, digest: str | None) -> str | None:
    return digest if token is None else digest_of(token)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
