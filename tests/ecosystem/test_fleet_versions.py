"""A fleet, and what waits in a ledger for one, that an earlier version of the meter made."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from tests.component.ledger.test_reader import http, part, snapshot
from tests.ecosystem.test_fleet import records_of, send, write
from tests.ecosystem.test_postgresql import _figures, rows
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.fleet.changes import TableRows, packed, unpacked
from vllm_cost_meter.ledger.fleet.schema import view_statements
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.tables.sums import EXTERNAL_AMOUNTS


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


def test_a_fleet_of_the_version_before_is_brought_up_to_date_by_the_first_server(
    tmp_path: Path, url: str
) -> None:
    one, two = (f"sqlite:///{tmp_path / name}.db" for name in ("one", "two"))
    write(one, *records_of("one"))
    send(one, url)
    before = _figures(url)
    columns = "SELECT table_name, column_name, data_type FROM information_schema.columns"
    mine = f"{columns} WHERE table_schema = current_schema() ORDER BY 1, 2"
    today = rows(url, mine)
    as_fleet_of_version_19(url)
    with pytest.raises(LedgerError, match="has schema version 19"):
        LedgerReader(url)
    write(two, *records_of("two"))
    send(two, url)
    assert rows(url, mine) == today
    runs = {run["run_id"] for run in _figures(url)[0]["runs"]}
    assert runs == {"one", "two"}
    assert _figures(url)[0]["balanced"] is before[0]["balanced"] is True


def as_fleet_of_version_19(url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        for name in (*(line.split()[2] for line in view_statements()), "replies"):
            connection.exec_driver_sql(f"DROP VIEW IF EXISTS {name} CASCADE")
        for table, column in (
            *((t, c) for t in ("sent_rollup_hours", "dropped_hours") for c in EXTERNAL_AMOUNTS),
            *(("requests", "external_tokens"), ("requests", "kv_role")),
            ("open_requests", "kv_role"),
        ):
            connection.exec_driver_sql(f"ALTER TABLE {table} DROP COLUMN {column}")
        connection.exec_driver_sql("UPDATE schema_version SET version = 19")
    engine.dispose()


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
