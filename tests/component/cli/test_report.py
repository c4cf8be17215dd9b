"""`report` in the words of the grammar and `statement`, over a real ledger."""

import csv
import io
import json
from pathlib import Path

import pytest

from tests.component.cli.test_cli import EVIL, cells, one_line, record, run, sql, write_ledger
from tests.component.ledger.test_charges import bill, write
from tests.component.ledger.test_reader import T0, Ledger, part, snapshot
from tests.support.upkeep import sums_again
from vllm_cost_meter.cli.report import SPLIT_NOTE
from vllm_cost_meter.records.snapshot import ClassTotals


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return write_ledger(tmp_path / "ledger.db")


# ---- reports in the words of the grammar


def test_a_report_is_added_up_by_the_columns_asked_for(ledger):
    result = run("report", "--aggregate", "model,day", "--idle", "even", "--ledger", ledger)
    assert result.exit_code == 0
    head, first, *_, last = result.stdout.splitlines()
    assert cells(head) == [
        "model", "day", "requests", "prompt_tokens", "cached_tokens", "output_tokens",
        "gpu_seconds", "idle_share_seconds", "usage_cost_usd", "cost_usd",
    ]  # fmt: skip
    assert cells(first) == [
        "m", "2027-01-15", "3", "30", "6", "15", "0.000001", "0.000001", "-", "-",
    ]  # fmt: skip
    assert last == "adds up: the rows are all of 0.000002 GPU-seconds, to the nanosecond"


@pytest.fixture
def split_ledger(tmp_path: Path) -> Path:
    """A ledger whose splits are known in part: alice's of 600 of 900 ns, bob's not, carol's all."""
    path = tmp_path / "split.db"
    written = Ledger(f"sqlite:///{path}")
    bills = [bill(1, 30), bill(2, 10), bill(3, None)]
    write(written, [*bills, bill(4, None, tenant="bob"), bill(5, 0, tenant="carol")])
    written.close()
    return path


@pytest.mark.parametrize("words", [(), ("--aggregate", "tenant")])
def test_a_table_says_of_each_row_how_far_its_split_may_be_off(split_ledger, words):
    lines = run("report", *words, "--ledger", split_ledger).stdout.splitlines()
    assert cells(lines[0])[-2:] == ["cost_usd", "split_within"]
    shown = {cells(line)[0]: line.split("  ")[-1].strip() for line in lines[1:5]}
    assert shown == {
        "alice": "6.7% of 66.6%", "bob": "unknown", "carol": "0.0%", "__idle__": "-",
    }  # fmt: skip
    assert lines[-1] == SPLIT_NOTE


def test_a_table_has_no_column_of_it_where_nothing_is_known(ledger):
    result = run("report", "--ledger", ledger)
    assert "split_within" not in result.stdout


def test_a_narrow_terminal_drops_it_before_what_was_asked_for(split_ledger, monkeypatch):
    monkeypatch.setattr("vllm_cost_meter.console.terminal_width", lambda _file=None: 60)
    head, *rest = run("report", "--ledger", split_ledger).stdout.splitlines()
    assert {"tenant", "gpu_seconds", "cost_usd"} <= set(cells(head))
    assert "split_within" not in head
    left_out = " ".join(" ".join(rest).split()).partition("left out: ")[2].partition(";")[0]
    assert "split_within" in left_out.split(", ")


def test_what_if_is_said_below_the_table(ledger):
    result = run("report", "--price", "3600", "--filter", "tenant:alice", "--ledger", ledger)
    _, row, own, what_if, filtered, _ = result.stdout.splitlines()
    assert cells(row)[-1] == "0.000000600"
    assert what_if == "what if: every GPU-hour at 3600 USD; that is not what it cost"
    assert own == "each row is a tenant on its own, without those below it"
    assert filtered == (
        "filtered: rows that are not shown belong to the whole too; a tenant in the filter means it"
        " with all tenants below it"
    )


def test_rows_of_times_alone_name_their_class(ledger):
    head, first, second, *_ = run(
        "report", "--aggregate", "day", "--ledger", ledger
    ).stdout.splitlines()
    assert cells(head)[:2] == ["class", "day"]
    assert [cells(row)[0] for row in (first, second)] == ["requests", "idle"]


def test_steps_name_their_beginning(ledger):
    late = 3600 * 10**9
    bills = [part(1), part(2, "h2"), part(3, "h3", tenant=EVIL, cost_nanousd=None)]
    hours = {500_000: ClassTotals(requests=900), 500_001: ClassTotals(idle=70)}
    totals = hours[500_000].plus(hours[500_001])
    record(ledger, snapshot(bills, 2, totals=totals, hours=hours, taken_at_ns=T0 + late))
    table = run("report", "--step", "1h", "--ledger", ledger).stdout.splitlines()
    assert cells(table[0])[:2] == ["from", "tenant"]
    assert [cells(row)[0][11:13] for row in table[1:-2]] == ["08"] * 11 + ["09"] * 9
    shown = run("report", "--step", "1h", "--csv", "--ledger", ledger).stdout
    first, *_ = csv.DictReader(io.StringIO(shown, newline=""))
    assert (first["from"], first["to"]) == (
        "2027-01-15T08:00:00.000000Z", "2027-01-15T09:00:00.000000Z",
    )  # fmt: skip
    together = run("report", "--step", "1h", "--accumulate", "--ledger", ledger).stdout
    assert cells(together.splitlines()[0])[0] == "tenant"


