"""The command `invoice` over a real ledger: what it prints, and with which status it ends."""

import json

import pytest

from tests.component.cli.test_cli import no_settings, run
from tests.component.ledger.test_economics import write
from tests.component.ledger.test_reader import Ledger

__all__ = ["no_settings"]

HEAD = "resource,timestamp,cumulative_usd\n"
# 0.50 USD in the hour that cost 0.40 by its price; the counter falls in the next.
READINGS = (
    "gpu-1,2027-01-15T08:00:00Z,1\n"
    "gpu-1,2027-01-15T09:00:00Z,1.5\n"
    "gpu-1,2027-01-15T10:00:00Z,0.1\n"
)  # fmt: skip


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "ledger.db"
    ledger = Ledger(f"sqlite:///{path}")
    write(ledger)
    ledger.close()
    return path


@pytest.fixture
def bill(tmp_path):
    file = tmp_path / "readings.csv"
    file.write_text(HEAD + READINGS)
    return file


def bring(path, bill, *options, **environment):
    return run(
        "invoice", "import", bill, "--format", "snapshots", "--ledger", path, *options,
        **environment,
    )  # fmt: skip


def test_an_import_says_what_was_written_and_what_nobody_observed(path, bill):
    result = bring(path, bill)
    assert (result.exit_code, result.stderr) == (0, "")
    head, row, written, lost = result.stdout.splitlines()
    assert head.split()[:2] == ["resource", "kind"]
    assert row.split()[:2] == ["gpu-1", "gpu"]
    assert row.split()[-3:] == ["0.500000000", "1", "1"]
    assert written == (
        "readings.csv: written: 0 lines and 3 snapshots; known before: 0; ignored rows: 0"
    )
    assert lost == (
        "not observed: gpu-1 (gpu) from 2027-01-15T09:00:00.000000Z to"
        " 2027-01-15T10:00:00.000000Z: reset"
    )


def test_a_dry_run_leaves_the_ledger_as_it_is(path, bill):
    answer = json.loads(bring(path, bill, "--dry-run", "--json").stdout)
    assert (answer["dry_run"], answer["snapshots"]) == (True, 3)
    assert "no bill" in run("invoice", "list", "--ledger", path).stdout
    assert json.loads(run("invoice", "list", "--ledger", path, "--json").stdout) == {
        "resources": []
    }


def test_what_was_imported_is_listed(path, bill):
    bring(path, bill)
    table = run("invoice", "list", "--ledger", path).stdout
    assert table.splitlines()[1].split()[0] == "gpu-1"
    [row] = json.loads(run("invoice", "list", "--ledger", path, "--json").stdout)["resources"]
    assert (row["billed_usd"], row["snapshots"], row["resets"]) == ("0.500000000", 3, 1)


def test_days_hold_the_bill_against_the_meter(path, bill):
    bring(path, bill)
    day, total = run("invoice", "days", "--ledger", path).stdout.splitlines()[1:]
    assert day.split()[:5] == ["2027-01-15", "0.600000000", "0.500000000", "0.100000000", "0.8"]
    assert total.split()[1:] == day.split()[1:]
    head, row = run("invoice", "days", "--ledger", path, "--csv").stdout.splitlines()
    assert dict(zip(head.split(","), row.split(","), strict=True))["unobserved_hours"] == "1.0"
    answer = json.loads(run("invoice", "days", "--ledger", path, "--json").stdout)
    assert [one["capture_rate"] for one in answer["days"]] == [0.8]
    window = ("--window", "2027-02-01T00:00:00Z,2027-02-02T00:00:00Z")
    answer = json.loads(run("invoice", "days", "--ledger", path, "--json", *window).stdout)
    assert answer["days"] == []


def test_a_layout_of_the_settings_is_a_format(path, tmp_path):
    config = tmp_path / "meter.toml"
    config.write_text(
        '[[invoices]]\nname = "lambda"\n'
        'columns = { resource = "Instance", from = "Start", to = "End", amount = "Cost" }\n'
        'constants = { kind = "gpu", currency = "EUR" }\n'
        '[[invoice_rates]]\ncurrency = "EUR"\nusd_rate = 1.25\n'
    )
    bill = tmp_path / "lambda.csv"
    bill.write_text("Instance,Start,End,Cost\ng,2027-01-15T08:00:00Z,2027-01-15T09:00:00Z,0.4\n")
    told = ("--format", "lambda", "--ledger", path, "--json")
    result = run("invoice", "import", bill, *told, COST_METER_CONFIG=str(config))
    [row] = json.loads(result.stdout)["resources"]
    assert row["billed_usd"] == "0.500000000"
    result = run("invoice", "import", bill, *told)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("gpu-1,2027-01-15T08:00:00Z,NaN", "readings.csv:2: cumulative_usd: expected"),
        ("gpu-1,2027-01-15T08:00:00Z,-1", "readings.csv:2: cumulative_usd: expected"),
        ("gpu-1,tomorrow,1", "readings.csv:2: timestamp: expected"),
        ("", "expected at least one row"),
    ],
)
def test_a_bad_file_is_one_line_and_status_2_and_writes_nothing(path, bill, row, message):
    bill.write_text(f"{HEAD}{row}\n{READINGS if row else ''}")
    result = bring(path, bill)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert message in result.stderr
    assert "no bill" in run("invoice", "list", "--ledger", path).stdout


def test_a_reading_that_contradicts_the_ledger_is_one_line_and_status_2(path, bill):
    bring(path, bill)
    bill.write_text(HEAD + READINGS.replace(",1\n", ",7\n"))
    result = bring(path, bill)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "readings.csv:2: 'gpu-1' at 2027-01-15T08:00:00.000000Z: expected" in result.stderr


@pytest.mark.parametrize("window", ["nonsense", "2027-02-01T00:00:00Z,2027-01-01T00:00:00Z", "0h"])
def test_a_window_of_no_sense_is_one_line_and_status_2(path, window):
    result = run("invoice", "days", "--ledger", path, "--window", window)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_json_and_csv_together_are_refused(path):
    result = run("invoice", "days", "--ledger", path, "--json", "--csv")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("gap", ["0", "-1", "nan", "9000", "x"])
def test_a_gap_of_no_sense_is_one_line_and_status_2(path, bill, gap):
    result = bring(path, bill, COST_METER_INVOICE_GAP_HOURS=gap)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "COST_METER_INVOICE_GAP_HOURS (environment): expected a number above 0" in result.stderr


def test_a_shorter_gap_is_told(path, bill):
    told = bring(path, bill, "--json", COST_METER_INVOICE_GAP_HOURS="0.5").stdout
    assert [one["reason"] for one in json.loads(told)["unobserved"]] == ["gap", "reset"]
