"""Invoice settings: `[[invoices]]`, `[[invoice_resources]]` and `[[invoice_rates]]`.

They say how the command line reads a provider's bill files. A server does not use them, so it
accepts every change.

Invariant: checked settings give `InvoiceRules` with a source for every field of a charge.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from vllm_cost_meter.config import types as t
from vllm_cost_meter.config.types import WrongError, about
from vllm_cost_meter.invoices.files import (
    BUILT_IN,
    CONSTANTS,
    FIELDS,
    GAP_HOURS,
    NEEDED,
    InvoiceRules,
    Layout,
)
from vllm_cost_meter.invoices.timeline import KINDS
from vllm_cost_meter.prices.book import USD
from vllm_cost_meter.units.calendar import zone_of
from vllm_cost_meter.units.time import NS_PER_HOUR

_GAP_HOURS_MAX = 8_784
COLUMNS = f"a table of column names by field: {', '.join(FIELDS)}"
SAME = f"a table of texts by field: {', '.join(CONSTANTS)}"
DELIMITER = "a comma, a semicolon, a tab or a vertical bar"


def _of_fields(fields: Sequence[str], expected: str) -> AfterValidator:
    def check(table: dict[str, str]) -> dict[str, str]:
        for name, value in table.items():
            if name not in fields or not value.strip():
                raise WrongError(expected, f"{name!r} = {value[: t.SHOWN_CHARS_MAX]!r}")
        return table

    return AfterValidator(check)


def _zone(name: str) -> str:
    try:
        zone_of(name)
    except ValueError:
        raise WrongError from None
    return name


class InvoiceSetting(BaseModel):
    """One `[[invoices]]` entry: how the CSV of a provider is laid out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: t.Note = Field(
        description="What `invoice import --format` calls it.",
        json_schema_extra=about(f"{t.NOTE}, not {' or '.join(BUILT_IN)}"),
    )
    columns: Annotated[dict[str, str], _of_fields(FIELDS, COLUMNS)] = Field(
        description="The column of each field. `item` and `invoice` separate charges for the same "
        "resource and time; a negative charge needs a `charge_class`.",
        json_schema_extra=about(COLUMNS),
    )
    constants: Annotated[dict[str, str], _of_fields(CONSTANTS, SAME)] = Field(
        default={},
        description="Values that are the same in all rows. Without a currency it is USD.",
        json_schema_extra=about(SAME),
    )
    time_format: t.Note | None = Field(
        default=None,
        description="The format of instants, for Python's `strptime`; without it RFC 3339.",
        json_schema_extra=about("a text such as %d/%m/%Y %H:%M"),
    )
    timezone: Annotated[str, AfterValidator(_zone)] = Field(
        default="UTC",
        description="The time zone of instants that name none.",
        json_schema_extra=about("the name of a time zone, such as Europe/Berlin"),
    )
    delimiter: Literal[",", ";", "|", "\t"] = Field(
        default=",",
        description="The character between two cells.",
        json_schema_extra=about(DELIMITER),
    )

    @field_validator("name")
    @classmethod
    def _not_built_in(cls, name: str) -> str:
        if name in BUILT_IN:
            raise WrongError
        return name

    @model_validator(mode="after")
    def _each_field_once(self) -> Self:
        for name in NEEDED:
            if name not in self.columns and name not in self.constants:
                raise WrongError(f"a column or a constant for {name!r}", "none", ("columns",))
        for name in self.constants:
            if name in self.columns:
                raise WrongError(f"a column or a constant for {name!r}", "both", ("constants",))
        return self

    def layout(self) -> Layout:
        """Return the file layout that this entry declares."""
        zone = zone_of(self.timezone)
        return Layout(self.columns, self.constants, self.time_format, zone, self.delimiter)


class ResourceSetting(BaseModel):
    """One `[[invoice_resources]]` entry: what kind of thing a resource is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resource: t.Note = Field(
        description="The resources that this entry is for; the first entry that fits holds.",
        json_schema_extra=about(t.PATTERN),
    )
    kind: Literal["gpu", "disk", "network", "other", "ignore"] = Field(
        description="Their kind; `ignore` leaves out what does not belong to this deployment.",
        json_schema_extra=about(f"{', '.join(KINDS)} or ignore"),
    )


class RateSetting(BaseModel):
    """One `[[invoice_rates]]` entry: what a currency is worth."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    currency: t.Currency = Field(
        description="A currency in bills; USD needs no entry.",
        json_schema_extra=about(t.CURRENCY),
    )
    usd_rate: t.ExchangeRate = Field(
        description="What one unit is worth when a bill is imported.",
        json_schema_extra=about(t.RATE, "USD"),
    )


class InvoiceSettings(BaseModel):
    """The invoices part of the settings."""

    invoices: tuple[InvoiceSetting, ...] = Field(
        default=(),
        description="Layouts of providers' CSV files: [invoices](../howto/against-the-invoice.md).",
        json_schema_extra=about("a list of layouts (in the environment: as JSON)", live=True),
    )
    invoice_resources: tuple[ResourceSetting, ...] = Field(
        default=(),
        description="Kinds of billed resources: [invoices](../howto/against-the-invoice.md).",
        json_schema_extra=about("a list of resources (in the environment: as JSON)", live=True),
    )
    invoice_rates: tuple[RateSetting, ...] = Field(
        default=(),
        description="What currencies in bills are worth: "
        "[invoices](../howto/against-the-invoice.md).",
        json_schema_extra=about("a list of rates (in the environment: as JSON)", live=True),
    )
    invoice_gap_hours: t.Number = Field(
        default=GAP_HOURS,
        gt=0,
        le=_GAP_HOURS_MAX,
        allow_inf_nan=False,
        description="Readings of a provider's counter that are further apart leave a gap; a "
        "change applies to later imports.",
        json_schema_extra=about(f"a number above 0, at most {_GAP_HOURS_MAX}", "hours", live=True),
    )

    @field_validator("invoices")
    @classmethod
    def _one_of_each_name(cls, settings: tuple[InvoiceSetting, ...]) -> tuple[InvoiceSetting, ...]:
        _refuse_twice(settings, "name", lambda one: one.name)
        return settings

    @field_validator("invoice_rates")
    @classmethod
    def _one_rate(cls, settings: tuple[RateSetting, ...]) -> tuple[RateSetting, ...]:
        _refuse_twice(settings, "currency", lambda one: one.currency)
        for place, one in enumerate(settings):
            if one.currency == USD:
                raise WrongError("a currency other than USD", repr(USD), (place, "currency"))
        return settings

    @property
    def invoice_rules(self) -> InvoiceRules:
        """The rules for reading bill files."""
        return InvoiceRules(
            {one.name: one.layout() for one in self.invoices},
            [(one.resource, one.kind) for one in self.invoice_resources],
            {one.currency: one.usd_rate for one in self.invoice_rates},
            round(self.invoice_gap_hours * NS_PER_HOUR),
        )


def _refuse_twice(settings: Sequence[object], key: str, of: Callable[..., str]) -> None:
    names = [of(one) for one in settings]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise WrongError(f"each {key} once", f"{name!r} twice", (place, key))
