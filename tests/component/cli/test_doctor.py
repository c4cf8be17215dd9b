"""The doctor: each check finds what it looks for, and what is wrong with it."""

import contextlib
import json
import sqlite3
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.doctor import findings, named, path, state_of_check
from tests.support.nvml import A, Card, nvmls
from tests.support.small_ledger import live_now
from tests.support.untouched import old_ledger
from tests.support.upkeep import noise, rows_of
from vllm_cost_meter.cli.commands import app
from vllm_cost_meter.cli.doctor import examine
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.journal.places import folder_of_ledger, link_second
from vllm_cost_meter.ledger.batches import BatchWriter
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION
from vllm_cost_meter.prices.book import PriceBook, PriceEntry, RunMatch

CHECKS = [
    "entry points",
    "named",
    "native",
    "vllm",
    "server",
    "ledger",
    "journal",
    "archive",
    "fleet",
    "settings",
    "schema",
    "pages",
    "books",
    "cost model",
    "price",
    "energy",
    "access",
]


__all__ = ["named", "path"]


def spoil_a_page(path: Path) -> None:
    """Overwrite the page with the root of a table."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        query = "SELECT rootpage FROM sqlite_master WHERE name = 'usage_pieces'"
        (page,) = connection.execute(query).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    content = bytearray(path.read_bytes())
    content[(page - 1) * size : page * size] = noise(size)
    path.write_bytes(content)


def sql(path: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


def test_a_good_installation_passes_every_check(path):
    found = findings(path)
    assert list(found) == CHECKS
    assert all(ok for ok, _ in found.values()), found
    assert found["books"][1] == "1 engine runs balance"
    assert found["vllm"][1].endswith("as the meter expects; an endpoint plugin adds the middleware")


def test_the_command_prints_one_line_a_check_or_one_json_object(path):
    text = CliRunner().invoke(app, ["doctor", "--ledger", str(path)])
    assert text.exit_code == 0
    assert [line.partition(":")[0] for line in text.stdout.splitlines()] == [
        f"ok   {name}" for name in CHECKS
    ]
    answer = json.loads(CliRunner().invoke(app, ["doctor", "--json", "--ledger", str(path)]).stdout)
    assert answer["ok"] is True
    assert [finding["name"] for finding in answer["findings"]] == CHECKS
    assert set(answer["findings"][0]) == {"name", "ok", "state", "detail"}


def test_once_tenants_are_declared_refusing_the_unnamed_is_recommended(path):
    acme = {"name": "acme", "api_key_sha256": ["ab" * 32]}
    for settings, said in (
        (Settings(), "every request has the same right to be served"),
        (Settings(tenants=[acme]), "recommended: COST_METER_UNNAMED_REQUESTS=refuse"),
        (Settings(tenants=[acme], unnamed_requests="refuse"), "that no rule names are refused"),
    ):
        ok, detail = findings(path, settings=settings)["access"]
        assert ok
        assert said in detail


def test_a_ledger_that_is_not_there_yet_is_no_fault_and_is_not_made(tmp_path):
    found = findings(tmp_path / "new" / "ledger.db")
    place = f"sqlite:///{tmp_path}/new/ledger.db"
    said = f"{place}: not there yet: the server makes the file at its start"
    assert found["ledger"] == (True, said)
    for name in ("schema", "pages", "books", "cost model"):
        assert found[name] == (True, "there is no ledger yet")
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_that_could_not_be_made_is_a_fault(tmp_path):
    (tmp_path / "file").touch()
    ok, detail = findings(tmp_path / "file" / "ledger.db")["ledger"]
    assert not ok
    assert f"cannot be created: {tmp_path}/file is a file" in detail


def test_a_row_of_each_table_is_written_and_taken_back(path):
    before = rows_of(path)
    said = f"sqlite:///{path} can be written: a row of each table, and taken back"
    assert findings(path)["ledger"] == (True, said)
    assert rows_of(path) == before


def test_looser_modes_are_said_and_not_changed(path):
    path.chmod(0o644)
    found = state_of_check(path, "ledger")
    assert found[0] == "warn"
    assert found[1].endswith(
        "; ledger.db is open to other users: a metered server's start closes it"
    )
    assert path.stat().st_mode & 0o777 == 0o644


def test_an_older_schema_is_a_warning_that_says_what_the_next_start_does(tmp_path):
    old_ledger(tmp_path / "ledger.db", 3)
    state, detail = state_of_check(tmp_path / "ledger.db", "schema")
    assert state == "warn"
    assert detail.startswith(f"version 3, this cost meter has {SCHEMA_VERSION}: the next start of")
    assert detail.endswith("`vllm-cost-meter ledger migrate` keeps a copy")
    found = findings(tmp_path / "ledger.db")
    assert found["books"] == (True, "not looked at: the ledger has schema version 3")


def test_a_newer_schema_is_a_fault(path):
    sql(path, "UPDATE schema_version SET version = 99")
    ok, detail = findings(path)["schema"]
    assert not ok
    assert f"has schema version 99, this cost meter knows {SCHEMA_VERSION}" in detail


def test_a_damaged_page_is_found(path):
    spoil_a_page(path)
    ok, detail = findings(path)["pages"]
    assert not ok
    assert detail.endswith("; run `vllm-cost-meter ledger check`")


def test_the_look_for_damage_in_a_large_ledger_is_cut_short_and_says_so(path):
    sql(path, "CREATE TABLE large AS SELECT zeroblob(64000000) AS x UNION ALL SELECT 1")
    detail = "cut short after 0.001 s: `vllm-cost-meter ledger check` reads all of them"
    assert findings(path, quick_check_s=0.001)["pages"] == (True, detail)


def test_a_ledger_that_cannot_be_written_fails_and_so_does_the_command(tmp_path):
    found = findings(tmp_path)
    assert "expected a file, got a folder" in found["ledger"][1]
    result = CliRunner().invoke(app, ["doctor", "--ledger", str(tmp_path)])
    assert result.exit_code == 1
    assert "FAIL ledger: " in result.stdout
    as_json = CliRunner().invoke(app, ["doctor", "--json", "--ledger", str(tmp_path)])
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["ok"] is False


def test_books_that_do_not_balance_fail(path):
    sql(path, "UPDATE snapshots SET billed_ns = billed_ns + 1")
    sql(path, "UPDATE snapshots SET taken_at = '2020-01-01T00:00:00.000000Z'")
    ok, detail = findings(path)["books"]
    assert not ok
    assert "vllm-cost-meter audit says where" in detail


def test_a_run_with_bills_and_without_totals_is_a_warning(path):
    sql(path, "DELETE FROM snapshots")
    assert state_of_check(path, "books") == (
        "warn",
        "0 engine runs balance; of 1 more no totals are known: vllm-cost-meter audit says whose",
    )


def test_an_engine_whose_meter_is_off_fails(path):
    sql(path, "UPDATE snapshots SET state = 'off'")
    live_now(path)
    ok, detail = findings(path)["books"]
    assert not ok
    assert "switched itself off in run run" in detail


@pytest.mark.parametrize("plugins", ["other", ""])
def test_plugins_that_leave_the_meter_out_fail(path, monkeypatch, plugins):
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    ok, detail = findings(path)["named"]
    assert not ok
    assert "leaves cost_meter out" in detail


def test_plugins_that_are_unset_need_the_flag(path, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS")
    assert findings(path)["named"] == (
        True,
        "VLLM_PLUGINS is unset: start with --plugins cost_meter",
    )


def test_a_ledger_that_refuses_a_write_cannot_be_written(path):
    """What SQLite says when a disk is full, said here by a trigger."""
    sql(
        path,
        "CREATE TRIGGER full BEFORE INSERT ON usage_pieces"
        " BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END",
    )
    ok, detail = findings(path)["ledger"]
    assert not ok
    assert detail.endswith("database or disk is full")


def test_a_password_in_the_ledgers_url_is_not_shown():
    found = {f.name: f.detail for f in examine("postgresql+psycopg://me:s3cret@127.0.0.1:1/x")}
    assert "s3cret" not in str(found)


def priced(path: Path, *entries: PriceEntry) -> tuple[bool, str]:
    found = {f.name: f for f in examine(f"sqlite:///{path}", PriceBook(entries))}
    return found["price"].ok, found["price"].detail


def test_the_price_in_force_is_named_with_its_source_for_the_latest_run(path):
    then = PriceEntry("prices[0]", Decimal("2"), "old list", 0, matches=RunMatch(host="node-1"))
    now = PriceEntry("prices[1]", Decimal("3"), "list", 1, matches=RunMatch(host="node-1"))
    later = PriceEntry("prices[2]", Decimal("4"), "x", 10**6, matches=RunMatch(host="node-1"))
    other = PriceEntry("prices[3]", Decimal("5"), "y", 1)
    assert priced(path, then, now, later, other) == (
        True,
        "now 3 USD per GPU-hour (gpu, from 1970-01-01T01Z, list), by prices[1]",
    )


def test_no_price_at_all_is_no_fault(path):
    assert priced(path) == (
        True,
        "none now, so cost is null: none is set by COST_METER_GPU_HOUR_USD or [[prices]]",
    )


def test_prices_of_which_none_is_for_the_latest_run_fail(path, tmp_path):
    other = PriceEntry("prices[0]", Decimal("2"), "list", 0, matches=RunMatch(host="node-2"))
    ok, detail = priced(path, other)
    assert not ok
    assert detail == (
        "none now, so cost is null: no entry matches model 'm', GPU 'a GPU', host 'node-1'"
    )
    assert priced(tmp_path / "new.db", other)[0], "no engine has run yet"


def test_the_command_takes_the_prices_of_the_settings(path, monkeypatch):
    monkeypatch.setenv("COST_METER_GPU_HOUR_USD", "2.49")
    said = CliRunner().invoke(app, ["doctor", "--ledger", str(path)]).stdout
    assert (
        "ok   price: now 2.49 USD per GPU-hour (gpu, COST_METER_GPU_HOUR_USD), by"
        " COST_METER_GPU_HOUR_USD\n"
    ) in said


def test_a_gpu_whose_energy_can_be_read_is_named(machine, path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine.add(Card(A))
    detail = f"the counter of NVIDIA H100 80GB HBM3 ({A}) can be read"
    assert findings(path)["energy"] == (True, detail)


def test_a_gpu_whose_energy_cannot_be_read_says_why_and_fails_nothing(machine, path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine.add(Card(A, mig_mode=1))
    ok, detail = findings(path)["energy"]
    assert ok
    assert detail.startswith("not measured: a MIG slice has no counter")


def test_a_machine_without_a_driver_passes(tmp_path, path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with nvmls(tmp_path / "none.so", tmp_path / "script"):
        assert findings(path)["energy"] == (
            True,
            "not measured: no libnvidia-ml.so.1, so no NVIDIA driver is here",
        )


def test_an_installation_without_the_binding_fails(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    ok, detail = findings(path)["energy"]
    assert not ok
    assert "pip install nvidia-ml-py" in detail


def test_the_places_of_the_journal_are_looked_at_and_nothing_is_made(path, tmp_path):
    assert state_of_check(path, "journal") == (
        "ok",
        f"{path}.journal: not there yet, and can be made; no second place is set",
    )
    same = Settings(second_journal=str(tmp_path / "other"))
    state, detail = state_of_check(path, "journal", settings=same)
    assert state == "warn"
    assert f"{tmp_path / 'other'} is on the same disk: where that fails, both do" in detail
    assert not (tmp_path / "other").exists()
    (tmp_path / "file").write_text("no folder")
    wrong = Settings(second_journal=str(tmp_path / "file" / "below"))
    state, detail = state_of_check(path, "journal", settings=wrong)
    assert state == "fail"
    assert f"{tmp_path / 'file'} is no folder that this user can write" in detail


def test_a_second_place_that_is_away_is_a_failure(path, tmp_path):
    second = tmp_path / "gone"
    folder_of_ledger(path).mkdir()
    link_second(folder_of_ledger(path), second)
    assert state_of_check(path, "journal")[0] == "ok"
    second.rmdir()
    state, detail = state_of_check(path, "journal")
    assert state == "fail"
    assert "is its disk away" in detail


def test_an_archive_is_looked_at_and_not_made(path, tmp_path):
    folder = tmp_path / "archive"
    assert state_of_check(path, "archive") == (
        "ok",
        "none is set: rows of old requests are dropped for good",
    )
    same = Settings(archive=str(folder))
    assert state_of_check(path, "archive", settings=same) == (
        "ok",
        f"{folder}: not there yet, and can be made",
    )
    assert not folder.exists()
    folder.write_text("no folder")
    state, detail = state_of_check(path, "archive", settings=same)
    assert (state, detail) == ("fail", f"{folder}: {folder} is no folder that this user can write")


def test_a_damaged_file_that_was_set_aside_is_a_warning(path):
    path.rename(path.with_name("ledger.db.damaged-20270115T080000Z"))
    BatchWriter(f"sqlite:///{path}").opened()
    state, detail = state_of_check(path, "ledger")
    assert state == "warn"
    assert "ledger.db.damaged-20270115T080000Z was set aside" in detail
    assert "ledger merge" in detail
