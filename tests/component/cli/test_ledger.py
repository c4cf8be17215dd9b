"""The commands `ledger ...`: what they print, how they end, and that a server outlives them."""

import json
import subprocess
import sys

import pytest

from tests.component.cli.test_cli import no_settings, run
from tests.component.ledger.test_reader import http, part
from tests.support.upkeep import fill, noise, rows_of, server, sql, sums_again, url_of
from vllm_cost_meter.journal.places import FileLock, folder_of_ledger
from vllm_cost_meter.journal.writer import JournalWriter
from vllm_cost_meter.ledger.database import open_database
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION

__all__ = ["no_settings"]

# Of a SQLite file only.
FILE_COMMANDS = ("check", "backup", "restore", "merge", "compact", "repair", "migrate")
COMMANDS = ("apply", "drop", *FILE_COMMANDS)

# 2020-01-02T03:04:05Z
OLD_US = 1_577_934_245_000_000


@pytest.fixture
def ledger(tmp_path):
    fill(tmp_path / "ledger.db")
    return tmp_path / "ledger.db"


def ask(command, *arguments, ledger, **more):
    return run("ledger", command, *arguments, "--ledger", ledger, **more)


def answer(command, *arguments, ledger):
    done = ask(command, *arguments, "--json", ledger=ledger)
    return json.loads(done.stdout)


def spoil(ledger, page):
    with ledger.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(noise(4096))


def root_of(ledger, name):
    return sql(ledger, "SELECT rootpage FROM sqlite_master WHERE name=?", name)[0][0]


def test_a_sound_ledger_passes_its_check_and_a_damaged_one_does_not(ledger):
    done = ask("check", "--full", ledger=ledger)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0] == f"ok   schema: version {SCHEMA_VERSION}"
    assert answer("check", ledger=ledger)["ok"] is True
    spoil(ledger, root_of(ledger, "http_requests"))
    done = ask("check", ledger=ledger)
    assert done.exit_code == 1
    assert "FAIL pages: " in done.stdout
    assert answer("check", ledger=ledger)["ok"] is False


def test_a_backup_and_its_restore_say_the_rows(ledger, tmp_path):
    copy = tmp_path / "copy.db"
    done = ask("backup", copy, ledger=ledger)
    rows = sum(map(len, rows_of(ledger).values()))
    assert done.exit_code == 0
    assert done.stdout == (
        f"{copy}: {rows} rows, {copy.stat().st_size:,} bytes, schema version {SCHEMA_VERSION}\n"
    )
    assert ask("backup", copy, ledger=ledger).exit_code == 2
    assert answer("backup", copy, "--force", ledger=ledger)["rows"] == rows
    done = ask("restore", copy, ledger=ledger)
    assert done.exit_code == 0
    aside, restored = done.stdout.splitlines()
    assert aside.startswith(f"the ledger before: {ledger}.replaced-20")
    assert restored == f"restored: {rows} rows, schema version {SCHEMA_VERSION}"
    assert answer("restore", copy, ledger=ledger)["rows"] == rows


def journaled(ledger, bills):
    """Leave bills in the journal of a server that was killed; return their requests' ids."""
    writer = JournalWriter(folder_of_ledger(ledger))
    writer.start()
    for seq in range(1, bills + 1):
        writer.append(part(seq, f"late-{seq}", run_id="late"), http(f"late-{seq}")).result(10)
    writer.close()
    return [f"late-{seq}" for seq in range(1, bills + 1)]


def late_bills(ledger):
    return sql(ledger, "SELECT count(*) FROM requests WHERE run_id='late'")[0][0]


def test_what_a_killed_server_left_in_its_journal_is_applied_by_a_command(ledger):
    journaled(ledger, 7)
    assert late_bills(ledger) == 0
    done = ask("apply", ledger=ledger)
    assert (done.exit_code, done.stdout) == (0, "the ledger has all that its journals hold\n")
    assert late_bills(ledger) == 7
    assert answer("apply", ledger=ledger) == {"left_records": 0}


def test_a_report_applies_it_too(ledger):
    (asked, *_) = journaled(ledger, 3)
    done = run("explain", asked, "--ledger", ledger)
    assert done.exit_code == 0
    assert asked in done.stdout
    assert late_bills(ledger) == 3


def test_where_a_server_is_behind_commands_say_how_much_and_a_copy_is_refused(ledger, tmp_path):
    """Its applier holds the lock, as one does that cannot write for a moment."""
    journaled(ledger, 2)
    lock = FileLock.try_to_take(folder_of_ledger(ledger) / "applier.lock")
    done = ask("apply", ledger=ledger)
    assert done.exit_code == 1
    assert done.stdout.startswith("4 records in journals are not in the ledger")
    refused = ask("backup", tmp_path / "copy.db", ledger=ledger)
    assert refused.exit_code == 2
    assert "4 records in journals are not in it yet" in refused.stderr
    assert not (tmp_path / "copy.db").exists()
    lock.release()
    assert ask("backup", tmp_path / "copy.db", ledger=ledger).exit_code == 0
    assert late_bills(tmp_path / "copy.db") == 2


