"""Make a fleet's tables, or bring them to this version; or write the SQL for those who run it.

The first server that finds an empty database makes the tables. It is an administrator who brings
them to a newer version, by `vllm-cost-meter fleet migrate`: until then newer servers keep what they
have to send. Older servers go on sending to newer tables, unless `fleet_version.oldest_sender` says
that they cannot: then they keep it too. So servers may be upgraded one by one, and nothing is lost.

Alembic runs the scripts, all in one transaction.

Invariant: tables that were migrated are like those that were made anew.
"""

# ruff: noqa: S608 - only names and numbers of our own are written into the SQL below
import io
from collections.abc import Callable
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger import schema
from vllm_cost_meter.ledger.fleet.grants import grants_kept
from vllm_cost_meter.ledger.fleet.schema import FLEET_VERSION, OLDEST_SENDER, has_fleet
from vllm_cost_meter.ledger.fleet.views import view_names, view_statements

_SCRIPTS = "vllm_cost_meter.ledger.fleet:migrations"
# The version before there were scripts is the first of them.
_FIRST = "0001"


def migrate(connection: Connection) -> None:
    """Bring a fleet's tables to this version, or make them, within the connection's transaction."""
    config = _config()
    config.attributes["connection"] = connection
    context = MigrationContext.configure(connection)
    if context.get_current_revision() is None and has_fleet(connection):
        context.stamp(ScriptDirectory.from_config(config), _FIRST)
    with grants_kept(connection):
        command.upgrade(config, "head")


def migration_sql(from_version: int | None = None) -> str:
    """Return the statements that `migrate` would execute, from a version on; None is none yet."""
    config = _config()
    config.output_buffer = io.StringIO()
    begin = "base" if from_version is None else f"{from_version:04}"
    command.upgrade(config, f"{begin}:head", sql=True)
    return config.output_buffer.getvalue()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", _SCRIPTS)
    config.set_main_option("path_separator", "os")
    return config


def drop_views(execute: Callable[[Any], object]) -> None:
    """Drop all views, so that the tables below them can change.

    What is a view today was a table in older versions. It fails if somebody else's view reads one.
    """
    names = ", ".join(f"'{name}'" for name in view_names())
    execute(
        "DO $$ DECLARE name TEXT; BEGIN"
        f" FOREACH name IN ARRAY ARRAY[{names}] LOOP"
        " IF EXISTS (SELECT 1 FROM information_schema.views"
        " WHERE table_schema = current_schema() AND table_name = name)"
        " THEN EXECUTE 'DROP VIEW ' || quote_ident(name); END IF; END LOOP; END $$"
    )


def make_views(execute: Callable[[Any], object]) -> None:
    """Make all views, and say which version this is."""
    for statement in view_statements():
        execute(statement)
    execute("DELETE FROM fleet_version")
    execute(
        "INSERT INTO fleet_version (version, oldest_sender)"
        f" VALUES ({FLEET_VERSION}, {OLDEST_SENDER})"
    )
    execute("DELETE FROM schema_version")
    execute(f"INSERT INTO schema_version (version) VALUES ({schema.SCHEMA_VERSION})")