def test_a_report_as_json_is_that_of_the_side_endpoint(ledger):
    shown = json.loads(run("report", "--aggregate", "lora", "--json", "--ledger", ledger).stdout)
    assert (shown["aggregate"], shown["adds_up"]) == (["lora"], True)
    assert shown["series"][0]["rows"][0]["lora"] == "__unallocated__"


def test_a_tag_and_its_values_cannot_steer_the_terminal_nor_a_spreadsheet(ledger):
    sql(ledger, "UPDATE requests SET tags = ?", json.dumps({"=x\x1b": "=1\x1b[2J"}))
    sums_again(ledger)
    for option in ([], ["--csv"]):
        result = run("report", "--aggregate", "tag:=x\x1b", *option, "--ledger", ledger)
        assert all(c.isprintable() or c in "\r\n" for c in result.stdout)
    assert "'=1\\x1b[2J" in result.stdout


def test_the_window_of_a_report_may_be_of_a_time_zone(ledger):
    tokyo = run("report", "--window", "2027-01", "--tz", "Asia/Tokyo", "--json", "--ledger", ledger)
    window = json.loads(tokyo.stdout)["window"]
    assert (window["from"], window["tz"]) == ("2026-12-31T15:00:00.000000Z", "Asia/Tokyo")


def test_a_report_without_words_is_that_by_tenant_with_its_old_keys(ledger):
    plain, by_tenant = (
        json.loads(run("report", *words, "--json", "--ledger", ledger).stdout)
        for words in ([], ["--aggregate", "tenant"])
    )
    assert {name: plain[name] for name in by_tenant} == by_tenant
    assert plain["tenants"] == by_tenant["series"][0]["rows"]
    assert plain["cost_nanousd"] == by_tenant["wall_cost_nanousd"]
    assert {"gpus", "after_cut", "overheads", "runs"} <= set(plain) - set(by_tenant)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--aggregate", "pod"], "aggregate: expected tenant, "),
        (["--step", "1m"], "step: expected one of 1h, 1d, 1w, month, got '1m'"),
        (["--idle", "fair"], "idle: expected none, "),
        (["--filter", "alice"], "filter: expected COLUMN:VALUE"),
        (["--price", "x"], "price: expected USD per GPU-hour, such as 2.10, got 'x'"),
        (["--tz", "Mars"], "tz: expected the name of a time zone"),
        (["requests", "--idle", "even"], "--idle: expected with `report tenants`"),
        (["requests", "--accumulate"], "--accumulate: expected with `report tenants`"),
        (["requests", "--tz", "UTC"], "--tz: expected with `report tenants`"),
    ],
)
def test_a_wrong_word_of_a_report_is_one_line_and_2(ledger, arguments, said):
    result = run("report", *arguments, "--ledger", ledger)
    assert result.exit_code == 2
    assert one_line(result).startswith(f"vllm-cost-meter: {said}")


def test_a_report_of_missing_bills_ends_with_1(ledger):
    sql(ledger, "UPDATE requests SET hour = NULL WHERE seq = 2")
    sums_again(ledger)
    result = run("report", "--aggregate", "model", "--ledger", ledger)
    assert result.exit_code == 1
    assert "DOES NOT ADD UP: 300 ns" in result.stdout


# ---- statements


def test_a_statement_is_of_one_tenant_or_of_all(ledger):
    mine = run("statement", "--tenant", "alice", "--month", "2027-01", "--ledger", ledger)
    assert mine.exit_code == 0
    assert mine.stdout.startswith(
        "Statement of alice with all tenants below it, 2027-01 (UTC), preliminary\n"
    )
    assert EVIL not in mine.stdout
    everyone = run("statement", "--all", "--month", "2027-01", "--ledger", ledger)
    assert everyone.stdout.startswith("Statement of all tenants, 2027-01 (UTC), preliminary\n")
    assert "whole: 0.000002 GPU-seconds of wall time x price unknown = unknown USD\n" in (
        everyone.stdout
    )


