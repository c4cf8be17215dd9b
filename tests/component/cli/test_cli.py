"""The command line over a real ledger: what it prints, and with which status it ends."""

import contextlib
import csv
import io
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.component.ledger.test_reader import CLASS_ROWS, T0, http, part, snapshot
from tests.support.builders import make_open
from tests.support.ledger_writer import LedgerWriter
from tests.support.small_ledger import live_now
from tests.support.upkeep import sums_again
from vllm_cost_meter.cli.audit import NOT_READ
from vllm_cost_meter.cli.commands import app
from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.records.energy import ENERGY_CLASSES
from vllm_cost_meter.records.snapshot import ClassTotals
from vllm_cost_meter.units.text import to_csv
from vllm_cost_meter.units.time import unix_ns_of

EVIL = "=HYPERLINK(1)"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("COST_METER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return write_ledger(tmp_path / "ledger.db")


def write_ledger(path: Path) -> Path:
    """A ledger of three exchanges, two of alice and one of a name that a spreadsheet would run."""
    bills = [part(1), part(2, "h2"), part(3, "h3", tenant=EVIL, cost_nanousd=None)]
    told = [http(), http("h2", at=1), http("h3", at=2, tenant=EVIL, cost_nanousd=None)]
    writer = LedgerWriter(f"sqlite:///{path}")
    writer.start()
    writer.commit(*bills, *told, snapshot(bills)).result(10)
    writer.close(5)
    return path


def run(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


def sql(path: Path, statement: str, *values: Any) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement, values)


def cells(line: str) -> list[str]:
    return line.split()


# ---- reports


def test_tenants_are_a_table_whose_rows_are_the_whole(ledger):
    result = run("report", "--ledger", ledger)
    assert result.exit_code == 0
    head, *rows, own, adds_up, last = result.stdout.splitlines()
    assert cells(head) == [
        *("tenant", "requests", "prompt_tokens", "cached_tokens", "output_tokens"),
        *("gpu_seconds", "cost_usd"),
    ]
    assert cells(rows[0]) == ["alice", "2", "20", "4", "10", "0.000001", "-"]
    assert [cells(row)[0] for row in rows] == ["alice", EVIL, *CLASS_ROWS]
    assert own == "each row is a tenant on its own, without those below it"
    assert adds_up == "adds up: the rows are all of 0.000002 GPU-seconds, to the nanosecond"
    assert last.startswith("no cost in all: no price for run run at 2027-01-15T08Z: none is set by")


def test_energy_is_a_column_in_joules_where_any_is_known(ledger):
    sql(ledger, "INSERT INTO request_energy VALUES ('run', 1, 500000, 700001, NULL)")
    sql(ledger, "UPDATE snapshots SET energy_mj = 700071, energy_reason = NULL")
    for name in ENERGY_CLASSES:
        mj = {"requests": 700_001, "idle": 70}.get(name, 0)
        sql(ledger, f"UPDATE snapshots SET {name}_mj = ?", mj)
    head, *rows, _, _, _ = run("report", "--ledger", ledger).stdout.splitlines()
    energies = {cells(row)[0]: cells(row)[-1] for row in rows}
    assert cells(head)[-1] == "joules"
    assert (energies["alice"], energies[EVIL], energies["__idle__"]) == ("700.001", "-", "0.070")
    head, *rows = run("report", "requests", "--ledger", ledger).stdout.splitlines()
    assert [cells(head)[-1], *(cells(row)[-1] for row in rows)] == ["joules", "-", "-", "700.001"]
    assert run("audit", "--full", "--ledger", ledger).exit_code == 0
    sql(ledger, "DELETE FROM request_energy")
    failed = run("audit", "--full", "--ledger", ledger)
    assert failed.exit_code == 1
    assert "  energy_difference_mj: 700001" in failed.stdout


def test_requests_are_a_table_the_newest_first(ledger):
    result = run("report", "requests", "--ledger", ledger, "--limit", 2)
    head, *rows = result.stdout.splitlines()
    assert cells(head)[:3] == ["finished_at", "http_request_id", "tenant"]
    assert [cells(row)[1] for row in rows] == ["h3", "h2"]
    assert cells(rows[1])[-1] == "0.000000007"
    only = run("report", "requests", "--ledger", ledger, "--tenant", "alice")
    _, *rows, whose = only.stdout.splitlines()
    assert [cells(row)[1] for row in rows] == ["h2", "h1"]
    assert whose == "requests of alice with all tenants below it"


def test_json_is_one_object_with_exact_figures(ledger):
    tenants = json.loads(run("report", "tenants", "--json", "--ledger", ledger).stdout)
    assert tenants["adds_up"] is True
    assert {row["tenant"]: row["gpu_time_ns"] for row in tenants["tenants"]}["alice"] == 600
    requests = json.loads(run("report", "requests", "--json", "--ledger", ledger).stdout)
    assert requests["requests"][2]["cost_usd"] == "0.000000007"
    assert requests["next"] is None


def test_csv_can_be_read_back_and_runs_in_no_spreadsheet(ledger):
    result = run("report", "--csv", "--ledger", ledger)
    rows = list(csv.DictReader(io.StringIO(result.stdout, newline="")))
    assert rows[1]["tenant"] == f"'{EVIL}"
    assert (rows[0]["tenant"], rows[0]["gpu_time_ns"]) == ("alice", "600")
    requests = run("report", "requests", "--csv", "--ledger", ledger).stdout
    first, *_ = csv.DictReader(io.StringIO(requests, newline=""))
    assert (first["tenant"], first["cost_usd"], first["status"]) == (f"'{EVIL}", "", "200")
    assert "parts" not in first


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("alice", "alice"),
        ("=1+1", "'=1+1"),
        ("+1+1", "'+1+1"),
        ("-1+1", "'-1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("-cmd|'/c calc'!A0", "'-cmd|'/c calc'!A0"),
        ("-", "'-"),
        ("-0.000000001", "-0.000000001"),
        ("-12", "-12"),
        (-12, "-12"),
        ("-1.5\n", "'-1.5\\n"),
        ("-1e5", "'-1e5"),
        ("\tx", "\\tx"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b31m", "\\x9b31m"),
        (None, ""),
        (0, "0"),
        ("a,b", "a,b"),
        ('say "x"', 'say "x"'),
    ],
)
def test_a_csv_cell_is_a_number_or_plain_text(value, cell):
    text = to_csv([{"name": value, "parts": []}])
    assert list(csv.reader(io.StringIO(text, newline=""))) == [["name"], [cell]]


def test_no_rows_are_no_csv():
    assert to_csv([]) == ""


def test_what_clients_chose_cannot_steer_the_terminal(ledger):
    sql(ledger, "UPDATE http_requests SET tenant = ?, route = ?", "\x1b[2Jx", "/v1/\u202ey\n")
    sql(ledger, "UPDATE requests SET tenant = ?", "\x1b[2Jx")
    sql(ledger, "UPDATE usage_pieces SET tenant = ?", "\x1b[2Jx")
    sums_again(ledger)
    for arguments in (
        ["report"],
        ["report", "requests"],
        ["report", "--csv"],
        ["report", "--json"],
    ):
        result = run(*arguments, "--ledger", ledger)
        assert all(c.isprintable() or c in "\r\n" for c in result.stdout), result.stdout
        assert result.exit_code == 0


def test_names_are_shown_as_they_are(ledger):
    name = ":warning: [bold]x[/bold] naïve"
    for table in ("http_requests", "requests", "usage_pieces"):
        sql(ledger, f"UPDATE {table} SET tenant = ?", name)
    sums_again(ledger)
    assert name in run("report", "--ledger", ledger).stdout
    assert name in run("report", "requests", "--ledger", ledger).stdout


def test_no_figure_is_cut_however_narrow_the_terminal_is(ledger):
    name = "t" * 128
    for table in ("http_requests", "requests", "usage_pieces"):
        sql(ledger, f"UPDATE {table} SET tenant = ?", name)
    sql(ledger, "UPDATE requests SET output_tokens = 123456789012345")
    sums_again(ledger)
    for what in ("tenants", "requests"):
        result = run("report", what, "--ledger", ledger, COLUMNS="20")
        assert "…" not in result.stdout
        assert name in result.stdout
        assert "123456789012345" in result.stdout or what == "tenants"
        assert "output_tokens" in result.stdout


def test_rows_that_do_not_add_up_end_with_1_and_the_difference(ledger):
    sql(ledger, "UPDATE requests SET hour = NULL WHERE seq = 2")
    sums_again(ledger)
    result = run("report", "--ledger", ledger)
    assert result.exit_code == 1
    assert "DOES NOT ADD UP: 300 ns of 0.000002 GPU-seconds are missing" in result.stdout
    assert run("report", "--json", "--ledger", ledger).exit_code == 1


def test_an_option_that_does_not_apply_is_refused_and_not_passed_over(ledger):
    for arguments, name in (
        (["requests", "--window", "today"], "--window"),
        (["tenants", "--tenant", "alice"], "--tenant"),
        (["--json", "--csv"], "--csv"),
    ):
        result = run("report", *arguments, "--ledger", ledger)
        assert result.exit_code == 2
        assert one_line(result).startswith(f"vllm-cost-meter: {name}: expected ")


# ---- prices

BOOK = """\
gpu_hour_usd = 1.5
[[prices]]
amount = 7.2e3
scope = "node"
gpus = 2
kind = "reserved"
effective_from = 2027-01-15T08:00:00Z
source = "contract 17"
[[prices]]
amount = 10
scope = "node"
gpus = 2
kind = "reserved"
effective_from = 2027-02-01T00:00:00Z
source = "contract 18"
[[energy_prices]]
usd_per_kwh = 0.3
effective_from = 2026-01-01T00:00:00Z
source = "utility"
[[overheads]]
name = "rent"
usd_per_month = 744
source = "lease"
[[overheads]]
name = "staff"
percent = 10
source = "plan"
"""


@pytest.fixture
def book(tmp_path: Path) -> str:
    path = tmp_path / "meter.toml"
    path.write_text(BOOK)
    return str(path)


def test_a_report_is_priced_by_the_settings_and_says_by_which_prices(ledger, book):
    *_, adds_up, price, rent, staff = run(
        "report", "--ledger", ledger, COST_METER_CONFIG=book
    ).stdout.splitlines()
    assert adds_up.startswith("adds up: ")
    assert price == (
        "priced at 3600 USD per GPU-hour (7200 USD per node of 2 GPUs, reserved, from"
        " 2027-01-15T08Z, contract 17)"
    )
    assert rent == "besides, rent (744 USD a month, lease): 1.000000000 USD"
    assert staff == "besides, staff (10 %, plan): 0.000000194 USD"
    answer = json.loads(run("report", "--json", "--ledger", ledger, COST_METER_CONFIG=book).stdout)
    assert answer["tenants"][0]["cost_nanousd"] == 600
    [row, *_] = csv.DictReader(
        io.StringIO(run("report", "--csv", "--ledger", ledger, COST_METER_CONFIG=book).stdout)
    )
    assert (row["cost_nanousd"], row["cost_reason"]) == ("600", "")


def test_a_percentage_of_no_cost_says_why(ledger, book):
    Path(book).write_text('[[overheads]]\nname = "staff"\npercent = 10\nsource = "plan"')
    *_, staff = run("report", "--ledger", ledger, COST_METER_CONFIG=book).stdout.splitlines()
    assert staff == "besides, staff (10 %, plan): the cost it is a part of is null"


def test_the_book_is_listed_with_the_time_for_which_each_entry_holds(book):
    head, *rows = run("prices", COST_METER_CONFIG=book).stdout.splitlines()
    assert cells(head)[:4] == ["key", "effective_from", "effective_until", "usd_per_gpu_hour"]
    instants = ["2027-01-15T08:00:00.000000Z", "2027-02-01T00:00:00.000000Z"]
    assert cells(rows[0])[:4] == ["prices[0]", *instants, "3600"]
    assert cells(rows[1])[:4] == ["prices[1]", instants[1], "-", "5"]
    assert cells(rows[2])[:4] == ["COST_METER_GPU_HOUR_USD", "-", "-", "1.5"]
    assert cells(rows[4])[:4] == ["energy_prices[0]", "2026-01-01T00:00:00.000000Z", "-", "0.3"]
    assert [cells(row)[0] for row in rows[6:]] == ["overheads[0]", "overheads[1]"]


def test_the_book_is_one_json_object(book):
    listed = json.loads(run("prices", "--json", COST_METER_CONFIG=book).stdout)
    assert list(listed) == ["prices", "energy_prices", "overheads"]
    first, second, _ = listed["prices"]
    assert first["effective_until"] == second["effective_from"]
    assert (first["amount"], first["kind"], first["source"]) == ("7200", "reserved", "contract 17")


def test_an_empty_book_says_where_prices_are_set():
    assert run("prices").stdout == (
        "no price: set COST_METER_GPU_HOUR_USD, or [[prices]] in the configuration file\n"
    )


def test_a_bad_price_is_one_line_and_2(ledger, book):
    Path(book).write_text(BOOK.replace("744", "-744"))
    for arguments in (["prices"], ["report", "--ledger", ledger], ["doctor"]):
        result = run(*arguments, COST_METER_CONFIG=book)
        assert result.exit_code == 2
        assert one_line(result) == (
            f"vllm-cost-meter: overheads[0].usd_per_month ({book}:22): expected a decimal number"
            " from 0 to 1,000,000,000,000 with at most 18 decimal places, got -744"
        )


# ---- audit


def test_an_audit_that_balances_says_so(ledger):
    live_now(ledger)
    result = run("audit", "--ledger", ledger)
    assert result.exit_code == 0
    *_, run_line, how, last = result.stdout.splitlines()
    assert "3 bills; difference 0 ns" in run_line
    assert (how, last) == (NOT_READ, "balanced")
    answer = json.loads(run("audit", "--json", "--ledger", ledger).stdout)
    assert (answer["balanced"], answer["runs"][0]["missing_bills"]) == (True, [])


def test_a_bill_that_was_deleted_is_named_with_the_difference(ledger):
    sql(ledger, "DELETE FROM requests WHERE seq = 2")
    # Of an engine that is dead: a report waits for bills of one that lives.
    sql(ledger, "UPDATE snapshots SET taken_at = '2020-01-01T00:00:00.000000Z'")
    assert run("audit", "--ledger", ledger).exit_code == 0, "it reads what the bills add up to"
    result = run("audit", "--full", "--ledger", ledger)
    assert result.exit_code == 1
    assert "  ledger_difference_ns: 300" in result.stdout.splitlines()
    assert "  missing bills: 2" in result.stdout.splitlines()
    assert result.stdout.endswith("NOT BALANCED\n")
    as_json = run("audit", "--json", "--full", "--ledger", ledger)
    assert as_json.exit_code == 1
    found = json.loads(as_json.stdout)["runs"][0]
    assert (found["missing_bills"], found["ledger_difference_ns"]) == (["2"], 300)


def test_requests_that_run_come_first_with_what_they_cost_so_far(ledger):
    live = (("internal-4", Accrued(decode_ns=5_000_000)),)
    bills = [part(1), part(2, "h2"), part(3, "h3", tenant=EVIL, cost_nanousd=None)]
    totals = ClassTotals(requests=900, in_flight=5_000_000)
    record(ledger, make_open(request_id="internal-4", http_request_id="h4", started_at_ns=T0))
    record(ledger, snapshot(bills, 2, totals=totals, live=live, step_ns=0))
    live_now(ledger)
    head, *rows = run("report", "requests", "--ledger", ledger).stdout.splitlines()
    assert "state" in cells(head)
    assert cells(rows[0])[:5] == ["-", "h4", "alice", "/v1/completions", "running"]
    assert cells(rows[0])[-2:] == ["0.005000", "-"]
    assert [cells(row)[4] for row in rows[1:]] == ["finished"] * 3


def test_an_audit_names_whose_time_a_dead_engine_lost(ledger):
    live = tuple((f"internal-{n}", Accrued(decode_ns=n * 10**9)) for n in range(10, 35))
    bills = [part(1), part(2, "h2"), part(3, "h3", tenant=EVIL, cost_nanousd=None)]
    spent = sum(used.gpu_time_ns for _, used in live)
    totals = ClassTotals(requests=900, in_flight=spent + 5 * 10**8)
    began = unix_ns_of("2020-01-01T00:00:30.000000Z")
    named = make_open(
        request_id="internal-34", http_request_id="h34", tenant=EVIL, started_at_ns=began
    )
    record(ledger, named)
    at = {"started_at_ns": T0 - 10**9, "taken_at_ns": T0}
    record(ledger, snapshot(bills, 2, totals=totals, live=live, step_ns=5 * 10**8, **at))
    sql(ledger, "UPDATE runs SET started_at = '2020-01-01T00:00:00.000000Z'")
    sql(ledger, "UPDATE snapshots SET taken_at = '2020-01-01T00:01:00.000000Z'")
    result = run("audit", "--ledger", ledger)
    assert result.exit_code == 0, "what a dead engine lost is booked, and balances"
    name, first, second, third, died, when, lost, *named, more, _, last = result.stdout.splitlines()
    books = (first, second, third)
    assert name == "2020-01-01 00:00 node-1 m, engine 0, run run"
    assert max(map(len, books)) <= 80
    assert books[0].startswith("  wall 550.500 s x 1 GPU = requests 0.000 +")
    assert "+ lost 550.500;" in second
    assert died == "  died after 2020-01-01T00:01:00.000000Z and bill 3;"
    assert when.endswith("last snapshot 2020-01-01T00:01:00.000000Z, after bill 3: 1 ran, 0 waited")
    assert lost == (
        "  lost 550.500 s: 550.000 of requests without a bill, 0.500 of the step in flight"
    )
    assert named[0] == f"    34.000 s at 2027-01-15T08:00:00.000000Z: tenant {EVIL}, h34"
    assert named[1] == "    33.000 s at 2027-01-15T08:00:00.000000Z: tenant (unknown), internal-33"
    assert len(named) == 20
    assert more == "    and 5 more; --json lists them, up to 1000 in all"
    assert last == "balanced"


def record(path: Path, *records: Any) -> None:
    writer = LedgerWriter(f"sqlite:///{path}")
    writer.start()
    writer.commit(*records).result(10)
    writer.close(5)


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE requests SET prefill_ns = 99 WHERE seq = 1", "uneven_bills: 1"),
        ("UPDATE requests SET tenant = 'me' WHERE seq = 1", "changed: True"),
        ("UPDATE snapshots SET billed_ns = 899", "billed_difference_ns: 1"),
        ("UPDATE engine_hours SET idle_ns = idle_ns + 5", "hours_difference_ns: 5"),
        ("UPDATE snapshots SET wall_ns = wall_ns + 7", "difference 7 ns"),
    ],
)
def test_an_audit_that_fails_says_why(ledger, statement, said):
    sql(ledger, statement)
    result = run("audit", "--full", "--ledger", ledger)
    assert result.exit_code == 1
    assert said in result.stdout


