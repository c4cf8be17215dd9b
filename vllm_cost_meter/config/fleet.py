"""Settings of a server that sends its ledger to a fleet's database.

Invariant: rows go into files only if a folder is named, and a folder is named only for that.
"""

from typing import Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from vllm_cost_meter.config import types as t

FleetRows = Literal["fleet", "files", "none"]


class FleetSettings(BaseModel):
    """The fleet's part of the settings."""

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

    @field_validator("fleet_files")
    @classmethod
    def _with_rows(cls, folder: str | None, info: ValidationInfo) -> str | None:
        is_asked = info.data.get("fleet_rows") == "files"
        if is_asked and folder is None:
            raise t.WrongError("a folder, because fleet_rows is files", "nothing")
        if folder is not None and not is_asked:
            raise t.WrongError('no folder, or fleet_rows = "files"', "a folder")
        return folder
