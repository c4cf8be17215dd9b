"""The pages on the ledger have every table and column, nothing else, and the code's numbers."""

import re
from inspect import signature

import pytest

from tests.support.pages import DOCS, names, section
from vllm_cost_meter.api_server.applying.process import PAUSE_S
from vllm_cost_meter.cli.commands import whole
from vllm_cost_meter.journal.segments import SEGMENT_BYTES
from vllm_cost_meter.journal.writer import JournalWriter
from vllm_cost_meter.ledger.database import default_url
from vllm_cost_meter.ledger.schema import SCHEMA_VERSION, metadata
from vllm_cost_meter.ledger.tables.replies import TOLD, replies

PAGE = DOCS / "reference" / "ledger-schema.md"
EXPLANATION = DOCS / "explanation" / "ledger.md"


@pytest.mark.parametrize("table", metadata.sorted_tables, ids=lambda table: table.name)
def test_every_column_is_documented_in_order_and_no_other(table):
    assert names(PAGE, table.name) == table.c.keys()


def test_every_table_is_documented_and_no_other():
    headings = [
        line.removeprefix("### ")
        for line in section(PAGE, "Tables").splitlines()
        if line.startswith("### ")
    ]
    assert sorted(headings) == sorted([*metadata.tables, replies.name])


def test_what_a_client_was_told_is_the_sum_of_the_numbers_on_the_page():
    (line,) = [line for line in PAGE.read_text().splitlines() if line.startswith("| `reply_told`")]
    assert re.findall(r"(\d+) for `(\w+)`", line) == [(str(n), name) for name, n in TOLD.items()]


def test_every_command_for_a_ledgers_file_has_its_section():
    page = DOCS / "howto" / "look-after-the-ledger.md"
    told = re.findall(r"^\| \[`(\w+)`\]", section(page, "Look after the ledger"), re.MULTILINE)
    assert sorted(told) == sorted(whole().commands["ledger"].commands)


def test_the_numbers_are_those_of_the_code(monkeypatch):
    text = EXPLANATION.read_text()
    writer = signature(JournalWriter).parameters
    assert f"at most {PAUSE_S:g} s later" in text
    assert (
        f"A segment is {SEGMENT_BYTES >> 20} MiB" in (DOCS / "reference" / "journal.md").read_text()
    )
    assert f"up to {writer['max_records'].default:,} per API server" in text
    assert f"schema version {SCHEMA_VERSION}" in PAGE.read_text()
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert default_url() == "sqlite:////home/me/.local/state/vllm-cost-meter/ledger.db"
    assert "`~/.local/state/vllm-cost-meter/ledger.db`" in text
