"""Migrate a ledger: with a copy of it as it was, and a way back that works."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.upkeep import fill, rows_of, server, sql, url_of
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION
from vllm_cost_meter.ledger.upkeep.checking import check_ledger
from vllm_cost_meter.ledger.upkeep.migrating import migrate_ledger
from vllm_cost_meter.ledger.upkeep.restoring import restore

NOW_NS = 1_800_000_000 * 10**9
OLDEST = Path(__file__).parents[1] / "ledger_v1.sql"


@pytest.fixture
def old(tmp_path):
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        connection.executescript(OLDEST.read_text())
    return tmp_path / "ledger.db"


def test_the_oldest_ledger_is_migrated_and_a_copy_of_it_kept(old, tmp_path):
    done = migrate_ledger(url_of(old), NOW_NS)
    assert (done.version_before, done.version_after) == (1, SCHEMA_VERSION)
    assert done.copy.file == tmp_path / "ledger.db.schema-1-20270115T080000Z"
    assert sql(done.copy.file, "SELECT version FROM schema_version") == [(1,)]
    assert all(one.ok for one in check_ledger(url_of(old), full=True))
    with closing(LedgerReader(url_of(old))) as reader:
        assert reader.audit()["balanced"]


def test_the_copy_is_the_way_back(old):
    before = sql(old, "SELECT * FROM requests")
    done = migrate_ledger(url_of(old), NOW_NS)
    restore(url_of(old), done.copy.file, NOW_NS)
    assert sql(old, "SELECT version FROM schema_version") == [(1,)]
    assert sql(old, "SELECT * FROM requests") == before


def test_a_ledger_that_is_up_to_date_stays_as_it_is(tmp_path):
    fill(tmp_path / "ledger.db")
    rows = rows_of(tmp_path / "ledger.db")
    done = migrate_ledger(url_of(tmp_path / "ledger.db"), NOW_NS)
    assert (done.version_before, done.version_after, done.copy) == (
        SCHEMA_VERSION,
        SCHEMA_VERSION,
        None,
    )
    assert rows_of(tmp_path / "ledger.db") == rows


def test_a_newer_ledger_is_refused_with_one_line(tmp_path):
    fill(tmp_path / "ledger.db")
    sql(tmp_path / "ledger.db", "UPDATE schema_version SET version=99")
    with pytest.raises(
        LedgerError, match=f"schema version 99, this cost meter knows {SCHEMA_VERSION}"
    ) as refused:
        migrate_ledger(url_of(tmp_path / "ledger.db"), NOW_NS)
    assert "\n" not in str(refused.value)


def test_it_is_refused_without_room_and_while_a_server_uses_it(tmp_path):
    path = tmp_path / "ledger.db"
    fill(path)
    sql(path, "UPDATE schema_version SET version=8")
    with pytest.raises(LedgerError, match="free bytes to copy and migrate"):
        migrate_ledger(url_of(path), NOW_NS, free=lambda _: 1000)
    sql(path, "UPDATE schema_version SET version=9")
    with server(path) as running:
        sql(path, "UPDATE schema_version SET version=8")
        with pytest.raises(LedgerError, match="in use by process"):
            migrate_ledger(url_of(path), NOW_NS)
        running.stop()
    assert sql(path, "SELECT version FROM schema_version") == [(8,)]
    assert sorted(p.name for p in tmp_path.iterdir() if "schema-8" in p.name) == []


def test_other_commands_say_to_migrate(old):
    with pytest.raises(LedgerError, match="run `vllm-cost-meter ledger migrate`"):
        LedgerReader(url_of(old))
