"""The pages on economics have every figure, calculator, unit, input, result and formula."""

import inspect
import re
import typing
from dataclasses import fields

import pytest

from tests.support.pages import DOCS, names, section, table_rows
from vllm_cost_meter.economics import Point
from vllm_cost_meter.economics.calculators import CALCULATORS, INPUTS
from vllm_cost_meter.economics.comparison import FORMULA
from vllm_cost_meter.endpoint.compare import MEMORY_BYTES_MAX, TIMEOUT_S
from vllm_cost_meter.ledger.economics.figures import FIGURES

PAGE = DOCS / "reference" / "economics.md"
COMPARE = (DOCS / "howto" / "compare-with-apis.md").read_text()


def row(name: str, of: str) -> list[str]:
    found = re.search(rf"^\| {of} \| (.*) \|$", section(PAGE, name), re.MULTILINE)
    assert found, f"{name} has no row {of}"
    return re.findall("`(.*?)`", found[1])


def test_every_calculator_is_documented_and_no_other():
    headings = re.findall(r"^### (.*)$", section(PAGE, "Calculators"), re.MULTILINE)
    assert headings == list(CALCULATORS)


@pytest.mark.parametrize("name", CALCULATORS)
def test_inputs_results_and_formula_are_those_of_the_function(name):
    function = CALCULATORS[name]
    result = typing.get_type_hints(function)["return"]
    assert sorted(row(name, "Inputs")) == sorted(inspect.signature(function).parameters)
    assert row(name, "Results") == [each.name for each in fields(result)]
    formula = " ".join(
        line.strip() for line in section(PAGE, name).splitlines() if line.startswith("    ")
    )
    assert formula == result.FORMULA


def test_the_formula_of_a_comparison_is_that_of_the_code():
    assert FORMULA in " ".join(COMPARE.split())


def test_the_bounds_of_a_comparison_are_those_of_the_code():
    said = " ".join(COMPARE.split())
    assert f"within {TIMEOUT_S:.0f} s and {MEMORY_BYTES_MAX // 2**30} GiB" in said


def test_every_input_is_explained_and_no_other():
    assert [cells[0].strip("`") for cells in table_rows(section(PAGE, "Inputs"))] == list(INPUTS)


def test_the_fields_of_a_point_are_documented():
    assert names(PAGE, "Curves") == [each.name for each in fields(Point)]


def test_every_figure_is_documented_with_its_unit_and_meaning_and_no_other():
    assert [
        (cells[0].strip("`"), cells[1], cells[2]) for cells in table_rows(section(PAGE, "Figures"))
    ] == [(name, figure.unit, figure.meaning) for name, figure in FIGURES.items()]
