"""A fleet's tables are brought to a newer version, and servers are upgraded one by one."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, text
from typer.testing import CliRunner

from tests.component.ledger.test_reader import http, part, snapshot
from tests.ecosystem.postgresql import Server
from tests.ecosystem.test_fleet import BILLS, name_of, records_of, send, write
from tests.ecosystem.test_postgresql import _figures, rows
from tests.support.fleet import sent
from vllm_cost_meter.cli.commands import app
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.fleet.changes import TableRows, packed, unpacked
from vllm_cost_meter.ledger.fleet.migrating import migrate, migration_sql
from vllm_cost_meter.ledger.fleet.schema import FLEET_VERSION, KEPT, fleet_metadata
from vllm_cost_meter.ledger.fleet.shared_settings import settings_changes, settings_versions
from vllm_cost_meter.ledger.fleet.views import view_names
from vllm_cost_meter.ledger.reader import LedgerReader

INDEXES = "SELECT indexdef FROM pg_indexes WHERE schemaname = current_schema() ORDER BY 1"
COLUMNS = """
SELECT table_name, column_name, data_type, collation_name, column_default, is_nullable
FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name)
WHERE table_schema = current_schema() AND table_type = 'BASE TABLE' ORDER BY 1, 2
"""
ALEMBIC = "alembic_version"


def made_of(url: str) -> tuple[list[Any], list[Any]]:
    """Return all columns and indexes of a database."""
    return rows(url, COLUMNS), rows(url, INDEXES)


def test_tables_that_scripts_made_are_those_of_the_code(
    tmp_path: Path, url: str, server: Server
) -> None:
    sent(f"sqlite:///{tmp_path}/ledger.db", url)
    by_code = server.new_database()
    engine = create_engine(by_code)
    with engine.begin() as connection:
        for table in KEPT:
            table.create(connection)
        assert {settings_changes, settings_versions} < set(fleet_metadata.sorted_tables)
        fleet_metadata.create_all(connection)
    engine.dispose()
    columns, indexes = made_of(url)
    ours = (
        [row for row in columns if row[0] != ALEMBIC],
        [i for i in indexes if ALEMBIC not in i[0]],
    )
    for mine, other in zip(ours, made_of(by_code), strict=True):
        assert set(mine) ^ set(other) == set()


def test_the_sql_for_an_administrator_makes_the_same_tables(
    tmp_path: Path, url: str, server: Server
) -> None:
    sent(f"sqlite:///{tmp_path}/ledger.db", url)
    by_hand = server.new_database()
    with psycopg.connect(by_hand.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(migration_sql())
    assert made_of(by_hand) == made_of(url)
    views = "SELECT viewname FROM pg_views WHERE schemaname = current_schema() ORDER BY 1"
    assert rows(by_hand, views) == rows(url, views) == sorted((name,) for name in view_names())


def test_a_server_keeps_what_it_has_to_send_until_the_tables_are_migrated(
    tmp_path: Path, url: str
) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    sent(own, url)
    write(own, *records_of("one"))
    _say(url, "UPDATE fleet_version SET version = 1, oldest_sender = 1")
    with pytest.raises(LedgerError, match="vllm-cost-meter fleet migrate"):
        sent(own, url)
    engine = create_engine(url)
    with engine.begin() as connection:
        migrate(connection)
    engine.dispose()
    send(own, url)
    assert _figures(url) == _figures(own)


def test_an_older_server_sends_to_newer_tables_unless_they_say_that_it_cannot(
    tmp_path: Path, url: str
) -> None:
    own = f"sqlite:///{tmp_path}/ledger.db"
    sent(own, url)
    name = name_of(own)
    _say(url, "ALTER TABLE kept_requests ADD COLUMN of_a_newer_version BIGINT")
    _say(url, "UPDATE fleet_version SET version = version + 1")
    write(own, *records_of("one")[:30])
    send(own, url)
    _say(url, "UPDATE fleet_version SET oldest_sender = version")
    write(own, *records_of("one")[30:])
    with pytest.raises(LedgerError, match="upgrade vllm-cost-meter"):
        sent(own, url)
    _say(url, "UPDATE fleet_version SET version = version - 1, oldest_sender = version - 1")
    send(own, url)
    assert name_of(own) == name
    assert rows(url, "SELECT count(*) FROM requests") == [(BILLS,)]


def _say(url: str, statement: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


def test_the_commands_make_and_migrate_the_tables_and_say_so(url: str) -> None:
    def said(*words: str) -> str:
        done = CliRunner().invoke(app, ["fleet", *words])
        assert done.exit_code == 0, done.output
        return done.stdout

    assert said("migrate", "--fleet", url) == f"the tables are of version {FLEET_VERSION} now\n"
    already = f"the tables are of version {FLEET_VERSION} already\n"
    assert said("migrate", "--fleet", url) == already
    assert said("migrate", "--sql").strip() == migration_sql().strip()
    assert said("tidy", "--fleet", url) == "tidied what 0 ledgers have sent\n"


def test_an_outbox_of_the_version_before_is_sent_whole(tmp_path: Path, url: str) -> None:
    ledger = f"sqlite:///{tmp_path / 'ledger.db'}"
    send(ledger, url)
    bill = part(1, "h1")
    write(ledger, bill, http("h1"), snapshot([bill]))
    as_outbox_of_version_19(tmp_path / "ledger.db")
    send(ledger, url)
    with LedgerReader(url) as fleet:
        (row,) = fleet.look_up("h1")
        assert (row["gpu_time_ns"], row["external_tokens"]) == (300, None)
        assert fleet.audit(full=True)["balanced"]


def as_outbox_of_version_19(path: Path) -> None:
    """Take the columns out of an outbox that version 20 has brought."""
    later = {"external_tokens", "external_known_tokens", "kv_role"}
    with closing(sqlite3.connect(path)) as connection, connection:
        for number, content in connection.execute("SELECT number, content FROM outbox").fetchall():
            tables = [
                TableRows(
                    name,
                    tuple(column for column in columns if column not in later),
                    [
                        tuple(v for c, v in zip(columns, row, strict=True) if c not in later)
                        for row in rows
                    ],
                )
                for name, columns, rows in unpacked(content)
            ]
            values = (packed(tables), number)
            connection.execute("UPDATE outbox SET content = ? WHERE number = ?", values)
