"""Rows go into Parquet files before they are dropped, and nothing goes that no file holds.

The judge of a file is DuckDB's own reader, beside the rows as sqlite3 reads them.
"""

import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pytest
from sqlalchemy import Engine, select

from tests.component.ledger.test_dropping import (
    AT,
    LATER_NS,
    MIDNIGHT,
    engine,
    left,
    path,
    put,
)
from tests.component.ledger.test_reader import HOUR, http, part, snapshot
from tests.support.upkeep import TWO_HOURS, rows_of, url_of, wrong_sums
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.ledger.retention import archiving
from vllm_cost_meter.ledger.retention.archiving import archive_and_drop
from vllm_cost_meter.ledger.retention.dropping import DroppedCounts, drop_exchanges
from vllm_cost_meter.ledger.retention.parquet import ParquetArchive
from vllm_cost_meter.ledger.schema import request_energy, requests, usage_pieces
from vllm_cost_meter.ledger.tables.replies import replies
from vllm_cost_meter.records.energy import ENERGY_CLASSES, RequestEnergy, RunEnergy
from vllm_cost_meter.records.owner import NamedBy, Owner

__all__ = ["engine", "path"]

TABLES = {table.name: table for table in (requests, usage_pieces, replies, request_energy)}
# All that quoting could get wrong.
ODD = Owner("o'dd \"ñ\\", NamedBy("api_key"), parent="above", tags={"a": "{'x': \"\\n\"}"})


@pytest.fixture
def archive(tmp_path: Path) -> ParquetArchive:
    return ParquetArchive(tmp_path / "archive")


def archived(archive: ParquetArchive) -> dict[str, set[tuple[Any, ...]]]:
    """Return the rows of all files by table."""
    found = {}
    with duckdb.connect(":memory:") as connection:
        for table in TABLES:
            files = str(archive.folder / table / "*.parquet")
            if list((archive.folder / table).glob("*.parquet")):
                rows = connection.execute("SELECT * FROM read_parquet(?)", [files]).fetchall()
                found[table] = {tuple(row) for row in rows}
                assert len(rows) == len(found[table])
    return found


def files_of(archive: ParquetArchive) -> list[str]:
    return sorted(str(f.relative_to(archive.folder)) for f in archive.folder.rglob("*.*"))


def fill(engine: Engine) -> None:
    """Write four bills of a day, with an energy that is known and one that is not."""
    bills = [part(1, "h1"), replace(part(2, "h2"), owner=ODD), part(3, "h2"), part(4, None)]
    bills[2] = part(3, "h2", pieces=TWO_HOURS)
    told = (RequestEnergy(1, HOUR, 7, None), RequestEnergy(2, HOUR, None, "no_device"))
    classes = dict.fromkeys(ENERGY_CLASSES, 0) | {"requests": 7}
    energy = RunEnergy(7, None, 0, classes, (), {HOUR: classes}, told)
    put(engine, *bills, http("h1"), http("h2"), http("h3"), snapshot(bills, energy=energy))


def test_the_files_hold_the_rows_that_were_dropped_and_all_sums_stay(engine, path, archive):
    fill(engine)
    with engine.connect() as connection:
        before = {name: set(connection.execute(select(of))) for name, of in TABLES.items()}
    with LedgerReader(url_of(path)) as reader:
        tenants = reader.tenants(as_of=AT)["tenants"]
        assert archive_and_drop(engine, MIDNIGHT, archive) == DroppedCounts(4, 3)
        assert reader.tenants(as_of=AT)["tenants"] == tenants
        assert reader.audit(AT, full=True)["balanced"]
    assert {table: rows for table, rows in archived(archive).items() if rows} == before
    assert all(not rows_of(path)[table] for table in TABLES if table != replies.name)
    assert not rows_of(path)["http_requests"]
    assert wrong_sums(path) == []


