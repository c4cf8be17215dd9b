"""Budget settings: the `[[budgets]]` tables, and the `Budget` that each declares.

A budget that could never be reached is a slip: one in USD without a price, or one of a tenant that
no request can be of. With such a budget the settings are refused.

Invariant: `budget()` of a checked setting never fails.
"""

import difflib
from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vllm_cost_meter.config import types as t
from vllm_cost_meter.config.tenants import RuleSetting, TenantSetting, can_be_named
from vllm_cost_meter.records.owner import UNKNOWN
from vllm_cost_meter.tenants.budgets import Budget
from vllm_cost_meter.units.money import NANOUSD_PER_USD
from vllm_cost_meter.units.time import NS_PER_SECOND

ROLLING_DAYS_MAX = 366
CONCURRENT_MAX = 1_000_000
LIMIT = "a decimal number above 0, at most 1,000,000,000,000, with at most 9 decimal places"
ZONE = "the name of a time zone, such as Europe/Berlin"
TAG_FORM = "key=value"


def _amount(value: object) -> Decimal:
    try:
        amount = Decimal(str(value))
    except ArithmeticError:
        raise t.WrongError(LIMIT) from None
    if isinstance(value, bool) or not amount.is_finite() or not 0 < amount <= 10**12:
        raise t.WrongError(LIMIT)
    if (amount * 10**9) % 1:
        raise t.WrongError(LIMIT)
    return amount


def _zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise t.WrongError(ZONE) from None
    return name


def _payer(name: str) -> str:
    return name if name == UNKNOWN else t._tenant_name(name)


def _tag(text: str) -> str:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise t.WrongError(TAG_FORM)
    return text


Limit = Annotated[Decimal, BeforeValidator(_amount)]