@pytest.mark.parametrize(
    ("option", "covers", "title", "tenants"),
    [
        ("--with-children", "with_children", "search with all tenants below it", ["ads", "search"]),
        ("--own", "own", "search on its own", ["search"]),
    ],
)
def test_a_statement_says_whether_the_tenants_below_are_in_it(
    tmp_path, option, covers, title, tenants
):
    bills = [part(1, tenant="search"), part(2, "h2", tenant="ads", tenant_parent="search")]
    path = tmp_path / "family.db"
    record(path, *bills, part(3, "h3", tenant="searches"), snapshot(bills))
    asked = ("statement", "--tenant", "search", option, "--month", "2027-01", "--ledger", path)
    answer = json.loads(run(*asked, "--json").stdout)
    assert (answer["tenant"], answer["covers"]) == ("search", covers)
    assert sorted({line["tenant"] for line in answer["lines"]}) == tenants
    assert answer["total"]["gpu_time_ns"] == 300 * len(tenants)
    text, page = run(*asked).stdout, run(*asked, "--format", "html").stdout
    assert text.startswith(f"Statement of {title}, 2027-01")
    assert f"<h1>Statement of {title}, 2027-01" in page
    rows = list(csv.DictReader(io.StringIO(run(*asked, "--csv").stdout, newline="")))
    assert sorted((row["tenant"], row["covers"]) for row in rows) == [(t, "own") for t in tenants]


def test_a_statement_is_written_in_each_format(ledger, tmp_path):
    def shown(format: str) -> str:
        result = run(
            *("statement", "--all", "--month", "2027-01", "--tz", "Europe/Berlin"),
            *("--idle", "even", "--format", format, "--ledger", ledger),
        )
        assert result.exit_code == 0
        return result.stdout

    answer = json.loads(shown("json"))
    assert (answer["month"], answer["window"]["tz"], answer["idle"]) == (
        "2027-01", "Europe/Berlin", "even",
    )  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(shown("csv"), newline="")))
    assert [(row["kind"], row["tenant"], row["item"]) for row in rows[:3]] == [
        ("usage", f"'{EVIL}", "m"), ("usage", "alice", "m"), ("class", "", "__idle__"),
    ]  # fmt: skip
    assert list(rows[0]) == list(answer["lines"][0])
    assert shown("html").startswith("<!doctype html>")


@pytest.mark.parametrize("format", ["table", "csv", "html"])
def test_a_statement_goes_into_a_file_as_it_would_be_printed(ledger, tmp_path, format):
    words = ("statement", "--all", "--month", "2027-01", "--format", format, "--ledger", ledger)
    path = tmp_path / "statement"
    assert run(*words, "-o", path).stdout == ""
    printed = run(*words).stdout_bytes
    assert path.read_bytes() == printed


def test_a_statement_that_does_not_add_up_ends_with_1(ledger):
    sql(ledger, "UPDATE requests SET hour = NULL WHERE seq = 2")
    sums_again(ledger)
    result = run("statement", "--all", "--month", "2027-01", "--ledger", ledger)
    assert result.exit_code == 1
    assert "audit: DOES NOT ADD UP: 300 ns" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--month", "2027-01"], "--tenant: expected it or --all, and not both"),
        (["--month", "2027-01", "--all", "--tenant", "alice"], "--tenant: expected it or --all"),
        (["--month", "january", "--all"], "month: expected a month such as 2026-11, got 'january'"),
        (["--month", "2027-01", "--all", "--tz", "Mars"], "tz: expected"),
        (["--month", "2027-01", "--all", "--idle", "fair"], "idle: expected"),
        (["--month", "2027-01", "--tenant", "alise"], "tenant: expected one with lines in it"),
        (["--month", "2027-01", "--all", "-o", "/nowhere/x"], "--output: /nowhere/x cannot be"),
    ],
)
def test_a_wrong_word_of_a_statement_is_one_line_and_2(ledger, arguments, said):
    result = run("statement", *arguments, "--ledger", ledger)
    assert result.exit_code == 2
    assert one_line(result).startswith(f"vllm-cost-meter: {said}")


def test_an_idle_policy_that_names_nobody_known_says_so_on_stderr(ledger, tmp_path):
    words = ("report", "--idle", "reserved:alice=10,carl=5,desk=5", "--ledger", ledger)
    result = run(*words)
    assert (result.exit_code, result.stderr.splitlines()) == (
        0,
        [
            f"vllm-cost-meter: --idle: tenant {name!r} is neither declared nor in the ledger; it is"
            " charged all the same"
            for name in ("carl", "desk")
        ],
    )
    # A cost centre without requests may be declared.
    settings = tmp_path / "meter.toml"
    settings.write_text('[[tenants]]\nname = "desk"\n')
    result = run(*words, "--json", COST_METER_CONFIG=str(settings))
    assert result.stderr.count("\n") == 1
    assert json.loads(result.stdout)["idle_unseen"] == ["carl", "desk"]
    month = ("statement", "--month", "2027-01", "--all", "--idle", "owner:carl")
    assert "tenant 'carl' is neither" in run(*month, "--ledger", ledger).stderr
