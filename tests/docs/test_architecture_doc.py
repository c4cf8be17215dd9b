"""The page on the architecture draws the house as it stands; CONTRIBUTING begins where it says."""

import re

from tests.contract.test_laws import FLOORS
from tests.support.pages import DOCS, ROOT, section

PAGE = DOCS / "explanation" / "architecture.md"
PACKAGE = ROOT / "vllm_cost_meter"


def test_every_room_stands_on_its_floor():
    shown = re.findall(r"^\| (\d) \| `(\w+)` \|", section(PAGE, "The house"), re.MULTILINE)
    rooms = [(str(floor), room) for floor, on_it in FLOORS.items() for room in sorted(on_it)]
    assert shown == rooms


def test_each_room_is_said_in_one_line():
    rows = re.findall(r"^\| \d \| `\w+` \| (.*) \|$", section(PAGE, "The house"), re.MULTILINE)
    assert rows
    assert all(0 < len(row) <= 100 for row in rows)


def test_what_one_looks_for_is_found_on_the_page():
    asked = re.findall(r"^\| (Where is .*?|What may .*?)\?", section(PAGE, "Where is it?"), re.M)
    assert {
        "Where is a step measured",
        "Where is a step split",
        "Where is a tenant found",
        "Where is money rounded",
        "What may import what",
    } <= set(asked)


def test_contributing_begins_with_the_reading_order_of_the_architecture():
    contributing = ROOT / "CONTRIBUTING.md"
    first = re.search(r"^## (.*)$", contributing.read_text(), re.MULTILINE)[1]
    steps = [
        re.findall(r"^\d\. .*$", section(page, "Where to begin"), re.MULTILINE)
        for page in (contributing, PAGE)
    ]
    assert first == "Where to begin"
    assert steps[0] == steps[1] != []