class BudgetSetting(BaseModel):
    """One `[[budgets]]` entry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: t.TenantName = Field(
        description="Name of the budget in replies, reports and metrics; unique.",
        json_schema_extra=t.about("1 to 128 printable characters"),
    )
    tenant: Annotated[str, AfterValidator(_payer)] | None = Field(
        default=None,
        description="The tenant that the budget covers, with all below it. Either this or `tag`.",
        json_schema_extra=t.about("the name of a tenant, or unknown: of all that no rule names"),
    )
    tag: Annotated[str, AfterValidator(_tag)] | None = Field(
        default=None,
        description="The budget covers all tenants with this tag.",
        json_schema_extra=t.about(TAG_FORM),
    )
    usd: Limit | None = Field(
        default=None,
        description="How much a period may cost. Needs a price. Either this or `gpu_seconds`.",
        json_schema_extra=t.about(LIMIT, "USD"),
    )
    gpu_seconds: Limit | None = Field(
        default=None,
        description="How much GPU time may be used in a period.",
        json_schema_extra=t.about(LIMIT, "GPU-seconds"),
    )
    period: Literal["day", "week", "month", "rolling"] = Field(
        default="month",
        description="When the budget begins anew: by the calendar (weeks begin on Monday), or "
        "never: `rolling` looks back `days` days.",
        json_schema_extra=t.about("day, week, month or rolling"),
    )
    days: Annotated[int, BeforeValidator(t._number)] = Field(
        default=30,
        ge=1,
        le=ROLLING_DAYS_MAX,
        description="The length of a rolling period.",
        json_schema_extra=t.about(f"a whole number from 1 to {ROLLING_DAYS_MAX}", "days"),
    )
    timezone: Annotated[str, AfterValidator(_zone)] = Field(
        default="UTC",
        description="A period begins at midnight in this time zone; a UTC hour belongs to the day "
        "in which it begins.",
        json_schema_extra=t.about(ZONE),
    )
    soft_percent: Annotated[float, BeforeValidator(t._number)] | None = Field(
        default=None,
        gt=0,
        le=100,
        allow_inf_nan=False,
        description="From this part of the amount on, replies carry a warning and metrics say so.",
        json_schema_extra=t.about("a number above 0, at most 100", "%"),
    )
    hard: bool = Field(
        default=True,
        description="Whether new requests are refused once the amount is used; if not, it only "
        "warns.",
        json_schema_extra=t.about("true or false"),
    )
    over: Literal["block", "throttle"] = Field(
        default="block",
        description="What a hard budget does with new requests: 429, or a delay of "
        "`budget_throttle_s`.",
        json_schema_extra=t.about("block or throttle"),
    )
    stop_running: bool = Field(
        default=False,
        description="Whether running requests end (finish reason `length`) once a hard budget is "
        "used up.",
        json_schema_extra=t.about("true or false"),
    )

    max_concurrent: Annotated[int, BeforeValidator(t._number)] | None = Field(
        default=None,
        ge=1,
        le=CONCURRENT_MAX,
        description="How many of its requests each API server runs at once; more get a 429. It "
        "bounds by how much the amount can be exceeded.",
        json_schema_extra=t.about(f"a whole number from 1 to {CONCURRENT_MAX:,}"),
    )

    each_server: bool = Field(
        default=False,
        description="Whether each server of a [fleet](../howto/fleet.md) counts its own use only; "
        "if not, the budget counts the use on all of them.",
        json_schema_extra=t.about("true or false"),
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.tenant is None) == (self.tag is None):
            raise t.WrongError("either a tenant or a tag", "both" if self.tenant else "neither")
        if (self.usd is None) == (self.gpu_seconds is None):
            raise t.WrongError("either usd or gpu_seconds", "both" if self.usd else "neither")
        if self.max_concurrent is not None and not self.hard:
            raise t.WrongError("hard = true beside max_concurrent", "hard = false")
        return self

    def budget(self, above: tuple[str, ...] = ()) -> Budget:
        """Return the declared budget; `above` are the tenants above its tenant."""
        amount, of_one = (
            (self.usd, NANOUSD_PER_USD)
            if self.usd is not None
            else (self.gpu_seconds or Decimal(0), NS_PER_SECOND)
        )
        limit = int(amount * of_one)
        soft = self.soft_percent
        key, _, value = (self.tag or "").partition("=")
        return Budget(
            name=self.name,
            limit=limit,
            unit="usd" if self.usd is not None else "gpu_seconds",
            period=self.period,
            zone=ZoneInfo(self.timezone),
            tenant=self.tenant,
            above=above,
            tag=(key, value) if self.tag is not None else None,
            days=self.days,
            soft_limit=None if soft is None else int(limit * Decimal(str(soft)) / 100),
            hard=self.hard,
            over=self.over,
            stop_running=self.stop_running,
            max_concurrent=self.max_concurrent,
            each_server=self.each_server,
        )


def check_budgets(budgets: Sequence[BudgetSetting], has_price: bool) -> None:
    """Raise WrongError unless names are unique, and there is a price for budgets in USD."""
    names: set[str] = set()
    for budget in budgets:
        if budget.name in names:
            raise t.WrongError("each budget's name once", f"{budget.name!r} twice")
        names.add(budget.name)
        if budget.usd is not None and not has_price:
            raise t.WrongError(
                "a price for a budget in USD (prices, gpu_hour_usd), or gpu_seconds",
                f"{budget.name!r} in USD and no price",
            )


def check_tenants_of_budgets(
    budgets: Sequence[BudgetSetting],
    tenants: Sequence[TenantSetting],
    rules: Sequence[RuleSetting],
) -> None:
    """Raise WrongError for a budget of a tenant that no request can ever be of."""
    for place, budget in enumerate(budgets):
        name = budget.tenant
        if name is None or can_be_named(name, tenants, rules):
            continue
        like = difflib.get_close_matches(name, [tenant.name for tenant in tenants], n=1)
        hint = f", perhaps {like[0]!r}" if like else ""
        raise t.WrongError(
            f"a declared tenant, or one that a rule can name{hint}",
            f"{name!r} of the budget {budget.name!r}",
            (place, "tenant"),
        )