# ---- a user's errors


def one_line(result: Result) -> str:
    """The one line on standard error that a user's error ends with; nothing on standard output."""
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("command", ["report", "audit"])
def test_no_ledger_is_one_line_and_2(command, tmp_path):
    for arguments in ([], ["--ledger", tmp_path / "nothing.db"]):
        result = run(command, *arguments)
        assert result.exit_code == 2
        assert "no such file; start a server with the meter" in one_line(result)
    assert not (tmp_path / "state").exists(), "a report creates nothing"


def test_a_file_that_is_no_ledger_is_one_line_and_2(tmp_path):
    text, empty = tmp_path / "text.db", tmp_path / "empty.db"
    text.write_text("not a database" * 100)
    empty.touch()
    for path in (text, empty, tmp_path):
        result = run("report", "--ledger", path)
        assert result.exit_code == 2
        assert one_line(result).startswith("vllm-cost-meter: ledger ")


@pytest.mark.parametrize("command", ["report", "audit", "doctor"])
def test_wrong_settings_are_one_line_and_2(command):
    result = run(command, COST_METER_PORT="abc")
    assert result.exit_code == 2
    assert one_line(result) == (
        "vllm-cost-meter: COST_METER_PORT (environment): expected 0 to 65535, or off, got 'abc'"
    )


@pytest.mark.parametrize("window", ["now", "0h", "2026-01-02T00:00:00Z,2026-01-01T00:00:00Z"])
def test_a_wrong_window_is_one_line_and_2(ledger, window):
    result = run("report", "--window", window, "--ledger", ledger)
    assert result.exit_code == 2
    assert one_line(result).startswith("vllm-cost-meter: window: expected ")


def test_what_a_message_shows_cannot_steer_the_terminal(tmp_path):
    result = run("report", "--ledger", f"sqlite+\x1b[2J\n:///{tmp_path}")
    assert "\x1b" not in one_line(result)


@pytest.mark.parametrize(
    "arguments", [["report", "nonsense"], ["report", "--limit", "0"], ["nonsense"], ["--nonsense"]]
)
def test_wrong_usage_is_2(arguments):
    assert run(*arguments).exit_code == 2


# ---- settings, help, pipes


def test_the_ledger_of_the_settings_is_read(ledger):
    assert run("audit", COST_METER_LEDGER=f"sqlite:///{ledger}").exit_code == 0


def test_a_reader_of_a_pipe_that_leaves_sees_no_traceback(ledger):
    command = f"{sys.executable} -m vllm_cost_meter.cli report --json --ledger {ledger} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
