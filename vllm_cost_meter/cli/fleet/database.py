"""The commands `fleet migrate` and `fleet tidy`: look after a fleet's database.

Invariant: neither changes a figure.
"""

from pathlib import Path
from typing import Annotated

import typer

from vllm_cost_meter.cli.options import Config, one_line_errors
from vllm_cost_meter.config.loading import fleet_place
from vllm_cost_meter.config.types import Text
from vllm_cost_meter.errors import SettingError
from vllm_cost_meter.ledger.fleet.migrating import migration_sql
from vllm_cost_meter.ledger.fleet.rows.partitions import partition_sql
from vllm_cost_meter.ledger.fleet.upkeep import migrate_fleet, tidy_fleet

FleetOption = Annotated[
    str | None, typer.Option(help="The fleet's database; otherwise that of COST_METER_FLEET.")
]


def fleet_url(fleet: str | None, config: Path | None) -> str:
    """Return the URL of the fleet that is meant. Raises SettingError if none is."""
    place = fleet_place(config=config)
    in_ledger = place.ledger if (place.ledger or "").startswith("postgresql") else None
    url = fleet or place.fleet or in_ledger
    if url is None:
        raise SettingError("--fleet", "a fleet's database, or COST_METER_FLEET", Text("neither"))
    return url


def migrate(
    fleet: FleetOption = None,
    config: Config = None,
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the statements, and connect to nothing.")
    ] = False,
    from_version: Annotated[
        int | None,
        typer.Option(
            "--from", min=1, help="With --sql: the version of the tables; otherwise there are none."
        ),
    ] = None,
    by_day: Annotated[
        bool,
        typer.Option(
            "--partition-by-day", help="Put the rows of requests into partitions by UTC day."
        ),
    ] = False,
) -> None:
    """Bring a fleet's tables to this version, or make them.

    Older servers go on sending; those that cannot keep what they have, and say so. With --sql the
    statements are printed for whoever runs them.

    With --partition-by-day rows that are there stay in place, as the default partition. `fleet
    tidy` then makes the partitions of the days to come, and drops those that have become empty.

    Example: vllm-cost-meter fleet migrate --sql --from 1
    """
    with one_line_errors():
        if sql:
            print(migration_sql(from_version))
            if by_day:
                print(partition_sql())
            return
        before, now = migrate_fleet(fleet_url(fleet, config), by_day=by_day)
    if before == now:
        print(f"the tables are of version {now} already")
    else:
        print(f"the tables are of version {now} now" + (f", and were of {before}" * bool(before)))


def tidy(
    fleet: FleetOption = None,
    config: Config = None,
    keep_rows_days: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="DAYS",
            help="Drop the rows of requests that ended before so many days before today (UTC).",
        ),
    ] = None,
) -> None:
    """Make a fleet's tables smaller, without a change to any figure.

    It adds up older sums, and deletes what nobody reads any more. With --keep-rows-days older rows
    of requests go too, and all sums stay, as `ledger drop` does it for one ledger.

    Servers whose role may update and delete do it themselves. This is for all others, and for what
    servers that are gone have left: once an hour, with a role that may.

    Example: vllm-cost-meter fleet tidy --keep-rows-days 90
    """
    with one_line_errors():
        senders, (bills, replies) = tidy_fleet(fleet_url(fleet, config), keep_rows_days)
    print(f"tidied what {senders} ledgers have sent")
    if keep_rows_days is not None:
        print(f"dropped the rows of {bills:,} bills and {replies:,} HTTP requests; their sums stay")