def test_a_ledger_whose_journals_are_not_applied_is_not_merged(ledger, tmp_path):
    other = tmp_path / "other.db"
    fill(other, "other", 5)
    journaled(other, 2)
    before = rows_of(ledger)
    refused = ask("merge", other, ledger=ledger)
    assert refused.exit_code == 2
    assert f"run `vllm-cost-meter ledger apply --ledger {other}` first" in refused.stderr
    assert rows_of(ledger) == before
    assert ask("apply", ledger=other).exit_code == 0
    assert ask("merge", other, ledger=ledger).exit_code == 0
    assert late_bills(ledger) == 2


def test_a_merge_shows_each_table(ledger, tmp_path):
    fill(tmp_path / "other.db", "other", 5)
    done = ask("merge", tmp_path / "other.db", "--dry-run", ledger=ledger)
    assert done.exit_code == 0
    assert "requests: 5 new, 0 raised, 0 known" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1] == "nothing was written: --dry-run"
    found = answer("merge", tmp_path / "other.db", ledger=ledger)
    assert {"name": "requests", "new": 5, "raised": 0, "known": 0, "differing": 0} in found[
        "tables"
    ]
    assert len(rows_of(ledger)["requests"]) == 35


def test_old_rows_are_dropped_and_the_books_balance_as_before(ledger):
    for table, column in (
        *(("requests", "finished_at"), ("requests", "ended_at")),
        ("http_requests", "finished_at"),
    ):
        sql(ledger, f"UPDATE {table} SET {column} = {OLD_US}")
    sums_again(ledger)
    assert ask("drop", "--before", "2020-01-02", ledger=ledger).stdout.startswith(
        "dropped from before 2020-01-02: 0 bills and 0 HTTP requests"
    )
    rows = "30 bills and 30 HTTP requests, and what"
    dry = ask("drop", "--before", "2020-01-03", "--dry-run", ledger=ledger)
    assert dry.stdout.splitlines() == [
        f"rows from before 2020-01-03: {rows} belongs to them",
        "nothing was dropped: --dry-run",
    ]
    assert len(rows_of(ledger)["requests"]) == 30
    done = ask("drop", "--before", "2020-01-03", ledger=ledger)
    assert done.stdout.splitlines()[0] == f"dropped from before 2020-01-03: {rows} belonged to them"
    assert rows_of(ledger)["requests"] == set()
    assert run("audit", "--full", "--ledger", ledger).exit_code == 0
    for words in (("audit",), ("report", "requests"), ("explain", "run-1")):
        told = run(*words, "--ledger", ledger)
        assert "requests that ended before 2020-01-03 (UTC) were dropped" in told.output, words
    nothing = {"bills": 0, "replies": 0}
    assert answer("drop", "--before", "2020-01-03", ledger=ledger) == {
        "before": "2020-01-03",
        "dry_run": False,
        "dropped": nothing,
        "left": nothing,
    }
    refused = ask("drop", "--before", "2999-01-01", ledger=ledger)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "rows of today and of the day before stay" in refused.stderr


def test_a_ledger_is_made_smaller(ledger):
    sql(ledger, "DELETE FROM requests")
    done = ask("compact", ledger=ledger)
    assert done.exit_code == 0
    assert done.stdout.endswith(f"{ledger.stat().st_size:,} bytes after\n")
    assert answer("compact", ledger=ledger)["bytes_after"] == ledger.stat().st_size


def test_a_repair_names_what_is_missing(tmp_path):
    ledger = tmp_path / "ledger.db"
    fill(ledger, bills=60)
    assert ask("repair", ledger=ledger).stdout == "nothing is damaged: nothing was changed\n"
    query = "SELECT pageno FROM dbstat WHERE name='requests' AND pagetype='leaf' AND ncell>3"
    spoil(ledger, sql(ledger, query)[0][0])
    done = ask("repair", ledger=ledger)
    assert done.exit_code == 0
    missing = 60 - len(rows_of(ledger)["requests"])
    assert missing > 3
    line = f"requests: {60 - missing} saved, {missing} missing, 1 damaged pages"
    assert line in done.stdout.splitlines()
    assert f"missing bills of run run: 1-{missing}" in done.stdout.splitlines()
    assert f"the damaged file: {ledger}.damaged-20" in done.stdout
    assert run("audit", "--ledger", ledger).exit_code == 1
    assert answer("repair", ledger=ledger) == {"damaged": False}
    assert answer("repair", "--force", ledger=ledger)["missing_bills"] == {"run": [f"1-{missing}"]}


