"""Tables as JSON, as CSV and in a file: the same on every command that prints one."""

import csv
import io
import json
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.component.cli.test_cli import no_settings, run
from tests.component.cli.test_tables import ALL_TIME, COMMANDS, TENANT, files
from vllm_cost_meter.cli.audit import audit_lines
from vllm_cost_meter.ledger.auditing.audit import DIFFERENCES
from vllm_cost_meter.records.snapshot import CLASSES

__all__ = ["files", "no_settings"]

# Commands of one table.
TABLES = [
    "report", "report requests", "report --aggregate", "statement", "statement --all", "budgets",
    "economics", "compare", "invoice list", "invoice days", "saturation list", "tenants list",
]  # fmt: skip


@pytest.fixture
def settings(files: Path, monkeypatch: pytest.MonkeyPatch, no_settings: None) -> None:
    monkeypatch.setenv("COST_METER_CONFIG", str(files / "meter.toml"))
    monkeypatch.setenv("COST_METER_LEDGER", f"sqlite:///{files / 'ledger.db'}")


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("name", TABLES)
def test_each_table_is_json_or_csv_and_may_go_to_a_file(name: str, tmp_path: Path) -> None:
    words = COMMANDS[name]
    assert isinstance(json.loads(run(*words, "--json").stdout), dict)
    printed = run(*words, "--csv").stdout
    head, *rows = csv.reader(io.StringIO(printed))
    assert rows
    assert {len(row) for row in rows} == {len(head)}
    for form in ((), ("--csv",)):
        file = tmp_path / "out"
        written = run(*words, *form, "--output", file)
        assert (written.stdout, written.stderr) == ("", "")
        assert file.read_bytes() == run(*words, *form).stdout_bytes


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("name", TABLES)
def test_two_formats_at_once_are_refused(name: str, tmp_path: Path) -> None:
    refused = run(*COMMANDS[name], "--json", "--csv", "--output", tmp_path / "out")
    assert refused.exit_code == 2
    assert refused.stderr == "vllm-cost-meter: --csv: expected without --json, got both\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("settings")
def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    refused = run("budgets", "--output", tmp_path / "none" / "out")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "--output: " in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.usefixtures("settings")
def test_the_short_words_of_a_statement_are_its_formats() -> None:
    words = COMMANDS["statement"]
    assert run(*words, "--json").stdout == run(*words, "--format", "json").stdout
    assert run(*words, "--csv").stdout == run(*words, "--format", "csv").stdout
    refused = run(*words, "--csv", "--format", "html")
    assert refused.exit_code == 2
    assert "--csv: expected without --format html, got both" in refused.stderr


@pytest.mark.usefixtures("settings")
def test_a_tenants_csv_has_its_tags_in_one_cell() -> None:
    (row, _) = csv.DictReader(io.StringIO(run("tenants", "list", "--csv").stdout))
    assert row["name"] == TENANT
    assert row["tags"] == "cost_center=4711-0815-1234-5678, team=search-and-recommendation"
    assert row["api_key_sha256"] == "a1a1a1a1..."


@pytest.mark.usefixtures("settings")
def test_the_csv_of_economics_has_all_digits() -> None:
    answer = json.loads(run("economics", "--window", ALL_TIME, "--json").stdout)
    rows = csv.DictReader(io.StringIO(run("economics", "--window", ALL_TIME, "--csv").stdout))
    found = {row["figure"]: row["value"] for row in rows}
    assert float(found["usd_per_m_output_tokens"]) == answer["figures"]["usd_per_m_output_tokens"]


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("words", [("economics",), ("compare", "--model", "openai/gpt-4o")])
def test_a_month_begins_where_the_time_zone_says(words: tuple[str, ...]) -> None:
    def begin(*more: str) -> datetime:
        answer = json.loads(run(*words, "--window", "2027-01", *more, "--json").stdout)
        return datetime.fromisoformat(answer["window"]["from"])

    assert begin() == datetime(2027, 1, 1, tzinfo=UTC)
    assert begin("--tz", "Europe/Berlin") == datetime(2026, 12, 31, 23, tzinfo=UTC)


def test_an_audit_shows_sleep_dummy_and_lost_time_by_name_and_the_run_by_its_host() -> None:
    times = {f"{name}_ns": 10**9 * at for at, name in enumerate(CLASSES, 1)}
    run_ = {
        **times, **dict.fromkeys(DIFFERENCES, 0), "started_at": "2027-01-15T08:00:00.000000Z",
        "host": "node-7", "model": "llama", "engine_index": 0, "run_id": "0123456789",
        "wall_ns": sum(times.values()), "gpus": 1, "last_seq": 3, "missing_bills": [],
        "lost_requests": [], "lost_step_ns": 0, "unbilled_replies": [],
        "last_bills": 0, "last_bills_ns": 0, "last_bills_in_flight_ns": 0,
    }  # fmt: skip
    whole = {
        "full": True,
        "fleet": None,
        "runs": [run_],
        "without_totals": [],
        "set_aside": [],
        "journal_losses": [],
        "rows_kept_from": None,
        "balanced": True,
    }
    lines = list(audit_lines(whole))
    assert lines[0] == "2027-01-15 08:00 node-7 llama, engine 0, run 01234567"
    shown = " ".join(lines)
    assert "other" not in shown
    for at, name in enumerate(CLASSES, 1):
        assert f"{name} {at}.000" in shown


@pytest.mark.usefixtures("settings")
def test_the_import_of_curves_says_in_json_what_it_kept(files: Path, tmp_path: Path) -> None:
    book = tmp_path / "ledger.db"
    with (
        closing(sqlite3.connect(files / "ledger.db")) as old,
        closing(sqlite3.connect(book)) as new,
    ):
        old.backup(new)
    words = ("saturation", "import", files / "curve.json", "--ledger", book, "--json")
    assert json.loads(run(*words).stdout) == {"new": 0, "known": 1}
