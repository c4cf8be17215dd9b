"""The command `break-even`: the price book in place of rates, and plots."""

import json
import sys

import pytest

from tests.component.cli.test_cli import no_settings, run

__all__ = ["no_settings"]

GIVEN = ("--tokens-per-hour", 10**6, "--api-usd-per-m", 1)
BOOK = """
[[prices]]
amount = 2.5
scope = "gpu"
kind = "on_demand"
effective_from = 2026-01-01T00:00:00Z
source = "price list"

[[prices]]
amount = 16
scope = "node"
gpus = 8
kind = "reserved"
effective_from = 2026-01-01T00:00:00Z
source = "contract 7"
host = "res-*"
"""


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "meter.toml"
    path.write_text(BOOK)
    return {"COST_METER_CONFIG": str(path)}


def test_rates_come_from_the_price_book_and_say_where_from(book):
    ask = ("break-even", "--price-book", "--gpus", 4, *GIVEN)
    answer = json.loads(run(*ask, "--json", **book).stdout)
    assert (answer["inputs"]["usd_per_hour"], answer["inputs"]["reserved_usd_per_hour"]) == (10, 8)
    assert answer["inputs"]["spot_usd_per_hour"] is None
    assert [(one["kind"], one["savings_percent"]) for one in answer["rates"]] == [
        ("on_demand", 0), ("reserved", pytest.approx(20)),
    ]  # fmt: skip
    used = answer["price_book"]
    assert (used["gpus"], used["gpu_name"]) == (4, None)
    assert [one["source"] for one in used["prices"]] == ["price list", "contract 7"]
    given = ("--usd-per-hour", 10, "--reserved-usd-per-hour", 8)
    said = json.loads(run("break-even", *given, *GIVEN, "--json").stdout)
    assert said == {name: value for name, value in answer.items() if name != "price_book"}
    shown = run(*ask, **book).stdout.splitlines()
    assert shown[-2].startswith("on_demand: 2.5 USD per GPU-hour (gpu, on_demand, from 2026-01-01")
    assert shown[-1].endswith("contract 7)")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "usd_per_hour: expected it or --price-book, got neither"),
        (("--price-book", "--gpus", 1, "--usd-per-hour", 1), "price book: expected it or usd_per"),
        (("--price-book", "--gpus", 1, "--spot-usd-per-hour", 1), "or spot_usd_per_hour, got both"),
        (("--price-book",), "gpus: expected how many the deployment has"),
        (("--price-book", "--gpus", 0), "gpus: expected a whole number above 0, got 0"),
        (("--usd-per-hour", 1, "--gpus", 1), "gpus: expected --price-book with it"),
        (("--usd-per-hour", 1, "--gpu-name", "x"), "gpu_name: expected --price-book with it"),
        (("--price-book", "--gpus", 1), "expected an on_demand price in force, got none"),
    ],
)
def test_rates_are_given_once(words, said, book):
    settings = {} if said.endswith("got none") else book
    result = run("break-even", *words, *GIVEN, **settings)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert said in result.stderr


@pytest.mark.parametrize(
    "given",
    [
        ("--usd-per-hour", 0.01),  # breaks even at 1 %
        ("--usd-per-hour", 1000),  # far from breaking even
        ("--usd-per-hour", 1, "--reserved-usd-per-hour", 0.6, "--spot-usd-per-hour", 0.3),
        ("--usd-per-hour", 0.4, "--overhead-usd-per-month", 5, "--overhead-percent", 3),
        ("--usd-per-hour", 1e-9),
    ],
)
def test_it_is_drawn(given, tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "a.svg"]
    result = run("break-even", *given, *GIVEN, "--plot", paths[0], "--plot", paths[1])
    assert (result.exit_code, result.stderr) == (0, "")
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in paths[1].read_text(encoding="utf-8")


def test_a_plot_that_cannot_be_is_refused_before_anything_is_printed(tmp_path, monkeypatch):
    ask = ("break-even", "--usd-per-hour", 1, *GIVEN, "--plot")
    for path, said in (
        (tmp_path / "a.pdf", "expected a name that"),
        (tmp_path / "no/a.png", "can"),
    ):
        result = run(*ask, path)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert said in result.stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in run(*ask, tmp_path / "a.png").stderr