def test_a_migration_says_the_way_back_and_other_commands_say_to_migrate(ledger):
    sql(ledger, "UPDATE schema_version SET version=8")
    refused = run("report", "--ledger", ledger)
    assert refused.exit_code == 2
    assert "run `vllm-cost-meter ledger migrate`" in refused.stderr
    done = ask("migrate", ledger=ledger)
    assert done.exit_code == 0
    copy, versions, way_back = done.stdout.splitlines()
    assert copy.startswith(f"the ledger as it was: {ledger}.schema-8-20")
    assert versions == f"migrated from schema version 8 to {SCHEMA_VERSION}"
    command = way_back.partition("`")[2].strip("`").split()[1:]
    assert command[-2:] == ["--ledger", str(ledger)]
    assert run(*command).exit_code == 0
    assert sql(ledger, "SELECT version FROM schema_version") == [(8,)]
    assert answer("migrate", ledger=ledger)["version_before"] == 8
    assert answer("migrate", ledger=ledger)["copy"] is None
    assert "nothing was changed" in ask("migrate", ledger=ledger).stdout
    sql(ledger, "UPDATE schema_version SET version=99")
    refused = ask("migrate", ledger=ledger)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("command", FILE_COMMANDS)
def test_for_postgresql_one_line_names_the_tool(command, tmp_path):
    files = [tmp_path / "file"] if command in ("backup", "restore", "merge") else []
    done = ask(command, *files, ledger="postgresql+psycopg://me:secret@host/db")
    assert done.exit_code == 2
    assert f"`ledger {command}` is for SQLite; in PostgreSQL the tool is " in done.stderr
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_ledger_that_is_not_there_is_one_line_and_is_not_made(command, tmp_path):
    files = [tmp_path / "file"] if command in ("backup", "restore", "merge") else []
    files += ["--before", "2020-01-01"] if command == "drop" else []
    done = ask(command, *files, ledger=tmp_path / "none.db")
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_command_takes_the_log_from_under_a_server(ledger, tmp_path):
    """Each runs as a process of its own beside a server, which is then killed: nothing is lost."""
    fill(tmp_path / "other.db", "other", 5)
    with server(ledger, commits_per_s=50) as running:
        wal = ledger.with_name("ledger.db-wal").stat().st_ino
        found = {}
        for words in (
            ("check",), ("check", "--full"), ("backup", tmp_path / "copy.db"),
            ("restore", tmp_path / "copy.db"), ("merge", tmp_path / "other.db"), ("compact",),
            ("repair", "--force"), ("migrate",),
        ):  # fmt: skip
            command = [sys.executable, "-m", "vllm_cost_meter.cli", "ledger", *map(str, words)]
            done = subprocess.run(
                [*command, "--ledger", str(ledger)], capture_output=True, text=True, check=False
            )
            found[" ".join(map(str, words[:1]))] = done.returncode
            assert ledger.with_name("ledger.db-wal").stat().st_ino == wal, words
        seen = sql(ledger, "SELECT max(seq) FROM requests WHERE run_id='live'")[0][0]
        running.process.kill()
        running.process.wait()
    assert found == {
        "check": 0, "backup": 0, "restore": 2, "merge": 0, "compact": 2, "repair": 2, "migrate": 0,
    }  # fmt: skip
    there = sql(ledger, "SELECT count(*), max(seq) FROM requests WHERE run_id='live'")[0]
    assert there[0] == there[1] >= seen
    assert sql(ledger, "SELECT count(*) FROM requests WHERE run_id='other'") == [(5,)]


def test_the_list_of_commands_is_complete():
    listed = run("ledger", "--help").stdout
    assert [word for word in COMMANDS if f" {word} " not in listed] == []


def test_a_new_ledger_passes_every_command(tmp_path):
    path = tmp_path / "ledger.db"
    open_database(url_of(path)).dispose()
    assert ask("check", "--full", ledger=path).exit_code == 0
    assert ask("backup", tmp_path / "copy.db", ledger=path).exit_code == 0
    assert ask("merge", tmp_path / "copy.db", ledger=path).exit_code == 0
    assert ask("repair", "--force", ledger=path).exit_code == 0
    assert ask("compact", ledger=path).exit_code == 0


def test_an_audit_is_not_balanced_while_journals_hold_what_the_ledger_lacks(ledger):
    assert run("audit", "--ledger", ledger).exit_code == 0
    journaled(ledger, 2)
    lock = FileLock.try_to_take(folder_of_ledger(ledger) / "applier.lock")
    done = run("audit", "--ledger", ledger)
    assert done.exit_code == 1
    assert done.stdout.splitlines()[-1].startswith(
        "NOT PROVED: journals hold what the ledger lacks"
    )
    found = json.loads(run("audit", "--json", "--ledger", ledger).stdout)
    assert (found["balanced"], found["reason"], found["not_applied_records"]) == (
        None,
        "not_applied",
        4,
    )
    lock.release()


def test_an_audit_names_what_was_lost_of_a_journal_and_is_not_balanced(ledger):
    journaled(ledger, 20)
    (segment,) = folder_of_ledger(ledger).glob("*/*.segment")
    content = bytearray(segment.read_bytes())
    content[content.index(b"late-9")] ^= 255
    segment.write_bytes(content)
    done = run("audit", "--ledger", ledger)
    assert done.exit_code == 1
    assert "1 records after record" in done.stdout
    assert done.stdout.splitlines()[-1] == "NOT BALANCED"
