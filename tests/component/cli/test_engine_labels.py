"""Commands that are about some engines: `--filter label:...` on each, and what they say of it."""

import json
from pathlib import Path

import pytest

from tests.component.cli.test_cli import cells, no_settings, one_line, run
from tests.component.ledger.test_engine_labels import MONTH, ledger

__all__ = ["ledger", "no_settings"]

ALL_TIME = ("--window", MONTH)
SPOT = ("--filter", "label:pool=spot")
SAID = "of engines with label:pool=spot alone: all figures are theirs"
OFFERS = """
[[api_prices]]
provider = "there"
model = "m"
input_usd_per_m = 1
output_usd_per_m = 4
source = "their page"
"""


@pytest.fixture
def path(ledger) -> str:
    return str(ledger.url.removeprefix("sqlite:///"))


def test_a_report_by_label_tells_usage_from_idle_time_of_each_pool(path):
    head, *lines = run("report", "--aggregate", "label:pool", "--ledger", path).stdout.splitlines()
    assert cells(head)[:3] == ["class", "label:pool", "requests"]
    shown = {tuple(cells(line)[:2]): cells(line)[6] for line in lines if len(cells(line)) > 6}
    assert shown["requests", "spot"] == "9.000000"
    assert shown["idle", "spot"] == "11.000000"
    assert shown["idle", "__unallocated__"] == "6.000000"


def test_a_report_says_which_engines_it_is_about(path):
    said = run("report", *SPOT, "--ledger", path).stdout.splitlines()
    assert SAID in said
    assert said[-1] == "adds up: the rows are all of 20.000000 GPU-seconds, to the nanosecond"
    assert not any(line.startswith("filtered:") for line in said)
    both = run("report", "--filter", "label:pool=spot+tenant:bob", "--ledger", path).stdout
    assert SAID in both.splitlines()
    assert "filtered: rows that are not shown" in both


def test_economics_are_of_the_engines_that_were_chosen(path):
    result = run("economics", *SPOT, *ALL_TIME, "--ledger", path)
    assert SAID in result.stdout.splitlines()
    answer = json.loads(run("economics", *SPOT, *ALL_TIME, "--ledger", path, "--json").stdout)
    assert (answer["engines"], answer["figures"]["cost_usd"]) == ("label:pool=spot", 20)
    sql = run("economics", *SPOT, "--explain", "cost_usd", *ALL_TIME, "--ledger", path).stdout
    assert "'spot-1'" in sql
    assert "'big'" not in sql


def test_a_statement_may_be_of_some_engines(path):
    of = ("--month", MONTH, "--all", "--json", "--ledger", path)
    answer = json.loads(run("statement", *SPOT, *of).stdout)
    assert (answer["engines"], answer["whole"]["amount_cents"]) == ("label:pool=spot", 2_000)


def test_a_comparison_may_be_of_some_engines(path, tmp_path: Path):
    prices = tmp_path / "prices.toml"
    prices.write_text(OFFERS)
    of = (*ALL_TIME, "--ledger", path, "--prices", prices, "--json")
    answer = json.loads(run("compare", *SPOT, *of).stdout)
    assert (answer["inputs"]["filter"], answer["mix"]["requests"]) == ("label:pool=spot", 2)
    assert (answer["self_hosted"]["model"], answer["self_hosted"]["usd"]) == (
        "label:pool=spot", "20.0",
    )  # fmt: skip
    whole = json.loads(run("compare", *of).stdout)
    assert (whole["mix"]["requests"], whole["self_hosted"]["usd"]) == (4, "70.0")


@pytest.mark.parametrize(
    "command", [("economics",), ("statement", "--month", MONTH, "--all"), ("compare",)]
)
def test_a_filter_of_anything_but_labels_is_refused_where_all_is_about_engines(path, command):
    result = run(*command, "--filter", "tenant:alice", "--ledger", path)
    assert result.exit_code == 2
    assert "filter: expected label:NAME=VALUE" in one_line(result)