def test_a_file_is_named_by_table_and_day_and_is_for_its_owner_only(engine, archive):
    fill(engine)
    archive_and_drop(engine, MIDNIGHT, archive)
    day = "2027-01-15"
    assert files_of(archive) == [
        f"replies/{day}.2.parquet",  # The one without a bill.
        *(f"{table}/{day}.parquet" for table in sorted(TABLES)),
    ]
    for file in archive.folder.rglob("*"):
        mode = stat.S_IMODE(file.stat().st_mode)
        assert mode == (0o700 if file.is_dir() else 0o600), file


def test_a_day_whose_rows_come_late_gets_another_file(engine, archive):
    bills = [part(1, "h1"), part(2, "h2"), part(3, "h3", finished_at_ns=LATER_NS)]
    put(engine, bills[0], http("h1"), snapshot(bills))
    assert archive_and_drop(engine, MIDNIGHT, archive) == DroppedCounts(1, 1)
    put(engine, *bills)
    assert archive_and_drop(engine, MIDNIGHT + 24, archive) == DroppedCounts(2, 0)
    assert [name for name in files_of(archive) if name.startswith("requests/")] == [
        "requests/2027-01-15.2.parquet",
        "requests/2027-01-15.parquet",
        "requests/2027-01-16.parquet",
    ]
    assert {row[1] for row in archived(archive)["requests"]} == {1, 2, 3}


def test_an_exchange_that_changes_after_it_was_written_goes_into_a_file_again(
    engine, archive, monkeypatch
):
    bills = [part(1, "h1"), part(2, "h2"), part(3, "h1")]
    put(engine, *bills[:2], http("h2"), snapshot(bills))
    keep = archive.keep

    def keep_while_a_bill_comes(*given: Any) -> Any:
        written = keep(*given)
        put(engine, bills[2])
        return written

    monkeypatch.setattr(archive, "keep", keep_while_a_bill_comes)
    steps = []
    monkeypatch.setattr(archiving, "drop_exchanges", lambda *given: noted(steps, *given))
    assert archive_and_drop(engine, MIDNIGHT, archive) == DroppedCounts(3, 1)
    assert steps == [["h2"], ["h1"]]
    assert left(engine) == ([], [])
    with duckdb.connect(":memory:") as connection:
        files = str(archive.folder / "requests" / "*.parquet")
        found = connection.execute("SELECT seq FROM read_parquet(?)", [files]).fetchall()
    assert sorted(found) == [(1,), (1,), (2,), (3,)]


def noted(steps: list[list[str | None]], connection: Any, exchanges: Any) -> DroppedCounts:
    steps.append([whole.id for whole in exchanges])
    return drop_exchanges(connection, exchanges)


@pytest.mark.parametrize("spoilt", ["cut", "changed"])
def test_a_file_that_cannot_be_read_again_as_it_was_written_drops_nothing(
    engine, path, archive, monkeypatch, spoilt
):
    fill(engine)
    convert = ParquetArchive._convert

    def convert_and_spoil(self: ParquetArchive, table: Any, lines: Path, file: Path) -> None:
        if spoilt == "changed":
            lines.write_bytes(lines.read_bytes().replace(b'"seq":1,', b'"seq":9,'))
        convert(self, table, lines, file)
        if spoilt == "cut":
            file.write_bytes(file.read_bytes()[:-9])

    monkeypatch.setattr(ParquetArchive, "_convert", convert_and_spoil)
    before = rows_of(path)
    with pytest.raises(LedgerError, match="no row") as raised:
        archive_and_drop(engine, MIDNIGHT, archive)
    assert "\n" not in str(raised.value)
    assert rows_of(path) == before
    assert files_of(archive) == []


def test_an_archive_that_is_a_file_is_refused_with_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="archive .*/file: cannot be written: File exists"):
        ParquetArchive(tmp_path / "file")


def test_without_duckdb_an_archive_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(LedgerError, match=r"pip install 'vllm-cost-meter\[parquet\]'"):
        ParquetArchive(tmp_path)
