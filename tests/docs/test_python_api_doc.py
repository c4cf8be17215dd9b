"""The page on the Python API has every public name, and its examples run as they stand."""

import re
import textwrap

import pytest

import vllm_cost_meter
from tests.support.pages import DOCS, names, section
from tests.support.small_ledger import small_ledger
from vllm_cost_meter import economics
from vllm_cost_meter.economics.calculators import CALCULATORS
from vllm_cost_meter.ledger.reader import LedgerReader
from vllm_cost_meter.reports.grammar import Words

PAGE = DOCS / "reference" / "python-api.md"


def code(text: str) -> str:
    lines = re.findall(r"^    .*$|^$", text, re.MULTILINE)
    return textwrap.dedent("\n".join(lines)).strip()


@pytest.fixture
def ledger(tmp_path):
    with small_ledger(tmp_path) as reader:
        yield reader


def test_every_public_name_is_on_the_page_and_no_other():
    assert sorted(names(PAGE, "Names")) == sorted(vllm_cost_meter.__all__)


def test_the_first_example_prints_the_tenants(tmp_path, monkeypatch, capsys):
    (tmp_path / "vllm-cost-meter").mkdir()
    small_ledger(tmp_path / "vllm-cost-meter").close()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    exec(code(PAGE.read_text().partition("## Names")[0]), {})
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == "search 300 0.000000001"


def test_the_questions_on_the_page_have_answers(ledger):
    asked = code(section(PAGE, "Asking a ledger")).splitlines()
    for line in asked:
        assert eval(line, {"ledger": ledger}), line
    methods = names(PAGE, "Asking a ledger")
    assert {line.partition(".")[2].partition("(")[0] for line in asked} <= set(methods)
    assert [name for name in methods if not callable(getattr(LedgerReader, name))] == []


def test_the_words_of_a_report_are_those_of_the_code():
    words = section(PAGE, "Asking a ledger").partition("all of them optional:")[2]
    assert set(re.findall("`([a-z]+)`", words.partition(".")[0])) == Words.__annotations__.keys()


def test_every_calculator_is_a_function_that_the_page_names():
    assert names(PAGE, "Economics") == [function.__name__ for function in CALCULATORS.values()]
    assert all(hasattr(economics, name) for name in names(PAGE, "Economics"))


def test_the_example_of_a_calculator_can_be_run():
    [call] = re.findall(r"^    (c_eff\(.*)$", section(PAGE, "Economics"), re.MULTILINE)
    assert eval(call, vars(economics)) > 0
