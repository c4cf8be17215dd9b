"""The page on the Python API has every calculator as a function, and its example is right."""

import re

from tests.docs.pages import DOCS, names, section
from vllm_cost_meter import economics
from vllm_cost_meter.economics.calculators import CALCULATORS

PAGE = DOCS / "reference" / "python-api.md"


def test_every_calculator_is_a_function_that_the_page_names():
    assert names(PAGE, "Economics") == [function.__name__ for function in CALCULATORS.values()]
    assert all(hasattr(economics, name) for name in names(PAGE, "Economics"))


def test_the_example_can_be_run():
    [call] = re.findall(r"^    (c_eff\(.*)$", section(PAGE, "Economics"), re.MULTILINE)
    assert eval(call, vars(economics)) > 0
