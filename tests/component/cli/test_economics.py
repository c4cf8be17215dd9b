"""The commands `economics` and `explain FIGURE` over a real ledger."""

import json
import sqlite3

import pytest

from tests.component.cli.test_cli import no_settings, run
from tests.component.ledger.test_economics import write
from tests.component.ledger.test_reader import Ledger

__all__ = ["no_settings"]

ALL_TIME = ("--window", "2026-01-01T00:00:00Z,2028-01-01T00:00:00Z")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "ledger.db"
    ledger = Ledger(f"sqlite:///{path}")
    write(ledger)
    ledger.close()
    return path


def test_figures_are_a_table_with_what_they_are_of(path):
    result = run("economics", "--ledger", path, *ALL_TIME)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    (cost,) = [line for line in lines if line.startswith("usd_per_m_output_tokens")]
    assert cost.split()[1:3] == ["30000", "USD"]
    assert lines[-1].startswith("priced at 36 USD per GPU-hour")
    assert "from 2026-01-01T00:00:00.000000Z" in result.stdout


def test_declared_bounds_are_judged(path):
    bounds = {"COST_METER_SLO_E2E_MS": "8", "COST_METER_SLO_PERCENTILE": "50"}
    result = run("economics", "--ledger", path, *ALL_TIME, **bounds)
    assert result.stdout.splitlines()[-1] == "bounds: e2e 8 ms for 50 %: met"
    answer = json.loads(run("economics", "--ledger", path, *ALL_TIME, "--json", **bounds).stdout)
    assert (answer["figures"]["good_requests"], answer["slo"]["met"]) == (2, True)


def test_a_week_without_anything_has_no_cost_and_no_error(path):
    result = run("economics", "--ledger", path)
    assert result.exit_code == 0
    assert "usd_per_request" in result.stdout


def test_explain_prints_the_sql_behind_a_figure(path):
    result = run("economics", "--explain", "arrivals_per_s", "--ledger", path)
    assert result.exit_code == 0
    about, sql = result.stdout.split("\n", 1)
    assert about == "arrivals_per_s: lambda: arrivals / observed time"
    with sqlite3.connect(path) as connection:
        assert connection.execute(sql).fetchall() == [(None,)]  # nothing ran in the last week
    told = run("economics", "--explain", "arrivals_per_s", "--ledger", path, "--json").stdout
    assert json.loads(told)["sql"].strip() == sql.strip()


def test_a_figure_of_bounds_that_nobody_declared_is_refused(path):
    result = run("economics", "--explain", "good_requests", "--ledger", path)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "good_requests: expected latency bounds" in result.stderr


def test_the_sql_of_a_figure_is_that_of_the_window_that_is_asked_for(path):
    asked = ("economics", "--explain", "arrivals_per_s", "--ledger", path)
    week = run(*asked).stdout
    year = run(*asked, "--window", "2027-01-01T00:00:00Z,2028-01-01T00:00:00Z").stdout
    assert week != year
    with sqlite3.connect(path) as connection:
        ((arrivals,),) = connection.execute(year.split("\n", 1)[1]).fetchall()
    assert arrivals is not None


def test_a_figure_that_is_none_is_refused(path):
    result = run("economics", "--explain", "x", "--ledger", path)
    assert result.exit_code == 2
    assert "--explain: expected a figure that `economics` lists, got 'x'" in result.stderr


def test_explain_with_a_figure_says_where_figures_are_explained(path):
    result = run("explain", "arrivals_per_s", "--ledger", path)
    assert (result.exit_code, result.stderr) == (
        2,
        "vllm-cost-meter: no request with the id 'arrivals_per_s' in the ledger; a figure is"
        " explained by `economics --explain arrivals_per_s`\n",
    )


@pytest.mark.parametrize("window", ["nonsense", "2027-02-01T00:00:00Z,2027-01-01T00:00:00Z"])
def test_a_window_of_no_sense_is_one_line(path, window):
    result = run("economics", "--ledger", path, "--window", window)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("bound", ["0", "-1", "nan", "inf", "x"])
def test_a_bound_of_no_sense_is_one_line(path, bound):
    result = run("economics", "--ledger", path, COST_METER_SLO_TTFT_MS=bound)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "COST_METER_SLO_TTFT_MS (environment): expected a number above 0" in result.stderr
