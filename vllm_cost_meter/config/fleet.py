"""Fleet settings: where the ledger is, to which fleet it is sent, and who has prices and tenants.

They are apart from the others because they are read first: they say from where the shared sections
come.

Invariant: a fleet's ledgers are SQLite files beside their servers, and rows go into files only if a
folder is named for them.
"""

from typing import Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from vllm_cost_meter.config import types as t

FleetRows = Literal["fleet", "files", "none"]


class FleetSettings(BaseModel):
    """The settings about the ledger and its fleet."""

    ledger: t.Url | None = Field(
        default=None,
        repr=False,
        description="Where the ledger is. Without it, "
        "`$XDG_STATE_HOME/vllm-cost-meter/ledger.db` (SQLite).",
        json_schema_extra=t.about(t.LEDGER, secret=True),
    )
    fleet: t.FleetUrl | None = Field(
        default=None,
        repr=False,
        description="The database of a fleet, which gets all that the ledger gets: "
        "[many servers](../howto/fleet.md). The ledger itself is then a SQLite file.",
        json_schema_extra=t.about(t.FLEET, secret=True),
    )
    fleet_interval_s: t.Number = Field(
        default=2.0,
        ge=0.1,
        le=10,
        allow_inf_nan=False,
        description="How often what is new is sent to the fleet.",
        json_schema_extra=t.about("a number from 0.1 to 10", "s"),
    )
    fleet_rows: FleetRows = Field(
        default="fleet",
        description="Where the rows of requests go: into the fleet's database, into Parquet files,"
        " or nowhere. Its sums are [the same](../howto/fleet.md#without-rows-of-requests).",
        json_schema_extra=t.about("fleet, files or none"),
    )
    fleet_files: t.ArchiveFolder | None = Field(
        default=None,
        description="The folder for the files of `fleet_rows`. Needs DuckDB.",
        json_schema_extra=t.about(t.FOLDER),
    )

    fleet_outbox_bytes: t.Bytes = Field(
        default=cast("int", "4GB"),  # read as if it was given
        description="How much may wait in the ledger while the fleet's database is away. If it is"
        " more, it is freed, and the database gets all that the ledger holds when it is back.",
        json_schema_extra=t.about(t.BYTES),
    )
    fleet_settings: bool = Field(
        default=False,
        description="Whether tenants, rules, prices, energy prices, overheads and budgets come from"
        " the fleet's database, and from nowhere else: "
        "[shared settings](../howto/fleet-settings.md). Needs `fleet`.",
        json_schema_extra=t.about("true or false"),
    )

    @field_validator("fleet_files")
    @classmethod
    def _with_rows(cls, folder: str | None, info: ValidationInfo) -> str | None:
        is_asked = info.data.get("fleet_rows") == "files"
        if is_asked and folder is None:
            raise t.WrongError("a folder, because fleet_rows is files", "nothing")
        if folder is not None and not is_asked:
            raise t.WrongError('no folder, or fleet_rows = "files"', "a folder")
        return folder

    @field_validator("fleet")
    @classmethod
    def _beside_a_file(cls, fleet: str | None, info: ValidationInfo) -> str | None:
        ledger = info.data.get("ledger")
        if fleet is not None and ledger is not None and not ledger.startswith("sqlite"):
            raise t.WrongError("a SQLite ledger on the server's own disk beside it", "PostgreSQL")
        return fleet


class FleetPlace(FleetSettings):
    """Those settings alone: what is known before the shared sections are."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @classmethod
    def of(cls, values: object) -> Self:
        """Return what these values say of the fleet. Raises ValidationError."""
        return cls.model_validate(values)
