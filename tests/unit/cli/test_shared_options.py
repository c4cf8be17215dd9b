"""Options that several commands have mean the same on each, and no command lacks one."""

import io
from contextlib import redirect_stdout
from typing import Any

import pytest

from tests.unit.cli.test_command_line import EACH, LEAVES
from vllm_cost_meter.cli.commands import COMMANDS, whole
from vllm_cost_meter.units.calendar import EXPECTED as WINDOWS

# How the help of each begins, and the metavar that says its type.
HELP = {
    "--config": "The settings file; otherwise",
    "--ledger": "The ledger: a SQLite file, or a SQLAlchemy URL; otherwise",
    "--json": "Print one JSON object.",
    "--csv": "Print CSV.",
    "--output": "A file to write, or write anew.",
    "--tz": "Time zone of days, such as Europe/Berlin; otherwise UTC.",
    "--window": WINDOWS,
    "--wide": "Show all columns, uncut.",
}
CALCULATORS = {words for words in LEAVES if words[0] == "calc"}
# They print several tables of different columns, and CSV has one. JSON has all of them.
SEVERAL_TABLES = {("prices",), ("break-even",), ("validate",), *CALCULATORS}
# They print sentences, and no table.
SENTENCES = (
    {("explain",), ("audit",), ("doctor",), ("saturation", "import")}
    | {("fleet", "settings", "show")}
    | {words for words in LEAVES if words[0] == "ledger"}
)
# They say in one line what they changed, or start a server and tell its story.
NO_ANSWER = {("tenants", "add"), ("tenants", "set"), ("tenants", "remove")} | {
    *(("fleet", "settings", name) for name in ("push", "set", "end", "restart")),
    ("demo",),
    ("server",),  # it answers over HTTP
    ("gpu-check",),  # a page and JSON, in its folder
    *(("fleet", "migrate"), ("fleet", "tidy")),
}
# It writes a folder: curves, which are its JSON, and a plot.
FOLDER = {("sweep",)}
# The formulas take the reader's own numbers, a simulation its own traffic; the demo and the check
# of a GPU have their own folder.
NO_SETTINGS = {("validate",), ("demo",), ("gpu-check",), *CALCULATORS}
# The settings alone say it, or the fleet's database does, which `--fleet` names.
OF_NO_LEDGER = ("tenants", "prices", "break-even", "fleet")
NO_LEDGER = {words for words in LEAVES if words[0] in OF_NO_LEDGER}
# Its days are those of providers, whose bills are by the UTC day.
UTC_ONLY = {("invoice", "days")}


def options(words: tuple[str, ...]) -> dict[str, Any]:
    return {name: one for one in LEAVES[words].params for name in one.opts}


def commands_with(name: str) -> set[tuple[str, ...]]:
    return {words for words in LEAVES if name in options(words)}


@pytest.mark.parametrize("name", HELP)
def test_an_option_has_one_type_and_one_meaning(name: str) -> None:
    found = [options(words)[name] for words in commands_with(name)]
    assert found
    assert all(one.help.startswith(HELP[name]) for one in found)
    assert len({str(one.type_descriptor.annotation) for one in found}) == 1
    assert len({(one.is_flag, one.multiple, one.required) for one in found}) == 1
    assert len({tuple(one.opts) for one in found}) == 1


def test_every_command_that_answers_has_json() -> None:
    assert set(LEAVES) - commands_with("--json") == NO_ANSWER


def test_every_command_of_one_table_has_csv_and_a_file_to_write() -> None:
    tables = set(LEAVES) - NO_ANSWER - SENTENCES - SEVERAL_TABLES
    assert commands_with("--csv") == tables
    assert commands_with("--output") == tables - FOLDER


def test_every_table_can_be_shown_whole() -> None:
    assert commands_with("--wide") == set(LEAVES) - NO_ANSWER - SENTENCES


def test_every_command_that_reads_settings_or_the_ledger_can_be_told_which() -> None:
    assert commands_with("--config") == set(LEAVES) - NO_SETTINGS
    assert commands_with("--ledger") == set(LEAVES) - NO_SETTINGS - NO_LEDGER


def test_a_window_follows_a_time_zone_where_days_do() -> None:
    windows = {("report",), ("economics",), ("compare",), ("invoice", "days")}
    assert commands_with("--window") == windows
    assert commands_with("--tz") == windows - UTC_ONLY | {("statement",)}


@EACH
def test_no_short_option_means_two_things(words: tuple[str, ...]) -> None:
    short = {name for name in options(words) if len(name) == 2 and name.startswith("-")}
    assert short <= {"-o"}


@pytest.mark.parametrize(
    "name", [name for name, one in COMMANDS.items() if one.place.endswith(":app")]
)
def test_a_group_lists_its_commands_with_whole_sentences(name: str) -> None:
    with redirect_stdout(io.StringIO()) as shown:
        whole().commands[name].main(["--help"], standalone_mode=False)
    assert "..." not in shown.getvalue().replace("[ARGS]...", "")
    assert max(map(len, shown.getvalue().splitlines())) <= 80
